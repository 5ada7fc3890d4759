"""Curves of precision against AP, and confusion against counts made by eye."""

import numpy as np
import pytest

from detrlib.errors import ConfigError
from detrlib.metrics.bootstrap import average_precision
from detrlib.metrics.coco_format import coco_detections
from detrlib.metrics.curves import ALL, BACKGROUND, confusion, precision_recall
from detrlib.metrics.detection import coco_ap, match_detections
from detrlib.metrics.failures import find_failures

NAMES = {3: "ant", 4: "bee", 9: "cat", 11: "unused"}


@pytest.mark.parametrize("task", ["random_detection_task", "crowded_task"])
def test_the_area_under_a_curve_is_ap(request, task):
    truth, detections = request.getfixturevalue(task)(2)
    matches = match_detections(truth, detections)
    curves = precision_recall(matches, NAMES)
    areas = curves.groupby(["class", "size"])["precision"].mean()
    expected = coco_ap(truth, detections)
    assert areas[ALL, "all"] == pytest.approx(expected["AP50"])
    for name in ("ant", "bee", "cat"):
        assert areas[name, "all"] == pytest.approx(expected["per_class"][name]["AP50"])
    assert "unused" not in set(curves["class"])
    at_75 = precision_recall(matches, NAMES, 0.75).query("size == 'all'")
    assert at_75[at_75["class"] == ALL]["precision"].mean() == pytest.approx(expected["AP75"])
    levels = [precision_recall(matches, NAMES, iou) for iou in np.arange(0.5, 1, 0.05)]
    means = [one[(one["class"] == ALL) & (one["size"] == "small")]["precision"].mean() for one in levels]
    assert np.mean(means) == pytest.approx(average_precision(matches)["AP_small"])
    with pytest.raises(ConfigError, match=r"0\.42"):
        precision_recall(matches, NAMES, 0.42)


def test_the_score_at_a_recall_reaches_it(random_detection_task):
    truth, detections = random_detection_task(5)
    matches = match_detections(truth, detections)
    rows = precision_recall(matches, NAMES).query("`class` == 'ant' and size == 'all'")
    ants = matches.detections.query("category_id == 3")
    total = matches.annotations.query("category_id == 3")["all"].sum()
    for row in rows[rows["score"].notna()].itertuples():
        kept = ants[ants["score"] >= row.score]
        assert ((kept["true_all"] & 1) > 0).sum() / total >= row.recall - 1e-9
    assert (rows[rows["score"].isna()]["precision"] == 0).all()


def test_curves_without_objects_or_detections(random_detection_task):
    truth, detections = random_detection_task(0)
    assert precision_recall(match_detections(truth | {"annotations": []}, detections), NAMES).empty
    assert (precision_recall(match_detections(truth, []), NAMES)["precision"] == 0).all()


def test_confusion_by_eye():
    boxes = [[0, 0, 40, 40], [100, 0, 140, 40], [0, 100, 40, 140], [300, 300, 340, 340]]
    annotations = [
        {
            "id": n + 1,
            "image_id": 1,
            "category_id": category,
            "bbox": [*box[:2], 40, 40],
            "area": 1600,
            "iscrowd": n == 3,
        }
        for n, (box, category) in enumerate(zip(boxes, (3, 4, 9, 9), strict=True))
    ]
    categories = [{"id": id, "name": name} for id, name in NAMES.items()]
    truth = {"images": [{"id": 1}], "categories": categories, "annotations": annotations}
    # An ant that is a bee with more certainty and a better box, and an ant after all; a bee as a cat; nothing on the
    # cat; a bee far from all; a cat of low score; a cat in a crowd.
    found = [[0, 0, 40, 40], [2, 0, 42, 40], [100, 0, 140, 42], [200, 200, 240, 240], [0, 100, 40, 140], boxes[3]]
    scores, guesses = [0.9, 0.8, 0.7, 0.6, 0.2, 0.9], [4, 3, 9, 4, 9, 9]
    failures = find_failures(truth, coco_detections(1, found, scores, guesses))
    table = confusion(failures, NAMES)
    cells = {(row, column): count for row, line in table.iterrows() for column, count in line.items() if count}
    expected = {("ant", "ant"): 1, ("bee", "cat"): 1, ("cat", BACKGROUND): 1, (BACKGROUND, "bee"): 2}
    assert cells == expected
    assert confusion(failures, NAMES, 0.1).loc["cat", "cat"] == 1
    assert confusion(failures, NAMES, 0.3, 0.99).loc["bee", BACKGROUND] == 1
    # A box with two classes, as sigmoids give it, where neither is the object's: the surer one is what it is taken for.
    for scores, taken in (([0.4, 0.6], "cat"), ([0.6, 0.4], "ant")):
        twice = find_failures(truth, coco_detections(1, [boxes[1]] * 2, scores, [3, 9]))
        assert confusion(twice, NAMES).loc["bee", taken] == 1
    for iou in (0, 50, float("nan")):
        with pytest.raises(ConfigError, match=f"iou {iou}"):
            confusion(failures, NAMES, iou=iou)


def test_every_object_and_detection_is_counted_once(crowded_task):
    failures = find_failures(*crowded_task(1))
    table = confusion(failures, NAMES, 0.4)
    objects = failures.annotations.query("fate != 'ignored'")["category_id"].value_counts()
    counted = failures.detections.query("score >= 0.4 and cause != 'ignored'")["category_id"].value_counts()
    for id, name in NAMES.items():
        assert table.loc[name].sum() == objects.get(id, 0) and table[name].sum() == counted.get(id, 0)
