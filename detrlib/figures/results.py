"""Figures of results. Every function takes a pandas table and returns a Figure.

Runs keep their colour across figures (`style.run_colours`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from detrlib.figures.style import MUTED, figure, run_colours, styled

UNDEFINED = -1  # COCO's value for a number that has no ground truth to be computed from
LABEL_HEIGHT = 0.14  # inches taken by one line of a direct label
ALPHA_LIMITS = (1.0, 2.0)  # softmax and sparsemax, the ends of the entmax family that heads choose from


@styled
def training_curves(frame: pd.DataFrame, metrics: Sequence[str], labels: Mapping[str, str] | None = None) -> Figure:
    """One panel per metric, one line per run, over epochs.

    frame: tidy, with columns run, epoch, metric, value; several values of a run and epoch, such as those of several
    seeds, are drawn as their mean and a band from the lowest to the highest. labels: what to write above a panel
    instead of the name of the metric. Raises ValueError for a metric that the frame lacks.
    """
    missing = set(metrics) - set(frame["metric"])
    if missing:
        raise ValueError(f"no values of {sorted(missing)}; there are {sorted(frame['metric'].unique())}")
    colours = run_colours(frame["run"])
    drawn, panels = _panels(len(metrics), columns=3, panel_height=1.5)
    for axes, metric in zip(panels, metrics, strict=True):
        of_metric = frame[frame["metric"] == metric].dropna(subset="value")
        for run, values in of_metric.groupby("run", sort=False):
            line = values.groupby("epoch")["value"].agg(["mean", "min", "max"])
            single = "o" if len(line) == 1 else None
            axes.plot(line.index, line["mean"], color=colours[run], label=run, marker=single)
            _band(axes, line.index, line["min"], line["max"], colours[run])
        axes.set_title((labels or {}).get(metric, metric), loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(axis="y")
    for axes in _bottom_panels(panels, columns=3):
        axes.set_xlabel("epoch")
    _label_lines(panels[:3][-1])
    return drawn


@styled
def bars(table: pd.DataFrame, metrics: Sequence[str], labels: Mapping[str, str] | None = None) -> Figure:
    """One panel per metric (a column of `table`), one bar per run (its index), with the value written on each bar.

    Missing values and COCO's -1 for "undefined" read n/a.
    """
    columns = min(len(metrics), 4)
    colours = run_colours(table.index)
    drawn, panels = _panels(len(metrics), columns, panel_height=0.35 + 0.2 * len(table), sharey=True)
    for axes, metric in zip(panels, metrics, strict=True):
        values = table[metric].where(table[metric] != UNDEFINED).astype(float)
        drawn_bars = axes.barh(
            range(len(table)), values.fillna(0), height=0.7, color=[colours[run] for run in table.index]
        )
        axes.bar_label(drawn_bars, [_short(value) for value in values], padding=2, fontsize=7)
        axes.set_title((labels or {}).get(metric, metric), loc="left")
        axes.set_yticks(range(len(table)), table.index)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=False, length=0)  # the bars carry their values
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(min(0, values.min()) if values.notna().any() else 0, 1.3 * max(values.fillna(0).max(), 1e-9))
    panels[0].invert_yaxis()  # the first run on top; the axis is shared
    return drawn


@styled
def per_layer(frame: pd.DataFrame, metrics: Mapping[str, str]) -> Figure:
    """One panel per metric ({name in the frame: what to write above it}), one line per run, over decoder layers.

    frame: tidy, with columns run, metric, layer (from 0), value, and optionally `state`: values of the first state are
    drawn solid, those of a second one, such as models before training, dashed. Several values of a run and layer
    (seeds, or images) are drawn as their mean and a band of one standard deviation. Raises ValueError when there are
    no values: no run has attention.
    """
    if frame.empty:
        raise ValueError(f"no values of {', '.join(metrics)} to draw: none of the runs has attention")
    colours = run_colours(frame["run"])
    states = list(frame["state"].unique()) if "state" in frame else [None]
    drawn, panels = _panels(len(metrics), columns=3, panel_height=1.8, width=min(1.0, 0.25 + 0.35 * len(metrics)))
    for axes, (metric, title) in zip(panels, metrics.items(), strict=True):
        of_metric = frame[frame["metric"] == metric].dropna(subset="value")
        for state, style in zip(states, ("solid", (0, (2, 1.5))), strict=False):
            of_state = of_metric if state is None else of_metric[of_metric["state"] == state]
            for run, values in of_state.groupby("run", sort=False):
                layers = values.groupby("layer")["value"].agg(["mean", "std"])
                label = run if style == "solid" else None
                filled = colours[run] if style == "solid" else "white"
                line = {"color": colours[run], "linestyle": style, "marker": "o", "markerfacecolor": filled}
                axes.plot(layers.index + 1, layers["mean"], label=label, **line)
                spread = layers["std"].fillna(0)
                _band(axes, layers.index + 1, layers["mean"] - spread, layers["mean"] + spread, colours[run])
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
    for axes in _bottom_panels(panels, columns=3):
        axes.set_xlabel("decoder layer")
    if len(states) > 1:
        drawn.supxlabel(f"solid: {states[0]}, dashed: {states[1]}", fontsize=7, color=MUTED)
    _label_lines(panels[:3][-1])
    return drawn


@styled
def alpha_heatmap(alphas: Mapping[str, ArrayLike]) -> Figure:
    """Learned alpha of every head, one panel per run: {run: [layers, heads]}, with the value written in each cell.

    The colour scale is the same for all figures, from 1 (softmax) to 2 (sparsemax).
    """
    grids = {run: np.asarray(alpha, dtype=float) for run, alpha in alphas.items()}
    columns = min(len(grids), 2)
    layers = max(len(grid) for grid in grids.values())
    width = 1.0 if columns > 1 else 0.65
    drawn, panels = _panels(len(grids), columns, panel_height=0.5 + 0.24 * layers, width=width)
    for axes, (run, grid) in zip(panels, grids.items(), strict=True):
        image = axes.imshow(grid, cmap="cividis", vmin=ALPHA_LIMITS[0], vmax=ALPHA_LIMITS[1], aspect="auto")
        for (layer, head), value in np.ndenumerate(grid):
            shade = "black" if image.norm(value) > 0.55 else "white"
            axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=6)
        axes.set_title(run, loc="left")
        axes.set_xticks(range(grid.shape[1]), range(1, grid.shape[1] + 1))
        axes.set_yticks(range(grid.shape[0]), range(1, grid.shape[0] + 1))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="head", ylabel="layer")
    scale = drawn.colorbar(image, ax=panels, ticks=[1, 1.5, 2], shrink=0.9, pad=0.02)
    scale.ax.set_yticklabels(["1 softmax", "1.5", "2 sparsemax"])
    scale.outline.set_visible(False)
    return drawn


@styled
def heads_over_training(
    frame: pd.DataFrame, quantity: str = "alpha", limits: tuple[float, float] | None = ALPHA_LIMITS
) -> Figure:
    """A quantity of every head over epochs: columns run, epoch, layer, head (both from 0), value.

    A row of panels per run, a column per layer, a line per head. limits: of the quantity, None where it has none.
    Raises ValueError where a column site holds several.
    """
    if "site" in frame and frame["site"].nunique() > 1:
        raise ValueError(f"heads of several sites, {', '.join(frame['site'].unique())}; choose one")
    runs, layers, heads = (list(frame[column].unique()) for column in ("run", "layer", "head"))
    layers, heads = sorted(layers), sorted(heads)
    colours = dict(zip(heads, _head_colours(len(heads)), strict=True))
    drawn, grid = figure(
        aspect=(0.35 + 1.15 * len(runs)) / 6.5,
        nrows=len(runs),
        ncols=len(layers),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for row, run in zip(grid, runs, strict=True):
        for axes, layer in zip(row, layers, strict=True):
            values = frame[(frame["run"] == run) & (frame["layer"] == layer)]
            for head, line in values.groupby("head"):
                axes.plot(line["epoch"], line["value"], color=colours[head], lw=1, label=f"head {head + 1}")
            axes.grid(axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        row[0].set_ylabel(f"{run}\n{quantity}")
    if limits:
        grid[0, 0].set(ylim=(limits[0] - 0.04, limits[1] + 0.04), yticks=[limits[0], sum(limits) / 2, limits[1]])
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title(f"layer {layer + 1}")
    drawn.supxlabel("epoch", fontsize=8)
    drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center", handlelength=1.2)
    return drawn


def _short(value: float) -> str:
    """Three significant digits, "n/a" for a missing value."""
    if np.isnan(value):
        return "n/a"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"


def _panels(
    count: int, columns: int, panel_height: float, width: float = 1.0, **arguments
) -> tuple[Figure, list[Axes]]:
    """`count` axes in rows of `columns`, each `panel_height` inches high; places left over stay empty."""
    columns = min(columns, count)
    rows = -(-count // columns)
    aspect = rows * (panel_height + 0.3) / (width * 6.5)
    drawn, grid = figure(width, aspect, nrows=rows, ncols=columns, squeeze=False, **arguments)
    for axes in grid.flat[count:]:
        axes.remove()
    return drawn, list(grid.flat[:count])


def _bottom_panels(panels: Sequence[Axes], columns: int) -> Sequence[Axes]:
    """Panels with nothing below them: the last one of every column."""
    return panels[-columns:]


def _band(axes: Axes, x: pd.Index, low: pd.Series, high: pd.Series, colour: str) -> None:
    """A pale band where `low` and `high` differ; one that has no height would leave a trace in print."""
    if (high > low).any():
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def _head_colours(count: int) -> list:
    """Heads have no order and no meaning shared between layers; evenly spaced hues keep any number apart."""
    from matplotlib import colormaps

    return list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def _label_lines(axes: Axes) -> None:
    """Write each line's label to the right of its end, in its colour, moved apart where ends lie close together."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]  # others have no label
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # labels refer to the limits as they are now
    ends = np.array([(line.get_ydata()[-1] - low) / (high - low) for line in lines])
    height = axes.get_position().height * axes.figure.get_figheight()
    for line, place in zip(lines, _spread(ends, LABEL_HEIGHT / height), strict=True):
        axes.text(
            1.03, place, line.get_label(), transform=axes.transAxes, va="center", fontsize=7, color=line.get_color()
        )


def _spread(positions: np.ndarray, gap: float) -> np.ndarray:
    """Positions moved as little as needed to lie at least `gap` apart, in the same order."""
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(len(positions))
    # Pool neighbours whose order would be violated, as in isotonic regression of the positions less the gaps.
    blocks: list[list[float]] = []
    for value in positions[order] - steps:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks]) + steps
    placed = np.empty_like(moved)
    placed[order] = moved
    return placed
