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


def test_query_and_keys_draw_an_arrow_and_a_score_for_each_key(texts):
    drawn = walkthrough.query_and_keys(np.array([1.0, 0]), np.array([[1.0, 1], [0, -2]]), np.array([0.7, 0.0]))
    left, right = drawn.axes
    ends = {text.get_text(): text.xy for text in left.texts if text.get_text()}
    assert {name: tuple(end) for name, end in ends.items()} == {"key 1": (1, 1), "key 2": (0, -2), "query": (1, 0)}
    assert [bar.get_height() for bar in right.patches] == [0.7, 0.0] and {"0.70", "score z"} <= set(texts(drawn))


def test_what_is_normalised_together_is_framed(texts):
    token, channel = np.indices((4, 3))
    drawn = walkthrough.normalised_together({"LayerNorm": token, "BatchNorm": channel}, 2)
    frames = [axes.patches[0].get_bbox().extents.tolist() for axes in drawn.axes]
    assert frames == [[0, 0, 3, 1], [0, 0, 1, 4]]  # a token, a channel of both images
    assert {"LayerNorm", "tokens of\nimage 2", "channel"} <= set(texts(drawn))
    assert drawn.axes[0].get_lines()[0].get_ydata() == [2, 2]


def test_box_steps_follow_the_centre_from_panel_to_panel(texts):
    drawn = walkthrough.box_steps(
        IMAGES[0], {"reference": BOX, "layer 1": BOX + np.array([4, 2, 4, 2])}, ["red"], BOX + 1
    )
    first, second = drawn.axes
    assert {"reference", "layer 1"} <= set(texts(drawn))
    assert first.get_xlim() == second.get_xlim() and not first.texts
    (arrow,) = second.texts
    assert (arrow.xyann, tuple(arrow.xy)) == (pytest.approx((5.5, 7.5)), (9.5, 9.5))
    truth, box = second.patches[1:4:2]
    assert truth.get_linestyle() != "-" and box.get_bbox().extents.tolist() == [6, 5, 13, 14]
    assert to_hex(box.get_edgecolor()) == to_hex("red")


@pytest.mark.filterwarnings("error")
def test_a_small_step_has_no_head_larger_than_itself():
    drawn = walkthrough.box_steps(IMAGES[0], {"before": BOX, "same": BOX, "after": BOX + 0.1, "later": BOX + 4})
    drawn.canvas.draw()
    none, small, large = (axes.texts[0].arrow_patch.get_mutation_scale() for axes in drawn.axes[1:])
    assert 0 < none < small < 1 and large == 7
