"""Backbones: torchvision's features, zeros outside the images, and what is frozen."""

import pytest
import torch
import torchvision

from detrlib.models import backbone_view
from detrlib.models.backbone import build_backbone, build_body, cell_view, nearest_mask, residual_stages
from detrlib.models.pretrained import load_backbone_weights

BACKBONES = {
    "tiny": ({"name": "tiny"}, 8),
    "resnet18": ({"name": "resnet18"}, 32),
    "resnet50-dilated": ({"name": "resnet50", "dilation": True}, 16),
}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("official", [False, True])
def test_backbone_is_that_of_torchvision(name, official, randomise):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)(weights=None).eval()
    randomise(reference)
    backbone = build_backbone(name, official_padding=official).eval()
    load_backbone_weights(backbone.body, reference.state_dict(), name)
    images = torch.randn(1, 3, 75, 106)
    expected = images
    with torch.no_grad():
        for part in list(reference.children())[:-2]:
            expected = part(expected)
        (level,) = backbone(images, torch.zeros(1, 75, 106, dtype=torch.bool))
    assert level.features.shape == (1, *backbone.num_channels, 3, 4)
    assert level.padding.shape == (1, 3, 4)
    torch.testing.assert_close(level.features, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_cell_sees_what_its_gradient_reaches():
    stride, view = cell_view("tiny")
    body = build_body("tiny", dilation=False)
    for weight in body.parameters():
        weight.data.abs_()  # nothing cancels, nothing is cut off by a ReLU
    images = torch.full((1, 3, 2 * view, 2 * view), 0.01, requires_grad=True)
    *_, (features, _) = residual_stages(body, images)
    assert features.shape[-1] == -(-images.shape[-1] // stride)
    features[0, :, features.shape[2] // 2, features.shape[3] // 2].sum().backward()
    rows = torch.nonzero(images.grad.abs().sum((0, 1, 3)))
    assert rows.max() - rows.min() + 1 == view


def test_views_of_the_backbones_are_those_of_the_literature():
    """Araujo et al. 2019, Table 1, has 435 for ResNet-18; DC5 halves the stride and sees as much."""
    assert cell_view("resnet18") == (32, 435)
    assert cell_view("resnet50", dilation=True) == (16, cell_view("resnet50").view)
    assert cell_view("swin_t").stride == 32 and cell_view("swin_t").view > 224


def test_what_a_cell_of_transformers_backbone_sees_is_what_ours_sees(model_settings):
    pytest.importorskip("transformers")
    resnet = {
        "model_type": "resnet",
        "layer_type": "basic",
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
    }
    theirs = {"backbone_config": resnet | {"out_features": ["stage4"]}}
    found = backbone_view(model_settings(architecture="huggingface", type="detr", options=theirs))
    assert found == cell_view("resnet18") == backbone_view(model_settings(backbone={"name": "resnet18"}))


def test_official_padding_lets_features_depend_on_the_batch(padded_batch, small):
    backbone = build_backbone("resnet18", official_padding=True).eval()
    images, padding = padded_batch((70, 101), canvas=(128, 160))
    with torch.no_grad():
        (together,) = backbone(images, padding)
        (alone,) = backbone(images[..., :70, :101], padding[..., :70, :101])
    h, w = alone.features.shape[-2:]
    assert (together.features[..., :h, :w] - alone.features).abs().max() > 0.1


def test_official_masks_are_those_of_the_nearest_pixel():
    """Of 101 pixels the official code looks at 0, 25, 50 and 75 for four cells; their own pixels begin at 0, 32, ..."""
    padding = (torch.arange(101) >= 60).expand(1, 2, 101)
    assert nearest_mask(padding, (1, 4)).tolist() == [[[False, False, False, True]]]
    assert padding[:, :1, ::32].tolist() == [[[False, False, True, True]]]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_outside_an_image_are_zero(backbone, padded_batch, small):
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


def test_stem_is_frozen_when_there_are_weights_to_keep(tmp_path, frozen, trainable):
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


@pytest.mark.parametrize("name", ["tiny", "resnet18", "resnet34"])
def test_dilation_needs_bottlenecks(name):
    with pytest.raises(ValueError, match=f"dilation.*{name}"):
        build_backbone(name, dilation=True)
