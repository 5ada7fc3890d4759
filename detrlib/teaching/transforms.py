"""Pictures of transforms, from scores to weights: bars, curves, the simplex, Jacobians, Newton's steps, maps; and where
a head rests that has learned to do nothing.

Legend: K keys, n points of a curve, h x w cells. A series whose name holds that of a transform has its colour.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from scipy.special import softmax

from detrlib.figures.overlay import colour_bar, overlay, scale_of
from detrlib.figures.style import COLOURS, MUTED, PALETTE, figure, run_colours, styled

# Scores of three keys @ PLANE are their position in the plane of scores that sum to zero, lengths and angles kept;
# position @ PLANE.T are the scores again, less their mean. The corners of the simplex are at the rows of PLANE.
PLANE = np.array([[-1, -1], [1, -1], [0, 2]]) / np.sqrt([2, 6])
SUPPORT_COLOURS = ["#ffffff", "#6baed6", "#bdd7e7", "#f1f5fc"]  # of no key, one, two and three keys
UP_TO_ONE = scale_of([np.ones((1, 1))])
SQUARE = np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]])  # corners, (x, y)
DASHES = ["-", "--", "-.", (0, (1, 1))]  # a later line over an earlier one leaves it visible


class Plane(NamedTuple):
    """The scores of two keys, or of three less their mean, as points of a plane, and where a transform takes them."""

    support: np.ndarray  # [n,n] number of keys with weight
    square: tuple[float, float, float, float]  # left, right, bottom and top of what is shown
    corners: np.ndarray  # [m,2] of all that weights can be
    moves: tuple[np.ndarray, np.ndarray]  # points [m,2] of scores, and of the weights they become
    of_scores: bool  # its axes are the scores of two keys


@styled
def weight_bars(scores: np.ndarray, weights: Mapping[str, np.ndarray]) -> Figure:
    """Scores [K], and beside them the weights [K] of every transform; a hollow circle is a weight of exactly zero."""
    drawn, panels = figure(1.0, 0.34, ncols=1 + len(weights))
    keys, colours = np.arange(1, len(scores) + 1), run_colours(weights)
    panels[0].bar(keys, scores, color=MUTED, width=0.7)
    panels[0].axhline(0, color=MUTED, linewidth=0.6)
    panels[0].set_title("scores", loc="left")
    top = 1.15 * max(np.max(values) for values in weights.values())
    for axes, (name, values) in zip(panels[1:], weights.items(), strict=True):
        axes.bar(keys, values, color=colours[name], width=0.7)
        zero = np.asarray(values) == 0
        if zero.any():  # a line without points would confuse the layout
            axes.plot(keys[zero], 0 * keys[zero], "o", color=colours[name], markerfacecolor="white", clip_on=False)
        for key, value in zip(keys[~zero], values[~zero], strict=True):
            text = f"{value:.2f}".removeprefix("0") if value >= 0.005 else "<.01"
            axes.annotate(text, (key, value), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        axes.set_title(f"{name}\n{np.sum(~zero)} of {len(keys)} keys", loc="left")
        axes.set(ylim=(0, top), yticks=[])
        axes.spines["left"].set_visible(False)
    for axes in panels:
        axes.set(xticks=keys, xlabel="key")
    return drawn


@styled
def curves(
    panels: Mapping[str, Mapping[str, tuple]],
    labels: Sequence[tuple[str, str]],
    marks: Mapping[str, Mapping[str, tuple]] | None = None,
) -> Figure:
    """A panel per title with a line per name, (x [n], y [n]); one legend for all.

    labels: those of the x and y axis of each panel; marks: points to dot, by title and name, (x [n], y [n]).
    """
    shared = len({y_label for _, y_label in labels}) == 1
    size = (0.75, 0.55) if len(panels) == 1 else (1.0, 0.4)
    drawn, grid = figure(*size, ncols=len(panels), sharey=shared)
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    colours, lines = _colours(names), {}
    for axes, (title, series), (x_label, y_label) in zip(np.atleast_1d(grid), panels.items(), labels, strict=True):
        for name, (x, y) in series.items():
            dashes = DASHES[names.index(name) % len(DASHES)]
            (lines[name],) = axes.plot(x, y, color=colours[name], linestyle=dashes, linewidth=1.8)
        for name, (x, y) in (marks or {}).get(title, {}).items():
            axes.plot(x, y, "o", color=colours[name], markersize=5, clip_on=False, zorder=3)
        axes.set_title(title, loc="left")
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(True)
        if shared:
            axes.label_outer()
    drawn.legend(lines.values(), lines, loc="outside right center", handlelength=2.6)
    return drawn


@styled
def simplex_regions(
    supports: Mapping[str, np.ndarray], extent: float, moves: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Figure:
    """The plane of three scores, coloured by the number of keys with weight; the triangle is the simplex.

    supports: name -> [n,n], on the square from -extent to extent; moves: name -> (scores [m,3], weights [m,3]), drawn
    as arrows from where scores are to the weights they become.
    """
    drawn, panels = figure(1.0, 0.4, ncols=len(supports))
    for axes, (name, support) in zip(panels, supports.items(), strict=True):
        square = (-extent, extent, -extent, extent)
        axes.imshow(support, extent=square, origin="lower", cmap=ListedColormap(SUPPORT_COLOURS), vmin=0, vmax=3)
        _triangle(axes)
        _arrows(axes, *(points @ PLANE for points in moves[name]))
        axes.set_title(name, loc="left")
        axes.set(xlim=square[:2], ylim=square[2:], xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    counts = ["1 key: a corner", "2 keys: an edge", "3 keys: the interior"]
    patches = [Patch(facecolor=c, edgecolor=MUTED, linewidth=0.5) for c in SUPPORT_COLOURS[1:]]
    drawn.legend(patches, counts, loc="outside lower center", ncols=3)
    return drawn


@styled
def simplex_paths(paths: Mapping[str, np.ndarray], title: str) -> Figure:
    """Weights of three keys [n,3] as a path inside the simplex, a dot at every point of it."""
    drawn, axes = figure(0.65, 0.82)
    colours = run_colours(paths)
    _triangle(axes)
    for number, (name, points) in enumerate(paths.items()):
        at = points @ PLANE
        dashes = DASHES[number % len(DASHES)]
        axes.plot(*at.T, linestyle=dashes, color=colours[name], label=name, linewidth=1.8, clip_on=False)
        axes.plot(*at.T, "o", color=colours[name], clip_on=False)
    for key, (x, y) in enumerate(1.12 * PLANE, 1):
        axes.text(x, y, f"key {key}", ha="center", va="center")
    axes.set(xlim=(-0.9, 0.9), ylim=(-0.5, 0.95), aspect="equal")
    axes.axis("off")
    axes.set_title(title, loc="left")
    axes.legend(loc="upper right", handlelength=2.6)
    return drawn


@styled
def jacobians(matrices: Mapping[str, np.ndarray]) -> Figure:
    """Jacobians [K,K], derivative of the weight of the row by the score of the column; white is exactly zero."""
    drawn, panels = figure(1.0, 0.38, ncols=len(matrices))
    most = max(np.abs(matrix).max() for matrix in matrices.values())
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        shown = _draw_jacobian(axes, matrix, most)
        axes.set_title(name, loc="left")
    panels[0].set_ylabel("weight of key")
    drawn.colorbar(shown, ax=panels.tolist(), shrink=0.7, label="derivative")
    return drawn


@styled
def portrait(name: str, scores: np.ndarray, weights: np.ndarray, plane: Plane, jacobian: np.ndarray) -> Figure:
    """A transform in three panels: what it does to a row, to the plane of the scores of two or three keys, and J.

    scores, weights [K]: of a row, hollow bars for softmax, a hollow circle for a weight of exactly zero; jacobian
    [K,K]: of that row, the derivative of the weight of the row by the score of the column, white where exactly zero.
    """
    drawn, (left, middle, right) = figure(1.0, 0.42, ncols=3)
    keys, colour, zero = np.arange(1, len(scores) + 1), run_colours([name])[name], np.asarray(weights) == 0
    left.bar(keys, weights, color=colour, width=0.7)
    left.bar(keys, softmax(scores), width=0.7, facecolor="none", edgecolor="black", linewidth=0.8)
    if zero.any():
        left.plot(keys[zero], 0 * keys[zero], "o", color=colour, markerfacecolor="white", clip_on=False)
    left.set_title(f"{name}\n{np.sum(~zero)} of {len(keys)} keys, sum {np.sum(weights):.2f}", loc="left")
    left.set(xticks=keys, xlabel="key", ylabel="weight; hollow: softmax")
    middle.imshow(
        plane.support, extent=plane.square, origin="lower", cmap=ListedColormap(SUPPORT_COLOURS), vmin=0, vmax=3
    )
    middle.fill(*plane.corners.T, facecolor="none", edgecolor="black", linewidth=1.2)
    _arrows(middle, *plane.moves)
    middle.set(xlim=plane.square[:2], ylim=plane.square[2:])
    if plane.of_scores:
        middle.set(xlabel="score of key 1", ylabel="score of key 2")
    else:
        middle.set(xticks=[], yticks=[])
    middle.set_title("scores to weights", loc="left")
    _draw_jacobian(right, jacobian, np.abs(jacobian).max() or 1.0)
    right.set_title("J", loc="left")
    right.set_ylabel("weight of key")
    counts = ["no key has weight", "1 key", "2 keys", "3 keys"]
    patches = {counts[n]: Patch(fc=SUPPORT_COLOURS[n], ec=MUTED, lw=0.5) for n in np.unique(plane.support)}
    drawn.legend(patches.values(), patches, loc="outside lower center", ncols=4)
    return drawn


@styled
def newton_steps(panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """A function of the threshold, tau [n] and value [n], and Newton's iterates on it, tau [m] and value [m]."""
    drawn, grid = figure(1.0, 0.42, ncols=len(panels))
    for axes, (title, (tau, value, steps, heights)) in zip(grid, panels.items(), strict=True):
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.plot(tau, value, color=PALETTE[0], linewidth=1.8)
        for number, (at, height) in enumerate(zip(steps, heights, strict=True)):
            axes.plot([at, at], [0, height], ":", color=MUTED, linewidth=1)
            if number + 1 < len(steps):
                axes.plot([at, steps[number + 1]], [height, 0], color=PALETTE[1], linewidth=1.2)
            axes.plot(at, height, "o", color=PALETTE[1], markersize=4, zorder=3)
        room = 0.04 * (max(tau) - min(tau))
        for number, at in enumerate(steps):
            if number == 0 or at - steps[number - 1] > room:
                axes.annotate(number, (at, 0), (0, -4), textcoords="offset points", ha="center", va="top")
        axes.set_title(title, loc="left")
        axes.set(xlabel="threshold tau", ylabel="f(tau)", ylim=(-0.22 * float(value.max()), None))
        axes.grid(True)
    return drawn


