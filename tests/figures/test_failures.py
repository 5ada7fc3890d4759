"""Figures of what goes wrong: bars of shares, and the images behind one."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from detrlib.errors import ConfigError
from detrlib.figures import failures as drawing
from detrlib.figures.style import NOTHING
from detrlib.metrics.coco_format import coco_detections
from detrlib.metrics.curves import ALL, BACKGROUND
from detrlib.metrics.failures import find_failures, lost_samples, lost_table


@pytest.fixture
def failed():
    """One picture with two objects: the first with another class, the second with nothing near it."""
    annotations = [
        {"id": n, "image_id": 4, "category_id": 1, "bbox": [20 + 60 * n, 10, 30, 30], "area": 900, "iscrowd": 0}
        for n in (0, 1)
    ]
    categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    truth = {"images": [{"id": 4}], "categories": categories, "annotations": annotations}
    boxes = [[21, 10, 50, 40], [5, 60, 15, 70]]
    found = coco_detections(4, boxes, [0.75, 0.5], [2, 1])
    image = np.zeros((80, 120, 3), dtype=np.uint8)
    names = {1: "ant", 2: "bee"}
    return SimpleNamespace(failures=find_failures(truth, found), categories=names, image=lambda _: image)


def test_bars_are_the_shares_in_points(failed, texts):
    table = lost_table(failed.failures, lost_samples(failed.failures, 5))
    drawn = drawing.lost_shares({"softmax": table, "sparsemax": table})
    left, right = drawn.axes
    bars = left.patches[:6]  # of the first run
    assert [bar.get_width() for bar in bars] == pytest.approx((100 * table["lost"][:6]).tolist(), nan_ok=True)
    assert len(right.patches) == 4
    assert {"softmax", "sparsemax", "place", "false negatives"} <= set(texts(drawn))
    assert drawing.lost_shares({}).get_label() == NOTHING


def test_the_images_behind_a_share_show_what_failed(failed, texts):
    told = texts(drawing.behind_share(failed, "class"))
    assert "image 4: 1 failure" in told and "bee for ant 0.75" in told
    assert "ant 0.50" in texts(drawing.behind_share(failed, "background"))
    assert "ant" in texts(drawing.behind_share(failed, "miss"))
    assert drawing.behind_share(failed, "duplicate").get_label() == NOTHING
    with pytest.raises(ConfigError, match="posture"):
        drawing.behind_share(failed, "posture")


def test_curves_are_drawn_by_size_and_by_class(half_curves, texts):
    curves = half_curves
    by_size = drawing.precision_recall(curves)
    assert [axes.get_title(loc="left") for axes in by_size.axes] == ["all", "small"]
    line = by_size.axes[0].get_lines()[0]
    assert line.get_ydata() == pytest.approx(curves[(curves["class"] == ALL) & (curves["size"] == "all")]["precision"])
    assert {"ant", "softmax"} <= set(texts(drawing.precision_recall(curves, by="class")))
    assert len(drawing.precision_recall(curves, by="class", most=1).axes) == 1
    nothing = drawing.precision_recall(curves[:0])
    assert nothing.get_label() == NOTHING and "predictions.json" in texts(nothing)[0], "where the data may have gone"


@pytest.fixture
def half_curves():
    """Half of the ants found, one after a false one, of one run."""
    rows = [(ALL, "all"), (ALL, "small"), ("ant", "all"), ("ant", "small")]
    precision = np.where(np.linspace(0, 1, 101) <= 0.5, 0.5, 0.0)
    parts = [
        pd.DataFrame({"class": name, "size": size, "recall": np.linspace(0, 1, 101), "precision": precision})
        for name, size in rows
    ]
    return pd.concat(parts).assign(run="softmax")


def test_confusion_is_written_as_shares_of_rows(texts):
    labels = ["ant", "bee", "cat", BACKGROUND]
    counts = pd.DataFrame([[3, 1, 0, 0], [0, 2, 0, 2], [0, 0, 5, 0], [0, 1, 0, 0]], labels, labels)
    told = texts(drawing.confusion_matrix(counts))
    assert {"0.75", "0.25", "0.50", "ant (4)", "bee (4)", "background (1)"} <= set(told)
    fewer = texts(drawing.confusion_matrix(counts, most=2))
    assert "cat (5)" not in fewer and "bee (4)" in fewer
    assert drawing.confusion_matrix(counts * 0).get_label() == NOTHING
