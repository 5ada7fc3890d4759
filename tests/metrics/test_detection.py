"""COCO AP against published numbers and against pycocotools."""

import contextlib
import copy
import io
import json

import pandas as pd
import pytest

from detrlib.errors import DataError
from detrlib.metrics.bootstrap import average_precision
from detrlib.metrics.coco_format import box_table, coco_detections
from detrlib.metrics.detection import METRICS, Matches, coco_ap, errors_by_image, match_detections


def test_published_ap(published):
    truth, detections, reference = published
    result = coco_ap(truth, detections)
    expected = {name: reference["expected"][name] for name in METRICS}
    assert {name: result[name] for name in METRICS} == pytest.approx(expected, rel=0, abs=reference["tolerance"])


def test_every_published_case_is_tested(shared_data, published_cases):
    folders = (shared_data / "coco_eval_cases").glob("*/expected.json")
    assert published_cases == {path.parent.name for path in folders}


@pytest.mark.parametrize("engine", ["faster_coco_eval", "pycocotools"])
def test_ap_without_crowds_and_with_areas_of_boxes(engine, shared_data):
    """As in data without masks; what is published of the same detections counts crowds and areas of masks."""
    folder = shared_data / "coco_eval_cases" / "cocoapi_val2014_100"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    objects = [one for one in truth["annotations"] if not one["iscrowd"]]
    truth["annotations"] = [one | {"area": one["bbox"][2] * one["bbox"][3]} for one in objects]
    detections = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    result = coco_ap(truth, detections, engine)
    expected = {"AP": 0.503647, "AP50": 0.696973, "AP75": 0.571667}
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=0, abs=1e-6)


