"""Figures of results: pandas tables as `detrlib.runs.results` makes them in, a Figure out.

Runs keep their colour across figures (`style.run_colours`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from detrlib.figures.style import DASH, MUTED, PALETTE, Nothing, figure, panels, readable, run_colours, styled
from detrlib.metrics.bootstrap import highest

LABEL_HEIGHT = 0.017  # inches that a direct label takes for each point of its size
FEW_POINTS = 12  # of a curve, which are marked: that of AP has one where it was measured
ALPHA_LIMITS = (1.0, 2.0)  # softmax and sparsemax, the ends of the entmax family that heads choose from
HEAD_SIZE = 6  # points of the numbers of heads, of which many stand below each other
HOLLOW = {"linestyle": (0, (2, 1.5)), "markerfacecolor": "white"}


CURVES = {  # of a training, by name in metrics.jsonl: what to write above them
    "epoch/loss": "total loss",
    "epoch/loss_class": "class loss",
    "epoch/loss_bbox": "L1 loss",
    "epoch/loss_giou": "GIoU loss",
    "epoch/class_error": "class error, %",
    "epoch/cardinality_error": "cardinality error, objects",
    "detection/AP": "AP",
    "detection/AP50": "AP50",
    "detection/AP75": "AP75",
    "detection/AP_small": "AP, small",
    "detection/AP_medium": "AP, medium",
    "detection/AP_large": "AP, large",
}


@styled
def training_curves(frame: pd.DataFrame, metrics: Sequence[str], labels: Mapping[str, str] | None = None) -> Figure:
    """Curves of training: one panel per metric, one line per run, over epochs.

    Several values of a run and epoch, such as those of several seeds, are drawn as their mean and a band from the
    lowest to the highest. Metrics that the frame lacks have no panel; a line below names them.

    frame: columns run, epoch, metric, value; labels: what to write above a panel instead of the name of the metric.
    """
    there = list(frame["metric"].unique())
    words = {metric: (labels or {}).get(metric, metric) for metric in metrics}
    titles = {metric: title for metric, title in words.items() if metric in there}
    missing = f"no values of {'; '.join(title for metric, title in words.items() if metric not in there)}"
    if not titles:
        raise Nothing(f"{missing}; there are {', '.join(there) or 'none at all'}")
    drawn, grid = panels(len(titles), 3, height=1.8)
    _lines_of_metrics(grid, titles, frame, "epoch", errorbar=("pi", 100))  # from the lowest to the highest
    _label_lines(grid[:3][-1])
    for line in (line for axes in grid for line in axes.get_lines() if len(line.get_xdata()) <= FEW_POINTS):
        line.set_marker("o")
    if len(titles) < len(metrics):
        drawn.supxlabel(missing, fontsize=7, color=MUTED)
    return drawn


@styled
def per_layer(frame: pd.DataFrame, metrics: Mapping[str, str]) -> Figure:
    """One panel per metric, one line per run, over decoder layers.

    Values of the first state are drawn solid, those of a second one, such as models before training, dashed. Several
    values of a run and layer (seeds, or images) are drawn as their mean and a band of one standard deviation.

    frame: columns run, metric, layer (from 0), value, and optionally `state`; metrics: {name in the frame: what to
    write above its panel}.
    """
    if frame.empty:
        raise Nothing(f"no values of {', '.join(metrics)}, none of the runs has attention")
    frame = frame.assign(layer=frame["layer"] + 1).rename(columns={"layer": "decoder layer"})
    states = list(frame["state"].unique()) if "state" in frame else []
    drawn, grid = panels(len(metrics), 3, height=2.1, width=min(1.0, 0.25 + 0.35 * len(metrics)))
    first = frame[frame["state"] == states[0]] if states else frame
    if len(states) > 1:
        second = frame[frame["state"] == states[1]]
        _lines_of_metrics(grid, metrics, second, "decoder layer", errorbar=_deviation, marker="o", **HOLLOW)
        drawn.supxlabel(f"solid: {states[0]}, dashed: {states[1]}", fontsize=7, color=MUTED)
    _lines_of_metrics(grid, metrics, first, "decoder layer", errorbar=_deviation, marker="o")
    _label_lines(grid[:3][-1])
    return drawn


def _lines_of_metrics(grid: Sequence[Axes], titles: Mapping[str, str], frame: pd.DataFrame, x: str, **look) -> None:
    """In the panel of each metric the lines of its runs over `x`."""
    colours = run_colours(frame["run"])
    for axes, (metric, title) in zip(grid, titles.items(), strict=True):
        rows = frame[frame["metric"] == metric].dropna(subset="value")
        band = look["errorbar"]
        own = {"errorbar": partial(band, most=highest(metric)) if callable(band) else band}
        draw_runs(axes, rows, x, "value", colours, **look | own)
        axes.set(xlabel=x if axes in grid[-3:] else "", ylabel="")
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))


def _deviation(values: pd.Series, most: float) -> tuple[float, float]:
    """A standard deviation around the mean, cut off where no value can be."""
    return max(values.mean() - values.std(), 0.0), min(values.mean() + values.std(), most)


def draw_runs(axes: Axes, rows: pd.DataFrame, x: str, y: str, colours: Mapping[str, str], **look) -> None:
    """A line per run, labelled with its name, through its means over `x`; look: of the lines, `errorbar` included."""
    before = len(axes.get_lines())
    names = {"x": x, "y": y, "hue": "run", "hue_order": list(colours), "palette": colours}
    look = {"markeredgecolor": None, "errorbar": None, "err_kws": {"alpha": 0.15, "lw": 0}} | look
    sns.lineplot(rows, **names, **look, legend=False, ax=axes)
    there = [run for run in colours if (rows["run"] == run).any()]
    for line, run in zip(axes.get_lines()[before:], there, strict=True):
        line.set_label(run)
    axes.grid(axis="y")


@styled
def bars(table: pd.DataFrame, metrics: Sequence[str], labels: Mapping[str, str] | None = None) -> Figure:
    """One panel per metric, one bar per run, with the value written on each bar.

    Metrics are columns of `table`, runs its index. Missing values read as a dash.
    """
    colours = run_colours(table.index)
    drawn, grid = panels(len(metrics), 4, height=0.65 + 0.2 * len(table), sharey=True)
    for axes, metric in zip(grid, metrics, strict=True):
        values = table[metric].astype(float)
        draw_bars(axes, values, [_short(value) for value in values], [colours[run] for run in table.index])
        axes.set_title((labels or {}).get(metric, metric), loc="left")
    return drawn


def draw_bars(axes: Axes, values: pd.Series, texts: Sequence[str], colours: Sequence[str]) -> None:
    """A bar for each of `values`, named by their index, the first on top, and its text at its end."""
    rows = range(len(values))
    lengths = values.fillna(0).astype(float)
    drawn = axes.barh(rows, lengths, height=0.72, color=colours)
    axes.bar_label(drawn, texts, padding=2, fontsize=7)
    axes.set_yticks(rows, values.index)
    axes.set_ylim(max(len(values), 1) - 0.5, -0.5)
    axes.set_xlim(min(0, lengths.min()), 1.3 * max(lengths.max(), 1e-9))
    axes.tick_params(length=0, labelbottom=False)
    axes.spines["bottom"].set_visible(False)


@styled
def alpha_family(alphas: np.ndarray, weights: np.ndarray) -> Figure:
    """The entmax family: weights [n,K] of every key against alpha [n], and the number of keys with weight."""
    drawn, (left, right) = figure(1.0, 0.4, ncols=2)
    for key, values in enumerate(np.transpose(weights), 1):
        left.plot(alphas, values, color=PALETTE[(key - 1) % len(PALETTE)], linewidth=1.8, label=f"key {key}")
    _label_lines(left, at=0)
    left.set_title("weights: weak keys reach zero one by one", loc="left")
    left.yaxis.tick_right()
    left.spines["left"].set_visible(False)
    right.step(alphas, (np.asarray(weights) > 0).sum(1), color="black", where="post", linewidth=1.8)
    right.set_title("keys with weight", loc="left")
    right.set_ylim(0, np.shape(weights)[1] + 0.5)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.grid(True)
        axes.set_xticks([1, 1.25, 1.5, 1.75, 2], ["1\nsoftmax", "1.25", "1.5\nentmax15", "1.75", "2\nsparsemax"])
        axes.set_xlabel("alpha")
    return drawn


@styled
def alpha_heatmap(alphas: Mapping[str, ArrayLike]) -> Figure:
    """Learned alpha of every head, one panel per run, with the value written in each cell.

    alphas: {run: [layers, heads]}. The colour scale is the same for all figures, from 1 (softmax) to 2 (sparsemax).
    """
    if not alphas:
        raise Nothing("none of the runs has learnable alphas")
    drawn, scale = head_maps(alphas, "cividis", ALPHA_LIMITS, ".2f")
    scale.set_ticks([1, 1.5, 2], labels=["1 softmax", "1.5", "2 sparsemax"])
    return drawn


@styled
def paibb_heatmap(paibb: Mapping[str, ArrayLike | None]) -> Figure:
    """PAIBB of every head, one panel per run, with the value written in each cell.

    paibb: {run: [layers, heads]}, None where it was not measured.
    """
    measured = {run: grid for run, grid in paibb.items() if grid is not None}
    if not measured:
        raise Nothing("PAIBB was measured of none of the runs")
    drawn, scale = head_maps(measured, "cividis", (0.0, 1.0), ".2f")
    scale.set_label("PAIBB")
    return drawn


def head_maps(
    values: Mapping[str, ArrayLike], colours: str, limits: tuple[float, float], text: str
) -> tuple[Figure, Colorbar]:
    """A panel per run with a cell per layer (down) and head (across), and the colour scale of all panels."""
    grids = {run: np.asarray(grid, dtype=float) for run, grid in values.items()}
    height = 0.65 + 0.25 * max(len(grid) for grid in grids.values())
    drawn, axes_of = panels(len(grids), 2, height, width=1.0 if len(grids) > 1 else 0.65)
    for axes, (run, grid) in zip(axes_of, grids.items(), strict=True):
        numbered = pd.DataFrame(grid).rename(index=lambda i: i + 1, columns=lambda i: i + 1)
        draw_cells(axes, numbered, colours, limits, text)
        axes.set_title(run, loc="left")
        axes.set(xlabel="head", ylabel="layer")
    scale = drawn.colorbar(axes.collections[0], ax=axes_of, shrink=0.9, pad=0.02)
    scale.outline.set_visible(False)
    return drawn, scale


def draw_cells(axes: Axes, table: pd.DataFrame, colours: str, limits: tuple[float, float], text: str) -> None:
    """A coloured cell for each value of a table, the value written in it; missing ones read as a dash."""
    sns.heatmap(table, cmap=colours, vmin=limits[0], vmax=limits[1], cbar=False, ax=axes)
    cells = axes.collections[0]
    for (row, column), value in np.ndenumerate(table):
        pale = np.isnan(value) or sns.utils.relative_luminance(cells.to_rgba(value)) > 0.22
        words = DASH if np.isnan(value) else format(value, text)
        look = {"ha": "center", "va": "center", "fontsize": 7, "color": "black" if pale else "white"}
        axes.text(column + 0.5, row + 0.5, words, **look)
    axes.tick_params(length=0, rotation=0)


@styled
def heads_over_training(
    frame: pd.DataFrame, quantity: str = "alpha", limits: tuple[float, float] | None = ALPHA_LIMITS
) -> Figure:
    """A quantity of every head over epochs: a row of panels per run and site, a column per layer, a line per head.

    The numbers of heads stand at the ends of their lines. frame: columns run, epoch, layer, head (both from 0), value,
    and perhaps site; limits: of the quantity, None where it has none.
    """
    if frame.empty:
        raise Nothing(f"no {quantity} of heads was logged, none of the runs has learnable alphas")
    several = "site" in frame and frame["site"].nunique() > 1
    named = frame.assign(row=frame["run"] + "\n" + frame["site"] if several else frame["run"])
    rows, layers, heads = named["row"].unique(), sorted(named["layer"].unique()), sorted(named["head"].unique())
    colours = dict(zip(heads, sns.color_palette("turbo", len(heads)), strict=True))
    height = max(1.45, 0.7 + LABEL_HEIGHT * HEAD_SIZE * len(heads))
    drawn, grid = panels(len(rows) * len(layers), len(layers), height, sharex=True, sharey=True)
    for axes, (row, layer) in zip(grid, product(rows, layers), strict=True):
        lines = named[(named["row"] == row) & (named["layer"] == layer)]
        sns.lineplot(lines, x="epoch", y="value", hue="head", palette=colours, lw=1, legend=False, ax=axes)
        for line, head in zip(axes.get_lines(), sorted(lines.dropna(subset="value")["head"].unique()), strict=True):
            line.set_label(head + 1)
        axes.set(xlabel="")
        axes.set_ylabel(f"{row}\n{quantity}" if layer == layers[0] else "", fontsize=7)
        axes.set_title(f"layer {layer + 1}" if row == rows[0] else "")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if limits:
        grid[0].set(ylim=(limits[0] - 0.04, limits[1] + 0.04), yticks=[limits[0], sum(limits) / 2, limits[1]])
    drawn.supxlabel("epoch; at the ends of lines the numbers of heads", fontsize=8)
    drawn.draw_without_rendering()  # which gives panels the height that labels share
    for axes in grid:
        _label_lines(axes, HEAD_SIZE)
    return drawn


def _short(value: float) -> str:
    """Three significant digits, a dash for a missing value."""
    if np.isnan(value):
        return DASH
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"


def _label_lines(axes: Axes, size: float = 7, at: int = -1) -> None:
    """Write each solid line's label beside its end, or its start (`at` 0), in its colour, moved apart where close."""
    lines = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # labels refer to the limits as they are now
    ends = np.array([(line.get_ydata()[at] - low) / (high - low) for line in lines])
    height = axes.get_position().height * axes.figure.get_figheight()
    for line, position in zip(lines, _spread(ends, LABEL_HEIGHT * size / height), strict=True):
        look = {"va": "center", "fontsize": size, "color": readable(line.get_color())}
        beside = {"x": 1.03, "ha": "left"} if at else {"x": -0.01, "ha": "right"}
        axes.text(**beside, y=position, s=line.get_label(), transform=axes.transAxes, **look)


def _spread(positions: np.ndarray, gap: float) -> np.ndarray:
    """Positions moved as little as needed to lie at least `gap` apart, in the same order."""
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(len(positions))
    # Positions less the gaps between them must not fall: the nearest such sequence is their isotonic regression.
    moved = isotonic_regression(positions[order] - steps).x + steps
    return moved[np.argsort(order)]
