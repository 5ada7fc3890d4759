"""Figures of what is established: differences with their intervals, and the spread over seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from detrlib.figures.style import MUTED, PALETTE, figure, run_colours, styled

ROW = 0.24  # inches of a pair or group
UNDEFINED = -1  # COCO's value for a number that has no ground truth to be computed from


@styled
def differences(comparisons: pd.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Forest plot: a panel per metric, a row per pair with its difference and 95 % interval, and a line at zero.

    comparisons: rows of `metrics.statistics.compare_runs` or `compare_groups`. Markers are filled where the difference
    is established, hollow where it is not, and stand without an interval where there is none; a missing difference
    reads n/a. labels: what to write above a panel instead of the metric.
    """
    metrics = list(dict.fromkeys(comparisons["metric"]))
    pairs = list(dict.fromkeys(comparisons["first"] + " − " + comparisons["second"]))
    drawn, panels = _rows_of_panels(len(metrics), len(pairs), extra=0.85)
    for axes, metric in zip(panels, metrics, strict=True):
        rows = comparisons[comparisons["metric"] == metric]
        axes.axvline(0, color=MUTED, lw=0.8)
        for _, row in rows.iterrows():
            place = pairs.index(f"{row['first']} − {row['second']}")
            if np.isnan(row["difference"]):
                axes.text(0, place, " n/a", va="center", fontsize=7, color=MUTED)
                continue
            axes.plot([row["low"], row["high"]], [place, place], color=PALETTE[0], lw=1.3)
            fill = PALETTE[0] if row["verdict"] == "established" else "white"
            axes.plot(row["difference"], place, marker="o", ms=5, color=PALETTE[0], mfc=fill)
        axes.set_title((labels or {}).get(metric, metric), loc="left")
        axes.set_xlabel("first − second")
        axes.margins(x=0.08)
    _name_rows(panels, pairs)
    marks = [
        Line2D([], [], marker="o", ms=5, color=PALETTE[0], mfc=fill, label=label)
        for label, fill in (("established", PALETTE[0]), ("not established", "white"))
    ]
    drawn.legend(handles=marks, loc="outside lower right", ncols=2)
    return drawn


@styled
def spread(results: pd.DataFrame, metrics: Sequence[str], labels: Mapping[str, str] | None = None) -> Figure:
    """A panel per metric and a row per group: one dot per seed, and a bar at their mean.

    results: a row per run with columns group, seed and the metrics (`frames.results_frame`). Missing values and COCO's
    -1 for "undefined" are left out. Raises ValueError for a metric that the table lacks.
    """
    missing = {"group", *metrics} - set(results.columns)
    if missing:
        raise ValueError(f"no columns {sorted(missing)} in the results; there are {list(results.columns)}")
    groups = list(dict.fromkeys(results["group"]))
    colours = run_colours(groups)
    drawn, panels = _rows_of_panels(len(metrics), len(groups), extra=0.5)
    for axes, metric in zip(panels, metrics, strict=True):
        for place, group in enumerate(groups):
            values = results.loc[results["group"] == group, metric].astype(float)
            values = values[values != UNDEFINED].dropna()
            axes.plot(values, np.full(len(values), place), "o", color=colours[group], ms=4, alpha=0.6, mew=0)
            if len(values):
                axes.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=colours[group], lw=2)
        axes.set_title((labels or {}).get(metric, metric), loc="left")
        axes.margins(x=0.08)
    _name_rows(panels, groups)
    return drawn


def _rows_of_panels(panels: int, rows: int, extra: float) -> tuple[Figure, list]:
    """At most three panels beside each other, which share their rows; extra: inches of a panel beside its rows."""
    columns = min(panels, 3)
    lines = -(-panels // columns)
    width = 1.0 if columns > 1 else 0.7
    aspect = lines * (ROW * rows + extra) / (width * 6.5)
    drawn, grid = figure(width, aspect, nrows=lines, ncols=columns, squeeze=False, sharey=True)
    for axes in grid.flat[panels:]:
        axes.remove()
    return drawn, list(grid.flat[:panels])


def _name_rows(panels: Sequence, names: Sequence[str]) -> None:
    for axes in panels:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
