"""The detections of a run as other programs read them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from detrlib.__main__ import app
from detrlib.errors import DataError, RunError
from detrlib.experiments.predictions import evaluate_predictions
from detrlib.metrics.detection import coco_ap
from detrlib.runs.exported import export_detections, to_supervision
from detrlib.runs.folder import load_results


@pytest.fixture
def run(tmp_path, write_layout):
    """The run of two detections of each object but those of the last image, in small data of COCO's kind."""
    write_layout(tmp_path / "data", "coco", train=2, val=3)
    truth = json.loads(next((tmp_path / "data" / "annotations").glob("*val2017.json")).read_text())
    last = truth["images"][-1]["id"]
    found = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": score}
        for one in truth["annotations"]
        for score in (0.9, 0.4)
        if one["image_id"] != last
    ]
    (tmp_path / "found.json").write_text(json.dumps(found))
    evaluate_predictions(tmp_path / "mine", tmp_path / "found.json", tmp_path / "data")
    return tmp_path / "mine", truth, found


def test_what_is_written_has_the_ap_of_the_run(run, tmp_path):
    run_dir, truth, found = run
    told = export_detections(run_dir, tmp_path / "out")
    assert str(tmp_path / "out" / "labels.json") in told and "val2017" in told
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(written) == len(found)
    assert coco_ap(tmp_path / "out" / "labels.json", written) == load_results(run_dir)["detection"]
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    assert {image["id"]: image["file_name"] for image in labels["images"]} == names
    with pytest.raises(RunError, match="not a run"):
        export_detections(tmp_path / "none", tmp_path / "out")


def test_a_class_that_the_data_lack_is_named(run):
    (run[0] / "predictions.json").write_text(json.dumps([run[2][0] | {"category_id": 77}]))
    with pytest.raises(DataError, match="class 77"):
        to_supervision(run[0])


@pytest.fixture
def lines(run, tmp_path, monkeypatch):
    """What is told of each program, as lines of Python."""
    monkeypatch.chdir(tmp_path)
    told = export_detections(run[0], Path("out"))
    names, parts = zip(*re.findall(r"# (\w+)\n([^#]*)", told), strict=True)
    assert names == ("FiftyOne", "supervision")
    monkeypatch.chdir(tmp_path.parent)  # they are run anywhere
    return dict(zip(names, parts, strict=True))


def test_supervision_reads_it_back(run, lines):
    pytest.importorskip("supervision", reason="supervision is not installed: pip install supervision")
    exec(lines["supervision"], told := {})
    read, detections = told["data"], told["detections"]
    assert len(detections) == len(read) == 3
    assert sum(map(len, detections.values())) == len(run[2])
    for path, _, objects in read:
        own = detections[path.rpartition("/")[2]]
        if len(own):  # of the last image there is none
            sure = own[own.confidence > 0.5]
            assert np.allclose(sure.xyxy, objects.xyxy) and sure.class_id.tolist() == objects.class_id.tolist()
            assert sure["class_name"].tolist() == [read.classes[label] for label in objects.class_id]


def test_fiftyone_reads_it_back(run, lines, tmp_path, monkeypatch):
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path / "database"))
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
    pytest.importorskip("fiftyone", reason="fiftyone, 1 GB with a database, is not installed: pip install fiftyone")
    exec(lines["FiftyOne"], told := {})
    _, truth, found = run
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    samples = {Path(sample.filepath).name: sample for sample in told["data"]}
    assert len(samples) == len(truth["images"]) == 3
    for image in truth["images"]:
        sample = samples[image["file_name"]]
        for field, entries in (("detections", truth["annotations"]), ("predictions", found)):
            read = [] if sample[field] is None else sample[field].detections
            given = [entry for entry in entries if entry["image_id"] == image["id"]]
            assert [one.label for one in read] == [names[entry["category_id"]] for entry in given]
            assert [one.confidence for one in read] == [entry.get("score") for entry in given]
            boxes = np.array([one.bounding_box for one in read]).reshape(-1, 4)  # relative to the picture
            assert np.allclose(boxes * [48, 40, 48, 40], np.reshape([entry["bbox"] for entry in given], (-1, 4)))


def test_the_command_writes_and_says_how_to_read(run, tmp_path, capsys):
    app(["export", str(run[0]), str(tmp_path / "out"), "--format", "detections"], standalone_mode=False)
    assert "from_coco" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"labels.json", "predictions.json"}
