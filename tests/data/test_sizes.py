"""Image sizes that follow from the objects: which they are, and that the objects then fit."""

import torch

from detrlib.data.sizes import suggested_image_sizes


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
