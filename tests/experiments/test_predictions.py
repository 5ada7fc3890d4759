"""The detections of any detector as a run: scored as COCO scores them, compared like others, every fault named."""

import json

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from detrlib.__main__ import app
from detrlib.config import Data, load_config, save_config
from detrlib.data import build_dataset
from detrlib.engine.loop import train
from detrlib.errors import DataError, RunError
from detrlib.experiments.predictions import evaluate_predictions, read_detections
from detrlib.files import write_json
from detrlib.metrics.bootstrap import ap_table
from detrlib.metrics.coco_format import coco_entries
from detrlib.metrics.detection import METRICS, coco_ap
from detrlib.metrics.statistics import compare
from detrlib.runs.examples import load_examples
from detrlib.runs.results import final_alphas, layer_frame, load_matches, paibb_table, results_frame, results_table


@pytest.fixture(scope="module")
def dataset(tiny_config):
    return build_dataset(tiny_config().data, "val")


@pytest.fixture(scope="module")
def detections(dataset):
    """The true boxes of every other object moved a little, with falling scores, and a false one."""
    annotations = dataset.ground_truth["annotations"][::2]
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9 - 0.01 * number}
        for number, a in enumerate(annotations)
    ]
    found[0] = found[0] | {"bbox": [value + 1.5 for value in found[0]["bbox"]]}
    return [*found, found[1] | {"bbox": [0, 0, 3, 3], "score": 0.95, "segmentation": []}]


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_config):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    save_config(tiny_config(), path)
    return path


