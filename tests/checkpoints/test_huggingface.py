"""Folders of transformers read without it and written for it: the same numbers both ways; damaged and foreign ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from detrlib.checkpoints.huggingface import huggingface_source, write_huggingface
from detrlib.checkpoints.source import Source, build_source
from detrlib.config import replace
from detrlib.config.huggingface import fetch_huggingface
from detrlib.errors import WeightsError

DEFORMABLE = {"model.architecture": "deformable"}
CHOICES = {
    "detr": {},
    "learned-position": {"model.position": "learned"},
    "conditional": {"model.queries": "conditional", "model.classification": "sigmoid"},
    "resnet50": {"model.backbone.name": "resnet50"},
    "deformable": DEFORMABLE | {"model.deformable.encoder_points": 3},
    "one-level": DEFORMABLE | {"model.deformable.levels": 1},
    "refine": DEFORMABLE | {"model.deformable.refine": True},
    "two-stage": DEFORMABLE | {"model.deformable.refine": True, "model.deformable.two_stage": True},
}


@pytest.fixture(params=CHOICES)
def source(request, source_of):
    """Weights of every kind of model that transformers has."""
    return source_of(CHOICES[request.param])


def theirs(folder):
    """The model that transformers makes of a folder, which it loads without complaint."""
    transformers = pytest.importorskip("transformers")
    model, found = transformers.AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def assert_same_predictions(ours, other):
    """In float64, since rounding of float32 grows through a backbone of random weights."""
    image = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        found, expected = ours.double()(image), other.double()(pixel_values=image)
    assert found.logits.std(1).min() > 1e-3 and found.boxes.std(1).min() > 1e-4  # queries differ
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.pred_boxes, rtol=0, atol=1e-5, check_dtype=False)


def assert_same_source(found, expected):
    assert found.cfg.model.model_dump(exclude={"compatibility"}) == expected.cfg.model.model_dump(
        exclude={"compatibility"}
    )
    assert found.cfg.data.image_size == expected.cfg.data.image_size and found.names == expected.names
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(value, expected.state[name]) for name, value in found.state.items())


def test_ours_to_theirs_and_back(source, tmp_path):
    write_huggingface(source, tmp_path / "ours")
    assert_same_source(huggingface_source(tmp_path / "ours"), source)
    model = theirs(tmp_path / "ours")
    assert model.config.id2label == {0: "N/A", 1: "cat", 2: "dog", 3: "N/A", 4: "cup"}
    assert_same_predictions(build_source(source), model)
    model.save_pretrained(tmp_path / "theirs")  # as it likes, shared heads once
    again = huggingface_source(tmp_path / "theirs", {"data.image_size": 640})
    assert_same_source(again, source)
    assert again.label == "theirs"


def test_files_of_timm_and_of_pickle(source_of, tmp_path):
    """As on the hub before 2024: names of torchvision, model_type alone known, weights saved by torch."""
    source = source_of({"model.backbone.name": "resnet50", "model.backbone.dilation": True}, None)
    plain = Source("plain", replace(source.cfg, {"model.backbone.dilation": False}), source.state, None, source.path)
    write_huggingface(plain, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {name: value for name, value in config.items() if "backbone" not in name and name != "id2label"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"backbone": "resnet50", "dilation": True}))
    body = "model.backbone.conv_encoder.model."
    state = {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if body not in name}
    state |= {
        name.replace("backbone.body.", body): value for name, value in source.state.items() if "backbone.body" in name
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_source(huggingface_source(tmp_path), source)


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({"model.norm": "pre"}, r"model\.norm"),
        ({"model.attention.decoder_cross": "sparsemax"}, r"model\.attention\.decoder_cross sparsemax"),
        ({"model.queries": "anchor"}, r"model\.queries"),
        ({"model.queries": "conditional"}, r"model\.classification"),
        ({"model.backbone.name": "tiny"}, r"model\.backbone\.name"),
        ({"model.backbone.name": "resnet50", "model.backbone.dilation": True}, r"model\.backbone\.dilation"),
        (CHOICES["two-stage"] | {"model.deformable.rho": 0.3}, r"model\.deformable\.rho"),
    ],
)
def test_models_that_transformers_has_not_are_named(source_of, tmp_path, chosen, name):
    with pytest.raises(WeightsError, match=name):
        write_huggingface(source_of(chosen), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def folder(source_of, tmp_path):
    write_huggingface(source_of({}), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model_type", "yolos"),
        ("activation_function", "gelu"),
        ("decoder_attention_heads", 2),
        ("backbone_config", {"hidden_act": "gelu"}),
    ],
)
def test_settings_that_give_other_numbers_are_refused(folder, setting, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(WeightsError, match=r"config\.json: \w+.*(yolos|gelu|4)"):
        huggingface_source(folder)


def test_damaged_folders(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.decoder.layers.1.self_attn.k_proj.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"incomplete.*decoder\.layers\.1\.self_attn\.k_proj\.bias"):
        huggingface_source(folder)
    (folder / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(WeightsError, match=r"model\.safetensors: damaged"):
        huggingface_source(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        huggingface_source(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json: not readable"):
        huggingface_source(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"no file .*config\.json"):
        huggingface_source(folder)


def test_ids_of_the_hub(folder, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot(repo_id, allow_patterns, local_files_only=False):
        asked.append((repo_id, local_files_only))
        if local_files_only:
            raise hub.errors.LocalEntryNotFoundError("not here")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert fetch_huggingface("owner/name") == folder
    assert asked == [("owner/name", True), ("owner/name", False)]


def test_the_hub_out_of_reach_is_one_sentence():
    """Tests are offline (HF_HUB_OFFLINE)."""
    with pytest.raises(WeightsError, match=r"owner/name.*https://.*owner/name.*model\.safetensors") as refusal:
        fetch_huggingface("owner/name")
    assert "\n" not in str(refusal.value)
