"""Classes of one data set as those of a model: by name, by id, and the annotations that follow them."""

import json
from pathlib import Path

import pytest

from detrlib.data.classes import match_classes, names_by_label, translate
from detrlib.errors import DataError

OURS = {1: "circle", 2: "square", 3: "triangle", 4: "star", 5: "ring", 6: "cross"}
# Their categories: two kinds of circle, a square under its own name in capitals, a cross, and what no run knows.
THEIRS = {11: "disc", 3: "SQUARE", 40: "dot", 7: "plus sign", 21: "cloud"}
NAMES = {"disc": "circle", "dot": "circle", "plus sign": "cross"}
AS_OURS = {11: 1, 3: 2, 40: 1, 7: 6}


def content(categories, annotations=()):
    """An annotation file of one image; annotations are category ids."""
    return {
        "images": [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}],
        "annotations": [{"image_id": 1, "category_id": id, "bbox": [0, 0, 5, 5]} for id in annotations],
        "categories": [{"id": id, "name": name} for id, name in categories.items()],
    }


def test_classes_match_by_given_names_then_by_their_own():
    found = match_classes(content(THEIRS, [11, 21, 21, 7]), OURS, NAMES)
    assert found.labels == AS_OURS and found.names == {1: "circle", 2: "square", 6: "cross"}
    assert found.matched == {"disc": "circle", "SQUARE": "square", "dot": "circle", "plus sign": "cross"}
    assert found.unmapped == {"cloud": 2} and found.unannotated == ["triangle", "star", "ring"]


def test_names_are_equal_up_to_case_spaces_and_underscores_and_may_be_refused():
    theirs = content({1: "Traffic_Light", 2: "mouse", 3: " tv"})
    ours = {0: "tv", 9: "traffic light", 10: "mouse"}  # a label 0, as contiguous ones have
    assert match_classes(theirs, ours).labels == {1: 9, 2: 10, 3: 0}
    without = match_classes(theirs, ours, {"MOUSE": ""})
    assert without.labels == {1: 9, 3: 0} and without.unmapped == {"mouse": 0} and without.unannotated == ["mouse"]


@pytest.mark.parametrize(
    "names, words",
    [
        ({"disk": "circle"}, ("'disk'", "annotation file", "'disc'")),
        ({"disc": "cirkle"}, ("'cirkle'", "model", "'circle'")),
        ({"disc": "oval office"}, ("'oval office'", "model", "circle, square, triangle")),
        ({"SQUARE": ""}, ("disc, SQUARE, dot, plus sign, cloud", "circle, square, triangle", "--map")),
    ],
)
def test_names_that_nobody_has(names, words):
    with pytest.raises(DataError) as error:
        match_classes(content(THEIRS), OURS, names)
    assert all(word in str(error.value) for word in words)


def test_names_that_may_be_two_classes():
    with pytest.raises(DataError, match=r"'CAR' .* car, Car"):
        match_classes(content({1: "CAR"}), {1: "car", 2: "Car"})
    assert match_classes(content({1: "Car"}), {1: "car", 2: "Car"}).labels == {1: 2}


def test_translation_keeps_everything_but_ids_and_what_has_no_partner():
    theirs = content(THEIRS, [11, 21, 40, 3]) | {"info": {"year": 2017}}
    theirs["annotations"][0] |= {"iscrowd": 1, "area": 3}
    before = json.dumps(theirs)
    made = translate(theirs, match_classes(theirs, OURS, NAMES))
    assert json.dumps(theirs) == before
    assert made["categories"] == [{"id": id, "name": OURS[id]} for id in (1, 2, 6)]
    assert [annotation["category_id"] for annotation in made["annotations"]] == [1, 1, 2]
    assert made["annotations"][0] == {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 1, "area": 3}
    assert made["images"] == theirs["images"] and made["info"] == {"year": 2017}
    same = translate(theirs, match_classes(theirs, OURS, by_id=True))
    assert {category["id"]: category["name"] for category in same["categories"]} == THEIRS
    assert [annotation["category_id"] for annotation in same["annotations"]] == [11, 21, 40, 3]


def test_names_as_json_has_them():
    assert names_by_label({"0": "a", "12": "b"}, Path("results.json")) == {0: "a", 12: "b"}


@pytest.mark.parametrize("given", [["a"], {"a": "b"}, {"1": 2}, None, "a"])
def test_names_that_are_none_name_the_file(given):
    with pytest.raises(DataError, match=r"results\.json: names of classes"):
        names_by_label(given, Path("results.json"))
