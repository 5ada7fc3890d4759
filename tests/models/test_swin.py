"""Swin-T as a backbone: torchvision's features, images independent of their batch, and official files."""

import pytest
import torch
import torchvision
from small import assert_alone_as_in_batch, frozen, padded_batch, randomise, small, trainable
from test_names import TOLD, both, official_file
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from detrlib.checkpoints.files import export_official, load_official
from detrlib.config import load_config
from detrlib.errors import ConfigError, WeightsError
from detrlib.models.backbone import Backbone, build_backbone, image_sizes
from detrlib.models.pretrained import backbone_entries, official_swin_name, swin_name
from detrlib.models.swin import swin_stages

STRIDES = (4, 8, 16, 32)


def randomised(module: nn.Module) -> nn.Module:
    """`module` with no parameter left at its start, and biases of positions that matter."""
    randomise(module)
    for part in module.modules():
        if isinstance(part, ShiftedWindowAttention):
            nn.init.normal_(part.relative_position_bias_table)
    return module.eval()


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return randomised(torchvision.models.swin_t(weights=None))


@pytest.fixture(scope="module")
def backbone(classifier, tmp_path_factory) -> Backbone:
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


def test_features_do_not_depend_on_the_batch(backbone):
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


def test_without_masking_features_depend_on_the_batch(backbone):
    """As in the official code; the switch exists for its checkpoints."""
    images, padding = padded_batch((70, 101), canvas=(128, 128))
    official = Backbone(backbone.body, (4,), mask_padding=False).eval()
    with torch.no_grad():
        (together,) = official(images, padding)
        (alone,) = official(images[..., :70, :101], padding[..., :70, :101])
    h, w = alone.features.shape[-2:]
    assert (together.features[..., :h, :w] - alone.features).abs().max() > 0.1


SWIN = {"name": "swin_t", "weights": "none", "freeze_stem": True}
TWO_STAGE = {"levels": 4, "refine": True, "two_stage": True}
FAMILY = {"architecture": "deformable", "classification": "sigmoid", "deformable": TWO_STAGE}


@pytest.mark.parametrize("settings", [{}, FAMILY], ids=["detr", "deformable"])
def test_an_image_alone_is_predicted_as_in_a_padded_batch(settings):
    assert_alone_as_in_batch(randomised(small(backbone=SWIN, **settings)))


def test_gradients_and_stochastic_depth(backbone):
    rates = [block.stochastic_depth.p for stage in backbone.body.features[1::2] for block in stage]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert frozen(backbone) == 304_086  # patches, first stage, its merging
    images, padding = padded_batch((70, 60), (60, 64), canvas=(72, 64))
    sum(level.features.square().sum() for level in backbone(images, padding)).backward()
    missing = [name for name, weight in backbone.named_parameters() if weight.requires_grad and weight.grad is None]
    assert missing == []
    backbone.zero_grad()


# Files


def official_names() -> set[str]:
    """Entries of an official Swin-T without its classifier and masks: 181."""
    names = both("patch_embed.proj", "patch_embed.norm")
    for stage, depth in enumerate((2, 2, 6, 2)):
        for place in (f"layers.{stage}.blocks.{i}" for i in range(depth)):
            names |= both(*(f"{place}.{part}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj")))
            names |= both(f"{place}.mlp.fc1", f"{place}.mlp.fc2")
            names |= {f"{place}.attn.relative_position_bias_table", f"{place}.attn.relative_position_index"}
        if stage < 3:
            place = f"layers.{stage}.downsample"
            names |= both(f"{place}.norm") | {f"{place}.reduction.weight"}
    assert len(names) == 181
    return names


