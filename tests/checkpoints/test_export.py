"""Models written for others and read back, in every layout; what stands in the way."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from detrlib.checkpoints.export import export, read_own, write_own
from detrlib.checkpoints.source import Source
from detrlib.config import Config, flat_settings, replace
from detrlib.errors import ConfigError, WeightsError
from detrlib.models import build_model
from detrlib.runs.sources import open_source

SIZES = {
    "model.hidden_dim": 32,
    "model.num_heads": 4,
    "model.encoder_layers": 2,
    "model.decoder_layers": 3,
    "model.feedforward_dim": 48,
    "model.num_queries": 7,
    "model.num_classes": 5,
    "model.dropout": 0.2,
    "train.lr": 3e-4,
}
SPARSE = {
    "model.backbone.name": "resnet18",
    "model.architecture": "deformable",
    "model.deformable": {"refine": True, "two_stage": True, "query_init": "memory", "rho": 0.3},
    "model.deformable.encoder_auxiliary": True,
    "model.deformable.class_specific_proposals": True,
}
CHOICES = {
    "tiny": {"model.backbone.name": "tiny"},
    "alpha": {"model.backbone.name": "tiny", "model.attention.decoder_cross": "alpha_entmax"},
    "anchor": {"model.backbone.name": "tiny", "model.queries": "anchor"},
    "sparse": SPARSE,
}


@pytest.fixture
def source_of(randomise):
    def source_of(chosen: dict) -> Source:
        torch.manual_seed(0)
        cfg = replace(Config(), SIZES | {"model.backbone.weights": "none"} | chosen)
        model = build_model(cfg.model)
        randomise(model)
        return Source("small", cfg, model.state_dict(), {0: "cat", 4: "dog"}, Path("small.pt"), 12)

    return source_of


def assert_same_weights(found, expected):
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(value, expected.state[name]) for name, value in found.state.items())


@pytest.mark.parametrize("chosen", CHOICES)
def test_safetensors_hold_all_that_a_model_needs(source_of, tmp_path, chosen):
    source = source_of(CHOICES[chosen])
    found = open_source(export(source, tmp_path / "model.safetensors"))
    assert_same_weights(found, source)
    assert (found.cfg, found.names, found.label) == (source.cfg, source.names, "model")
    with pytest.raises(ConfigError, match=r"model\.num_heads"):
        open_source(tmp_path / "model.safetensors", overrides={"model.num_heads": 2})


@pytest.mark.parametrize("chosen", [{"model.backbone.name": "resnet18"}, SPARSE])
def test_the_official_layout_tells_what_entries_do_not_show(source_of, tmp_path, chosen):
    source = source_of(chosen | {"model.backbone.freeze_stem": True})
    found = open_source(export(source, tmp_path / "model.pth"))
    assert_same_weights(found, source)
    ours, theirs = (
        {name: value for name, value in flat_settings(s.cfg.model, "model.").items() if "compatibility" not in name}
        for s in (source, found)
    )
    assert ours == theirs and found.epoch == 12


def test_the_layout_follows_from_the_suffix_or_is_named(source_of, tmp_path):
    source = source_of({"model.backbone.name": "resnet18"})
    folder = export(source, tmp_path / "folder")
    assert_same_weights(open_source(folder), source)
    assert_same_weights(open_source(export(source, tmp_path / "v1.2", "huggingface")), source)
    with pytest.raises(ConfigError, match=r"model\.onnx.*\.safetensors.*--format"):
        export(source, tmp_path / "model.onnx")
    with pytest.raises(WeightsError, match=r"folder is there already"):
        export(source, folder)


def test_models_that_others_have_not_leave_nothing_behind(source_of, tmp_path):
    for name in ("model.pth", "folder"):
        with pytest.raises(WeightsError, match="backbone"):
            export(source_of(CHOICES["tiny"]), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_and_damaged_ones(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors: names no settings.*config\.json"):
        read_own(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 50)
    with pytest.raises(WeightsError, match=r"model\.safetensors: damaged"):
        read_own(tmp_path / "model.safetensors")


@pytest.mark.parametrize("key", ["detrlib.settings", "detrlib.names"])
@pytest.mark.parametrize("text", ["{", "[1]", '{"model": {"no_such": 1}}'])
def test_settings_and_names_in_a_file_that_are_none(source_of, tmp_path, key, text):
    write_own(source_of(CHOICES["tiny"]), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(state, tmp_path / "model.safetensors", metadata | {key: text})
    with pytest.raises(WeightsError, match=r"model\.safetensors: the settings or names"):
        read_own(tmp_path / "model.safetensors")