def pycocotools_stats(truth: dict, detections: list[dict]):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco.COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        evaluation = cocoeval.COCOeval(reference, reference.loadRes(copy.deepcopy(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(5))
def test_ap_agrees_with_pycocotools(seed, capsys, random_detection_task):
    truth, detections = random_detection_task(seed)
    given = copy.deepcopy((truth, detections))
    result = coco_ap(truth, detections)
    assert (truth, detections) == given
    assert capsys.readouterr() == ("", "")
    evaluation = pycocotools_stats(truth, detections)
    assert [result[name] for name in METRICS] == pytest.approx(evaluation.stats.tolist(), abs=1e-12)
    assert 0.1 < result["AP"] < 0.9  # neither trivial end

    for position, name in enumerate(["ant", "bee", "cat", "unused"]):
        precision = evaluation.eval["precision"][:, :, position, 0, -1]
        expected = precision.mean() if name != "unused" else -1
        assert result["per_class"][name]["AP"] == pytest.approx(expected)
        assert result["per_class"][name]["AP50"] == pytest.approx(precision[0].mean())


def test_the_official_evaluator_gives_the_same_numbers(capsys, random_detection_task):
    """Chosen by evaluate.engine for a number that is to be published."""
    truth, detections = random_detection_task(1)
    given = copy.deepcopy((truth, detections))
    fast, official = coco_ap(truth, detections), coco_ap(truth, detections, "pycocotools")
    assert (truth, detections) == given and capsys.readouterr() == ("", "")
    assert [official[name] for name in METRICS] == pytest.approx([fast[name] for name in METRICS], abs=1e-12)
    for name, numbers in fast["per_class"].items():
        assert official["per_class"][name] == pytest.approx(numbers, abs=1e-12)
    assert coco_ap(truth, [], "pycocotools") == coco_ap(truth, [])


def test_ap_does_not_depend_on_annotation_ids(random_detection_task):
    assert coco_ap(*random_detection_task(0, first_annotation=0)) == coco_ap(*random_detection_task(0))


def test_ap_without_detections_is_zero_where_there_is_ground_truth(random_detection_task):
    truth, _ = random_detection_task(1)
    truth["annotations"] = [one | {"area": 50.0} for one in truth["annotations"]]
    result = coco_ap(truth, [])
    assert (result["AP"], result["AP_small"], result["AR_100"]) == (0, 0, 0)
    assert (result["AP_medium"], result["AR_large"]) == (-1, -1)
    assert result["per_class"] == {
        "ant": {"AP": 0, "AP50": 0},
        "bee": {"AP": 0, "AP50": 0},
        "cat": {"AP": 0, "AP50": 0},
        "unused": {"AP": -1, "AP50": -1},
    }


def test_ap_without_any_object_is_undefined(random_detection_task):
    truth, detections = random_detection_task(2)
    result = coco_ap(truth | {"annotations": []}, detections)
    assert {result[name] for name in METRICS} == {-1}


def test_detections_of_an_unknown_image_are_refused(random_detection_task):
    truth, _ = random_detection_task(0)
    with pytest.raises(DataError, match="not in the ground truth, such as 999"):
        coco_ap(truth, coco_detections(999, [[0, 0, 5, 5]], [0.5], [3]))


@pytest.mark.parametrize("engine", ["faster_coco_eval", "pycocotools"])
def test_a_table_is_judged_as_a_list_and_left_as_it_is(engine, random_detection_task):
    truth, detections = random_detection_task(2)
    table = box_table(detections)
    given = table.copy()
    assert coco_ap(truth, table, engine) == coco_ap(truth, detections, engine)
    for part, expected in zip(match_detections(truth, table), match_detections(truth, detections), strict=True):
        pd.testing.assert_frame_equal(part, expected)
    pd.testing.assert_frame_equal(table, given)


def test_objects_and_detections_of_classes_or_images_that_are_not_listed_do_not_count(random_detection_task):
    truth, detections = random_detection_task(0)
    listed = truth["categories"][:2]
    ids = [entry["id"] for entry in listed]
    own = {"categories": listed, "annotations": [a for a in truth["annotations"] if a["category_id"] in ids]}
    expected = coco_ap(truth | own, [one for one in detections if one["category_id"] in ids])
    stray = own["annotations"][0] | {"image_id": 999}
    assert (
        coco_ap(truth | {"categories": listed, "annotations": [*truth["annotations"], stray]}, detections) == expected
    )
    nothing = coco_ap(truth | {"categories": []}, detections)
    assert nothing["AP"] == -1 and nothing["per_class"] == {}


def test_matching_in_small_parts_changes_nothing(monkeypatch, crowded_task):
    task = crowded_task(0)
    whole = match_detections(*task)
    for limit, few in (("PAIRS_AT_ONCE", 7), ("IMAGES_AT_ONCE", 5), ("IMAGES_AT_ONCE", 1)):
        monkeypatch.setattr(f"detrlib.metrics.detection.{limit}", few)
        for part, expected in zip(match_detections(*task), whole, strict=True):
            pd.testing.assert_frame_equal(part, expected)


def test_matches_list_every_image_and_compute_ap_of_any_of_them(random_detection_task):
    truth, detections = random_detection_task(3)
    matches = match_detections(truth, detections)
    ids = [image["id"] for image in truth["images"]]
    assert sorted(set(matches.annotations["image_id"])) == ids
    some = ids[::2]
    subset = Matches(*(table[table["image_id"].isin(some)] for table in matches))
    kept = {
        "images": [image for image in truth["images"] if image["id"] in some],
        "annotations": [one for one in truth["annotations"] if one["image_id"] in some],
    }
    expected = coco_ap(truth | kept, [one for one in detections if one["image_id"] in some])
    assert average_precision(subset) == pytest.approx({name: expected[name] for name in METRICS[:6]}, rel=0, abs=1e-9)


def test_images_that_went_worst_come_first():
    """Of image 1 one object is missed and one detection false, of image 2 both are missed, image 3 has none."""
    boxes = {1: [[0, 0, 20, 20], [50, 50, 20, 20]], 2: [[0, 0, 30, 30], [40, 40, 30, 30]], 3: []}
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    truth = {"images": [{"id": image} for image in boxes], "categories": categories}
    flat = [(image, box) for image, of_image in boxes.items() for box in of_image]
    truth["annotations"] = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (image, box) in enumerate(flat, 1)
    ]
    detections = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in (
            (1, 1, [0, 0, 20, 20], 0.9),
            (1, 1, [0, 0, 20, 19], 0.8),  # the same object again
            (2, 1, [0, 0, 30, 30], 0.2),
            (2, 2, [40, 40, 30, 30], 0.9),
        )
    ]
    table = errors_by_image(match_detections(truth, detections))
    assert list(table.reset_index()) == ["image_id", "objects", "missed", "false_positives"]
    assert table.reset_index().values.tolist() == [[2, 2, 2, 1], [1, 2, 1, 1], [3, 0, 0, 0]]
    assert errors_by_image(match_detections(truth, detections), 0.1).loc[2].tolist() == [2, 1, 1]
