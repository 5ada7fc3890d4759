"""What models return, what padding must not change, and which settings are refused.

Legend: B images, H heads, Q queries, K = h x w cells of the feature map, C classes.
"""

import math

import pytest
import torch

from detrlib.attention import TRANSFORMS
from detrlib.attention.multihead import merge_heads
from detrlib.models import build_model
from detrlib.models.outputs import site_of

SITES = ("encoder_self", "decoder_self", "decoder_cross")
BACKBONES = {
    "tiny": ({"name": "tiny"}, 8),
    "resnet18": ({"name": "resnet18"}, 32),
    "resnet50-dilated": ({"name": "resnet50", "dilation": True}, 16),
}


def everywhere(transform: str) -> dict[str, str]:
    """Settings of a transform at all sites where it can stand."""
    return {site: transform for site in SITES if (site, transform) != ("decoder_self", "tvmax")}


QUERIES = ("learned", "conditional", "anchor")
# softmax and entmax15 with all kinds of queries, each of the others with one.
WITH_QUERIES = [
    (transform, queries)
    for number, transform in enumerate(TRANSFORMS)
    for queries in (QUERIES if transform in ("softmax", "entmax15") else [QUERIES[number % 3]])
]


# Padding


CONTENT = ("query_content", "key_content", "value")  # matrices of Conditional DETR's self-attention


@pytest.mark.parametrize("queries", ["learned", "conditional", "anchor"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_image_alone_is_predicted_as_in_a_padded_batch(backbone, queries, assert_alone_as_in_batch, small):
    assert_alone_as_in_batch(small(backbone=BACKBONES[backbone][0] | {"weights": "none"}, queries=queries))


@pytest.mark.parametrize(("transform", "queries"), WITH_QUERIES)
@pytest.mark.parametrize("null_key", ["none", "learned"])
def test_padding_changes_nothing_for_any_transform(transform, queries, null_key, assert_alone_as_in_batch, small):
    assert_alone_as_in_batch(small(attention=everywhere(transform) | {"null_key": null_key}, queries=queries))


@pytest.mark.parametrize("settings", [{"norm": "pre"}, {"position": "learned"}, {"classification": "sigmoid"}])
def test_padding_changes_nothing_for_any_variant(settings, assert_alone_as_in_batch, small):
    assert_alone_as_in_batch(small(**settings))


def test_content_of_padding_does_not_matter(padded_batch, small):
    model = small()
    images, padding = padded_batch((70, 101), (128, 64), canvas=(128, 160))
    with torch.no_grad():
        expected = model(images, padding)
        found = model(images.masked_fill(padding[:, None], 50.0), padding)
    torch.testing.assert_close(found.logits, expected.logits)


# Gates, differences, registers

OPTIONS = {
    "gate of heads": {"attention": {"gate": "head"}},
    "gate of channels": {"attention": {"gate": "channel"}},
    "differential": {"attention": {"differential": True}},
    "registers": {"registers": 3},
}
TOGETHER = {"attention": {"gate": "head", "differential": True}, "registers": 3}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("queries", ["learned", "conditional", "anchor"])
def test_padding_changes_nothing_for_any_option(option, queries, assert_alone_as_in_batch, small):
    assert_alone_as_in_batch(small(queries=queries, **OPTIONS[option]))


@pytest.mark.parametrize(
    "settings",
    [
        {"polling": {"ratio": 0.3, "pooled": 4}},
        {"norm": "pre"},
        {"attention": TOGETHER["attention"] | everywhere("sparsemax")},
        {"attention": TOGETHER["attention"] | {"encoder_self": "tvmax"}, "encoder_layers": 1, "decoder_layers": 1},
    ],
)
def test_padding_changes_nothing_for_all_options_together(settings, assert_alone_as_in_batch, small):
    assert_alone_as_in_batch(small(**TOGETHER | settings))


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_are_off_change_nothing(option, small):
    """What is not of the option has the same names and shapes, and models without it have none of it."""
    without = {name: value.shape for name, value in small().state_dict().items()}
    state = {name: value.shape for name, value in small(**OPTIONS[option]).state_dict().items()}
    new = {name: shape for name, shape in state.items() if name not in without}
    assert new and {name: shape for name, shape in state.items() if name in without} == without
    assert all({"gate", "difference", "registers"} & set(name.split(".")) for name in new)


def test_options_stand_at_the_sites_named(small):
    chosen = {
        "gate": "channel",
        "gate_sites": "encoder_self",
        "differential": True,
        "differential_sites": "decoder_cross",
    }
    transformer = small(attention=chosen).transformer
    assert all(layer.self_attn.gate is not None for layer in transformer.encoder.layers)
    assert all(layer.self_attn.difference is None for layer in transformer.encoder.layers)
    for number, layer in enumerate(transformer.decoder.layers):
        assert layer.self_attn.gate is layer.self_attn.difference is layer.multihead_attn.gate is None
        assert layer.multihead_attn.difference.start == pytest.approx(0.8 - 0.6 * math.exp(-0.3 * number))


def test_maps_beside_registers_are_those_of_cells(padded_batch, small):
    model = small(registers=3)
    images, padding = padded_batch((70, 101), (128, 64), canvas=(128, 160))
    with torch.no_grad():
        maps = model(images, padding, need_attention=True).attention
    for cells, whole in zip(maps.encoder_self, maps.encoder_whole, strict=True):
        assert cells.shape == (2, 4, 320, 320) and whole.shape == (2, 4, 323, 323)
        assert torch.equal(cells, whole[..., :320, :320])
        torch.testing.assert_close(cells.sum(-1) + whole[..., :320, 320:].sum(-1), torch.ones(2, 4, 320))
        assert (whole[..., :320, 320:] > 0).all()
        assert (cells.masked_select(maps.key_padding[:, None, None]) == 0).all()
    assert maps.as_images("encoder_self", 0).shape == (2, 4, 320, 16, 20)
    assert small()(images, padding, need_attention=True).attention.encoder_whole is None


# Attention maps


@pytest.mark.parametrize(("transform", "queries"), WITH_QUERIES)
def test_attention_maps(transform, queries, padded_batch, small):
    model = small(attention=everywhere(transform), queries=queries)
    images, padding = padded_batch((70, 101), (128, 64), canvas=(128, 160))
    with torch.no_grad():
        predictions = model(images, padding, need_attention=True)
        plain = model(images, padding)
    maps, grid, cells = predictions.attention, (16, 20), 320
    assert plain.attention is None
    torch.testing.assert_close(plain.logits, predictions.logits, rtol=0, atol=1e-5)
    assert maps.grid == grid
    assert torch.equal(maps.key_padding, padding[:, ::8, ::8].flatten(1))
    expected = {"encoder_self": [(2, 4, cells, cells)] * 2, "decoder_self": [(2, 4, 7, 7)] * 3}
    for site, shapes in (expected | {"decoder_cross": [(2, 4, 7, cells)] * 3}).items():
        weights = getattr(maps, site)
        assert [layer.shape for layer in weights] == shapes
        for layer in weights:
            if transform not in ("budget", "softpick", "sigmoid", "relu"):  # whose rows sum to something else
                torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]), rtol=0, atol=1e-5)
            if site != "decoder_self":
                assert (layer.masked_select(maps.key_padding[:, None, None]) == 0).all()
    assert not torch.equal(maps.decoder_cross[0], maps.decoder_cross[1])


