"""Figures of what is established: differences with their intervals, and the spread over seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from detrlib.errors import ConfigError
from detrlib.figures.style import DASH, MUTED, PALETTE, Nothing, panels, run_colours, styled

ROW, MANY_ROWS = 0.24, 0.17  # inches of a pair or group, and of one of MANY, so that nine panels fit on a page
MANY = 8


@styled
def differences(comparisons: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Forest plot: a panel per metric, a row per pair with its difference and 95 % interval, and a line at zero.

    comparisons: rows of `metrics.statistics.compare_runs` or `compare_groups`, with columns first, second, metric,
    difference, low, high, verdict. Markers are filled where the difference is established, hollow where it is not, and
    stand without an interval where there is none; a missing difference reads as a dash. labels: what to write above a
    panel instead of the metric.
    """
    if comparisons.empty:
        raise Nothing("there are no two to compare")
    named = comparisons.assign(pair=comparisons["first"] + " − " + comparisons["second"])
    metrics, pairs = named["metric"].unique(), list(named["pair"].unique())
    drawn, grid = _rows_of_panels(len(metrics), pairs, extra=0.85)
    for axes, metric in zip(grid, metrics, strict=True):
        axes.axvline(0, color=MUTED, lw=0.8)
        for row in named[named["metric"] == metric].itertuples():
            y = pairs.index(row.pair)
            if np.isnan(row.difference):
                axes.text(0, y, f" {DASH}", va="center", fontsize=7, color=MUTED)
            axes.plot([row.low, row.high], [y, y], color=PALETTE[0], lw=1.3)
            axes.plot(row.difference, y, **_mark(row.verdict == "established"))
        axes.set_title((labels or {}).get(metric, metric), loc="left")
        axes.set_xlabel("first − second")
        _settle(axes)
    legend = {True: "established", False: "not established"}
    there = [established for established in legend if established in set(named["verdict"] == "established")]
    marks = [Line2D([], [], **_mark(established)) for established in there]
    drawn.legend(marks, [legend[established] for established in there], loc="outside lower right", ncols=2)
    return drawn


def _mark(established: bool) -> dict:
    return {"marker": "o", "ms": 5, "color": PALETTE[0], "mfc": PALETTE[0] if established else "white"}


@styled
def spread(results: pd.DataFrame, metrics: Sequence[str], labels: Mapping[str, str] | None = None) -> Figure:
    """A panel per metric and a row per group: one dot per seed, and a bar at their mean.

    results: a row per run with a column group and the metrics (`runs.results.results_frame`). Missing values
    are left out, and metrics that have no other. Raises ConfigError for a metric that the table
    lacks.
    """
    missing = {"group", *metrics} - set(results.columns)
    if missing:
        raise ConfigError(f"no columns {sorted(missing)} in the results; there are {list(results.columns)}")
    defined = results[list(metrics)].astype(float).dropna(axis=1, how="all")
    if defined.empty:
        raise Nothing(f"no run has values of {', '.join(metrics)}")
    colours = run_colours(results["group"])
    drawn, grid = _rows_of_panels(defined.shape[1], list(colours), extra=0.5)
    for axes, metric in zip(grid, defined, strict=True):
        rows = {"x": defined[metric], "y": results["group"], "hue": results["group"], "palette": colours, "ax": axes}
        sns.stripplot(**rows, jitter=False, size=4, alpha=0.6, legend=False)
        sns.pointplot(
            **rows, errorbar=None, marker="|", markersize=13, markeredgewidth=2, linestyle="none", legend=False
        )
        axes.set(xlabel="", ylabel="")
        axes.set_title((labels or {}).get(metric, metric), loc="left")
        _settle(axes)
    return drawn


def _settle(axes: Axes) -> None:
    """Let x span no less than a hundredth of its largest value, and 0.001: closer up there is only rounding to see."""
    low, high = axes.get_xlim()
    lacking = max(0.01 * max(abs(low), abs(high)), 1e-3) - (high - low)
    if lacking > 0:
        axes.set_xlim(low - lacking / 2, high + lacking / 2)
    axes.ticklabel_format(axis="x", useOffset=False)


def _rows_of_panels(count: int, names: Sequence[str], extra: float) -> tuple[Figure, list[Axes]]:
    """Two or three panels beside each other, which share their rows; extra: inches of a panel beside them."""
    width = 1.0 if count > 1 else 0.7
    row = ROW if len(names) <= MANY else MANY_ROWS
    drawn, grid = panels(count, 2 if count == 4 else 3, row * len(names) + extra, width, sharey=True)
    for axes in grid:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(3))  # small differences have long numbers
    return drawn, grid
