"""Weights of backbones, from the files that people have of them: torchvision's, SCRL's, official Swin Transformers."""

import urllib.error

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from detrlib.errors import WeightsError
from detrlib.models.backbone import build_backbone, build_body
from detrlib.models.pretrained import SWIN_NAMES, backbone_entries, renamed
from detrlib.models.swin import swin_stages

OFFICIAL = [(torchvisions, official) for official, torchvisions in SWIN_NAMES]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_scrl_weights_start_a_backbone(prefix, tmp_path, randomise):
    torch.manual_seed(0)
    body = build_body("resnet18", False)
    randomise(body)
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    network = {"projector.0.weight": torch.zeros(1)}
    for name, value in body.state_dict().items():
        part, rest = name.split(".", 1)
        network[f"{prefix}encoder.{numbers[part]}.{rest}"] = value
    content = {"online_network_state_dict": network, "epoch": 200}
    assert backbone_entries(content).keys() == body.state_dict().keys()
    torch.save(content, tmp_path / "resnet18.pt")
    loaded = build_backbone("resnet18", tmp_path / "resnet18.pt").body.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in body.state_dict().items())


def test_backbone_files_of_other_forms():
    state = {"conv1.weight": torch.zeros(1)}
    assert (
        backbone_entries({"model": state})
        == backbone_entries({"state_dict": state})
        == backbone_entries(state)
        == state
    )


@pytest.fixture(scope="module")
def classifier(randomise) -> nn.Module:
    """A Swin-T with no parameter left at its start, and biases of positions that matter."""
    torch.manual_seed(0)
    model = torchvision.models.swin_t(weights=None)
    randomise(model)
    for part in model.modules():
        if isinstance(part, ShiftedWindowAttention):
            nn.init.normal_(part.relative_position_bias_table)
    return model.eval()


def test_official_weights_of_a_classifier(classifier, tmp_path, official_swin_names):
    expected = classifier.state_dict()
    names = official_swin_names("norm", "head")
    assert {renamed(name, OFFICIAL) for name in expected} == names
    official = {name: expected[renamed(name, SWIN_NAMES)] for name in names}
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
    state = {renamed(k, OFFICIAL): v for k, v in classifier.state_dict().items() if not k.endswith(needless)}
    theirs.load_state_dict(transformers_state(state))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        *_, (found, _) = swin_stages(classifier, images)
        found = classifier.norm(found.permute(0, 2, 3, 1)).flatten(1, 2)
        torch.testing.assert_close(found, theirs(images).last_hidden_state, rtol=0, atol=1e-4)


def test_imagenet_weights_of_swin_t_are_loaded(classifier, monkeypatch):
    state = classifier.state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: state)
    body = build_backbone("swin_t", "imagenet", stages=(2, 3, 4)).body
    assert torch.equal(body.features[7][1].mlp[3].weight, state["features.7.1.mlp.3.weight"])
    assert [name for name, _ in body.named_children()] == ["features", "norm1", "norm2", "norm3"]


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
    torch.save({"conv1.weight": print}, tmp_path / "code.pt")
    with pytest.raises(WeightsError, match=r"code\.pt: not readable") as caught:
        build_backbone("resnet18", tmp_path / "code.pt")
    assert "weights_only" not in str(caught.value)  # torch would tell how to run it
