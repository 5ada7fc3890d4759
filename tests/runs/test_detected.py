"""Detections as tables, in COCO's format and for the package supervision."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from detrlib.data.pictures import Picture, find_pictures
from detrlib.errors import ConfigError
from detrlib.runs.detected import Detected, save_detected


@pytest.fixture
def detected():
    """Two detections in a picture of 40 x 20 pixels."""
    return Detected(
        picture="photo.jpg",
        image_id=7,
        size=(20, 40),
        boxes=np.array([[0, 5, 10, 15], [20, 0, 40, 20]], dtype=np.float32),
        scores=np.array([0.9, 0.6], dtype=np.float32),
        labels=np.array([1, 17]),
        names=["person", "cat"],
        queries=np.array([4, 0]),
        source=Picture("photo.jpg", 7, Image.new("RGB", (40, 20))),
        classes={1: "person", 2: "bicycle"},
    )


@pytest.fixture
def nothing():
    empty = np.zeros(0, dtype=np.float32)
    source = find_pictures(np.zeros((4, 4, 3), dtype=np.uint8))[0]
    return Detected("picture 1", 8, (4, 4), np.zeros((0, 4), np.float32), empty, empty.astype(int), [], empty, source)


def test_as_tables(detected, nothing):
    frame = detected.to_frame()
    assert frame[["name", "label", "query"]].values.tolist() == [["person", 1, 4], ["cat", 17, 0]]
    assert frame.loc[1, ["x0", "y0", "x1", "y1"]].tolist() == [20, 0, 40, 20]
    assert list(nothing.to_frame().columns) == list(frame.columns) and nothing.to_frame().empty


def test_in_words_and_in_pixels_of_a_smaller_picture(detected, nothing):
    assert repr(detected) == "Detected(photo.jpg, 20 x 40: person 0.90, cat 0.60)"
    assert "nothing" in repr(nothing) and len(nothing) == 0 and len(detected) == 2
    assert np.array_equal(detected.boxes_in(detected.image(20)), detected.boxes / 2)


def test_in_cocos_format_with_all_that_is_needed_to_read_it(tmp_path, detected, nothing):
    save_detected(tmp_path / "run", [detected, nothing])
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert predictions == detected.to_coco() and predictions[0]["bbox"] == [0, 5, 10, 10]
    content = json.loads((tmp_path / "run" / "images.json").read_text())
    assert [(image["id"], image["width"], image["height"]) for image in content["images"]] == [(7, 40, 20), (8, 4, 4)]
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert names == {1: "person", 2: "bicycle", 17: "cat"}


def test_without_supervision_the_remedy_is_named(detected, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match="pip install supervision"):
        detected.to_supervision()


def test_supervision_takes_them(detected, nothing):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed: pip install supervision")
    given = detected.to_supervision()
    assert isinstance(given, supervision.Detections) and len(given) == 2
    assert np.array_equal(given.xyxy, detected.boxes) and np.array_equal(given.confidence, detected.scores)
    assert given.class_id.tolist() == [1, 17] and given["class_name"].tolist() == ["person", "cat"]
    assert len(given[given.confidence > 0.7]) == 1
    assert nothing.to_supervision().xyxy.shape == (0, 4)