@styled
def grouped_bars(groups: Mapping[str, Mapping[str, float]], title: str, label: str) -> Figure:
    """For every group a bar per name, its value written on it."""
    drawn, axes = figure(0.8, 0.42)
    names = list(next(iter(groups.values())))
    colours, width = _colours(names), 0.8 / len(names)
    for number, name in enumerate(names):
        positions = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
        bars = axes.bar(
            positions, [group[name] for group in groups.values()], 0.9 * width, color=colours[name], label=name
        )
        axes.bar_label(bars, fmt=lambda value: f"{value:.2f}" if value else "0", fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.1)
    axes.set_ylabel(label)
    axes.set_title(title, loc="left")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return drawn


@styled
def weight_maps(scores: np.ndarray, maps: Mapping[str, np.ndarray], columns: int = 3) -> Figure:
    """Scores [h,w], darker where higher, and the weights [h,w] they become, by title.

    Weights have one logarithmic scale; white is a weight of exactly zero.
    """
    count = 1 + len(maps)
    rows = -(-count // columns)
    height, width = scores.shape
    drawn, panels = figure(1.0, (height / width + 0.2) * rows / columns, nrows=rows, ncols=columns, squeeze=False)
    for axes in panels.flat[count:]:
        axes.remove()
    scale, first, rest = scale_of(list(maps.values())), panels.flat[0], panels.flat[1:count]
    first.imshow(scores, cmap="Greys")
    for axes, values in zip(rest, maps.values(), strict=True):
        axes.imshow(overlay(values, scale))
    for axes, title in zip(panels.flat, ["scores", *maps], strict=False):
        axes.set_title(title, loc="left")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    colour_bar(drawn, list(rest), scale, "weight")
    return drawn


@styled
def resting_places(rows: Mapping[str, Mapping[str, tuple[np.ndarray, float | None]]]) -> Figure:
    """A row of maps for each null key, a column for each transform: mean weights [h,w], and the mass on the null key.

    White is a weight of exactly zero, colours are logarithmic. The largest weight is written into its cell, the mass on
    the null key into a cell beside the map; None: there is no null key.
    """
    columns = list(next(iter(rows.values())))
    drawn, panels = figure(0.95, 0.27 * len(rows), nrows=len(rows), ncols=len(columns), squeeze=False)
    for axes, (null, own) in zip(panels, rows.items(), strict=True):
        axes[0].set_ylabel(null)
        for panel, (weights, mass) in zip(axes, own.values(), strict=True):
            h, w = weights.shape
            panel.imshow(overlay(weights, UP_TO_ONE), extent=(0, w, h, 0))
            row, column = np.unravel_index(weights.argmax(), weights.shape)
            _write(panel, (column + 0.5, row + 0.5), weights.max())
            panel.plot([0, w, w, 0, 0], [0, 0, h, h, 0], color=MUTED, linewidth=0.6, clip_on=False)
            if mass is not None:
                panel.imshow(overlay(np.array([[mass]]), UP_TO_ONE), extent=(w + 0.5, w + 1.5, h, h - 1))
                panel.plot(w + 0.5 + SQUARE[0], h - 1 + SQUARE[1], color=MUTED, linewidth=0.6, clip_on=False)
                _write(panel, (w + 1, h - 0.5), mass)
                panel.text(w + 1, h - 1.1, "null", ha="center", va="bottom", color=MUTED, fontsize=7)
            panel.set(xlim=(0, w + 1.6), ylim=(h, 0), xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
    for axes, name in zip(panels[0], columns, strict=True):
        axes.set_title(name, loc="left")
    colour_bar(drawn, panels.ravel(), UP_TO_ONE, "mean weight")
    return drawn


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Those of the transforms in the names; where there are none, the first of the palette."""
    known = any(transform in name for transform in COLOURS for name in names)
    return run_colours(names) if known else dict(zip(names, cycle(PALETTE), strict=False))


def _triangle(axes: Axes) -> None:
    axes.plot(*PLANE[[0, 1, 2, 0]].T, color="black", linewidth=1.2)


def _arrows(axes: Axes, starts: np.ndarray, ends: np.ndarray) -> None:
    for start, end in zip(starts, ends, strict=True):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": PALETTE[1], "shrinkA": 0})


def _draw_jacobian(axes: Axes, matrix: np.ndarray, most: float) -> AxesImage:
    """A Jacobian [K,K], colours from -most to most; exact zeros are white and say so."""
    keys = np.arange(1, len(matrix) + 1)
    shown = axes.imshow(np.where(matrix == 0, np.nan, matrix), cmap="PuOr_r", vmin=-most, vmax=most)
    for row, column in np.argwhere(matrix == 0):
        axes.text(column, row, "0", ha="center", va="center", fontsize=6, color=MUTED)
    axes.set(xticks=keys - 1, yticks=keys - 1, xticklabels=keys, yticklabels=keys, xlabel="score of key")
    return shown


def _write(axes: Axes, position: tuple[float, float], weight: float) -> None:
    """A weight into its cell, in a colour that is seen on that of the cell."""
    text = "<.01" if 0 < weight < 0.005 else f"{weight:.2f}".removeprefix("0")
    axes.text(*position, text, ha="center", va="center", fontsize=7, color="white" if weight > 0.1 else "black")
