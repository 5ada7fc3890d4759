"""Figures of what is established: hollow and filled differences, and the spread over seeds."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from detrlib.errors import ConfigError
from detrlib.figures.statistics import differences, spread
from detrlib.figures.style import PALETTE
from detrlib.figures.tables import markdown_table
from detrlib.metrics.seeds import compare_groups
from detrlib.metrics.statistics import compare_runs, comparison_table, with_verdicts

pytestmark = pytest.mark.filterwarnings("error")


def seeds(**groups):
    """A row per run from {group: AP of its seeds 1, 2, ...}."""
    rows = [(group, seed, ap) for group, values in groups.items() for seed, ap in enumerate(values, 1)]
    return pd.DataFrame(rows, columns=["group", "seed", "AP"])


def test_differences_are_hollow_where_not_established(texts):
    table = compare_groups(seeds(a=[0.50, 0.51, 0.49], b=[0.70, 0.71, 0.73], c=[0.6]), ["AP"])
    drawn = differences(table, {"AP": "average precision"})
    (axes,) = drawn.axes
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [to_hex(dot.get_markerfacecolor()).upper() for dot in dots] == [PALETTE[0], "#FFFFFF", "#FFFFFF"]
    assert np.allclose([dot.get_xdata()[0] for dot in dots], table["difference"])
    bars = [line.get_xdata() for line in axes.get_lines() if line.get_marker() == "None"][1:]
    assert np.allclose(bars, table[["low", "high"]], equal_nan=True)
    assert {"a − b", "a − c", "b − c", "average precision", "established", "not established"} <= set(texts(drawn))
    missing = with_verdicts(table.assign(difference=np.nan, p=np.nan))
    assert " –" in texts(differences(missing))
    assert "not established" in texts(differences(missing)) and "established" not in texts(differences(missing))


def test_one_run_or_group_has_no_differences(texts):
    for table in (compare_groups(seeds(a=[0.5, 0.6]), ["AP"]), compare_runs({"a": pd.Series(dtype=float)})):
        assert texts(differences(table)) == ["Nothing to show: there are no two to compare."]
        assert comparison_table(table).empty


def test_spread_has_a_dot_per_seed_and_a_bar_at_the_mean(texts):
    table = seeds(softmax=[0.5, 0.6, np.nan], entmax15=[0.55]).assign(gini=0.5, empty=np.nan)
    drawn = spread(table, ["AP", "gini", "empty"])
    first = drawn.axes[0]
    dots = [rows.get_offsets() for rows in first.collections]
    assert [sorted(row[:, 0]) for row in dots] == [[0.5, 0.6], [0.55]]
    assert [row[0, 1] for row in dots] == [0, 1]  # the first group on top
    assert first.get_ylim() == (1.5, -0.5)
    bars = [line.get_xydata() for line in first.get_lines() if line.get_marker() == "|"]
    assert np.allclose([row[~np.isnan(row).any(1)] for row in bars], [[[0.55, 0]], [[0.55, 1]]])
    assert {"AP", "gini", "softmax", "entmax15"} <= set(texts(drawn)) and len(drawn.axes) == 2
    assert texts(spread(table, ["empty"])) == ["Nothing to show: no run has values of empty."]
    with pytest.raises(ConfigError, match="zeros"):
        spread(table, ["zeros"])


def test_the_comparison_in_markdown():
    table = comparison_table(compare_groups(seeds(a=[0.50, 0.51, 0.49], b=[0.70, 0.71, 0.73]), ["AP"]))
    header, _, row = markdown_table(table, {}).splitlines()
    assert header == "| pair | metric | difference | 95 % interval | paired by seed | p (Holm) | verdict |"
    assert row.startswith("| a − b | AP | −0.213 | −0.245 to −0.182 | ") and row.endswith("| established (3 seeds) |")


def test_panels_do_not_zoom_into_rounding_or_leave_numbers_to_add(texts):
    near, far = (spread(seeds(a=[3.644], b=[value]), ["AP"]) for value in (3.6441, 4.5))
    low, high = near.axes[0].get_xlim()
    assert high - low >= 0.036 and low < 3.644 < high
    assert np.diff(far.axes[0].get_xlim()) < 1.1
    nothing = with_verdicts(
        pd.DataFrame(
            [{"first": "a", "second": "b", "metric": "AP", "difference": -1e-17, "low": 0, "high": 0, "p": 1.0}]
        )
    )
    drawn = differences(nothing)
    drawn.canvas.draw()
    assert np.diff(drawn.axes[0].get_xlim()) >= 1e-3 and not drawn.axes[0].xaxis.get_offset_text().get_text()
