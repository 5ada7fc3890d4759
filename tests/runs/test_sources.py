"""A model by any of its names, runs made of it, and what is said of names that nothing has."""

import shutil

import pytest
import torch
from typer.testing import CliRunner

from detrlib.__main__ import app
from detrlib.checkpoints.files import export_official
from detrlib.checkpoints.source import COCO_LABELS
from detrlib.config import load_config
from detrlib.engine.evaluate import load_model
from detrlib.engine.loop import train
from detrlib.errors import ConfigError, RunError, WeightsError
from detrlib.files import load_checkpoint, write_checkpoint, write_json
from detrlib.runs import sources
from detrlib.runs.sources import build_source, open_source, save_run

R18 = {"name": "resnet18", "weights": "none", "freeze_stem": True}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("runs") / "nested" / "first"
    train(tiny_config({"train.epochs": 1, "train.ema": 0.5}), folder)
    return folder


@pytest.fixture
def runs(run_dir, monkeypatch):
    """The folder of all runs, in which there is one, nested/first."""
    folder = run_dir.parent.parent
    monkeypatch.setattr(sources, "RUNS", folder)
    monkeypatch.setattr(sources, "run_path", lambda name: folder / name)
    return folder


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_run_by_name_and_by_folder_has_averaged_weights_and_names_of_classes(runs, run_dir, monkeypatch):
    by_name = open_source("nested/first")
    assert (by_name.label, by_name.epoch) == ("nested/first", 1)
    assert by_name.names[1] == "circle" and len(by_name.names) == by_name.cfg.model.num_classes - 1
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    assert equal(by_name.state, checkpoint["average"]) and not equal(by_name.state, checkpoint["model"])
    model = build_source(by_name)
    assert not model.training and equal(model.state_dict(), load_model(run_dir).state_dict())
    monkeypatch.chdir(runs / "nested")
    for name in (run_dir, "first", run_dir / "checkpoints" / "last.pt"):
        assert equal(open_source(name).state, by_name.state)
    with pytest.raises(RunError, match=r"epoch-0007.*there are best, last"):
        open_source("nested/first", "epoch-0007")
    with pytest.raises(ConfigError, match=r"model\.num_heads"):
        open_source("nested/first", overrides={"model.num_heads": 2})


def test_runs_made_of_predictions_have_no_model(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "of-predictions")
    write_json(folder / "results.json", {"detector": "detections.json"})
    with pytest.raises(RunError, match=r"of-predictions.*no model"):
        open_source(folder)


def test_a_checkpoint_of_another_architecture_is_named_when_it_is_built(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    write_checkpoint(folder / "checkpoints" / "last.pt", {"model": {"weight": torch.ones(2)}})
    with pytest.raises(RunError, match=r"last\.pt.*this architecture"):
        build_source(open_source(folder))


def test_an_official_file_comes_with_names_of_coco(small, tmp_path):
    for classes, names in ((COCO_LABELS, 80), (5, 0)):
        model = small(backbone=R18, num_classes=classes)
        torch.save({"model": export_official(model), "epoch": 3}, tmp_path / "official.pth")
        source = open_source(tmp_path / "official.pth", overrides={"model.num_heads": 4})
        assert (source.label, source.epoch) == ("official", 3)
        assert equal(build_source(source).state_dict(), model.state_dict())
        assert len(source.names or {}) == names
        assert not names or (source.names[1], source.names[90]) == ("person", "toothbrush")


def test_published_weights_by_name_come_with_settings_that_their_file_lacks(runs, small, tmp_path, monkeypatch):
    model = small(backbone=R18 | {"name": "resnet50"})
    torch.save({"model": export_official(model)}, tmp_path / "file.pth")
    monkeypatch.setattr(sources, "fetch", {"detr-r50-dc5": tmp_path / "file.pth"}.get)
    source = open_source("detr-r50-dc5", overrides={"model.num_heads": 4})
    assert source.label == "detr-r50-dc5"
    assert source.cfg.model.backbone.dilation and source.cfg.model.num_heads == 4
    (runs / "detr-r50-dc5").mkdir()
    assert open_source("detr-r50-dc5", overrides={"model.num_heads": 4}).label == "detr-r50-dc5"
    (runs / "detr-r50-dc5").rmdir()


def test_ids_of_hugging_face_come_last_and_after_names_that_are_near(runs, monkeypatch):
    asked = []

    def fetch(name):
        asked.append(name)
        raise WeightsError(f"{name}: out of reach")

    monkeypatch.setattr(sources, "fetch_huggingface", fetch)
    with pytest.raises(WeightsError, match="owner/name: out of reach"):
        open_source("owner/name")
    with pytest.raises(WeightsError, match="did you mean nested/first"):
        open_source("nested/firsd")
    assert asked == ["owner/name"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("nested/fist", "nested/first"),
        ("detr-r5O", "detr-r50"),
        ("zzz", "detr-r101-dc5"),
    ],
)
def test_a_name_that_nothing_has(runs, name, near):
    with pytest.raises(WeightsError, match=f"'{name}'.*{near}"):
        open_source(name)


def test_a_config_without_the_number_of_classes_is_named(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    for text, fault in (("", "is empty"), ("train: {epochs: 1}", r"model\.num_classes")):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(RunError, match=rf"config\.yaml:? {fault}"):
            open_source(folder)


def test_a_file_that_is_not_there_is_no_misspelt_name(runs):
    for name in ("/nested/first", "first.pth", "here/model.pth"):
        with pytest.raises(WeightsError, match=rf"^'{name}': there is no such file"):
            open_source(name)


# --- runs made of weights from elsewhere ------------------------------------------------------------------------


@pytest.fixture
def official(small, tmp_path):
    """A small DETR, and an official file of its weights."""
    model = small(backbone=R18)
    torch.save({"model": export_official(model), "epoch": 3}, tmp_path / "official.pth")
    return model, tmp_path / "official.pth"


def test_a_run_of_official_weights(official, tmp_path):
    model, path = official
    told = {"model.num_heads": 4, "model.dropout": 0.1}
    save_run(open_source(path, overrides=told | {"data.root": "elsewhere"}), tmp_path / "run")
    cfg = load_config(tmp_path / "run" / "config.yaml")
    assert (cfg.data.root, cfg.model.num_heads, cfg.model.compatibility.padding) == ("elsewhere", 4, "exact")
    again = load_model(tmp_path / "run")
    assert equal(again.state_dict(), model.state_dict())
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
    assert equal(again.state_dict(), model.state_dict())
    refused = CliRunner().invoke(app, ["export", run, str(tmp_path / "model.onnx")])
    assert refused.exit_code == 1 and "model.onnx" in refused.stderr
    misspelt = CliRunner().invoke(app, ["import", "detr-r5O"])
    assert misspelt.exit_code == 1 and "detr-r50" in misspelt.stderr
