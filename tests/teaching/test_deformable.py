"""Pictures of the walkthrough of deformable attention: every function draws small inputs and shows what it promises."""

import numpy as np
import pytest

from detrlib.teaching import deformable

pytestmark = pytest.mark.filterwarnings("error")

SHAPES = [(5, 8), (3, 4)]


def test_growth_is_logarithmic_and_names_its_lines(texts):
    drawn = deformable.growth({"dense": ([1, 2, 4], [0.1, 1.6, 25.6])}, {"two": 2}, ("side", "cost"))
    (axes,) = drawn.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert {"dense", "two", "side", "cost"} <= set(texts(drawn))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert "0.1" in [tick.get_text() for tick in axes.get_yticklabels()]


def test_locations_lie_over_the_cells_of_each_level(texts):
    locations = np.full((3, 2, 2, 2), 0.5)
    locations[1] = 0.25
    drawn = deformable.locations_on_levels(locations, np.array([0.5, 0.5]), SHAPES)
    assert {"level 1: 5 x 8 cells", "level 2: 3 x 4 cells", "head 3"} <= set(texts(drawn))
    second = drawn.axes[1].get_lines()[1]  # of head 2
    assert (second.get_xdata() == 0.25 * 4).all() and (second.get_ydata() == 0.25 * 3).all()


def test_cell_shares_write_what_is_not_zero(texts):
    shares = np.array([[0.25, 0.0], [0.75, 0.0]])
    drawn = deformable.cell_shares({"a": shares, "b": 2 * shares}, (0.5, 1.2))
    assert sorted(texts(drawn)) == [".25", ".50", ".75", "1.50", "a", "b"]


def test_costs_are_stacked_and_times_are_lines(texts):
    parts = {"backbone": [2.0, 2.0], "encoder": [1.0, 2.0]}
    drawn = deformable.cost_against_ratio(parts, {"encoder": ([0.5, 1], [3, 6])}, {"encoder": 5})
    left, right = drawn.axes
    assert [bar.get_y() for bar in left.patches] == [0, 0, 2, 2]
    assert {"0.5", "dense", "backbone", "milliseconds", "dense, without scores"} <= set(texts(drawn))
    assert right.get_lines()[1].get_ydata() == [5]
