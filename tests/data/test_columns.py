"""Annotations as columns: nothing is lost on the way there and back."""

import math

import torch

from detrlib.data.columns import BoxColumns, Columns, ImageColumns, Names, position_in

IMAGES = [
    {"id": 9, "file_name": "über/9.png", "width": 40, "height": 30},
    {"id": 2**62, "file_name": "1.png", "height": 30},
    {"id": 0, "file_name": "零.png"},
]
BOXES = [
    {"id": -5, "image_id": 9, "category_id": 7, "bbox": [0.1, 2.0, 3.0, 4.0], "area": 61.5, "iscrowd": 0},
    {"id": 6, "image_id": 0, "category_id": 7, "bbox": [], "area": 0.0, "iscrowd": 1},
]


def test_there_and_back():
    content = {"images": IMAGES, "annotations": BOXES, "categories": [{"id": 7, "name": "dog"}], "info": 1}
    columns = Columns.of(content)
    assert columns.content() == content
    assert columns.images.sizes.tolist() == [[40, 30], [0, 30], [0, 0]]
    assert [columns.images.names[index] for index in range(3)] == columns.images.names.tolist()


def test_nothing_has_columns_too():
    assert BoxColumns.of([]).annotations() == ImageColumns.of([]).records() == Names.of([]).tolist() == []
    assert BoxColumns.of([]).boxes.shape == (0, 4)


def test_an_empty_box_is_told_from_one_without_numbers():
    no_number = BOXES[0] | {"bbox": [math.nan] * 4}
    assert BoxColumns.of([BOXES[1], no_number]).empty.tolist() == [True, False]
    assert BoxColumns.of(BOXES).take(torch.tensor([1])).annotations() == BOXES[1:]


def test_positions_in_a_column_that_rises():
    found = position_in(torch.tensor([2, 5, 9]), torch.tensor([9, 1, 5, 6, 10, 2]))
    assert found.tolist() == [2, -1, 1, -1, -1, 0]
    assert position_in(torch.tensor([], dtype=torch.int64), torch.tensor([1])).tolist() == [-1]
