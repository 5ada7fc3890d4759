"""Maps of detections: what the model goes on with, the same in any batch, and those of models that have less.

Legend: B images, H heads, K keys, Q queries, n detections.
"""

import numpy as np
import pytest
import torch
from torch import nn

from detrlib.config import load_config
from detrlib.config.huggingface import KINDS
from detrlib.errors import ModelError
from detrlib.experiments.attribution import BACKWARD, METHODS, ON_REQUEST, allowed_methods, explain, passes
from detrlib.experiments.propagation import Layers, relevance, rollout
from detrlib.models import build_model

TRANSFORMS = ("softmax", "sparsemax", "entmax15", "alpha_entmax", "tvmax")
SIZES, CANVAS = [(40, 64), (64, 48)], (64, 64)
QUERIES, LABELS = [torch.tensor([3, 0, 6]), torch.tensor([5])], [torch.tensor([1, 4, 0]), torch.tensor([2])]


def everywhere(transform):
    """Settings of a transform at all sites where it can stand."""
    sites = ("encoder_self", "decoder_self", "decoder_cross")
    return {site: transform for site in sites if (site, transform) != ("decoder_self", "tvmax")}


def of_one_image(sites):
    return Layers(*([weights[None] for weights in site] for site in sites))


def explained(model, images, padding, image, methods=None, seed=0, masks=20):
    """The detections of one image of a padded batch."""
    alone = slice(image, image + 1)
    return explain(model, images[alone], padding[alone], QUERIES[image], LABELS[image], methods, seed, masks)


class Shifted(nn.Module):
    """A transform whose weights are moved by `change`, as if the model had looked slightly elsewhere."""

    def __init__(self, transform, change):
        super().__init__()
        self.transform, self.change = transform, change

    def forward(self, *arguments):
        return self.transform(*arguments) + self.change


@pytest.mark.parametrize("site", ["encoder_self", "decoder_self", "decoder_cross"])
def test_maps_are_what_the_model_goes_on_with(site, small):
    """The gradient for a returned map is the difference that moving the weights themselves makes."""
    model = small(norm="pre", attention=everywhere("entmax15")).double()
    images, padding = (torch.randn(1, 3, 16, 24).double(), torch.zeros(1, 16, 24, dtype=torch.bool))
    part = model.transformer.encoder if site == "encoder_self" else model.transformer.decoder
    for number in range(len(part.layers)):
        predictions = model(images, padding, need_attention=True)
        weights = getattr(predictions.attention, site)[number]
        (gradient,) = torch.autograd.grad(predictions.logits[0, 2, 1], weights)
        attention = part.layers[number].multihead_attn if site == "decoder_cross" else part.layers[number].self_attn
        change, scores = 1e-6 * torch.randn_like(weights), []
        plain = attention.transform
        for sign in (1, -1):
            attention.transform = Shifted(plain, sign * change)
            with torch.no_grad():
                scores.append(model(images, padding, need_attention=True).logits[0, 2, 1].item())
        attention.transform = plain
        expected = (gradient * change).sum().item()
        assert abs(expected) > 1e-12
        assert (scores[0] - scores[1]) / 2 == pytest.approx(expected, rel=1e-4)


