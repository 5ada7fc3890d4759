"""What models return, what padding must not change, and which settings are refused.

Legend: B images, H heads, Q queries, K = h x w cells of the feature map, C classes.
"""

import urllib.error

import pytest
import torch
import torchvision
from small import assert_alone_as_in_batch, frozen, model_settings, padded_batch, small, trainable

from detrlib.attention import TRANSFORMS
from detrlib.errors import ConfigError, WeightsError
from detrlib.models import AttentionMaps, Predictions, build_model
from detrlib.models.backbone import build_backbone, build_body
from detrlib.models.position import LearnedPosition, SinePosition, sine_of_boxes

SITES = ("encoder_self", "decoder_self", "decoder_cross")


def everywhere(transform: str) -> dict[str, str]:
    """Settings of a transform at all sites where it can stand."""
    return {site: transform for site in SITES if (site, transform) != ("decoder_self", "tvmax")}


# Padding


BACKBONES = {
    "tiny": ({"name": "tiny"}, 8),
    "resnet18": ({"name": "resnet18"}, 32),
    "resnet50-dilated": ({"name": "resnet50", "dilation": True}, 16),
}


@pytest.mark.parametrize("queries", ["learned", "anchor"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_image_alone_is_predicted_as_in_a_padded_batch(backbone, queries):
    assert_alone_as_in_batch(small(backbone=BACKBONES[backbone][0] | {"weights": "none"}, queries=queries))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("queries", ["learned", "anchor"])
def test_padding_changes_nothing_for_any_transform(transform, queries):
    assert_alone_as_in_batch(small(attention=everywhere(transform), queries=queries))


@pytest.mark.parametrize("settings", [{"norm": "pre"}, {"position": "learned"}, {"classification": "sigmoid"}])
def test_padding_changes_nothing_for_any_variant(settings):
    assert_alone_as_in_batch(small(**settings))


def test_content_of_padding_does_not_matter():
    model = small()
    images, padding = padded_batch((70, 101), (128, 64), canvas=(128, 160))
    with torch.no_grad():
        expected = model(images, padding)
        found = model(images.masked_fill(padding[:, None], 50.0), padding)
    torch.testing.assert_close(found.logits, expected.logits)


def test_without_masking_features_depend_on_the_batch():
    """As in the official code; the switch exists for its checkpoints."""
    backbone = small(backbone={"name": "resnet18", "weights": "none", "mask_padding": False}).backbone
    images, padding = padded_batch((70, 101), canvas=(128, 160))
    with torch.no_grad():
        (together,) = backbone(images, padding)
        (alone,) = backbone(images[..., :70, :101], padding[..., :70, :101])
    h, w = alone.features.shape[-2:]
    assert (together.features[..., :h, :w] - alone.features).abs().max() > 0.1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_outside_an_image_are_zero(backbone):
    choice, stride = BACKBONES[backbone]
    body = small(backbone=choice | {"weights": "none"}).backbone
    images, padding = padded_batch((70, 101), (128, 64), canvas=(128, 160))
    with torch.no_grad():
        (level,) = body(images, padding)
    assert level.features.shape == (2, *body.num_channels, -(-128 // stride), -(-160 // stride))
    assert torch.equal(level.padding, padding[:, ::stride, ::stride])
    outside = level.padding[:, None].expand_as(level.features)
    assert (level.features[outside] == 0).all()
    assert (level.features[~outside] != 0).any()


# Attention maps


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("queries", ["learned", "anchor"])
def test_attention_maps(transform, queries):
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
            torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]), rtol=0, atol=1e-5)
            if site != "decoder_self":
                assert (layer.masked_select(maps.key_padding[:, None, None]) == 0).all()
    assert not torch.equal(maps.decoder_cross[0], maps.decoder_cross[1])


def test_sites_get_the_transforms_chosen_for_them():
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


def numbered_maps() -> AttentionMaps:
    """Maps of 2 images, 1 head, 3 queries and a 2 x 4 grid; the second image is 1 x 3 cells."""
    cross = torch.arange(2 * 3 * 8.0).view(2, 1, 3, 8)
    padding = torch.zeros(2, 2, 4, dtype=torch.bool)
    padding[1, 1:] = padding[1, :, 3:] = True
    return AttentionMaps(
        [torch.arange(128.0).view(2, 1, 8, 8)], [torch.zeros(2, 1, 3, 3)], [cross], (2, 4), padding.flatten(1)
    )


def test_maps_as_images():
    maps = numbered_maps()
    images = maps.as_images("decoder_cross", 0)
    assert images.shape == (2, 1, 3, 2, 4)
    assert images[1, 0, 2, 1, 3] == maps.decoder_cross[0][1, 0, 2, 1 * 4 + 3]
    assert images[0, 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert maps.as_images("encoder_self", 0).shape == (2, 1, 8, 2, 4)
    with pytest.raises(ValueError, match="decoder_self"):
        maps.as_images("decoder_self", 0)


def test_valid_grid():
    assert [numbered_maps().valid_grid(image) for image in range(2)] == [(2, 4), (1, 3)]


# Positions


def test_sine_position_by_hand():
    padding = torch.zeros(1, 3, 5, dtype=torch.bool)
    padding[0, 2] = padding[0, :, 4] = True
    found = SinePosition(8, temperature=100.0)(padding)
    assert found.shape == (1, 8, 3, 5)
    for row, column in [(0, 0), (1, 3), (0, 2)]:
        expected = []
        for number, total in [(row + 1, 2), (column + 1, 4)]:
            angle = torch.tensor(2 * torch.pi * number / total)
            expected += [angle.sin(), angle.cos(), (angle / 10).sin(), (angle / 10).cos()]
        torch.testing.assert_close(found[0, :, row, column], torch.stack(expected), rtol=0, atol=1e-5)


def test_centred_positions_line_up_with_boxes():
    grid = SinePosition(16, centred=True)(torch.zeros(1, 4, 5, dtype=torch.bool))
    for row, column in [(0, 0), (3, 1), (2, 4)]:
        boxes = torch.tensor([(column + 0.5) / 5, (row + 0.5) / 4, 0.1, 0.1])
        torch.testing.assert_close(sine_of_boxes(boxes, 8, 10000.0)[:16], grid[0, :, row, column], rtol=0, atol=1e-5)


def test_learned_position():
    position = LearnedPosition(8)
    found = position(torch.zeros(2, 3, 60, dtype=torch.bool))
    assert found.shape == (2, 8, 3, 60)
    columns, rows = position.col_embed.weight, position.row_embed.weight
    torch.testing.assert_close(found[1, :4, 0, 0], columns[0])
    torch.testing.assert_close(found[1, :4, 2, 59], columns[49])
    torch.testing.assert_close(found[1, 4:, 2, 59], rows[2])
    share = 49 / 59  # of the way from the first entry to the second
    torch.testing.assert_close(found[0, :4, 1, 1], columns[0] + share * (columns[1] - columns[0]))
    torch.testing.assert_close(found[0, :4, 0, :50], position(torch.zeros(1, 1, 60, dtype=torch.bool))[0, :4, 0, :50])
    found.sum().backward()
    assert (position.col_embed.weight.grad != 0).all()


def test_learned_position_within_the_table_is_a_lookup():
    position = LearnedPosition(8)
    found = position(torch.zeros(1, 50, 7, dtype=torch.bool))
    torch.testing.assert_close(found[0, :4, 31], position.col_embed.weight[:7].T)
    torch.testing.assert_close(found[0, 4:, :, 6], position.row_embed.weight.T)


# Predictions


def test_every_layer_predicts():
    for queries in ("learned", "anchor"):
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


@pytest.mark.parametrize("queries", ["learned", "anchor"])
def test_every_parameter_learns(queries):
    attention = dict.fromkeys(SITES, "alpha_entmax")
    model = small(queries=queries, attention=attention, position="learned").train()
    predictions = model(*padded_batch((70, 101), (96, 128), canvas=(96, 128)))
    layers = (*predictions.auxiliary, predictions)
    sum(layer.logits.square().sum() + layer.boxes.square().sum() for layer in layers).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert still == []


def test_anchors_start_as_reference_boxes():
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


def test_every_layer_moves_the_anchors_on():
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


def test_attention_to_anchors_spreads_with_the_box():
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


def test_sigmoid_scores_start_near_one_percent():
    torch.manual_seed(0)
    settings = model_settings(backbone={"name": "tiny", "weights": "none"}, classification="sigmoid", num_classes=3)
    assert build_model(settings).class_embed.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)


@pytest.mark.parametrize("queries", ["learned", "anchor"])
def test_boxes_keep_their_precision_inside_autocast(queries):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predictions = small(queries=queries)(*padded_batch((64, 64), canvas=(64, 64)))
    assert all(layer.boxes.dtype == torch.float32 for layer in (*predictions.auxiliary, predictions))


def test_detections_with_softmax():
    logits = torch.tensor([[[3.0, 0.0, 1.0], [0.0, 1.0, 9.0], [0.0, 4.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1], [0.25, 0.75, 0.5, 0.5]]])
    found = Predictions(logits, boxes).detections(torch.tensor([[200, 100]]))[0]
    assert found.queries.tolist() == [2, 0, 1]
    assert found.labels.tolist() == [1, 0, 1]  # never no-object, however likely
    torch.testing.assert_close(found.boxes[0], torch.tensor([0.0, 100.0, 50.0, 200.0]))
    torch.testing.assert_close(found.boxes[1], torch.tensor([40.0, 60.0, 60.0, 140.0]))
    torch.testing.assert_close(found.scores[0], logits[0, 2].softmax(0)[1])
    assert len(Predictions(logits, boxes).detections(torch.tensor([[200, 100]]), limit=2)[0].scores) == 2


def test_detections_with_sigmoid():
    logits = torch.tensor([[[3.0, -9.0, 2.0], [0.0, -1.0, -9.0]], [[-5.0, -6.0, -9.0], [-9.0, 1.0, -4.0]]])
    boxes = torch.rand(2, 2, 4)
    first, second = Predictions(logits, boxes, "sigmoid").detections(torch.tensor([[10, 10], [20, 40]]), limit=3)
    assert (first.queries.tolist(), first.labels.tolist()) == ([0, 0, 1], [0, 2, 0])  # one query, two classes
    assert (second.queries.tolist(), second.labels.tolist()) == ([1, 1, 0], [1, 2, 0])
    torch.testing.assert_close(first.scores, torch.tensor([3.0, 2.0, 0.0]).sigmoid())
    corners = boxes[1, 1, :2] - boxes[1, 1, 2:] / 2
    torch.testing.assert_close(second.boxes[0, :2], corners * torch.tensor([40.0, 20.0]))
    everything = Predictions(logits, boxes, "sigmoid").detections(torch.tensor([[10, 10], [20, 40]]))
    assert [len(image.scores) for image in everything] == [6, 6]


# Weights and refusals


def test_stem_is_frozen_when_there_are_weights_to_keep(tmp_path):
    body = build_body("tiny", False)
    torch.save(body.state_dict(), tmp_path / "tiny.pt")
    stem = trainable(body.conv1) + trainable(body.layer1)
    for weights, choice, expected in [
        (tmp_path / "tiny.pt", None, stem),
        (tmp_path / "tiny.pt", False, 0),
        ("none", None, 0),
        ("none", True, stem),
    ]:
        backbone = build_backbone("tiny", weights, freeze_stem=choice)
        assert frozen(backbone) == expected == frozen(backbone.body.conv1) + frozen(backbone.body.layer1)


def test_imagenet_weights_offline(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(WeightsError, match=r"resnet18.*no route to host.*model\.backbone\.weights"):
        build_backbone("resnet18", "imagenet")


def test_imagenet_weights_are_loaded(monkeypatch):
    torch.manual_seed(0)
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: state)
    body = build_backbone("resnet18", "imagenet").body
    assert torch.equal(body.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert not body.conv1.weight.requires_grad


def test_there_are_no_imagenet_weights_of_the_tiny_backbone():
    with pytest.raises(WeightsError, match=r"tiny.*none or crops"):
        build_backbone("tiny", "imagenet")


def test_weights_of_another_architecture_are_named(tmp_path):
    path = tmp_path / "resnet34.pt"
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    with pytest.raises(WeightsError, match=r"resnet34\.pt: weights of another backbone: unexpected layer1\.2"):
        build_backbone("resnet18", path)


def test_a_file_that_is_no_state_dict_is_named(tmp_path):
    torch.save({"model": {"conv1.weight": torch.zeros(1), "epoch": 3}}, tmp_path / "run.pt")
    with pytest.raises(WeightsError, match=r"run\.pt: expected a state dict"):
        build_backbone("resnet18", tmp_path / "run.pt")
    with pytest.raises(WeightsError, match=r"model\.backbone\.weights: no file .*absent\.pt"):
        build_backbone("resnet18", tmp_path / "absent.pt")


@pytest.mark.parametrize("name", ["tiny", "resnet18", "resnet34"])
def test_dilation_needs_bottlenecks(name):
    with pytest.raises(ValueError, match=f"dilation.*{name}"):
        build_backbone(name, dilation=True)


def test_settings_that_need_data_are_refused():
    tiny = {"name": "tiny", "weights": "none"}
    with pytest.raises(ConfigError, match="num_classes"):
        build_model(model_settings(backbone=tiny))
    with pytest.raises(ConfigError, match="crops"):
        build_model(model_settings(backbone=tiny | {"weights": "crops"}, num_classes=2))
