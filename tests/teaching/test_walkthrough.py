"""Pictures of single steps of DETR: every function draws small inputs without a warning and shows what it promises."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from detrlib.figures.style import class_colour
from detrlib.teaching import walkthrough

pytestmark = pytest.mark.filterwarnings("error")

IMAGES = np.full((2, 16, 24, 3), 0.5)
BOX = np.array([[2.0, 3, 9, 12]])


def test_grid_maps_share_their_scale_and_mark_a_cell_each(texts):
    maps = np.stack([np.zeros((3, 4)), np.full((3, 4), 0.5)])
    drawn = walkthrough.grid_maps(maps, ["a", "b"], np.zeros((3, 4), bool), [(0, 1), (2, 3)], "weight")
    assert [axes.images[0].get_clim() for axes in drawn.axes[:2]] == [(0, 0.5)] * 2
    assert [line.get_xydata().tolist() for line in drawn.axes[1].get_lines()] == [[[3, 2]]] * 2  # a cross with its rim
    assert {"a", "b", "weight"} <= set(texts(drawn))


def test_cost_matrix_frames_the_chosen_pairs():
    cost = np.arange(8.0).reshape(4, 2)
    (axes, _) = walkthrough.cost_matrix(cost, np.array([3, 0]), np.array([1, 0]), ["star", "ring"]).axes
    assert np.array_equal(axes.images[0].get_array(), cost.T)
    assert [(patch.get_x(), patch.get_y()) for patch in axes.patches] == [(2.5, 0.5), (-0.5, -0.5)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["star", "ring"]


def test_box_pairs_are_surrounded_by_the_smallest_box_of_both():
    (axes,) = walkthrough.box_pairs(np.array([[[0, 0, 4, 4], [2, 3, 8, 6.0]]]), ["GIoU"]).axes
    hull, *boxes = [tuple(patch.get_bbox().extents) for patch in axes.patches]
    assert hull == (0, 0, 8, 6) and boxes == [(0, 0, 4, 4), (2, 3, 8, 6)]


def test_loss_curve_counts_updates_from_one():
    (line,) = walkthrough.loss_curve([3.0, 2.0]).axes[0].get_lines()
    assert line.get_xydata().tolist() == [[1, 3], [2, 2]]


def test_boxes_before_and_after_have_a_row_per_stage(texts):
    names = {1: "star", 2: "ring"}
    stages = {"before": [(BOX, [2], [0.1])], "after": [(BOX + 1, [1], [0.9])]}
    drawn = walkthrough.boxes_before_and_after(IMAGES[:1], stages, [(BOX, [1])], names)
    assert {"before", "after", "ring 0.10", "star 0.90"} <= set(texts(drawn))
    truth, predicted = drawn.axes[1].patches[1::2]
    assert predicted.get_bbox().extents.tolist() == [3, 4, 10, 13]
    assert to_hex(truth.get_edgecolor()) == to_hex(predicted.get_edgecolor()) == class_colour(1, names).lower()
