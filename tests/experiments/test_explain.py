"""Explanations against computations of their own kind: loops over layers and cells, finite differences, a joint matrix.

Legend: B images, H heads, K keys, Q queries, n detections.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from small import padded_batch, small
from test_detr import everywhere
from tiny import tiny_config
from torch import nn

from detrlib.engine.launch import launch
from detrlib.errors import ModelError, RunError
from detrlib.experiments.explain import METHODS, explain, faithfulness_run
from detrlib.experiments.propagation import Layers, relevance, rollout

TRANSFORMS = ("softmax", "sparsemax", "entmax15", "alpha_entmax", "tvmax")
SIZES, CANVAS = [(40, 64), (64, 48)], (64, 64)
QUERIES, LABELS = [torch.tensor([3, 0, 6]), torch.tensor([5])], [torch.tensor([1, 4, 0]), torch.tensor([2])]


def random_layers(encoder=2, decoder=3, images=2, queries=4, keys=6, sparse=False):
    """Rows of float64 that sum to one, some of them with zeros."""
    generator = torch.Generator().manual_seed(0)

    def maps(count, *shape):
        found = [torch.rand(images, *shape, generator=generator, dtype=torch.float64) for _ in range(count)]
        found = [(one - 0.6 * sparse).clamp(min=0) + 1e-300 for one in found]
        return [one / one.sum(-1, keepdim=True) for one in found]

    return Layers(maps(encoder, keys, keys), maps(decoder, queries, queries), maps(decoder, queries, keys))


def relevance_by_loops(encoder_self, decoder_self, decoder_cross):
    """Chefer, Gur & Wolf 2021, Eq. 6 to 10, of one image, entry by entry: -> [Q,K]."""
    queries, keys = decoder_cross[0].shape

    def product(a, b):
        return [[sum(a[i][m] * b[m][j] for m in range(len(b))) for j in range(len(b[0]))] for i in range(len(a))]

    def added(a, b):
        return [[x + y for x, y in zip(u, v, strict=True)] for u, v in zip(a, b, strict=True)]

    def normalised(matrix):
        rows = []
        for i, row in enumerate(matrix):
            rest = [value - (i == j) for j, value in enumerate(row)]
            total = sum(rest)
            rows.append([(value / total if total else 0.0) + (i == j) for j, value in enumerate(rest)])
        return rows

    r_ii = [[float(i == j) for j in range(keys)] for i in range(keys)]
    r_qq = [[float(i == j) for j in range(queries)] for i in range(queries)]
    r_qi = [[0.0] * keys for _ in range(queries)]
    for a in encoder_self:
        r_ii = added(r_ii, product(a.tolist(), r_ii))
    for own, cross in zip(decoder_self, decoder_cross, strict=True):
        old = r_qq, r_qi
        r_qq, r_qi = (added(one, product(own.tolist(), one)) for one in old)
        transposed = [list(column) for column in zip(*normalised(r_qq), strict=True)]
        r_qi = added(r_qi, product(product(transposed, cross.tolist()), normalised(r_ii)))
    return torch.tensor(r_qi, dtype=torch.float64)


def rollout_of_one_sequence(encoder_self, decoder_self, decoder_cross):
    """Products of (I + A) / 2 over one sequence, queries before cells; what attends to nothing keeps all of itself."""
    queries, keys = decoder_cross[0].shape
    found = torch.eye(queries + keys, dtype=torch.float64)

    def step(first, last, sources, attention):
        matrix = torch.eye(queries + keys, dtype=torch.float64)
        matrix[first:last, first:last] /= 2
        matrix[first:last, sources] += attention.double() / 2
        return matrix

    cells, own = slice(queries, queries + keys), slice(0, queries)
    for a in encoder_self:
        found = step(queries, queries + keys, cells, a) @ found
    for a, cross in zip(decoder_self, decoder_cross, strict=True):
        found = step(0, queries, cells, cross) @ step(0, queries, own, a) @ found
    return found[:queries, queries:], found[:queries]


# Propagation


@pytest.mark.parametrize("encoder", [0, 2])
@pytest.mark.parametrize("sparse", [False, True])
def test_relevance_against_loops(encoder, sparse):
    layers = random_layers(encoder, sparse=sparse)
    found = relevance(layers)
    for image in range(2):
        expected = relevance_by_loops(*([one[image] for one in site] for site in layers))
        torch.testing.assert_close(found[image], expected, rtol=1e-12, atol=1e-14)


def test_relevance_of_rows_without_gradient_is_nothing_and_finite():
    layers = Layers(*([torch.zeros_like(one) for one in site] for site in random_layers()))
    assert (relevance(layers) == 0).all()


def test_relevance_of_one_layer_is_its_weighted_attention():
    layers = random_layers(encoder=0, decoder=1)
    layers = layers._replace(decoder_self=[torch.zeros(2, 4, 4, dtype=torch.float64)])
    torch.testing.assert_close(relevance(layers), layers.decoder_cross[0])


@pytest.mark.parametrize("encoder", [0, 2])
def test_rollout_against_one_sequence(encoder):
    layers = random_layers(encoder)
    found = rollout(layers)
    for image in range(2):
        expected, everything = rollout_of_one_sequence(*([one[image] for one in site] for site in layers))
        torch.testing.assert_close(found[image], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(everything.sum(-1), torch.ones(4, dtype=torch.float64))


# Maps of models


class Shifted(nn.Module):
    """A transform whose weights are moved by `change`, as if the model had looked slightly elsewhere."""

    def __init__(self, transform, change):
        super().__init__()
        self.transform, self.change = transform, change

    def forward(self, *arguments):
        return self.transform(*arguments) + self.change


@pytest.mark.parametrize("site", ["encoder_self", "decoder_self", "decoder_cross"])
def test_maps_are_what_the_model_goes_on_with(site):
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


@pytest.mark.parametrize("queries", ["learned", "anchor"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_method_against_its_own_computation(transform, queries):
    model = small(attention=everywhere(transform), queries=queries)
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    found = explain(model, images, padding, QUERIES, LABELS)
    assert tuple(found) == METHODS
    for image, (height, width) in enumerate(SIZES):
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
                "rollout": rollout_of_one_sequence(*mean)[0][query],
                "grad_attention": weighted[2][-1][query],
                "relevance": relevance_by_matrices(weighted)[query],
            }
            for method, own in expected.items():
                assert own.max() > 0
                torch.testing.assert_close(
                    found[method][image][number, :h, :w].flatten().double(),
                    own,
                    rtol=5e-3 if transform != "tvmax" else 2e-2,  # its patches join and part with the last digits
                    atol=(5e-4 if transform != "tvmax" else 1e-2) * own.max().item(),
                )


def relevance_by_matrices(weighted):
    """The loops above, of one image, through numpy: cells are too many for entries."""
    encoder, decoder, cross = ([one.numpy() for one in site] for site in weighted)
    queries, keys = cross[0].shape

    def normalised(matrix):
        rest = matrix - np.eye(len(matrix))
        total = rest.sum(1, keepdims=True)
        return np.divide(rest, total, out=np.zeros_like(rest), where=total > 0) + np.eye(len(matrix))

    r_ii, r_qq, r_qi = np.eye(keys), np.eye(queries), np.zeros((queries, keys))
    for a in encoder:
        r_ii = r_ii + a @ r_ii
    for a, c in zip(decoder, cross, strict=True):
        r_qi, r_qq = r_qi + a @ r_qi, r_qq + a @ r_qq
        r_qi = r_qi + normalised(r_qq).T @ c @ normalised(r_ii)
    return torch.from_numpy(r_qi)


@pytest.mark.parametrize("settings", [{}, {"encoder_layers": 0, "norm": "pre", "queries": "anchor"}])
def test_maps_of_an_image_alone_are_those_in_a_padded_batch(settings):
    model = small(**settings)
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    together = explain(model, images, padding, QUERIES, LABELS, seeds=[8, 9])
    for image, (height, width) in enumerate(SIZES):
        alone = explain(
            model,
            images[image : image + 1, :, :height, :width],
            padding[image : image + 1, :height, :width],
            [QUERIES[image]],
            [LABELS[image]],
            seeds=[8 + image],
        )
        h, w = height // 8, width // 8
        for method in METHODS:
            maps, (own,) = together[method][image], alone[method]
            assert maps.shape == (len(QUERIES[image]), 8, 8) and own.shape == (len(QUERIES[image]), h, w)
            assert not maps.requires_grad and (maps >= 0).all() and (own.flatten(1).sum(1) > 0).all()
            torch.testing.assert_close(maps[:, :h, :w], own, rtol=1e-2, atol=1e-3 * own.max().item())
            assert (maps[:, h:] == 0).all() and (maps[:, :, w:] == 0).all()


def test_models_that_favour_padding_are_explained_by_the_image_all_the_same():
    model = small(attention={"padding": "add_one"})
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    attention = model(images, padding, need_attention=True).attention
    assert attention.decoder_cross[-1][0, :, :, attention.key_padding[0]].min() > 0
    for method, (first, _) in explain(model, images, padding, QUERIES, LABELS).items():
        assert (first[:, 5:] == 0).all(), method


def test_boxes_cover_cells_by_their_share():
    model = small()
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    found = explain(model, images, padding, QUERIES, LABELS, ["box"])
    predictions = model(images, padding)
    for image, (height, width) in enumerate(SIZES):
        for number, query in enumerate(QUERIES[image]):
            cx, cy, w, h = predictions.boxes[image, query].tolist()
            edges = np.clip([cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2], 0, 1) * [width, width, height, height]
            x0, x1, y0, y1 = edges / 8
            for (row, column), share in np.ndenumerate(found["box"][image][number].numpy()):
                expected = max(0, min(x1, column + 1) - max(x0, column)) * max(0, min(y1, row + 1) - max(y0, row))
                assert share == pytest.approx(expected, abs=1e-5)


def test_images_without_detections_and_labels_that_matter():
    model = small()
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    none = torch.tensor([], dtype=torch.long)
    for maps in explain(model, images, padding, [none, none], [none, none]).values():
        assert [own.shape for own in maps] == [(0, 8, 8)] * 2
    twice = [none, torch.tensor([5, 5])], [none, torch.tensor([2, 3])]
    for method, (first, second) in explain(model, images, padding, *twice).items():
        assert len(first) == 0
        differ = not torch.equal(second[0], second[1])
        assert differ == (method in ("grad_attention", "relevance", "random")), method
    plain = explain(model, images, padding, QUERIES, LABELS, ["relevance"])["relevance"][1]
    torch.testing.assert_close(explain(model, images, padding, *twice)["relevance"][1][:1], plain)


def test_noise_has_a_seed():
    model = small()
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    one, same, other = (
        explain(model, images, padding, QUERIES, LABELS, ["random"], seeds)["random"]
        for seeds in ([1, 2], [1, 2], [3, 2])
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


# Refusals


def test_deformable_models_are_explained_by_their_samples_only():
    model = small(architecture="deformable", classification="sigmoid")
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    found = explain(model, images, padding, QUERIES, LABELS)
    assert tuple(found) == ("raw", "box", "random")
    attention = model(images, padding, need_attention=True).attention
    expected = attention.as_images("decoder_cross", -1).mean(1)[0, QUERIES[0]].detach()
    torch.testing.assert_close(found["raw"][0][:, :5], expected[:, :5])
    assert (found["raw"][0][:, 5:] == 0).all() and expected[:, 5:].any()  # places sampled beyond the image
    with pytest.raises(ModelError, match="rollout, relevance: deformable attention samples places"):
        explain(model, images, padding, QUERIES, LABELS, ["raw", "rollout", "relevance"])


def test_unknown_methods_and_frozen_models_are_refused():
    model = small()
    arguments = *padded_batch(*SIZES, canvas=CANVAS), QUERIES, LABELS
    with pytest.raises(ModelError, match="unknown explanation lime; there are raw, rollout"):
        explain(model, *arguments, ["raw", "lime"])
    model.requires_grad_(False)
    explain(model, *arguments, ["raw", "rollout"])
    with pytest.raises(ModelError, match="requires_grad_"):
        explain(model, *arguments, ["relevance"])


# Runs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    launch(tiny_config({"train.epochs": 1}), folder, gpus=0)
    return folder


def test_a_run_is_measured_and_remembers_how(run_dir):
    settings = {"images": 3, "steps": 3, "min_score": 0.0}
    frame = faithfulness_run(run_dir, methods=["raw", "relevance", "random"], **settings)
    pd.testing.assert_frame_equal(pd.read_parquet(run_dir / "measures" / "faithfulness.parquet"), frame)
    detections = frame[["image_id", "query"]].drop_duplicates()
    assert len(frame) == 3 * len(detections) and frame["image_id"].nunique() == 3
    assert set(frame["size"]) <= {"small", "medium", "large"} and frame["category"].notna().all()
    curves = pd.read_parquet(run_dir / "measures" / "faithfulness_curves.parquet")
    assert len(curves) == 3 * 2 * 3 * 4
    known = json.loads((run_dir / "measures" / "faithfulness.json").read_text())
    assert known["passes"] == 3 * 2 + len(frame) * 2 * 2 and known["detections"] == len(detections)
    # The mean curve of a method has the area that its detections have on average, image by image.
    for method, own in frame.groupby("method"):
        chosen = (curves["method"] == method) & (curves["direction"] == "deletion") & (curves["measure"] == "score")
        area = np.trapezoid(curves[chosen]["mean"], curves[chosen]["fraction"])
        assert area == pytest.approx(own.groupby("image_id")["deletion_score"].mean().mean(), abs=1e-6)


def test_all_queries_are_explained_as_their_best_class(run_dir):
    frame = faithfulness_run(run_dir, 1, ["box"], 2, min_score=0.0, matched=False)
    assert sorted(frame["query"]) == list(range(10))


def test_runs_that_cannot_be_measured_are_refused(run_dir, tmp_path):
    with pytest.raises(RunError, match=r"no detection with a score of 1.1 in 2 images; lower min_score"):
        faithfulness_run(run_dir, 2, min_score=1.1)
    with pytest.raises(ModelError, match="one image and two steps at least"):
        faithfulness_run(run_dir, 2, steps=1)
    with pytest.raises(RunError, match=r"results\.json"):
        faithfulness_run(tmp_path / "none", 2)
