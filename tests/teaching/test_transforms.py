"""Figures of the transforms: every function draws small inputs without a warning and shows what it promises."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from detrlib.figures import style
from detrlib.teaching import transforms

pytestmark = pytest.mark.filterwarnings("error")


def test_the_plane_keeps_lengths_and_angles_of_scores_without_their_mean():
    scores = np.random.default_rng(0).normal(size=(5, 3))
    centred = scores - scores.mean(1, keepdims=True)
    assert np.allclose(scores @ transforms.PLANE @ transforms.PLANE.T, centred)
    assert np.allclose((scores @ transforms.PLANE) @ (scores @ transforms.PLANE).T, centred @ centred.T)
    assert np.allclose(np.eye(3) @ transforms.PLANE, transforms.PLANE)


def test_weight_bars_write_weights_and_mark_exact_zeros(texts):
    weights = {"softmax": np.array([0.7, 0.297, 0.003]), "sparsemax": np.array([1.0, 0.0, 0.0])}
    drawn = transforms.weight_bars(np.array([2.0, 1.0, -3.0]), weights)
    assert {"softmax\n3 of 3 keys", "sparsemax\n1 of 3 keys", ".70", ".30", "<.01", "1.00"} <= set(texts(drawn))
    _, soft, sparse = drawn.axes
    assert to_hex(soft.patches[0].get_facecolor()).upper() == style.COLOURS["softmax"]
    assert not soft.get_lines() and list(sparse.get_lines()[0].get_xdata()) == [2, 3]
    widths = [axes.get_position().width for axes in drawn.axes]
    assert max(widths) < 1.3 * min(widths) and sum(widths) > 0.6  # panels fill the figure


@pytest.mark.parametrize("count", [1, 2])
def test_curves_have_one_legend_and_a_colour_per_transform(count):
    line = ([0, 1], [0.0, 0.5])
    panels = {f"panel {n}": {"softmax, alpha 1": line, "sparsemax, alpha 2": line} for n in range(count)}
    drawn = transforms.curves(panels, [("x", "y")] * count, {"panel 0": {"softmax, alpha 1": ([0.5], [0.2])}})
    (legend,) = drawn.legends
    assert len(drawn.axes) == count
    assert [text.get_text() for text in legend.get_texts()] == ["softmax, alpha 1", "sparsemax, alpha 2"]
    lines = drawn.axes[0].get_lines()
    assert [line.get_color() for line in lines] == [style.COLOURS[n] for n in ("softmax", "sparsemax", "softmax")]


def test_pictures_of_the_simplex(texts):
    corner, start = np.array([[1.0, 0, 0]]), np.array([[2.0, -1, -1]])
    supports = {name: np.full((4, 4), n) for n, name in ((3, "softmax"), (1, "sparsemax"))}
    drawn = transforms.simplex_regions(supports, 2.0, dict.fromkeys(supports, (start, corner)))
    assert {"softmax", "sparsemax", "2 keys: an edge"} <= set(texts(drawn))
    assert [axes.images[0].get_array().max() for axes in drawn.axes] == [3, 1]
    drawn = transforms.simplex_paths({"softmax": np.vstack([corner, corner[:, ::-1]])}, "a path")
    assert {"a path", "key 3", "softmax"} <= set(texts(drawn))


def test_jacobians_share_a_scale_and_write_zeros():
    drawn = transforms.jacobians({"softmax": np.full((2, 2), 0.1), "sparsemax": np.diag([0.5, 0.0])})
    assert [axes.images[0].get_clim() for axes in drawn.axes[:2]] == [(-0.5, 0.5)] * 2
    assert [text.get_text() for text in drawn.axes[1].texts] == ["0"] * 3 and not drawn.axes[0].texts


def test_newton_steps_are_numbered_where_there_is_room():
    tau = np.linspace(-1, 0, 5)
    panel = (tau, -tau - 0.5, np.array([-1.0, -0.6, -0.59]), np.array([0.5, 0.1, 0.09]))
    drawn = transforms.newton_steps({"a": panel, "b": panel})
    assert [text.get_text() for text in drawn.axes[0].texts] == ["0", "1"]


def test_grouped_bars_write_their_values(texts):
    drawn = transforms.grouped_bars(
        {"+1": {"softmax": 0.61, "sparsemax": 0.8}, "-inf": {"softmax": 0, "sparsemax": 0}}, "t", "y"
    )
    assert {"0.61", "0.80", "0", "+1", "-inf"} <= set(texts(drawn))


def test_weight_maps_leave_zeros_white():
    weights = np.array([[0.0, 0.4], [0.6, 0.0]])
    drawn = transforms.weight_maps(np.eye(2), {"a": weights, "b": weights / 2, "c": weights})
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["scores", "a", "b", "c", ""]  # and a bar
    first, second = (axes.images[0].get_array() for axes in drawn.axes[1:3])
    assert (first[..., 3] == 0).tolist() == [[True, False], [False, True]]
    assert first[1, 0, 3] > second[1, 0, 3]  # one scale for all


@pytest.mark.parametrize("of_scores", [True, False])
def test_a_portrait_shows_row_plane_and_jacobian(texts, of_scores):
    support, corners = np.array([[0, 1], [1, 2]]), np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    moves = np.array([[-1.0, 0.5]]), np.array([[0.0, 0.5]])
    plane = transforms.Plane(support, (-1, 2, -1, 2), corners, moves, of_scores)
    jacobian = np.array([[0.2, 0.0, -0.1], [0.0, 0.0, 0.0], [-0.1, 0.0, 0.2]])
    drawn = transforms.portrait("softpick", np.array([1.0, 0, -1]), np.array([0.5, 0.0, 0.2]), plane, jacobian)
    left, middle, right = drawn.axes
    assert {"softpick\n2 of 3 keys, sum 0.70", "no key has weight", "1 key", "2 keys"} <= set(texts(drawn))
    assert "3 keys" not in texts(drawn)  # no point of this plane has so many
    assert [bar.get_height() for bar in left.patches[:3]] == [0.5, 0.0, 0.2]
    assert sum(bar.get_height() for bar in left.patches[3:]) == pytest.approx(1)  # softmax
    assert list(left.get_lines()[0].get_xdata()) == [2]  # exactly zero
    assert middle.get_images()[0].get_array().tolist() == support.tolist()
    assert bool(middle.get_xlabel()) == of_scores
    assert [text.get_text() for text in right.texts] == ["0"] * 5


def test_resting_places_write_the_largest_weight_and_what_the_null_key_has(texts):
    corner, nothing = np.array([[0.8, 0.1], [0.1, 0.0]]), np.zeros((2, 2))
    rows = {"without": {"softmax": (corner, None)}, "with": {"softmax": (nothing, 1.0)}}
    drawn = transforms.resting_places(rows)
    assert {"softmax", ".80", "without", ".00", "1.00", "null", "with", "mean weight"} <= set(texts(drawn))
    assert len(drawn.axes[0].get_images()) == 1 and len(drawn.axes[1].get_images()) == 2


def test_lines_of_no_transform_have_the_first_colours():
    line = ([0, 1], [0.0, 0.5])
    drawn = transforms.curves({"panel": {"head 1": line, "head 2": line}}, [("x", "y")])
    assert [line.get_color() for line in drawn.axes[0].get_lines()] == style.PALETTE[:2]
