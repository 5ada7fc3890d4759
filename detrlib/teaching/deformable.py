"""Pictures of the walkthrough of deformable and sparse encoders: costs, sampling locations over cells, interpolation.

Legend: H heads, L levels, P points, h x w cells of a level, n points of a line.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from detrlib.figures.style import MUTED, PALETTE, figure, styled


@styled
def growth(lines: Mapping[str, tuple], marks: Mapping[str, float], labels: tuple[str, str]) -> Figure:
    """Lines of what grows, on logarithmic axes.

    lines: by name (x [n], y [n]); labels: of the axes; marks: text -> x of a vertical line.
    """
    drawn, axes = figure(0.8, 0.5)
    for (name, (x, y)), colour in zip(lines.items(), PALETTE, strict=False):
        axes.plot(x, y, color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axes.xaxis.set_major_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(x[:: max(1, len(x) // 6)])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    for text, at in marks.items():
        axes.axvline(at, color=MUTED, linewidth=0.6, linestyle=":")
        axes.annotate(
            text, (at, 0.02), (3, 0), xycoords=("data", "axes fraction"), textcoords="offset points", color=MUTED
        )
    axes.grid(True)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return drawn


@styled
def locations_on_levels(locations: np.ndarray, reference: np.ndarray, shapes: Sequence[tuple[int, int]]) -> Figure:
    """Sampling locations [H,L,P,2] of one query over the cells of every level, a colour per head, and its reference.

    Locations and reference [2], which is a star, are (x, y) in 0..1 of every level; shapes: (h, w) of each level.
    """
    drawn, panels = figure(0.9, 1.08 / (len(shapes) + 0.4), ncols=len(shapes), squeeze=False)
    for level, (axes, (h, w)) in enumerate(zip(panels[0], shapes, strict=True)):
        for head, points in enumerate(locations[:, level]):
            colour = PALETTE[head % len(PALETTE)]
            axes.plot(*(points * (w, h)).T, "o-", color=colour, linewidth=0.6, markersize=4.5, label=f"head {head + 1}")
        axes.plot(*(reference * (w, h)), "*", color="black", markersize=11, markeredgecolor="white")
        axes.set(xlim=(0, w), ylim=(h, 0), aspect="equal")
        _draw_borders(axes, h, w)
        axes.spines[:].set_visible(True)
        axes.set_title(f"level {level + 1}: {h} x {w} cells", loc="left")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return drawn


@styled
def cell_shares(panels: Mapping[str, np.ndarray], location: Sequence[float]) -> Figure:
    """A panel per title: numbers [h,w] in shaded cells, dots at centres, a cross at the location.

    location: (x, y) in cells.
    """
    drawn, grid = figure(min(1.0, 0.3 * len(panels)), 1.12 / len(panels), ncols=len(panels), squeeze=False)
    top = max(values.max() for values in panels.values())
    for axes, (title, values) in zip(grid[0], panels.items(), strict=True):
        h, w = values.shape
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * top, extent=(0, w, h, 0))
        for (row, column), value in np.ndenumerate(values):
            if value:
                axes.text(column + 0.5, row + 0.2, f"{value:.2f}".removeprefix("0"), ha="center", va="center")
        axes.plot(*(np.indices((w, h)).reshape(2, -1) + 0.5), ".", color=MUTED, markersize=3)
        axes.plot(*location, "x", color=PALETTE[1], markersize=8, markeredgewidth=2)
        _draw_borders(axes, h, w, color="white")
        axes.set_axisbelow(False)
        axes.spines[:].set_visible(False)
        axes.set_title(title, loc="left")
    return drawn


@styled
def cost_against_ratio(
    parts: Mapping[str, Sequence[float]], times: Mapping[str, tuple], dense: Mapping[str, float]
) -> Figure:
    """Left, GFLOPs by component as stacked bars; right, times (share of tokens [n], milliseconds [n]) as lines.

    parts: component -> GFLOPs at equally spaced shares up to 1, where the encoder is dense. dense: milliseconds of the
    dense model by the names of `times`, drawn as hollow points.
    """
    drawn, (left, right) = figure(1.0, 0.42, ncols=2)
    count = len(next(iter(parts.values())))
    bottom = np.zeros(count)
    for (name, values), colour in zip(parts.items(), [MUTED, *PALETTE], strict=False):
        left.bar(range(count), values, 0.8, bottom=bottom, color=colour, label=name)
        bottom = bottom + values
    left.set_xticks(range(count), [*(f"{(n + 1) / count:g}" for n in range(count - 1)), "dense"])
    left.set(xlabel="share of tokens kept", ylabel="GFLOPs", ylim=(0, 1.5 * bottom.max()))
    handles, names = left.get_legend_handles_labels()
    left.legend(handles[::-1], names[::-1], loc="upper left", ncols=2)
    for (name, (shares, milliseconds)), colour in zip(times.items(), PALETTE, strict=False):
        right.plot(shares, milliseconds, "o-", color=colour, label=name)
        right.plot(1.0, dense[name], "o", color=colour, markerfacecolor="white", markersize=6)
    right.plot([], [], "o", color=MUTED, markerfacecolor="white", markersize=6, label="dense, without scores")
    right.margins(y=0.3)
    right.set(xlabel="share of tokens kept", ylabel="milliseconds", xlim=(0, 1.05), ylim=(0, None))
    right.legend(loc="upper left")
    right.grid(True)
    return drawn


def _draw_borders(axes: Axes, h: int, w: int, **look) -> None:
    """Lines between h x w cells."""
    axes.set_xticks(range(w + 1), [])
    axes.set_yticks(range(h + 1), [])
    axes.tick_params(length=0)
    axes.grid(True, **look)
