"""The door: every fault of a COCO annotation file is named with its place, and harmless variants are read."""

import codecs
import json

import numpy as np
import pytest
from pycocotools import mask

from detrlib.data.annotations import read_annotations
from detrlib.errors import DataError

OBJECT = {"id": 5, "image_id": 1, "category_id": 7, "bbox": [4, 5, 10, 8], "area": 61.5, "iscrowd": 0}
FILE = {
    "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}],
    "annotations": [OBJECT | {"id": 4}, OBJECT],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog", "supercategory": "animal"}],
}


@pytest.fixture
def write(tmp_path):
    """`write(content)` makes an annotation file of a dictionary, a text or bytes; returns its path."""

    def make(content):
        text = json.dumps(content) if isinstance(content, dict) else content
        (tmp_path / "a.json").write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / "a.json"

    return make


def refused(path, *words):
    """Reading raises a DataError that begins with the path and has all of `words`."""
    with pytest.raises(DataError) as error:
        read_annotations(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_what_is_read_is_kept_and_what_is_not_is_let_go(write):
    more = {"coco_url": "http://a", "flickr_url": "http://b"}
    content = FILE | {
        "info": {"year": 2017},
        "images": [FILE["images"][0] | more],
        "annotations": [OBJECT | {"segmentation": [[1, 2, 3, 4, 5, 6]]}],
    }
    assert read_annotations(write(content)) == FILE | {"info": {"year": 2017}, "annotations": [OBJECT]}


def test_what_is_missing_is_filled_in(write):
    few = {name: OBJECT[name] for name in ("image_id", "category_id", "bbox")}
    nulls = few | {"id": None, "area": None, "iscrowd": None}
    _, first, second = read_annotations(write(FILE | {"annotations": [OBJECT, few, nulls]}))["annotations"]
    assert first == few | {"id": 6, "area": 80, "iscrowd": 0}
    assert second == few | {"id": 7, "area": 80, "iscrowd": 0}


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"iscrowd": "0"}, {}),
        ({"iscrowd": "false"}, {}),
        ({"iscrowd": True}, {"iscrowd": 1}),
        ({"area": "9000"}, {"area": 9000}),
        ({"bbox": ["4", 5, 10.0, "8"]}, {}),
        ({"image_id": "1", "category_id": 7.0}, {}),
        ({"area": 0}, {"area": 80}),
        ({"area": -3}, {"area": 80}),
        ({"area": float("nan")}, {"area": 80}),
        ({"area": float("inf")}, {"area": 80}),
    ],
)
def test_numbers_of_another_spelling_are_read(write, given, expected):
    assert read_annotations(write(FILE | {"annotations": [OBJECT | given]}))["annotations"] == [OBJECT | expected]


POLYGONS = [[4, 5, 14, 5, 14, 13], [6, 2.5, 7, 2.5, 7, 6]]
RUNS = {"size": [30, 40], "counts": [4 * 30 + 5, 8, 22, 8, 1200 - 163]}  # columns 4 and 5, rows 5 to 12


@pytest.mark.parametrize(
    "segmentation, box",
    [
        (POLYGONS, [4, 2.5, 10, 10.5]),
        (POLYGONS[0], [4, 5, 10, 8]),
        (RUNS, [4, 5, 2, 8]),
        (mask.frPyObjects(RUNS, 30, 40) | {"counts": mask.frPyObjects(RUNS, 30, 40)["counts"].decode()}, [4, 5, 2, 8]),
    ],
)
@pytest.mark.parametrize("bbox", [{}, {"bbox": []}, {"bbox": None}])
def test_a_segmentation_without_a_box_has_one(write, segmentation, box, bbox):
    entry = {name: value for name, value in OBJECT.items() if name not in ("bbox", "area")}
    content = read_annotations(write(FILE | {"annotations": [OBJECT, entry | bbox | {"segmentation": segmentation}]}))
    assert content["annotations"] == [OBJECT, entry | {"bbox": box, "area": pytest.approx(box[2] * box[3])}]


@pytest.mark.parametrize("bbox", [[], None])
def test_an_empty_box_is_no_object_and_is_left_for_the_data_set_to_count(write, bbox):
    (found,) = read_annotations(write(FILE | {"annotations": [OBJECT | {"bbox": bbox}]}))["annotations"]
    assert found["bbox"] == []


