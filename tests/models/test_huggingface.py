"""Detectors of transformers behind the interface of this library: the same numbers, no padding, maps that add up."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from detrlib.attention.deformable import sample_and_mix
from detrlib.attention.multihead import merge_heads
from detrlib.config import load_config
from detrlib.config.huggingface import KINDS, POINTS, SQUARE
from detrlib.data.augment import MEAN, STD
from detrlib.errors import ConfigError, ModelError
from detrlib.losses import Criterion
from detrlib.models import alpha_modules, build_model
from detrlib.models.outputs import SampledMaps, site_of

SITES = ("encoder_self", "decoder_self", "decoder_cross")


@pytest.fixture(scope="module")
def detector(huggingface_settings):
    def detector(kind: str, points: int | list[int] = 4, own_options: dict | None = None, **settings) -> nn.Module:
        """One whose attention and boxes differ from query to query."""
        torch.manual_seed(0)
        overrides = huggingface_settings(kind, **settings)
        if kind in POINTS:
            overrides["model"]["options"]["decoder_n_points"] = points
        overrides["model"]["options"] |= own_options or {}
        model = build_model(load_config(overrides=overrides).model).eval()
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0, 0.2)
        return model

    return detector


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_boxes_are_those_of_transformers(detector, kind):
    model, images = detector(kind), torch.randn(2, 3, 64, 64)
    pixels = images
    if kind in SQUARE:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        images = (pixels - mean) / std
    with torch.no_grad():
        found, theirs = model(images), model.model(pixel_values=pixels)
    torch.testing.assert_close(found.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.boxes, theirs.pred_boxes, rtol=1e-4, atol=1e-4)
    assert found.classification == ("softmax" if kind == "detr" else "sigmoid")
    assert found.logits.shape[-1] == 5 + (kind == "detr")


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_alone_is_as_in_a_padded_batch_and_so_are_its_maps(detector, padded_batch, kind):
    model = detector(kind)
    sizes = (64, 96), (40, 70)
    images, padding = padded_batch(*sizes, canvas=(64, 96))
    with torch.no_grad():
        together = model(images, padding, need_attention=True)
        for number, (height, width) in enumerate(sizes):
            alone = model(images[number : number + 1, :, :height, :width], None, need_attention=True)
            torch.testing.assert_close(together.logits[number], alone.logits[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(together.boxes[number], alone.boxes[0], rtol=1e-3, atol=1e-4)
            rows, columns = together.attention.valid_grid(number)
            assert (rows, columns) == alone.attention.grid
            maps = together.attention.as_images("decoder_cross", -1)[number, ..., :rows, :columns]
            torch.testing.assert_close(maps, alone.attention.as_images("decoder_cross", -1)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_maps_sum_to_one_where_keys_are_scored(detector, padded_batch, kind):
    images, padding = padded_batch((64, 96), (40, 70), canvas=(64, 96))
    with torch.no_grad():
        maps = detector(kind)(images, padding, need_attention=True).attention
    for site in SITES:
        layers = getattr(maps, site)
        assert isinstance(layers, SampledMaps) == (site in POINTS.get(kind, ()))
        assert len(layers) == (1 if kind in SQUARE and site == "encoder_self" else 2)
        total = layers[0].sum(-1)
        if isinstance(layers, SampledMaps):
            assert total.max() <= 1 + 1e-5
            locations = layers.sampling_locations(0)
            assert locations.shape[-1] == 2 and locations.shape[3] == 3
        elif site != "encoder_self":
            torch.testing.assert_close(total, torch.ones_like(total))
        else:  # padded cells do not ask
            assert set(total.round(decimals=4).unique().tolist()) <= {0.0, 1.0}
        assert (site in maps.values) == (not isinstance(layers, SampledMaps))
    only = detector(kind)(images, padding, need_attention=("decoder_self",)).attention
    assert only.decoder_cross[0] is None if kind not in POINTS else True
    assert only.decoder_self[0] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_that_the_maps_mix(detector, kind):
    """What the layers project in the end is the weights times the values that are returned."""
    model, mixed = detector(kind), {}
    for path, module in model.model.named_modules():
        before, _, name = path.rpartition(".")
        if (site := site_of(before)) and name in ("o_proj", "out_proj", "output_proj"):
            module.register_forward_pre_hook(lambda _, inputs, site=site: mixed.setdefault(site, []).append(inputs[0]))
    with torch.no_grad():
        maps = model(torch.randn(2, 3, 64, 64), need_attention=True).attention
    assert "decoder_self" in maps.values
    for site, layers in maps.values.items():
        for weights, values, expected in zip(getattr(maps, site), layers, mixed[site], strict=True):
            torch.testing.assert_close(merge_heads(weights @ values), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["rt_detr", "rt_detr_v2", "d_fine"])
def test_points_are_where_transformers_looks(detector, kind):
    """Values mixed at the points that are returned are what the layer mixes; levels may have different numbers."""
    model = detector(kind, points=[3, 6, 3] if kind == "d_fine" else 4)
    layer = model.model.model.decoder.layers[0].encoder_attn
    shapes = [(8, 8), (4, 4), (2, 2)]
    tokens, queries = torch.randn(2, 84, 32), torch.randn(2, 5, 32)
    points = torch.rand(2, 5, 1, 4) * 0.5 + 0.2
    given = {"encoder_hidden_states": tokens, "reference_points": points, "spatial_shapes_list": shapes}
    given["spatial_shapes"] = torch.tensor(shapes)
    given["level_start_index"] = torch.tensor([0, 64, 80])
    with torch.no_grad():
        output, samples = layer(hidden_states=queries, **given)
        values = layer.value_proj(tokens) if hasattr(layer, "value_proj") else tokens
        mixed = sample_and_mix(values.unflatten(-1, (4, -1)), shapes, *samples)
        mixed = layer.output_proj(mixed) if hasattr(layer, "output_proj") else mixed
    torch.testing.assert_close(mixed, output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["detr", "deformable_detr", "rt_detr_v2", "d_fine"])
def test_our_losses_teach_every_layer(detector, kind):
    model = detector(
        kind,
        attention={"decoder_self": "alpha_entmax", "encoder_self": "entmax15"}
        if kind != "deformable_detr"
        else {"decoder_self": "alpha_entmax"},
    ).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    target = {"labels": torch.tensor([1, 3]), "boxes": torch.rand(2, 4) * 0.3 + 0.2}
    predictions = model(torch.randn(2, 3, 64, 64))
    loss, terms = Criterion()(predictions, [target, target])
    loss.backward()
    optimizer.step()
    assert "loss_bbox_0" in terms
    assert ("loss_class_enc" in terms) == (kind in SQUARE)
    assert list(alpha_modules(model)) == ["decoder_self.0", "decoder_self.1"]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    for part in ("backbone", "encoder.", "decoder.layers.0", "decoder.layers.1", "pre_alpha"):
        assert any(part in name for name in changed), part


def test_the_model_itself_is_pickled_and_copied_with_its_transforms(detector):
    model = detector("rt_detr_v2", attention={"encoder_self": "sparsemax", "decoder_cross": "sparsemax"})
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, copied = model(images, None, True), copy.deepcopy(model)(images, None, True)
    torch.testing.assert_close(ours.logits, copied.logits)
    weights = ours.attention.decoder_cross.samples[0].weights
    assert (weights == 0).float().mean() > 0.2  # of the points of a query, most have no weight
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:3]))


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "dab_detr", "deformable_detr"])
def test_padded_cells_have_exactly_no_weight_and_do_not_ask(detector, padded_batch, kind):
    sparse = {"decoder_self": "sparsemax"} | {
        site: "entmax15" for site in SITES[::2] if site not in POINTS.get(kind, ())
    }
    images, padding = padded_batch((64, 160), (30, 70), canvas=(64, 160))
    with torch.no_grad():
        attention = detector(kind, attention=sparse)(images, padding, need_attention=True).attention
    padded = attention.key_padding
    assert padded[1].any() and not padded[0].any()
    for site in ("encoder_self", "decoder_cross"):
        for layer in getattr(attention, site):
            if isinstance(getattr(attention, site), SampledMaps):
                continue  # points near the edge are shared between cells inside and outside
            assert not layer[1, ..., padded[1]].any() and (layer[1] == 0).any()
            assert site == "decoder_cross" or not layer[1, :, padded[1]].any()


@pytest.mark.parametrize("kind", ["detr", "deformable_detr", "rt_detr_v2", "d_fine"])
def test_stem_and_first_stage_are_frozen_with_the_weights_of_a_source(huggingface_settings, kind, tmp_path):
    """As DETR and its kin were trained; constants of D-FINE stay constants."""

    def frozen(**settings) -> set[str]:
        model = build_model(load_config(overrides={"model": huggingface_settings(kind)["model"] | settings}).model)
        names = {name for name, value in model.named_parameters() if not value.requires_grad}
        return {name.split("backbone.")[-1] for name in names}

    constants = {"model.model.decoder.reg_scale", "model.model.decoder.up"} if kind == "d_fine" else set()
    assert frozen() == constants
    stem = frozen(freeze_stem=True) - constants
    assert stem and all(re.search(r"embedder|stages\.0", name) for name in stem)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert bool(frozen(source=str(tmp_path)) - constants) == (kind not in SQUARE)


def test_batch_norms_that_are_not_trained_keep_their_statistics(detector):
    model = detector("rt_detr_v2", own_options={"freeze_backbone_batch_norms": False})
    assert model.learns_statistics()
    for name, parameter in model.named_parameters():
        if "backbone." in name:
            parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    model.train()(torch.randn(2, 3, 64, 64))
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved and not any("backbone." in name for name in moved)
    model.requires_grad_(False)
    assert not model.learns_statistics()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("detr", {"d_model": 30}),
        ("detr", {"encoder_attention_heads": 5}),
        ("deformable_detr", {"num_feature_levels": 1}),
        ("rt_detr_v2", {"d_model": 30}),
        ("rt_detr_v2", {"num_queries": 500}),  # more than there are tokens to choose from
        ("d_fine", {"encode_proj_layers": [7]}),
        ("d_fine", {"decoder_in_channels": [32, 32, 16]}),
    ],
)
def test_options_that_contradict_each_other_are_said_to_in_one_line(detector, kind, options):
    with pytest.raises(ConfigError, match=r"model\.options") as refusal:
        detector(kind, own_options=options).try_out()
    assert "\n" not in str(refusal.value)


def test_a_model_that_is_tried_out_stays_as_it_was(detector):
    model = detector("d_fine").train()
    before = copy.deepcopy(model.state_dict())
    model.try_out()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_faults_name_the_setting_or_the_site(huggingface_settings, detector):
    with pytest.raises(ModelError, match="decoder_cross"):
        detector("deformable_detr", attention={"decoder_cross": "tvmax"})
    with pytest.raises(ConfigError, match=r"model\.options\.encode_proj_layers"):
        settings = huggingface_settings("rt_detr_v2")
        settings["model"]["options"]["encode_proj_layers"] = [1, 2]
        build_model(load_config(overrides=settings).model)