@pytest.fixture(scope="module")
def run_dir(detections, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions")
    write_json(folder / "found.json", detections)
    evaluate_predictions(folder / "other", folder / "found.json", config)
    return folder / "other"


def test_average_precision_is_that_of_coco(run_dir, dataset, detections):
    found = json.loads((run_dir / "results.json").read_text())["detection"]
    assert found == coco_ap(dataset.ground_truth, detections)
    assert 0 < found["AP"] < 1
    truth = COCO()
    truth.dataset = dataset.ground_truth
    truth.createIndex()
    theirs = COCOeval(truth, truth.loadRes([dict(entry, segmentation=[[]]) for entry in detections]), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert [found[name] for name in METRICS] == pytest.approx(theirs.stats.tolist(), abs=1e-6)


def test_the_folder_is_that_of_a_run_without_attention(run_dir, dataset, tiny_config):
    (row,) = results_frame([run_dir]).to_dict("records")
    assert row["architecture"] == "predictions from found.json" and row["images"] == 13
    assert row["decoder_cross"] is None and row["epoch"] is None
    assert results_table([run_dir]).loc["other", ["Gini", "PAIBB"]].isna().all()
    assert paibb_table([run_dir]).loc["other", "pairs"] == 0
    assert load_examples(run_dir) == [] and final_alphas([run_dir]) == {}
    assert layer_frame([run_dir]).empty
    assert ap_table(load_matches(run_dir)).loc["AP", "value"] == pytest.approx(row["AP"])
    cfg = load_config(run_dir / "config.yaml")
    assert cfg.data == tiny_config().data and cfg.model.num_classes == dataset.num_classes
    assert (run_dir / "environment.json").exists() and (run_dir / "predictions.json").exists()


def test_it_is_compared_with_a_trained_run_image_by_image(run_dir, tmp_path, tiny_config):
    train(tiny_config({"train.epochs": 1}), tmp_path / "trained")
    found = compare(load_matches(run_dir), load_matches(tmp_path / "trained"), resamples=20)
    first, second = results_table([run_dir, tmp_path / "trained"]).AP
    assert found["images"] == 13 and found["difference"] == pytest.approx(first - second)
    assert found["low"] <= found["difference"] <= found["high"]


@pytest.mark.parametrize("place", ["folder", "file"])
def test_data_may_be_a_folder_or_an_annotation_file(place, run_dir, dataset, tmp_path):
    annotations = dataset.annotations_path
    data = annotations.parent.parent if place == "folder" else annotations
    results = evaluate_predictions(tmp_path / "run", run_dir / "predictions.json", data)
    assert results["detection"] == json.loads((run_dir / "results.json").read_text())["detection"]
    cfg = load_config(tmp_path / "run" / "config.yaml")
    assert build_dataset(cfg.data, "val").annotations_path == annotations


@pytest.mark.parametrize("layout", ["roboflow", "yolo", "voc", "voc beside pictures"])
def test_data_may_be_of_any_layout_and_images_named_by_their_files(layout, tmp_path, write_layout):
    root = write_layout(tmp_path / "set", layout)
    truth = build_dataset(Data(root=str(root)), "val")
    names = dict(zip(truth.image_ids, truth.file_names, strict=True))
    found = [
        {"image_id": names[a["image_id"]].removesuffix(".png" * (n % 2)), "score": 0.5}
        | {k: a[k] for k in ("category_id", "bbox")}
        for n, a in enumerate(truth.ground_truth["annotations"])
    ]
    write_json(tmp_path / "found.json", found)
    for number, data in enumerate([root, root / "data.yaml"] if layout == "yolo" else [root]):
        results = evaluate_predictions(tmp_path / f"run{number}", tmp_path / "found.json", data)
        assert results["detection"]["AP"] == pytest.approx(1) and results["images"] == 3
        assert sorted(results["names"].values()) == ["cat", "dog"]
    test = evaluate_predictions(tmp_path / "test", write_empty(tmp_path), root, "test")
    assert test["images"] == 2 and test["detection"]["AP"] == 0


def write_empty(folder):
    write_json(folder / "none.json", [])
    return folder / "none.json"


GOOD = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5.5], "score": 0.5}
FAULTS = {
    "not JSON": ("{", "JSON"),
    "a dictionary": (json.dumps({"annotations": [GOOD]}), "dict"),
    "numbers": ("[1]", "entry 0"),
    "no score": (json.dumps([GOOD, {k: v for k, v in GOOD.items() if k != "score"}]), "entry 1.*score"),
    "image": (json.dumps([GOOD | {"image_id": 9}]), "image_id 9"),
    "image as text": (json.dumps([GOOD | {"image_id": "1"}]), "image_id '1'"),
    "category": (json.dumps([GOOD | {"category_id": 0}]), "category_id 0"),
    "NaN": (json.dumps([GOOD | {"score": float("nan")}]), "score nan"),
    "no number": (json.dumps([GOOD | {"score": None}]), "score None"),
    "three numbers": (json.dumps([GOOD | {"bbox": [0, 0, 5]}]), "bbox"),
    "corners": (json.dumps([GOOD | {"bbox": [9, 9, -5, 5]}]), "bbox"),
    "endless": (json.dumps([GOOD | {"bbox": [0, 0, 5, float("inf")]}]), "bbox"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_file_are_named(name, tmp_path):
    content, named = FAULTS[name]
    (tmp_path / "found.json").write_text(content)
    with pytest.raises(DataError, match=rf"found\.json: .*{named}") as caught:
        read_detections(tmp_path / "found.json", [1, 2], [2, 3])
    assert "\n" not in str(caught.value)


def test_good_entries_are_read_without_what_is_not_needed(tmp_path):
    write_json(tmp_path / "found.json", [GOOD | {"segmentation": [], "id": 3}])
    assert coco_entries(read_detections(tmp_path / "found.json", [1], [2])) == [GOOD]
    with pytest.raises(DataError, match=r"absent\.json"):
        read_detections(tmp_path / "absent.json", [1], [2])


def test_nothing_is_written_where_something_is_wrong_or_there_already(run_dir, config, tmp_path):
    write_json(tmp_path / "found.json", [GOOD | {"image_id": -1}])
    with pytest.raises(DataError, match="image_id -1"):
        evaluate_predictions(tmp_path / "run", tmp_path / "found.json", config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="other is there already"):
        evaluate_predictions(run_dir, run_dir / "predictions.json", config)


def test_command_line(run_dir, config, tmp_path):
    words = ["evaluate", str(tmp_path / "run"), "--predictions", str(run_dir / "predictions.json")]
    shown = CliRunner().invoke(app, [*words, "--data", str(config)])
    assert shown.exit_code == 0 and shown.output.startswith("AP 0.")
    for wrong in ([], ["--data", str(config), "--by-id"]):
        refused = CliRunner().invoke(app, [*words, *wrong])
        assert refused.exit_code == 1 and "--predictions" in refused.stderr


@pytest.mark.parametrize("command", ["evaluate", "explain", "intervene"])
def test_there_is_no_model_to_look_into(run_dir, command):
    refused = CliRunner().invoke(app, [command, str(run_dir)])
    assert refused.exit_code == 1 and "other is made of predictions from found.json" in refused.stderr


def test_settings_of_the_evaluation_are_kept(run_dir, config, tmp_path):
    overrides = {"evaluate.engine": "pycocotools"}
    results = evaluate_predictions(tmp_path / "run", run_dir / "predictions.json", config, overrides=overrides)
    assert load_config(tmp_path / "run" / "config.yaml").evaluate.engine == "pycocotools"
    before = json.loads((run_dir / "results.json").read_text())["detection"]
    assert results["detection"]["AP"] == pytest.approx(before["AP"], abs=1e-12)