@pytest.mark.parametrize(
    "entry, words",
    [
        ({}, ("annotations[0].bbox", "segmentation", "id 5")),
        ({"segmentation": [[1, 2, 3]]}, ("annotations[0].segmentation", "3 coordinates", "id 5")),
        ({"segmentation": [["a", "b", "c", "d"]]}, ("annotations[0].segmentation", "id 5")),
        ({"segmentation": {"size": [30, 40]}}, ("annotations[0].segmentation", "counts", "id 5")),
        ({"segmentation": {"size": [30, 40], "counts": [-1, 5]}}, ("annotations[0].segmentation", "id 5")),
        ({"segmentation": {"size": [30, 40], "counts": "0" * 50}}, ("annotations[0].segmentation", "30 x 40", "id 5")),
    ],
)
def test_what_has_neither_a_box_nor_polygons_is_named(write, entry, words):
    without = {name: value for name, value in OBJECT.items() if name != "bbox"}
    refused(write(FILE | {"annotations": [without | entry]}), *words)


def test_sizes_and_names_of_another_spelling_are_read(write):
    image, category = FILE["images"][0] | {"width": "40"}, {"id": 7, "name": 2017}
    content = read_annotations(write(FILE | {"images": [image], "categories": [category]}))
    assert content["images"] == FILE["images"] and content["categories"] == [{"id": 7, "name": "2017"}]


def test_a_byte_order_mark_is_no_fault(write):
    assert read_annotations(write(codecs.BOM_UTF8 + json.dumps(FILE).encode())) == FILE


def test_a_box_that_is_not_a_number_is_read_for_the_data_set_to_drop(write):
    (found,) = read_annotations(write(FILE | {"annotations": [OBJECT | {"bbox": [float("nan"), 1, 2, 3]}]}))[
        "annotations"
    ]
    assert np.isnan(found["bbox"][0])


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"images": [', ("JSON", "line 1", "download")),
        (b"\xff\xfe{", ("JSON", "UTF-8")),
        ("", ("JSON",)),
        ("[1, 2]", ("[1, 2]", "'images'", "'annotations'", "'categories'")),
        ('{"shapes": [], "version": "5.0"}', ("images: ", "shapes", "'annotations'")),
        (FILE | {"images": []}, ("images: ",)),
        (FILE | {"annotations": {}}, ("annotations: ",)),
        (FILE | {"categories": []}, ("categories: ",)),
    ],
)
def test_a_file_that_is_not_coco_is_refused(write, text, words):
    refused(write(text), *words)


@pytest.mark.parametrize(
    "section, fault, words",
    [
        ("annotations", {"image_id": 99}, ("annotations[1].image_id: 99", "'images'", "id 5")),
        ("annotations", {"category_id": 8}, ("annotations[1].category_id: 8", "'categories'", "id 5")),
        ("annotations", {"category_id": [8]}, ("annotations[1].category_id: ", "[8]", "id 5")),
        ("annotations", {"bbox": [1, 2, 3]}, ("annotations[1].bbox: ", "[1, 2, 3]", "id 5", "width, height")),
        ("annotations", {"bbox": [1, 2, 3, "x"]}, ("annotations[1].bbox[3]: ", "'x'", "id 5")),
        ("annotations", {"iscrowd": "maybe"}, ("annotations[1].iscrowd: ", "'maybe'", "id 5")),
        ("annotations", {"area": "large"}, ("annotations[1].area: ", "'large'", "id 5")),
        ("images", {"id": "one"}, ("images[1].id: ", "'one'")),
        ("images", {"id": -1}, ("images[1].id: ", "-1")),
        ("images", {"id": 2**63}, ("images[1].id: ", str(2**63))),
        ("images", {"width": 2**63}, ("images[1].width: ", str(2**63))),
        ("images", {"id": 1}, ("images[1].id: 1", "twice")),
        ("images", {"id": 2, "file_name": ""}, ("images[1].file_name: ", "id 2")),
        ("images", {"id": 2, "width": "wide"}, ("images[1].width: ", "'wide'", "id 2")),
        ("categories", {"id": 3}, ("categories[1].id: 3", "twice")),
        ("categories", {"name": ""}, ("categories[1].name: ", "id 7")),
    ],
)
def test_a_fault_is_named_with_its_place_and_id(write, section, fault, words):
    entries = FILE[section] if len(FILE[section]) > 1 else FILE[section] * 2
    refused(write(FILE | {section: [entries[0], entries[1] | fault]}), *words)


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_an_entry_that_is_no_object_is_named(write, section):
    refused(write(FILE | {section: [*FILE[section], "1.png"]}), f"{section}[{len(FILE[section])}]: ", "'1.png'")


def test_missing_fields_are_named_and_further_faults_are_counted(write):
    refused(write(FILE | {"annotations": [{"bbox": [1, 2, 3, 4]}]}), "annotations[0].image_id: ", "1 more")


def test_a_file_that_is_not_there_is_named(tmp_path):
    refused(tmp_path / "b.json")
    refused(tmp_path)