@pytest.mark.parametrize("queries", ["learned", "conditional", "anchor"])
def test_values_are_those_that_the_maps_mix(queries, padded_batch, small):
    model, mixed = small(queries=queries), {}
    for path, module in model.named_modules():
        if path.endswith("out_proj"):
            site = site_of(path.removesuffix(".out_proj"))
            module.register_forward_pre_hook(lambda _, inputs, site=site: mixed.setdefault(site, []).append(inputs[0]))
    with torch.no_grad():
        maps = model(*padded_batch((70, 101), (128, 64), canvas=(128, 160)), need_attention=True).attention
        only = model(*padded_batch((70, 101), canvas=(128, 160)), need_attention=("encoder_self",)).attention
    for site, layers in maps.values.items():
        for weights, values, expected in zip(getattr(maps, site), layers, mixed[site], strict=False):
            torch.testing.assert_close(merge_heads(weights @ values), expected)
    assert only.values["decoder_cross"] == only.values["decoder_self"] == [None] * 3


def test_sites_get_the_transforms_chosen_for_them(padded_batch, small):
    model = small(attention={"encoder_self": "entmax15", "decoder_self": "sparsemax", "decoder_cross": "softmax"})
    images, padding = padded_batch((128, 160), canvas=(128, 160))
    with torch.no_grad():
        maps = model(images, padding, need_attention=True).attention
    for layer in model.transformer.encoder.layers:
        assert type(layer.self_attn.transform).__name__ == "Entmax15"
    for layer in model.transformer.decoder.layers:
        assert type(layer.self_attn.transform).__name__ == "Sparsemax"
        assert type(layer.multihead_attn.transform).__name__ == "Softmax"
    assert all((layer > 0).all() for layer in maps.decoder_cross)


# Predictions


