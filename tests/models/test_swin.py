"""Swin-T as a backbone: torchvision's features, and images independent of their batch."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from detrlib.config import load_config
from detrlib.errors import ConfigError
from detrlib.models.backbone import Backbone, build_backbone, image_sizes

STRIDES = (4, 8, 16, 32)


@pytest.fixture(scope="session")
def randomised(randomise):
    def randomised(module: nn.Module) -> nn.Module:
        """`module` with no parameter left at its start, and biases of positions that matter."""
        randomise(module)
        for part in module.modules():
            if isinstance(part, ShiftedWindowAttention):
                nn.init.normal_(part.relative_position_bias_table)
        return module.eval()

    return randomised


@pytest.fixture(scope="module")
def classifier(randomised) -> nn.Module:
    torch.manual_seed(0)
    return randomised(torchvision.models.swin_t(weights=None))


@pytest.fixture(scope="module")
def backbone(classifier, tmp_path_factory, randomise) -> Backbone:
    """All four stages, with the weights of `classifier`, from a file."""
    path = tmp_path_factory.mktemp("weights") / "swin_t.pt"
    torch.save(classifier.state_dict(), path)
    found = build_backbone("swin_t", path, stages=(1, 2, 3, 4)).eval()
    for number in range(4):
        randomise(found.body.get_submodule(f"norm{number}"))
    return found


def no_padding(images: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)


# 232 pixels make 8 tokens in the last stage, where the windows of 7 are shifted then.
@pytest.mark.parametrize("size", [(64, 100), (232, 64), (40, 260)])
def test_features_are_those_of_torchvision(classifier, backbone, size):
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        found = backbone(images, no_padding(images))
        x = images
        for number, level in enumerate(found):
            for part in classifier.features[2 * number : 2 * number + 2]:
                x = part(x)
            expected = backbone.body.get_submodule(f"norm{number}")(x).permute(0, 3, 1, 2)
            torch.testing.assert_close(level.features, expected, rtol=0, atol=1e-5)
            assert level.features.shape[-2:] == tuple(-(-side // STRIDES[number]) for side in size)
    assert backbone.num_channels == [level.features.shape[1] for level in found] == [96, 192, 384, 768]


SIZES = [(70, 101), (232, 64), (97, 30)]  # windows of the second are shifted where those of the others are not


def test_features_do_not_depend_on_the_batch(backbone, padded_batch):
    images, padding = padded_batch(*SIZES, canvas=(240, 128))
    assert image_sizes(padding) == SIZES
    with torch.no_grad():
        together = backbone(images.masked_fill(padding[:, None], 50.0), padding)
        for i, (height, width) in enumerate(SIZES):
            alone = images[i : i + 1, :, :height, :width]
            for one, level in zip(backbone(alone, no_padding(alone)), together, strict=True):
                h, w = one.features.shape[-2:]
                torch.testing.assert_close(one.features[0], level.features[i, :, :h, :w], rtol=0, atol=1e-5)
                assert not level.padding[i, :h, :w].any() and level.padding[i].sum() == level.padding[i].numel() - h * w
    for level in together:
        assert (level.features.masked_select(level.padding[:, None]) == 0).all()


def test_official_padding_lets_features_depend_on_the_batch(backbone, padded_batch):
    images, padding = padded_batch((70, 101), canvas=(128, 128))
    official = Backbone(backbone.body, (4,), official_padding=True).eval()
    with torch.no_grad():
        (together,) = official(images, padding)
        (alone,) = official(images[..., :70, :101], padding[..., :70, :101])
    h, w = alone.features.shape[-2:]
    assert (together.features[..., :h, :w] - alone.features).abs().max() > 0.1


def attended_pair_by_pair(attention: ShiftedWindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention of the official code for tokens [h,w,C], from one large table of who sees whom.

    Axes are padded with zeros to whole windows of M tokens, and cut after rolling them back by s tokens: the last
    window holds, apart from each other, M - s tokens of the end and s of the beginning.
    """
    (height, width), side, heads = x.shape[:2], attention.window_size[0], attention.num_heads
    lengths = [-(-size // side) * side for size in (height, width)]
    tokens = torch.zeros(*lengths, x.shape[2], dtype=x.dtype)
    tokens[:height, :width] = x
    together, within = torch.tensor(True), []
    for axis, (length, shift) in enumerate(zip(lengths, attention.shift_size, strict=True)):
        rolled = (torch.arange(length) - shift) % length
        region = (rolled >= length - side).int() + (rolled >= length - shift) if shift else torch.zeros(length)
        label = 3 * (rolled // side) + region
        label, place = (v[:, None].expand(lengths) if axis == 0 else v.expand(lengths) for v in (label, rolled % side))
        together = together & (label.flatten()[:, None] == label.flatten())
        within.append(place.flatten()[:, None] - place.flatten() + side - 1)
    bias = attention.relative_position_bias_table[within[0] * (2 * side - 1) + within[1]].permute(2, 0, 1)
    query, key, value = attention.qkv(tokens.flatten(0, 1)).unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
    scores = query @ key.mT / query.shape[-1] ** 0.5 + bias
    mixed = scores.masked_fill(~together, -torch.inf).softmax(-1) @ value
    return attention.proj(mixed.transpose(0, 1).flatten(1)).unflatten(0, lengths)[:height, :width]


# Of 40 x 90 pixels the last stages have 3 x 6 and 2 x 3 tokens, less than a window, which official code shifts too.
@pytest.mark.parametrize("size", [(40, 90), (230, 61)])
def test_official_padding_is_that_of_the_official_code(backbone, size):
    body = copy.deepcopy(backbone.body).double()
    official, exact = (Backbone(body, (1, 2, 3, 4), choice).eval() for choice in (True, False))
    images = torch.zeros(1, 3, *(-(-side // 4) * 4 for side in size), dtype=torch.float64)
    images[..., : size[0], : size[1]] = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = official(images[..., : size[0], : size[1]], None)
        x = official.body.features[0](images)[0]
        for number, level in enumerate(found):
            for block in official.body.features[2 * number + 1]:
                x = x + attended_pair_by_pair(block.attn, block.norm1(x))
                x = x + block.mlp(block.norm2(x))
            expected = official.body.get_submodule(f"norm{number}")(x).permute(2, 0, 1)
            torch.testing.assert_close(level.features[0], expected, rtol=0, atol=1e-8)
            if number < 3:
                x = official.body.features[2 * number + 2](x)
        unshifted = exact(images[..., : size[0], : size[1]], None)
        assert (unshifted[-1].features - found[-1].features).abs().max() > 1e-3


SWIN = {"name": "swin_t", "weights": "none", "freeze_stem": True}
TWO_STAGE = {"levels": 4, "refine": True, "two_stage": True}
FAMILY = {"architecture": "deformable", "classification": "sigmoid", "deformable": TWO_STAGE}


@pytest.mark.parametrize("settings", [{}, FAMILY], ids=["detr", "deformable"])
def test_an_image_alone_is_predicted_as_in_a_padded_batch(settings, assert_alone_as_in_batch, randomised, small):
    assert_alone_as_in_batch(randomised(small(backbone=SWIN, **settings)))


def test_gradients_and_stochastic_depth(backbone, frozen, padded_batch):
    rates = [block.stochastic_depth.p for stage in backbone.body.features[1::2] for block in stage]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert frozen(backbone) == 304_086  # patches, first stage, its merging
    images, padding = padded_batch((70, 60), (60, 64), canvas=(72, 64))
    sum(level.features.square().sum() for level in backbone(images, padding)).backward()
    missing = [name for name, weight in backbone.named_parameters() if weight.requires_grad and weight.grad is None]
    assert missing == []
    backbone.zero_grad()


def test_settings_without_sense_are_refused():
    for setting, value in [("dilation", True), ("weights", "crops")]:
        with pytest.raises(ConfigError, match=rf"model\.backbone\.{setting}.*(swin_t|Swin)"):
            load_config(overrides={"model.backbone.name": "swin_t", f"model.backbone.{setting}": value})
