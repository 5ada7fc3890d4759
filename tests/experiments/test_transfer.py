"""A run on data with other classes: which are scored, under which ids, and that nothing else moves the score."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detrlib.config import load_config, replace, save_config
from detrlib.data import build_dataset
from detrlib.engine.evaluate import evaluate_run
from detrlib.engine.loop import train
from detrlib.errors import ConfigError, DataError, RunError
from detrlib.experiments import transfer
from detrlib.experiments.transfer import evaluate_on, scored_classes
from detrlib.files import write_json
from detrlib.runs.examples import load_examples
from detrlib.runs.folder import load_results
from detrlib.runs.results import results_table

OURS = {1: "circle", 2: "square", 3: "triangle", 4: "star", 5: "ring", 6: "cross"}
# Their categories: two kinds of circle, a square under its own name in capitals, a cross, and what no run knows.
THEIRS = {11: "disc", 3: "SQUARE", 40: "dot", 7: "plus sign", 21: "cloud"}
NAMES = {"disc": "circle", "dot": "circle", "plus sign": "cross"}
AS_OURS = {11: 1, 3: 2, 40: 1, 7: 6}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_config):
    """A finished tiny run on drawn shapes."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config({"train.epochs": 1, "model.classification": "sigmoid"}), folder)
    return folder


