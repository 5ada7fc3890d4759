"""Models written for others and read back, in every layout; what stands in the way."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from detrlib.checkpoints.export import export, read_own, write_own
from detrlib.checkpoints.source import CHECKSUM
from detrlib.config import flat_settings
from detrlib.errors import ConfigError, WeightsError
from detrlib.runs.sources import open_source

SPARSE = {
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


@pytest.mark.parametrize("chosen", [{}, {"model.attention.decoder_cross": "sparsemax"}, SPARSE])
def test_the_official_layout_tells_what_entries_do_not_show(source_of, tmp_path, chosen):
    source = source_of(chosen)
    found = open_source(export(source, tmp_path / "model.pth"))
    assert_same_weights(found, source)
    ours, theirs = (
        {name: value for name, value in flat_settings(s.cfg.model, "model.").items() if "compatibility" not in name}
        for s in (source, found)
    )
    assert ours == theirs and found.epoch == 12


def test_the_layout_follows_from_the_suffix_or_is_named(source_of, tmp_path):
    source = source_of({})
    folder = export(source, tmp_path / "folder")
    assert_same_weights(open_source(folder), source)
    assert_same_weights(open_source(export(source, tmp_path / "v1.2", "huggingface")), source)
    with pytest.raises(ConfigError, match=r"model\.h5.*\.safetensors.*--format"):
        export(source, tmp_path / "model.h5")
    with pytest.raises(WeightsError, match=r"folder is there already"):
        export(source, folder)


def test_models_that_others_have_not_leave_nothing_behind(source_of, tmp_path):
    for name in ("model.pth", "folder"):
        with pytest.raises(WeightsError, match="backbone"):
            export(source_of(CHOICES["tiny"]), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("model.attention.encoder_self", {"model.attention.encoder_self": "entmax15"}),
        ("model.attention.alpha", {"model.attention": {"decoder_cross": "entmax", "alpha": 1.2}}),
        ("model.position_temperature", {"model.position_temperature": 20.0}),
        ("model.attention.gate", {"model.attention.gate": "head"}),
        ("model.attention.differential", {"model.attention.differential": True}),
        ("model.registers", {"model.registers": 2}),
    ],
)
def test_what_an_official_file_does_not_tell_is_refused(source_of, tmp_path, name, chosen):
    with pytest.raises(WeightsError, match=re.escape(name)):
        export(source_of(chosen), tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()


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
        metadata, state = file.metadata() | {key: text}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(state, tmp_path / "model.safetensors", {name: metadata[name] for name in metadata if name != CHECKSUM})
    with pytest.raises(WeightsError, match=r"model\.safetensors: the settings or names"):
        read_own(tmp_path / "model.safetensors")


def test_alphas_on_their_way_are_kept_or_refused(source_of, tmp_path):
    """An official file tells the aim of an annealing, not how far it is."""
    overrides = {"model.attention.decoder_cross": "sparsemax", "model.attention.anneal": {"epochs": 4}}
    halfway = replace(source_of(overrides), epoch=2)
    with pytest.raises(WeightsError, match=r"model\.attention\.anneal"):
        export(halfway, tmp_path / "halfway.pth")
    for source in (halfway, replace(halfway, epoch=9)):
        read = open_source(export(source, tmp_path / f"{source.epoch}.safetensors"))
        assert read.epoch == source.epoch
        assert read.cfg.model.annealed_alphas(read.epoch) == source.cfg.model.annealed_alphas(source.epoch)
    export(source, tmp_path / "arrived.pth")
