"""Runs made of official files, and the command that makes them."""

import pytest
import torch
from typer.testing import CliRunner

from detrlib.__main__ import app
from detrlib.checkpoints.files import export_official
from detrlib.config import load_config
from detrlib.engine.evaluate import load_model
from detrlib.errors import RunError
from detrlib.files import load_checkpoint
from detrlib.runs.imported import save_run
from detrlib.runs.sources import open_source


@pytest.fixture
def official(small, tmp_path):
    """A small DETR, and an official file of its weights."""
    model = small(backbone={"name": "resnet18", "weights": "none", "freeze_stem": True})
    torch.save({"model": export_official(model), "epoch": 3}, tmp_path / "official.pth")
    return model, tmp_path / "official.pth"


def test_a_run_of_official_weights(official, tmp_path):
    model, path = official
    told = {"model.num_heads": 4, "model.dropout": 0.1}
    save_run(open_source(path, overrides=told | {"data.root": "elsewhere"}), tmp_path / "run")
    cfg = load_config(tmp_path / "run" / "config.yaml")
    assert (cfg.data.root, cfg.model.num_heads, cfg.model.compatibility.padding) == ("elsewhere", 4, "exact")
    again = load_model(tmp_path / "run")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    known = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (known["epoch"], known["global_step"]) == (3, 0)
    with pytest.raises(RunError, match="there already"):
        save_run(open_source(path, overrides=told), tmp_path / "run")


def test_command_line(official, tmp_path):
    _, path = official
    told = ["--set", "model.num_heads=4", "--as", str(tmp_path / "run")]
    shown = CliRunner().invoke(app, ["import", str(path), *told])
    assert shown.exit_code == 0 and (tmp_path / "run" / "config.yaml").exists()
    assert "detr, " in shown.output and "model.backbone.name: resnet18" in shown.output
    refused = CliRunner().invoke(app, ["import", str(tmp_path / "absent.pth")])
    assert refused.exit_code == 1 and "absent.pth" in refused.stderr


def test_a_model_is_exported_and_imported_again(official, tmp_path):
    model, path = official
    run = str(tmp_path / "run")
    for words in (
        ["import", str(path), "--set", "model.num_heads=4", "--as", run],
        ["export", run, str(tmp_path / "model.safetensors")],
        ["export", str(tmp_path / "model.safetensors"), str(tmp_path / "folder")],
        ["import", str(tmp_path / "folder"), "--as", str(tmp_path / "again")],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    again = load_model(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    refused = CliRunner().invoke(app, ["export", run, str(tmp_path / "model.onnx")])
    assert refused.exit_code == 1 and "model.onnx" in refused.stderr
    misspelt = CliRunner().invoke(app, ["import", "detr-r5O"])
    assert misspelt.exit_code == 1 and "detr-r50" in misspelt.stderr