def test_models_with_signed_weights_and_registers_are_explained(padded_batch, small):
    """Signs are of no effect where magnitudes are taken, and what has gone through registers is counted."""
    model = small(attention={"gate": "head", "differential": True}, registers=2)
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    maps = explained(model, images, padding, 0, METHODS)
    assert tuple(maps) == METHODS
    alone = model(images[:1, :, : SIZES[0][0], : SIZES[0][1]], need_attention=True).attention
    assert (alone.decoder_cross[-1] < 0).any()
    raw = alone.decoder_cross[-1][0].abs().mean(0)
    h, w = (side // 8 for side in SIZES[0])
    for number, query in enumerate(QUERIES[0]):
        torch.testing.assert_close(maps["raw"][number, :h, :w].flatten(), raw[query], rtol=1e-3, atol=1e-5)
    for method, own in maps.items():
        assert (own >= 0).all() and own.isfinite().all() and own.any()
        assert method.startswith("odam") or own.flatten(1).any(1).all()


@pytest.mark.parametrize("queries", ["learned", "anchor"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_method_against_its_own_computation(transform, queries, padded_batch, small):
    model = small(attention=everywhere(transform), queries=queries)
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    for image, (height, width) in enumerate(SIZES):
        maps = explained(model, images, padding, image)
        assert tuple(maps) == tuple(name for name in METHODS if name not in ON_REQUEST)
        one = images[image : image + 1, :, :height, :width], padding[image : image + 1, :height, :width]
        h, w = height // 8, width // 8
        for number, (query, label) in enumerate(zip(QUERIES[image], LABELS[image], strict=True)):
            predictions = model(*one, need_attention=True)
            attention = predictions.attention
            sites = (attention.encoder_self, attention.decoder_self, attention.decoder_cross)
            mean = [[weights[0].mean(0).detach().double() for weights in site] for site in sites]
            score = predictions.logits[0, query, label]
            for site in sites:
                for weights in site:
                    weights.retain_grad()
            score.backward()
            weighted = [[(x.grad * x).detach().clamp(min=0)[0].double().mean(0) for x in site] for site in sites]
            expected = {
                "raw": mean[2][-1][query],
                "rollout": rollout(of_one_image(mean))[0, query],
                "grad_attention": weighted[2][-1][query],
                "relevance": relevance(of_one_image(weighted))[0, query],
            }
            for method, own in expected.items():
                assert own.max() > 0
                torch.testing.assert_close(
                    maps[method][number, :h, :w].flatten().double(),
                    own,
                    rtol=5e-3 if transform != "tvmax" else 2e-2,  # its patches join and part with the last digits
                    atol=(5e-4 if transform != "tvmax" else 1e-2) * own.max().item(),
                )


@pytest.mark.parametrize("settings", [{}, {"encoder_layers": 0, "norm": "pre", "queries": "anchor"}])
def test_maps_of_an_image_alone_are_those_in_a_padded_batch(settings, padded_batch, small):
    model = small(**settings)
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    for image, (height, width) in enumerate(SIZES):
        options = {"methods": METHODS, "seed": 8, "masks": 40}
        in_batch = explained(model, images, padding, image, **options)
        alone = explained(model, images[..., :height, :width], padding[..., :height, :width], image, **options)
        h, w = height // 8, width // 8
        for method in METHODS:
            maps, own = in_batch[method], alone[method]
            assert maps.shape == (len(QUERIES[image]), 8, 8) and own.shape == (len(QUERIES[image]), h, w)
            assert not maps.requires_grad and (maps >= 0).all() and own.any()
            assert method.startswith("odam") or own.flatten(1).any(1).all()  # all that adds to a score may be negative
            torch.testing.assert_close(maps[:, :h, :w], own, rtol=1e-2, atol=1e-3 * own.max().item())
            assert (maps[:, h:] == 0).all() and (maps[:, :, w:] == 0).all()


def test_models_that_favour_padding_are_explained_by_the_image_all_the_same(padded_batch, small):
    model = small(attention={"padding": "add_one"})
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    attention = model(images, padding, need_attention=True).attention
    assert attention.decoder_cross[-1][0, :, :, attention.key_padding[0]].min() > 0
    for method, maps in explained(model, images, padding, 0).items():
        assert (maps[:, 5:] == 0).all(), method


def test_boxes_cover_cells_by_their_share(padded_batch, small):
    model = small()
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    predictions = model(images, padding)
    for image, (height, width) in enumerate(SIZES):
        maps = explained(model, images, padding, image, ["box"])["box"]
        for number, query in enumerate(QUERIES[image]):
            cx, cy, w, h = predictions.boxes[image, query].tolist()
            edges = np.clip([cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2], 0, 1) * [width, width, height, height]
            x0, x1, y0, y1 = edges / 8
            for (row, column), share in np.ndenumerate(maps[number].numpy()):
                expected = max(0, min(x1, column + 1) - max(x0, column)) * max(0, min(y1, row + 1) - max(y0, row))
                assert share == pytest.approx(expected, abs=1e-5)


def test_images_without_detections_and_labels_that_matter(padded_batch, small):
    model = small()
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    none = torch.tensor([], dtype=torch.long)
    one = images[1:], padding[1:]
    for maps in explain(model, *one, none, none, METHODS, masks=2).values():
        assert maps.shape == (0, 8, 8)
    twice = explain(model, *one, torch.tensor([5, 5]), torch.tensor([2, 3]))
    for method, maps in twice.items():
        differ = not torch.equal(maps[0], maps[1])
        assert differ == (method in BACKWARD or method == "random"), method
    plain = explained(model, images, padding, 1, ["relevance"])["relevance"]
    torch.testing.assert_close(twice["relevance"][:1], plain)


@pytest.mark.parametrize("method", ["random", "drise"])
def test_noise_and_masks_have_a_seed(method, padded_batch, small):
    model = small()
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    one, same, other = (explained(model, images, padding, 0, [method], seed)[method] for seed in (1, 1, 3))
    assert torch.equal(one, same) and not torch.equal(one, other)


FAMILIES = {
    "deformable": {"architecture": "deformable", "classification": "sigmoid"},
    "sparse": {
        "architecture": "deformable",
        "classification": "sigmoid",
        "deformable": {"two_stage": True, "refine": True, "rho": 0.5},
    },
    "polling": {"polling": {"ratio": 0.5}},
} | {kind: kind for kind in KINDS}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_is_explained_alone_as_in_a_padded_batch(family, padded_batch, small, huggingface_settings):
    if isinstance(family, str):
        torch.manual_seed(0)
        model = build_model(load_config(overrides=huggingface_settings(family)).model).eval()
    else:
        model = small(**family)
    methods = [*allowed_methods(model), *ON_REQUEST]
    assert {"raw", "gradient", "odam", "drise", "box", "random"} <= set(methods)
    if isinstance(family, str):  # whose maps of single images, not those of a batch, are in the graph
        methods = [name for name in methods if name not in ("grad_attention", "relevance")]
    images, padding = padded_batch((64, 96), (40, 70), canvas=(64, 96))
    asked = QUERIES[0], LABELS[0], methods, 3, 10
    in_batch = explain(model, images[1:], padding[1:], *asked)
    alone = explain(model, images[1:, :, :40, :70], None, *asked)
    for method in methods:
        maps, own = in_batch[method].float(), alone[method].float()
        h, w = own.shape[1:]
        assert len(own) == 3 and (own >= 0).all() and own.any(), method
        torch.testing.assert_close(maps[:, :h, :w], own, rtol=2e-2, atol=5e-3 * own.max().item(), msg=method)
        assert (maps[:, h:] == 0).all() and (maps[:, :, w:] == 0).all(), method


def test_passes_are_counted_by_method():
    assert passes(["raw", "odam_box", "drise", "box"], images=2, detections=7, masks=30) == {
        "raw": {"forward": 2, "backward": 0},
        "odam_box": {"forward": 2, "backward": 35},
        "drise": {"forward": 60, "backward": 0},
        "box": {"forward": 0, "backward": 0},
    }


def test_deformable_models_are_explained_by_their_samples_only(padded_batch, small):
    model = small(architecture="deformable", classification="sigmoid")
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    maps = explained(model, images, padding, 0)
    assert tuple(maps) == ("raw", "gradient", "odam", "box", "random")
    attention = model(images, padding, need_attention=True).attention
    expected = attention.as_images("decoder_cross", -1).mean(1)[0, QUERIES[0]].detach()
    torch.testing.assert_close(maps["raw"][:, :5], expected[:, :5])
    assert (maps["raw"][:, 5:] == 0).all() and expected[:, 5:].any()  # locations sampled beyond the image
    with pytest.raises(ModelError, match="rollout, relevance: deformable attention samples locations"):
        explained(model, images, padding, 0, ["raw", "rollout", "relevance"])


def test_unknown_methods_and_frozen_models_are_refused(padded_batch, small):
    model = small()
    arguments = *padded_batch(*SIZES, canvas=CANVAS), 0
    with pytest.raises(ModelError, match="unknown explanation lime; there are raw, rollout"):
        explained(model, *arguments, ["raw", "lime"])
    methods = [name for name in METHODS if name not in ("grad_attention", "relevance")]
    expected = explained(model, *arguments, methods)
    model.requires_grad_(False)
    for method, maps in explained(model, *arguments, methods).items():
        torch.testing.assert_close(maps, expected[method], msg=method)
    with pytest.raises(ModelError, match="requires_grad_"):
        explained(model, *arguments, ["relevance"])


def test_maps_of_polled_cells_are_free_of_gradients(padded_batch, small):
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    maps = explained(small(polling={"ratio": 0.5}), images, padding, 0, METHODS)
    assert set(maps) == set(METHODS) and not any(own.requires_grad for own in maps.values())