def test_official_weights_of_a_classifier(classifier, tmp_path):
    expected = classifier.state_dict()
    names = official_names() | both("norm", "head")
    assert {official_swin_name(name) for name in expected} == names
    official = {name: expected[swin_name(name)] for name in names}
    official = {k: v.view(49, 49) if k.endswith("position_index") else v for k, v in official.items()}
    content = {"model": official | {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}}
    found = backbone_entries(content)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    torch.save(content, tmp_path / "swin.pth")
    body = build_backbone("swin_t", tmp_path / "swin.pth").body.state_dict()
    assert body.keys() - expected.keys() == {"norm3.weight", "norm3.bias"}
    assert all(torch.equal(value, expected[key]) for key, value in body.items() if key in expected)
    del official["layers.2.blocks.5.mlp.fc2.bias"]
    torch.save(official, tmp_path / "swin.pth")
    with pytest.raises(WeightsError, match=r"swin\.pth: .*missing features\.5\.5\.mlp\.3\.bias"):
        build_backbone("swin_t", tmp_path / "swin.pth")


def transformers_state(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official entries under the names of the transformers package."""
    renamed = {}
    pairs = [("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("patch_embed.norm", "embeddings.norm")]
    pairs += [("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("attn.proj", "attention.o_proj")]
    pairs += [("attn.relative", "attention.relative_position_bias.relative"), ("attn.", "attention.")]
    for name, value in official.items():
        for theirs, other in pairs:
            name = name.replace(theirs, other)
        name = {"layers": "encoder.", "norm": "layer"}.get(name.split(".")[0], "") + name
        parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True) if "qkv" in name else [("", value)]
        renamed |= {name.replace("qkv", part): content for part, content in parts}
    return renamed


def test_official_weights_mean_what_transformers_takes_them_for(classifier):
    """Position biases, the order of merged patches, and that of queries, keys and values; in 224 pixels."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SwinModel(transformers.SwinConfig(), add_pooling_layer=False).eval()
    needless = ("head.weight", "head.bias", "relative_position_index")
    state = {official_swin_name(k): v for k, v in classifier.state_dict().items() if not k.endswith(needless)}
    theirs.load_state_dict(transformers_state(state))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        *_, found = swin_stages(classifier, images, lambda x: x, None)
        found = classifier.norm(found.permute(0, 2, 3, 1)).flatten(1, 2)
        torch.testing.assert_close(found, theirs(images).last_hidden_state, rtol=0, atol=1e-4)


def test_imagenet_weights_are_loaded(classifier, monkeypatch):
    state = classifier.state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: state)
    body = build_backbone("swin_t", "imagenet", stages=(2, 3, 4)).body
    assert torch.equal(body.features[7][1].mlp[3].weight, state["features.7.1.mlp.3.weight"])
    assert [name for name, _ in body.named_children()] == ["features", "norm1", "norm2", "norm3"]


def test_official_file_of_a_detector(tmp_path):
    model = randomised(small(backbone=SWIN | {"mask_padding": False}, **FAMILY))
    state = export_official(model)
    prefix = "backbone.0.body."
    names = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    assert names == official_names() | both("norm1", "norm2", "norm3")
    assert state[f"{prefix}layers.2.blocks.4.attn.relative_position_index"].shape == (49, 49)
    assert state[f"{prefix}layers.1.downsample.reduction.weight"].shape == (384, 768)
    path = official_file(tmp_path / "swin.pth", state, num_queries=7)
    again = load_official(path, TOLD)
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert trainable(again) == trainable(model)
    images, padding = padded_batch((64, 60), (40, 64), canvas=(64, 64))
    with torch.no_grad():
        torch.testing.assert_close(again(images, padding).logits, model(images, padding).logits)
    del state[f"{prefix}layers.2.blocks.5.norm1.weight"]
    other = {f"{prefix}layers.2.blocks.17.norm1.weight": torch.zeros(384)}  # Swin-S
    with pytest.raises(WeightsError, match=r"not Swin-T \(blocks \(2, 2, 18, 2\), 96 channels\)"):
        load_official(official_file(tmp_path / "swin_s.pth", state | other), TOLD)


def test_settings_without_sense_are_refused():
    for setting, value in [("dilation", True), ("weights", "crops")]:
        with pytest.raises(ConfigError, match=rf"model\.backbone\.{setting}.*(swin_t|Swin)"):
            load_config(overrides={"model.backbone.name": "swin_t", f"model.backbone.{setting}": value})