def test_every_layer_predicts(padded_batch, small):
    for queries in ("learned", "conditional", "anchor"):
        for classification, classes in [("softmax", 6), ("sigmoid", 5)]:
            model = small(queries=queries, classification=classification)
            predictions = model(*padded_batch((70, 101), canvas=(96, 128)))
            assert len(predictions.auxiliary) == 2
            for layer in (*predictions.auxiliary, predictions):
                assert layer.logits.shape == (1, 7, classes)
                assert layer.boxes.shape == (1, 7, 4)
                assert layer.classification == classification
                assert ((layer.boxes > 0) & (layer.boxes < 1)).all()
            assert not torch.equal(predictions.auxiliary[0].boxes, predictions.auxiliary[1].boxes)


@pytest.mark.parametrize("queries", ["learned", "conditional", "anchor"])
def test_every_parameter_learns(queries, padded_batch, small):
    attention = dict.fromkeys(SITES, "alpha_entmax") | TOGETHER["attention"]
    model = small(queries=queries, attention=attention, position="learned", registers=3).train()
    predictions = model(*padded_batch((70, 101), (96, 128), canvas=(96, 128)))
    layers = (*predictions.auxiliary, predictions)
    sum(layer.logits.square().sum() + layer.boxes.square().sum() for layer in layers).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    # The first layer's content is zero: with matrices of its own, those have nothing to learn from.
    content = [f"transformer.decoder.layers.0.self_attn.{part}.weight" for part in CONTENT]
    assert still == (content if queries == "conditional" else [])


def test_anchors_start_as_reference_boxes(model_settings, padded_batch):
    torch.manual_seed(0)
    model = build_model(
        model_settings(backbone={"name": "tiny", "weights": "none"}, queries="anchor", num_classes=2)
    ).eval()
    with torch.no_grad():
        predictions = model(*padded_batch((64, 64), canvas=(64, 64)))
    boxes = predictions.boxes[0]
    torch.testing.assert_close(boxes, model.query_embed.weight.sigmoid(), rtol=0, atol=1e-5)
    torch.testing.assert_close(boxes[:, 2:], torch.full((100, 2), 0.25), rtol=0, atol=1e-5)
    assert boxes[:, :2].std(0).min() > 0.2


def test_every_layer_moves_the_anchors_on(padded_batch, small):
    model = small(queries="anchor")
    step = torch.tensor([0.1, -0.2, 0.3, -0.4])
    with torch.no_grad():
        model.query_embed.weight.clamp_(-3, 3)
        model.bbox_embed.layers[-1].weight.zero_()
        model.bbox_embed.layers[-1].bias.copy_(step)
    predictions = model(*padded_batch((64, 64), canvas=(64, 64)))
    for number, layer in enumerate((*predictions.auxiliary, predictions), start=1):
        expected = (model.query_embed.weight + number * step).sigmoid()
        torch.testing.assert_close(layer.boxes[0], expected, rtol=0, atol=1e-5)
    gradient = torch.autograd.grad(predictions.boxes.sum(), model.bbox_embed.layers[-1].bias)[0]
    last_only = (predictions.boxes * (1 - predictions.boxes)).sum((0, 1))  # each layer learns its own correction
    torch.testing.assert_close(gradient, last_only)


def test_attention_to_anchors_spreads_with_the_box(small):
    decoder = small(queries="anchor").transformer.decoder
    with torch.no_grad():
        decoder.expected_size.layers[-1].weight.zero_()
        decoder.expected_size.layers[-1].bias.copy_(torch.tensor([0.0, 1.0]))  # expected width and height
    place, content = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    boxes = torch.tensor([0.3, 0.6, 0.2, 0.8]).expand(2, 7, 4)
    found = decoder.modulated(place, boxes, content)
    width, height = torch.tensor([0.0, 1.0]).sigmoid().tolist()
    torch.testing.assert_close(found[..., :16], place[..., :16] * height / 0.8)  # y comes first
    torch.testing.assert_close(found[..., 16:], place[..., 16:] * width / 0.2)


def test_sigmoid_scores_start_near_one_percent(model_settings):
    torch.manual_seed(0)
    settings = model_settings(backbone={"name": "tiny", "weights": "none"}, classification="sigmoid", num_classes=3)
    assert build_model(settings).class_embed.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)


@pytest.mark.parametrize("queries", ["learned", "conditional", "anchor"])
def test_boxes_keep_their_precision_inside_autocast(queries, padded_batch, small):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predictions = small(queries=queries)(*padded_batch((64, 64), canvas=(64, 64)))
    assert all(layer.boxes.dtype == torch.float32 for layer in (*predictions.auxiliary, predictions))