@pytest.fixture(scope="module")
def elsewhere(run_dir, tmp_path_factory):
    """A COCO-format folder of the run's pictures, in which what it detects, moved a little, is "annotated".

    So a tiny model has an AP far from 0 and from 1, with detections of every class, the unannotated ones included.
    """
    data, random = build_dataset(load_config(run_dir / "config.yaml").data, "val"), np.random.default_rng(0)
    detections = json.loads((run_dir / "predictions.json").read_text())
    drawn = {1: [11, 40], 2: [3], 6: [7], 3: [21], 4: [21], 5: [21]}
    annotations = []
    for number in random.choice(len(detections), 200, replace=False):
        x, y, width, height = detections[number]["bbox"]
        box = [*(np.array([x, y]) + random.uniform(-1, 1, 2)).tolist(), width, height]
        category = int(random.choice(drawn[detections[number]["category_id"]]))
        annotations.append(
            {"id": len(annotations) + 1, "image_id": detections[number]["image_id"], "category_id": category}
            | {"bbox": box, "area": width * height, "iscrowd": int(random.random() < 0.1)}
        )
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "test").symlink_to(data.images_path)
    categories = [{"id": id, "name": name} for id, name in THEIRS.items()]
    made = {"images": data.ground_truth["images"], "annotations": annotations, "categories": categories}
    write_json(folder / "annotations" / "instances_test.json", made)
    return folder


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def scored_by_hand(annotations, detections, category_ids):
    """COCO's numbers by pycocotools on their file, which is left as it is."""
    with silence():
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.params.catIds = sorted(category_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_ap_is_that_of_the_same_detections_scored_by_hand_on_their_ids(run_dir, elsewhere):
    """The run's own detections of the same pictures, their ids turned into theirs, by the other evaluator."""
    names = {"disc": "circle", "plus sign": "cross", "dot": ""}  # one class each, so that ids can be turned back
    results = evaluate_on(run_dir, elsewhere, names=names)  # the only split
    back = {1: 11, 2: 3, 6: 7}
    own = json.loads((run_dir / "predictions.json").read_text())
    theirs = [found | {"category_id": back[found["category_id"]]} for found in own if found["category_id"] in back]
    assert 0 < len(theirs) < len(own)
    expected = scored_by_hand(elsewhere / "annotations/instances_test.json", theirs, back.values())
    numbers = [results["detection"][name] for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")]
    assert 0.02 < expected[0] < 0.9
    assert numbers == pytest.approx(expected[:6].tolist(), abs=1e-9)
    assert set(results["detection"]["per_class"]) == {"circle", "square", "cross"}


def test_results_say_what_was_scored_and_are_a_run_folder(run_dir, elsewhere):
    before = (run_dir / "results.json").read_bytes()
    results = evaluate_on(run_dir, elsewhere / "annotations/instances_test.json", names=NAMES)
    folder = run_dir / "test"
    annotated = json.loads((elsewhere / "annotations/instances_test.json").read_text())["annotations"]
    clouds = sum(annotation["category_id"] == 21 for annotation in annotated)
    assert results["matched"] == {"disc": "circle", "SQUARE": "square", "dot": "circle", "plus sign": "cross"}
    assert results["unmapped"] == {"cloud": clouds} and clouds > 0
    assert results["unannotated"] == ["triangle", "star", "ring"] and "lower bound" in results["note"]
    assert results["names"] == {str(label): name for label, name in OURS.items()}  # as pictures of detections need
    assert load_results(folder) == results
    assert {found["category_id"] for found in json.loads((folder / "predictions.json").read_text())} <= {1, 2, 6}
    dataset = build_dataset(load_config(folder / "config.yaml").data, "val")
    assert dataset.names == {1: "circle", 2: "square", 6: "cross"}
    assert len(dataset.frame()) == len(annotated) - clouds
    assert len(load_examples(folder)) == 2 and results_table([run_dir, folder]).shape[0] == 2
    assert (run_dir / "results.json").read_bytes() == before


def test_labels_from_zero(run_dir, elsewhere, tmp_path, tiny_config):
    """A run that numbers its classes 0..n-1 is scored on its labels, class 0 included."""
    cfg = tiny_config({"train.epochs": 1, "data.contiguous": True, "model.classification": "sigmoid"})
    train(cfg, tmp_path / "run")
    own = json.loads((tmp_path / "run" / "predictions.json").read_text())  # with category ids
    results = evaluate_on(tmp_path / "run", elsewhere, split="test", names={"disc": "circle", "dot": ""})
    back = {1: 11, 2: 3}
    theirs = [found | {"category_id": back[found["category_id"]]} for found in own if found["category_id"] in back]
    expected = scored_by_hand(elsewhere / "annotations/instances_test.json", theirs, back.values())
    assert results["detection"]["AP"] == pytest.approx(expected[0], abs=1e-9)
    dataset = build_dataset(load_config(tmp_path / "run" / f"{elsewhere.name}-test" / "config.yaml").data, "val")
    assert dataset.names == {0: "circle", 1: "square"}
    with pytest.raises(ConfigError, match=r"by_id .* data\.contiguous"):
        evaluate_on(tmp_path / "run", elsewhere, split="test", by_id=True)


def test_by_id_takes_ids_for_labels_whatever_the_names(run_dir, elsewhere, tmp_path):
    truth = json.loads((elsewhere / "annotations/instances_test.json").read_text())
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != 21]
    for annotation in truth["annotations"]:
        annotation["category_id"] = AS_OURS[annotation["category_id"]]
    truth["categories"] = [{"id": 1, "name": "cross"}, {"id": 2, "name": "tree"}, {"id": 6, "name": "x"}]
    path = tmp_path / "by_id.json"
    write_json(path, truth)
    results = evaluate_on(run_dir, path, images=elsewhere / "test", by_id=True)
    own = json.loads((run_dir / "predictions.json").read_text())
    expected = scored_by_hand(path, [found for found in own if found["category_id"] in (1, 2, 6)], [1, 2, 6])
    assert results["detection"]["AP"] == pytest.approx(expected[0], abs=1e-9)
    assert results["matched"] == {"cross": "circle", "tree": "square", "x": "cross"}
    truth["categories"].append({"id": 7, "name": "cloud"})
    write_json(path, truth)
    with pytest.raises(DataError, match=r"by_id\.json: category id 7; the run knows 0 to 6"):
        evaluate_on(run_dir, path, images=elsewhere / "test", by_id=True)
    with pytest.raises(ConfigError, match="it takes no names"):
        evaluate_on(run_dir, path, images=elsewhere / "test", by_id=True, names=NAMES)


@pytest.mark.parametrize("layout", ["roboflow", "yolo", "voc", "voc beside pictures"])
def test_data_of_any_layout(run_dir, tmp_path, write_layout, layout):
    root, names = write_layout(tmp_path / f"{layout}-set", layout), {"cat": "circle", "dog": "square"}
    results = evaluate_on(run_dir, root, names=names)  # the run validates on val2017, which is val, or valid
    assert results["images"] == 3 and results["matched"] == names and results["unmapped"] == {}
    dataset = build_dataset(load_config(run_dir / root.name / "config.yaml").data, "val")
    assert dataset.names == {1: "circle", 2: "square"} and len(dataset.frame()) == 2
    assert evaluate_on(run_dir, root, split="test", names=names)["images"] == 2
    if layout == "yolo":
        assert evaluate_on(run_dir, root / "data.yaml", names=names, save_as="named")["images"] == 3


def test_a_run_that_holds_out_images_is_judged_on_the_other_data(elsewhere, tmp_path, tiny_config):
    train(tiny_config({"train.epochs": 1, "data.holdout": 0.3}), tmp_path / "run")
    assert load_results(tmp_path / "run")["images"] < 20
    assert evaluate_on(tmp_path / "run", elsewhere, split="test", names=NAMES)["images"] == 13
    assert evaluate_run(tmp_path / "run", split="val2017")["images"] == 13


def test_faults_are_told_before_the_model_runs(run_dir, elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "evaluate_into", None)
    (tmp_path / "empty").mkdir()
    file = elsewhere / "annotations/instances_test.json"
    for error, message, options in [
        (DataError, r"no split val, only test; .*--split", {"on": elsewhere, "split": "val"}),
        (DataError, r"looked for .*COCO", {"on": tmp_path / "empty"}),
        (DataError, r"instances_test\.json: .*'disk'", {"on": file, "names": {"disk": ""}}),
        (DataError, r"nowhere\.json", {"on": tmp_path / "nowhere.json"}),
        (DataError, r"instances_test\.json: .*--images", {"on": file, "images": tmp_path}),
        (ConfigError, r"split test .*instances_test\.json", {"on": file, "split": "test"}),
        (ConfigError, r"evaluate\.\*", {"on": file, "overrides": {"data.image_size": 32}}),
        (RunError, r"'examples' .*--as", {"on": file, "save_as": "examples"}),
        (RunError, r"'other' .*--as", {"on": file, "save_as": "../other"}),
        (RunError, r"'\.\.' .*--as", {"on": file, "save_as": ".."}),
    ]:
        with pytest.raises(error, match=message):
            evaluate_on(run_dir, **options)
    write_json(run_dir / "taken" / "results.json", {"annotations": "instances_val2017.json"})
    with pytest.raises(RunError, match=r"taken .*--as"):
        evaluate_on(run_dir, file, save_as="taken")


def test_a_run_without_names(run_dir, elsewhere, tmp_path):
    """As an imported checkpoint without them is before it has been evaluated."""
    write_json(tmp_path / "results.json", {"imported": "detr.pth"})
    cfg = load_config(run_dir / "config.yaml")
    save_config(replace(cfg, {"data.classes": None}), tmp_path / "config.yaml")
    with pytest.raises(RunError, match=r"names.*--by-id"):
        evaluate_on(tmp_path, elsewhere, split="test")


def test_words_for_what_was_scored_and_what_was_not(run_dir, elsewhere):
    names = {"disc": "circle", "dot": "", "plus sign": "cross"}
    shown = scored_classes(evaluate_on(run_dir, elsewhere, split="test", names=names, save_as="shown"))
    assert "3 classes scored, disc = circle, SQUARE = square, plus sign = cross" in shown
    assert re.search(r"left out: dot \(\d+ objects\), cloud \(\d+ objects\)", shown)
    assert "their detections left out: triangle, star, ring" in shown and "lower bound" in shown
    assert (run_dir / "shown" / "results.json").exists()
