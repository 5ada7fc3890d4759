"""Reading in blocks gives what reading entry by entry gives, or leaves the file to it."""

import io
import json

import pytest
import torch

from detrlib.data import blocks
from detrlib.data.annotations import read_annotations
from detrlib.data.blocks import OddFile, read_blocks
from detrlib.data.columns import Columns
from detrlib.errors import DataError

IMAGES = [{"id": 3 * n, "file_name": f"ü{n}.png", "width": 40, "height": 30, "license": 1} for n in range(40)]
POLYGON, RUNS = {"segmentation": [[1.5, 2, 3, 4, 5, 6]]}, {"segmentation": {"counts": [3, 4], "size": [30, 40]}}
MORE = (POLYGON, RUNS, {"text": 'a "brace" { and }, ]\\'}, {"attributes": {"tags": ["é"], "more": {}}})
BOXES = [
    {"id": 900 - n, "image_id": 3 * (n % 40), "category_id": 7, "bbox": [1, 2.25, 3, n], "area": n / 3}
    | MORE[n % 4]
    | ({"iscrowd": n % 2} if n % 3 else {})
    for n in range(90)
]
FILE = {
    "info": {"year": 2017, "of": [{"a": 1}, {"b": "}, {"}]},
    "images": IMAGES,
    "annotations": BOXES,
    "categories": [{"id": 7, "name": "dog", "supercategory": "animal"}, {"id": 8, "name": 5}],
    "number": 12,
}
LAYOUTS = {
    "as json writes it": lambda content: json.dumps(content),
    "indented": lambda content: json.dumps(content, indent=4),
    "without spaces": lambda content: json.dumps(content, separators=(",", ":"), ensure_ascii=False),
    "boxes first": lambda content: json.dumps({"annotations": content["annotations"]} | content) + "\n\n",
}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    return all(map(equal, one, other)) if isinstance(one, tuple) else one == other


@pytest.fixture
def both(tmp_path):
    """`both(text)`: what each way of reading makes of a file, or the fault that it raises."""

    def read(text):
        path = tmp_path / "a.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        found = []
        for way in (lambda: read_blocks(io.BytesIO(path.read_bytes())), lambda: Columns.of(read_annotations(path))):
            try:
                found.append(way())
            except (OddFile, DataError) as error:
                found.append(error)
        return found

    return read


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [64, 100, 1000, 2**21])
def test_both_ways_give_the_same_wherever_blocks_end(both, monkeypatch, layout, size):
    monkeypatch.setattr(blocks, "BLOCK", size)
    monkeypatch.setattr(blocks, "MOST", 10**6)
    quick, careful = both(layout(FILE))
    assert equal(quick, careful)
    assert len(quick.boxes.ids) == 90 and quick.rest["info"] == FILE["info"]


@pytest.mark.parametrize("change", [{"annotations": []}, {"annotations": BOXES[:1]}, {"images": IMAGES[:1]}])
def test_short_lists(both, change):
    content = FILE | change
    content["annotations"] = [one | {"image_id": 0} for one in content["annotations"]]
    assert equal(*both(json.dumps(content)))


def test_an_area_that_is_none_is_that_of_the_box(both):
    boxes = [one | {"area": area} for one, area in zip(BOXES, (0, -3, None), strict=False)]
    quick, careful = both(json.dumps(FILE | {"annotations": [*boxes, *BOXES[3:]]}))
    assert equal(quick, careful) and quick.boxes.areas[1] == 3


ODD = {
    "a number as text": {"annotations": [BOXES[0] | {"category_id": "7"}]},
    "a whole number as a fraction": {"annotations": [BOXES[0] | {"category_id": 7.0}]},
    "a flag as text": {"annotations": [BOXES[0] | {"iscrowd": "false"}]},
    "another flag": {"annotations": [BOXES[0] | {"iscrowd": 2}]},
    "no id": {"annotations": [{name: value for name, value in BOXES[0].items() if name != "id"}]},
    "no box": {"annotations": [{name: value for name, value in BOXES[0].items() if name != "bbox"}]},
    "an empty box": {"annotations": [BOXES[0] | {"bbox": []}]},
    "a short box": {"annotations": [BOXES[0] | {"bbox": [1, 2, 3]}]},
    "not a number": {"annotations": [BOXES[0] | {"bbox": [float("nan"), 2, 3, 4]}]},
    "unknown image": {"annotations": [*BOXES, BOXES[0] | {"image_id": 1}]},
    "unknown class": {"annotations": [*BOXES, BOXES[0] | {"category_id": 9}]},
    "image twice": {"images": [*IMAGES, IMAGES[0]]},
    "class twice": {"categories": [{"id": 7, "name": "dog"}] * 2},
    "negative image": {"images": [*IMAGES, IMAGES[0] | {"id": -1}]},
    "large image": {"images": [*IMAGES, IMAGES[0] | {"id": 2**63}]},
    "large annotation": {"annotations": [BOXES[0] | {"id": 2**63}]},
    "no name": {"images": [*IMAGES, IMAGES[0] | {"id": 1, "file_name": ""}]},
    "negative size": {"images": [*IMAGES, IMAGES[0] | {"id": 1, "width": -4}]},
    "no images": {"images": []},
    "no classes": {"categories": []},
    "no list": {"annotations": {}},
    "an entry that is none": {"annotations": [*BOXES, "x"]},
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_what_is_odd_is_left_to_the_careful_way(both, change):
    assert isinstance(both(json.dumps(FILE | change))[0], OddFile)


TEXT = json.dumps(FILE)
MALFORMED = {
    "nothing": "",
    "a list": "[1, 2]",
    "cut short": TEXT[: len(TEXT) // 2],
    "not closed": TEXT[:-1],
    "more behind it": TEXT + "x",
    "a comma too many": TEXT.replace('}], "categories"', '},], "categories"'),
    "a comma too few": TEXT.replace('}, {"id": 899', '} {"id": 899'),
    "no comma between lists": TEXT.replace('], "categories"', '] "categories"'),
    "a brace too many": TEXT.replace('}], "categories"', '}}], "categories"'),
    "a bracket too many": TEXT.replace('}], "categories"', '}]], "categories"'),
    "no number": TEXT.replace("2.25", "2.2.5"),
    "not UTF-8": TEXT.replace("animal", "\u00e9").encode("latin-1", "ignore").replace(b"brace", b"br\xe9ce"),
    "not UTF-8 where nobody reads": TEXT.encode().replace(b"brace", b"br\xe9ce"),
    "a key twice": TEXT.replace('"number": 12', '"images": []'),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("size", [64, 2**21])
def test_what_is_no_json_is_left_to_the_careful_way_which_names_it(both, monkeypatch, text, size):
    monkeypatch.setattr(blocks, "BLOCK", size)
    monkeypatch.setattr(blocks, "MOST", 10**6)
    quick, careful = both(text)
    assert isinstance(quick, OddFile) and isinstance(careful, DataError)


@pytest.mark.parametrize("more", [{"parts": [{"a": 1}, {"b": 2}]}, {"text": "as in [{}, {}]"}])
def test_what_looks_like_the_end_of_a_list_is_left_to_the_careful_way(both, more):
    quick, careful = both(json.dumps(FILE | {"annotations": [one | more for one in BOXES]}))
    assert isinstance(quick, OddFile) and len(careful.boxes.ids) == 90


def test_a_value_that_goes_on_and_on_is_not_held_in_memory(both, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    quick, careful = both(json.dumps(FILE | {"info": "x" * 1000}))
    assert isinstance(quick, OddFile) and len(careful.images.ids) == 40
