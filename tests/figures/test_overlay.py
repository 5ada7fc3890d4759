"""What colours of maps claim: zero has none, the smallest weight has one, and panels that are compared share them."""

import numpy as np
import pytest
import torch
from matplotlib.colors import rgb_to_hsv
from matplotlib.text import Text

from detrlib.figures import overlay, style
from detrlib.figures.overlay import Panel, Scale, draw_maps, map_numbers, numbers, scale_of
from detrlib.metrics.localisation import paibb
from detrlib.metrics.sparsity import gini

pytestmark = pytest.mark.filterwarnings("error")

IMAGE = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
TINY = np.finfo(np.float32).smallest_subnormal  # the smallest weight that float32 can tell from zero
WEIGHTS = np.array([[0.0, TINY, 1e-4], [1e-2, 0.1, 0.3]], dtype=np.float32)


@pytest.fixture
def draw():
    """Draws maps in panels beside each other: the figure, and the colours of each map."""

    def draw(*maps, **settings):
        drawn, grid = style.image_panels(IMAGE, 1, len(maps), 1.7, **overlay.room(len(maps)))
        draw_maps(drawn, [Panel(axes, IMAGE, weights) for axes, weights in zip(grid[0], maps, strict=True)], **settings)
        return drawn, [np.asarray(axes.images[1].get_array()) for axes in grid[0]]

    return draw


@pytest.mark.parametrize("scale", [None, Scale(1e-3, 1.0, True), Scale(0.0, 1.0, False)])
def test_exactly_the_zeros_have_no_colour_and_the_smallest_weight_is_seen(scale):
    colours = overlay.overlay(WEIGHTS, scale)
    assert colours.shape == (2, 3, 4)
    assert np.array_equal(colours[..., 3] == 0, WEIGHTS == 0)
    assert colours[..., 3][WEIGHTS > 0].min() >= overlay.FAINTEST - 1e-6
    saturation = rgb_to_hsv(colours[..., :3])[WEIGHTS > 0][:, 1]  # the image below is grey: it has none
    assert saturation.min() > 0.3


def test_more_weight_is_denser_and_darker():
    for logarithmic, spaced in ((True, np.geomspace(1e-4, 1, 9)), (False, np.linspace(0.01, 1, 9))):
        weights = spaced[None]
        colours = overlay.overlay(weights, scale_of([weights], logarithmic))[0]
        assert (np.diff(colours[:, 3]) > 0).all()
        lightness = colours[:, :3] @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(lightness) < 0).all()


def test_a_logarithmic_scale_tells_orders_of_magnitude_apart_where_a_linear_one_does_not():
    weights = np.array([[1e-4, 1e-3, 1e-2, 1e-1]])
    shares = {logarithmic: scale_of([weights], logarithmic).norm()(weights) for logarithmic in (True, False)}
    assert np.diff(shares[True]).min() > 0.2 > 0.01 > np.diff(shares[False]).min()


def test_maps_that_are_compared_share_their_colours_unless_each_has_its_own(draw):
    faint, strong = WEIGHTS / 5, WEIGHTS
    _, (first, second) = draw(faint, strong)
    assert first[1, 2, 3] < second[1, 2, 3]  # the highest of either, 0.06 and 0.3
    np.testing.assert_allclose(draw(faint, strong / 5)[1][0], draw(faint, strong / 5)[1][1])
    _, (first, second) = draw(faint, strong, scale="own", logarithmic=False)
    np.testing.assert_allclose(first[1, 2], second[1, 2])


def test_the_bar_says_which_weights_colours_are(draw, texts):
    drawn, _ = draw(WEIGHTS / 5, WEIGHTS)
    bar = drawn.axes[-1]
    assert bar.get_ylim() == pytest.approx((0.3e-4, 0.3), rel=1e-5) and bar.get_yscale() == "log"
    assert {"weight", "0: no colour"} <= set(texts(drawn))
    drawn, _ = draw(WEIGHTS / 5, WEIGHTS, scale="own", logarithmic=False)
    assert drawn.axes[-1].get_ylim() == (0, 1)
    assert "weight / highest of its map" in texts(drawn)
    assert any("max 0.06" in text for text in texts(drawn))


def test_numbers_below_a_map_are_those_of_the_metrics():
    box, extent = np.array([0.0, 0, 48, 32]), np.array([1.5, 3.0])
    words = numbers(WEIGHTS, IMAGE, box, extent)
    weights = torch.from_numpy(WEIGHTS)
    inside = paibb(weights[None], torch.tensor([[0.25, 0.25, 0.5, 0.5]]), (1.5, 3.0)).item()
    assert words == [
        "5/6 cells",
        f"Gini {gini(weights.flatten()).item():.2f}",
        f"in box {inside:.2f}",
        f"mass {WEIGHTS.sum():.2f}",
    ]
    assert numbers(WEIGHTS, IMAGE) == [*words[:2], words[3]]
    assert numbers(WEIGHTS, IMAGE, box, extent, mass=False) == words[:3]  # of maps that are no weights
    assert numbers(WEIGHTS / WEIGHTS.sum(), IMAGE) == words[:2]


