"""Pictures of the measures: every function draws small inputs without a warning and shows what it promises."""

import numpy as np
import pytest

from detrlib.teaching import measures

pytestmark = pytest.mark.filterwarnings("error")

IMAGES = [np.full((16, 24, 3), value, np.uint8) for value in (0, 100, 255)]


def test_a_small_map_has_its_numbers_and_its_box_in_cells(texts):
    cells = np.array([[0.0, 0.25], [0.5, 0.25]])
    drawn = measures.cells_and_surface(cells, np.full((20, 20), 0.3), (0.5, 0, 2, 1))
    left, right = drawn.axes
    assert {"0", "0.25", "0.5", "cells", "interpolated"} <= set(texts(drawn))
    assert left.images[0].get_extent() == right.images[0].get_extent() == [0, 2, 2, 0]
    assert [patch.get_bbox().bounds for patch in right.patches] == [(0.5, 0, 1.5, 1)] * 2


@pytest.mark.parametrize("maps", [[], [np.eye(2, 3)] * 3])
def test_images_stand_in_a_row_with_their_boxes_and_maps(maps, texts):
    drawn = measures.row_of_images(IMAGES, ["a", "b", "c"], [np.array([2, 2, 8, 8])] * 3, maps)
    assert texts(drawn) == ["a", "b", "c"] and len(drawn.axes) == 3
    assert [len(axes.images) for axes in drawn.axes] == [2 if maps else 1] * 3
    assert all(axes.patches[-1].get_bbox().bounds == (2, 2, 6, 6) for axes in drawn.axes)


def test_many_images_take_several_rows():
    drawn = measures.row_of_images(IMAGES * 4, list("abcdefghijkl"))
    assert len(drawn.axes) == 12 and drawn.axes[0].get_gridspec().get_geometry() == (3, 5)


def test_resampled_values_stand_under_their_interval(texts):
    values = np.linspace(0, 1, 50)
    drawn = measures.resampled(
        {"first": values, "second": values}, dict.fromkeys(("first", "second"), (0.1, 0.5, 0.8)), "AP"
    )
    assert {"first", "second", "AP"} <= set(texts(drawn))
    bar, dot = drawn.axes[1].get_lines()
    assert list(bar.get_xdata()) == [0.1, 0.8] and list(dot.get_xdata()) == [0.5]
