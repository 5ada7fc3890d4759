"""One cleaned list of objects: what is cut, what is left out, and what stays as the file has it."""

import math

import pytest
import torch

from detrlib.data.columns import BoxColumns
from detrlib.data.objects import clean, suggested_image_sizes

SIZES = {1: (40, 30)}


def annotation(box, **fields):
    return {"id": 5, "image_id": 1, "category_id": 7, "bbox": box, "area": 61.5, "iscrowd": 0} | fields


def cleaned(annotations, sizes=SIZES, clip=True):
    """The objects, and what they are as annotations."""
    ids, sizes = torch.tensor(list(sizes)), torch.tensor(list(sizes.values()))
    columns = BoxColumns.of(annotations)
    objects = clean(columns, ids, sizes, clip)
    return objects, objects.among(columns).annotations()


def test_what_lies_in_the_image_is_not_touched():
    given = [annotation([0.1, 0.2, 39.9, 29.8]), annotation([4, 5, 10, 8], iscrowd=1)]
    assert cleaned(given)[1] == given
    assert cleaned(given, {2: (40, 30)})[1] == [], "of images that are not meant"


@pytest.mark.parametrize("clip", [True, False])
def test_boxes_beyond_the_image_are_cut_or_judged_as_they_stand(clip):
    given = annotation([-6, 20, 26, 18], area=26 * 18)
    columns = BoxColumns.of([given])
    objects = clean(columns, torch.tensor([1]), torch.tensor([[40, 30]]), clip)
    cut = {"bbox": [0, 20, 20, 10], "area": 200}
    assert objects.among(columns).annotations() == [given | cut if clip else given]
    assert objects.beyond == {5: 8} and objects.without_area == []
    assert columns.annotations() == [given], "the file's own entry is not changed"


def test_objects_know_their_image_and_keep_the_order_of_the_file():
    given = [annotation([1, 1, 5, 5], id=id, image_id=image) for id, image in ((1, 9), (2, 1), (3, 4), (4, 9))]
    objects, kept = cleaned(given, {1: (40, 30), 9: (40, 30)})
    assert [one["id"] for one in kept] == [1, 2, 4] and objects.images.tolist() == [1, 0, 1]


def test_the_area_of_a_mask_is_kept_where_the_cut_box_holds_it():
    (cut,) = cleaned([annotation([-6, 20, 26, 18], area=150)])[1]
    assert cut["area"] == 150


def test_less_than_half_a_pixel_is_rounding_and_no_word_is_lost_on_it():
    objects, (kept,) = cleaned([annotation([0, 0, 40.01, 30])])
    assert objects.beyond == {} and kept["bbox"] == [0, 0, 40, 30]


@pytest.mark.parametrize(
    "box",
    [[4, 4, 0, 9], [4, 4, 9, -1], [40, 5, 10, 10], [math.nan, 1, 2, 3], [0, 0, math.inf, 5], [-math.inf, 0, 9, 9]],
)
def test_what_has_no_area_or_is_no_number_is_left_out(box):
    objects, kept = cleaned([annotation(box)])
    assert kept == [] and objects.without_area == [5] and objects.empty == 0


def test_an_empty_box_says_that_there_is_no_object():
    objects, kept = cleaned([annotation([])])
    assert kept == objects.without_area == [] and objects.empty == 1


def test_objects_fit_at_the_suggested_sizes():
    sides = torch.linspace(0.1, 1.1, 101)  # a tenth is below 0.2, a tenth above 1.0
    smallest, largest = suggested_image_sizes(sides, stride=8, view=100)
    assert (smallest, largest) == (80, 100)
    assert (sides * smallest >= 2 * 8 - 0.1).float().mean() > 0.89
    assert (sides * largest <= 100.1).float().mean() > 0.89


def test_large_objects_are_for_small_images_and_some_data_has_no_size():
    assert suggested_image_sizes(torch.full((5,), 0.9), 8, 103)[1] == 114
    assert suggested_image_sizes(torch.full((5,), 0.05), 8, 103) == (320, 2060)
    smallest, largest = suggested_image_sizes(torch.tensor([0.01, 0.02, 0.9, 1.0]), 32, 435)
    assert smallest > largest
    assert suggested_image_sizes(torch.full((1,), 4.0), 8, 103) == (32, 32)  # what data.image_size allows