def test_a_map_without_weight_says_so():
    """As beside a null key that takes all: nothing is drawn, and no number is made up."""
    nothing = np.zeros_like(WEIGHTS)
    assert numbers(nothing, IMAGE, np.array([0.0, 0, 48, 32])) == ["no weight on any cell"]
    assert not overlay.overlay(nothing)[..., 3].any()
    assert np.isfinite(map_numbers(nothing[None], np.array([[0.0, 0, 48, 32]]), (64, 96))).all()


def test_every_map_is_measured_beside_its_own_box():
    maps, boxes = np.zeros((2, 1, 4, 6), dtype=np.float32), np.array([[0, 0, 40, 40], [0, 0, 32, 32]])
    maps[0, 0, 1, 1] = 1.0  # within the first box, of 96 x 64 pixels
    maps[1, 0, 3, 5] = maps[1, 0, 0, 5] = 0.5  # far from the second
    support, concentration, inside = map_numbers(maps, boxes, (64, 96)).transpose(2, 0, 1)
    assert support.ravel().tolist() == [1, 2] and concentration[0, 0] > concentration[1, 0]
    assert inside[0, 0] > 0.9 and inside[1, 0] == pytest.approx(0, abs=1e-6)


def test_numbers_below_the_last_row_outlive_the_cropping_of_notebooks():
    drawn, grid = style.image_panels(IMAGE, 3, 3, 1.7, **overlay.room(3))
    draw_maps(drawn, [Panel(axes, IMAGE, WEIGHTS, box=np.array([0, 0, 9, 9])) for axes in grid.flat])
    drawn.canvas.draw()
    kept = drawn.get_tightbbox().transformed(drawn.dpi_scale_trans)  # what `bbox_inches="tight"` leaves
    written = [text for text in drawn.findobj(Text) if "Gini" in text.get_text()]
    assert len(written) == 9 and min(text.get_window_extent().y0 for text in written) >= kept.y0 > 0


def test_a_map_covers_the_image_or_reaches_beyond_it():
    _, axes = style.figure()
    overlay.draw_map(axes, IMAGE, WEIGHTS)
    assert axes.images[1].get_extent() == [-0.5, 95.5, 63.5, -0.5]
    _, axes = style.figure()
    overlay.draw_map(axes, IMAGE, WEIGHTS, extent=np.array([1.6, 3.0]))  # of 2 rows, 1.6 lie on the image
    assert np.allclose(axes.images[1].get_extent(), [-0.5, 95.5, 79.5, -0.5])
    assert axes.get_ylim() == (63.5, -0.5)


def test_a_map_of_nothing_has_no_colour(draw):
    for settings in ({}, {"logarithmic": False}, {"scale": "own"}):
        _, (colours,) = draw(np.zeros((2, 3)), **settings)
        assert (colours[..., 3] == 0).all()


def test_captions_of_a_crowd_keep_inside_the_picture_and_off_each_other(texts):
    """The first ones have places, the others none; few that lie apart all have one."""
    drawn, axes = style.figure(1.0, 1.0, layout=None)
    axes.set_position((0, 0, 1, 1))
    axes.imshow(np.zeros((200, 200, 3), np.uint8))
    corners = np.random.default_rng(0).uniform(0, 150, (120, 2))
    boxes = np.hstack([corners, corners + 40])
    given = boxes, [f"class {n}" for n in range(120)], ["#0072B2"] * 120, (200, 200), style.TEXT_WIDTH
    count = overlay.write_captions(axes, *given)
    assert count == 30 == len(axes.texts) and axes.texts[0].get_text() == "class 0"
    drawn.canvas.draw()
    places = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for n, one in enumerate(places) for other in places[:n])
    inside = drawn.bbox.padded(1)
    assert all(inside.contains(*corner) for place in places for corner in place.corners())
    assert overlay.write_captions(axes, boxes[:1], *(part[:1] for part in given[1:3]), (200, 200), 6) == 1


def test_few_captions_find_room_at_their_own_boxes(texts):
    """At the upper edge within, beside a neighbour's caption further down: never at a box of another class."""
    boxes = np.array([[26, 41, 97, 110], [13, 0, 77, 54], [1, 39, 39, 98], [11, 103, 35, 126.0]])
    drawn, axes = style.figure(0.35, 1.0, layout=None)
    axes.set_position((0, 0, 1, 1))
    axes.imshow(np.zeros((128, 128, 3), np.uint8))
    names = ["star 0.83", "ring 0.80", "triangle 0.79", "ring 0.85"]
    assert overlay.write_captions(axes, boxes, names, ["#0072B2"] * 4, (128, 128), 0.35 * style.TEXT_WIDTH) == 4
    assert texts(drawn) == names
    for text, (x0, y0, x1, y1) in zip(axes.texts, boxes, strict=True):
        x, y = text.get_position()
        assert x0 - 1 <= x <= x1 and y0 <= y <= y1


def test_a_caption_at_the_edge_does_not_cover_a_small_box():
    _, axes = style.figure(0.35, 1.0, layout=None)
    small = np.array([[60, 2, 70, 8.0]])
    assert overlay.write_captions(axes, small, ["star"], ["#0072B2"], (128, 128), 2.3) == 1
    line = 1.6 * overlay.FONT * 128 / 2.3 / 72
    assert axes.texts[0].get_position()[1] - line >= 8 - 1e-9
