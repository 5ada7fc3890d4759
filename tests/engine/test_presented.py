"""What Weights & Biases is shown of a finished run, read back from the file of an offline one."""

import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest

from detrlib import runs
from detrlib.engine import presented
from detrlib.engine.loop import train
from detrlib.runs import Example

NAMES = {1: "circle", 2: "square"}
BLOCK = 2**15  # of a file of W&B, which is a log as LevelDB writes it


def records(path):
    """Every record of a .wandb file."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, position, parts, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(pb.Record.FromString(parts))
            parts = b""
    return found


def logged(found):
    """{name: its last value} of a run's history; of media a dictionary."""
    values = {}
    for item in (item for record in found if record.HasField("history") for item in record.history.item):
        name, *inner = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        values[name] = values.get(name, {}) | {inner[0]: value} if inner else value
    return values


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B without an account or a network, whose files lie in the folder of the test."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds: a loaded machine starts its service slowly


@pytest.fixture
def example():
    """Two queries, of which one is matched: its map has all its weight in the two left cells of the upper row."""
    maps = np.zeros((1, 2, 2, 2, 4), dtype=np.float32)
    maps[0, 0, 1, 0, 0], maps[0, 1, 1, 0, 1] = 1, 1
    return Example(
        7,
        np.full((40, 80, 3), 100, dtype=np.uint8),
        true_boxes=np.array([[0, 0, 80, 40]], dtype=np.float32),
        true_labels=np.array([2]),
        boxes=np.array([[1, 2, 3, 4], [0, 0, 40, 20]], dtype=np.float32),
        labels=np.array([1, 1]),
        scores=np.array([0.9, 0.75]),
        matched=np.array([-1, 0]),
        queries=np.array([3, 5]),
        extent=np.array([2.0, 4.0]),
        stored={"decoder_cross": maps},
    )


def test_an_offline_run_holds_boxes_a_table_and_files(tmp_path, offline, tiny_config):
    overrides = {"train.tracking.wandb": "offline", "model.attention.decoder_cross": "sparsemax", "train.epochs": 1}
    run_dir = tmp_path / "run"
    train(tiny_config(overrides), run_dir)
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    found = records(path)
    history, folder = logged(found), path.parent / "files"
    pictures = history["examples/detections"]
    assert pictures["count"] == 2 and pictures["captions"] == [
        f"image {e.image_id}" for e in runs.load_examples(run_dir)
    ]
    assert all((folder / name).exists() for name in pictures["filenames"])
    (first, *_) = (json.loads((folder / each["path"]).read_text()) for each in pictures["all_boxes"][0].values())
    assert first["box_data"][0]["domain"] == "pixel" and set(first["class_labels"].values()) >= {"circle", "square"}
    artifacts = {record.artifact.type: record.artifact for record in found if record.HasField("artifact")}
    files = {
        kind: {entry.path: entry.local_path for entry in each.manifest.contents} for kind, each in artifacts.items()
    }
    assert artifacts["model"].name == "model-run"
    assert files["model"] == {"last.pt": str(run_dir / "checkpoints" / "last.pt")}  # not a copy
    assert {"results.json", "config.yaml"} <= files["results"].keys()
    table = json.loads(Path(files["run_table"]["examples/attention.table.json"]).read_text())
    assert table["columns"] == list(presented.COLUMNS)
    assert len(table["data"]) == sum((example.matched >= 0).sum() for example in runs.load_examples(run_dir)) > 0
    for row in table["data"]:
        assert row[6]["path"] in files["run_table"] and all(0 <= number <= 1 for number in row[7:])


def test_nothing_of_it_without_being_asked_for_and_a_fault_leaves_the_run_finished(
    tmp_path, offline, tiny_config, monkeypatch, caplog
):
    asked = {"train.tracking.wandb": "offline", "train.epochs": 1}
    train(tiny_config(asked | {"train.tracking.artifacts": False}), tmp_path / "without")
    (path,) = (tmp_path / "without").glob("wandb/offline-run-*/*.wandb")
    assert "val-AP/AP" in logged(records(path)) and "examples/detections" not in logged(records(path))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(presented, "boxes_on_image", full)
    with caplog.at_level(logging.WARNING):
        train(tiny_config(asked), tmp_path / "full")
    assert "no space left" in caplog.text and runs.is_finished(tmp_path / "full")


def test_the_report_of_a_sweep_is_an_artifact_of_the_sweep(tmp_path, offline, tiny_config):
    home = tmp_path / "sweep"
    (home / "figures").mkdir(parents=True)
    (home / "figures" / "layers.pdf").write_text("%PDF")
    (home / "report.html").write_text("<html>")
    presented.present_report(tiny_config(), home, home / "report.html")
    assert not (home / "wandb").exists()  # not asked for
    presented.present_report(tiny_config({"train.tracking.wandb": "offline"}), home, home / "report.html")
    (path,) = home.glob("wandb/offline-run-*-sweep/*.wandb")
    (artifact,) = [record.artifact for record in records(path) if record.HasField("artifact")]
    assert artifact.name == "report-sweep"
    assert {entry.path for entry in artifact.manifest.contents} == {"report.html", "figures/layers.pdf"}


def test_a_row_says_what_its_map_shows(example):
    pytest.importorskip("wandb")
    (row,) = presented.rows_of(example, NAMES)
    known = dict(zip(presented.COLUMNS, row, strict=True))
    assert known["query"] == 5 and known["class"] == "circle" and known["object"] == "square"
    assert known["zeros"] == 0.75 and known["gini"] == pytest.approx(1 - 2 / 8) and known["paibb"] == pytest.approx(1)
    example.stored = {}
    assert presented.rows_of(example, NAMES) == []


def test_cells_lie_where_they_are_in_the_image_and_no_weight_has_no_colour(example):
    weights = example.maps("decoder_cross", -1).mean(0)[1]
    drawn = presented.map_on_image(example.image, weights, example.extent)
    assert drawn.shape == example.image.shape
    coloured = (drawn != drawn[..., :1]).any(-1)
    assert coloured[:20, :40].all() and coloured.sum() == 20 * 40
    half = presented.map_on_image(example.image, weights, np.array([1.0, 4.0]))  # the lower cells are beyond the image
    assert (half != half[..., :1]).any(-1)[:, :40].all()
