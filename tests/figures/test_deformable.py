"""Figures of deformable attention and sparse encoders: every function draws small inputs and shows what it promises."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from detrlib.figures import deformable, style
from detrlib.figures.overlay import Scale, overlay

pytestmark = pytest.mark.filterwarnings("error")

IMAGE = np.full((40, 60, 3), 120, np.uint8)
EXTENTS = [np.array([5.0, 7.5]), np.array([2.5, 3.75])]  # the last cells reach beyond the image
SHAPES = [(5, 8), (3, 4)]


def test_sampling_points_are_as_large_as_their_weights(texts):
    locations = np.tile([30.0, 20.0], (2, 2, 3, 1))
    weights = np.zeros((2, 2, 3))
    weights[0, 1, 0], weights[1, 0, 2] = 0.8, 0.2
    box = np.array([24.0, 14, 36, 26])
    views = {title: deformable.Sampling(locations, weights, box, box + 1) for title in "abcde"}
    drawn = deformable.sampling_points(IMAGE, views, columns=3)
    assert {"a", "e", "level 1", "level 2"} <= set(texts(drawn))
    assert [axes.get_visible() for axes in drawn.axes] == [True] * 5 + [False]
    coarse, fine = drawn.axes[0].collections
    assert len(fine.get_offsets()) == len(coarse.get_offsets()) == 1  # the others are exactly zero: crosses
    assert [len(line.get_xdata()) for line in drawn.axes[0].get_lines()] == [5, 5]
    assert to_hex(fine.get_facecolor()[0]).upper() == style.PALETTE[0]
    assert coarse.get_sizes().max() == deformable.LARGEST_POINT == 4 * fine.get_sizes().max()


@pytest.mark.parametrize("box", [[0, 0, 3, 3], [50, 30, 60, 40], [0, 0, 60, 40], [20, 10, 40, 20]])
def test_surroundings_hold_the_box_and_stay_within_the_image(box):
    _, axes = style.figure()
    deformable._look_at(axes, np.array([box], float), np.array([60, 40]))
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert 0 <= left <= box[0] and box[2] <= right <= 60 + 1e-9
    assert 0 <= top <= box[1] and box[3] <= bottom <= 40 + 1e-9
    assert (right - left) / (bottom - top) == pytest.approx(60 / 40)


def test_boxes_with_and_without_captions(texts):
    boxes = np.array([[1.0, 1, 9, 9], [5, 5, 30, 30]])
    drawn = deformable.boxes_on_image(IMAGE, {"one": (boxes, ["star", ""]), "two": (boxes[:0], [])})
    assert sorted(texts(drawn)) == ["one", "star", "two"]
    assert len(drawn.axes[0].patches) == 4  # each with a rim


def test_level_maps_cover_the_image_and_share_their_scale(texts):
    maps = [np.arange(h * w, dtype=float).reshape(h, w) for h, w in SHAPES]
    marked = [np.zeros(shape, bool) for shape in SHAPES]
    marked[0][1, 2] = True
    drawn = deformable.level_maps(IMAGE, {"score": maps, "DAM": maps}, EXTENTS, marked)
    assert {"score, level 1", "DAM, level 1", "level 2"} <= set(texts(drawn))
    first, second = (axes.images[1] for axes in drawn.axes[:2])
    np.testing.assert_allclose(second.get_array(), overlay(maps[1], Scale(0.0, 39.0, logarithmic=False)), atol=1e-5)
    assert [axes.get_ylim() for axes in drawn.axes[4:]] == [(0, 39), (0, 39)]  # a bar for each row
    assert first.get_extent() == [-0.5, 63.5, 39.5, -0.5] and drawn.axes[0].get_xlim() == (-0.5, 59.5)
    (dots,) = drawn.axes[0].get_lines()
    assert dots.get_xydata().tolist() == [[19.5, 11.5]]  # the centre of cell (1, 2), 8 pixels wide


def test_maps_of_nothing_are_drawn():
    deformable.level_maps(IMAGE, {"score": [np.zeros(shape) for shape in SHAPES]}, EXTENTS).canvas.draw()


def test_only_kept_tokens_show_the_image(texts):
    masks = [np.zeros(shape, bool) for shape in SHAPES]
    masks[1][0, 3] = True
    drawn = deformable.kept_tokens(IMAGE, {"rho 0.1": masks}, EXTENTS)
    assert {"rho 0.1, level 1", "level 2"} <= set(texts(drawn))
    hidden = drawn.axes[1].images[1].get_array()[..., 3]
    assert hidden[0, 3] == 0 and (np.delete(hidden.ravel(), 3) > 0.9).all()
