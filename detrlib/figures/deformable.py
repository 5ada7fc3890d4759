"""Pictures of deformable attention and of sparse encoders: places, shares of cells, tokens, costs.

Legend: H heads, L levels, P points, h x w cells of a level, n boxes. Images are [rows, columns, 3]; places are (x, y)
and boxes xyxy, both in pixels of the image, whose left and upper borders are at 0.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from detrlib.figures.attention import CAPTION_HEIGHT, MAP_COLOURS, MAP_OPACITY, draw_box
from detrlib.figures.style import MUTED, PALETTE, TEXT_WIDTH, figure, styled

WIDEST_PANEL = 2.1  # inches
LARGEST_POINT = 60.0  # area in square points of the place with the highest weight


class View(NamedTuple):
    """Where one query looks, for `sampling_points`."""

    places: np.ndarray  # [H,L,P,2]
    weights: np.ndarray  # [H,L,P]
    reference: np.ndarray  # the box [4] that it starts from
    box: np.ndarray  # the box [4] that it then predicts


@styled
def growth(lines: Mapping[str, tuple], marks: Mapping[str, float], labels: tuple[str, str]) -> Figure:
    """Lines (x [n], y [n]) on logarithmic axes; marks: text -> x of a vertical line."""
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
def places_on_levels(places: np.ndarray, reference: np.ndarray, shapes: Sequence[tuple[int, int]]) -> Figure:
    """Places [H,L,P,2] of one query over the cells of every level, a colour per head; a star is the reference.

    Places and reference [2] are in 0..1 of every level.
    """
    drawn, panels = figure(0.9, 1.08 / (len(shapes) + 0.4), ncols=len(shapes), squeeze=False)
    for level, (axes, (h, w)) in enumerate(zip(panels[0], shapes, strict=True)):
        for head, points in enumerate(places[:, level]):
            colour = PALETTE[head % len(PALETTE)]
            axes.plot(*(points * (w, h)).T, "o-", color=colour, linewidth=0.6, markersize=4.5, label=f"head {head + 1}")
        axes.plot(*(reference * (w, h)), "*", color="black", markersize=11, markeredgecolor="white")
        axes.set(xlim=(0, w), ylim=(h, 0), aspect="equal")
        axes.set_xticks(range(w + 1), [])
        axes.set_yticks(range(h + 1), [])
        axes.tick_params(length=0)
        axes.grid(True)
        axes.spines[:].set_visible(True)
        axes.set_title(f"level {level + 1}: {h} x {w} cells", loc="left")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return drawn


@styled
def cell_shares(panels: Mapping[str, np.ndarray], place: Sequence[float]) -> Figure:
    """Numbers [h,w] written into cells, shaded; dots are centres, a cross is at `place` (x, y), in cells."""
    drawn, grid = figure(min(1.0, 0.3 * len(panels)), 1.12 / len(panels), ncols=len(panels), squeeze=False)
    top = max(values.max() for values in panels.values())
    for axes, (title, values) in zip(grid[0], panels.items(), strict=True):
        h, w = values.shape
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * top, extent=(0, w, h, 0))
        for (row, column), value in np.ndenumerate(values):
            if value:
                axes.text(column + 0.5, row + 0.2, f"{value:.2f}".removeprefix("0"), ha="center", va="center")
        axes.plot(*(np.indices((w, h)).reshape(2, -1) + 0.5), ".", color=MUTED, markersize=3)
        axes.plot(*place, "x", color=PALETTE[1], markersize=8, markeredgewidth=2)
        axes.set_xticks(range(w + 1), [])
        axes.set_yticks(range(h + 1), [])
        axes.tick_params(length=0)
        axes.grid(True, color="white")
        axes.set_axisbelow(False)
        axes.spines[:].set_visible(False)
        axes.set_title(title, loc="left")
    return drawn


@styled
def sampling_points(image: np.ndarray, views: Mapping[str, View], columns: int = 4) -> Figure:
    """A panel per title: the places where a query looks, in the colour of their level, as large as their weight.

    The dashed box is the one that the query starts from, the solid one what it predicts; a panel shows what is around.
    """
    drawn, panels = _panels(image, -(-len(views) // columns), min(columns, len(views)))
    for axes, (title, view) in zip(panels.flat, views.items(), strict=False):
        _show(axes, image, pale=0.45)
        draw_box(axes, view.reference, MUTED, dashed=True)
        draw_box(axes, view.box, "black")
        levels = view.places.shape[1]
        for level in reversed(range(levels)):  # the finest on top
            points, weights = view.places[:, level].reshape(-1, 2), view.weights[:, level].ravel()
            area = np.maximum(2.0, LARGEST_POINT * weights / view.weights.max())
            rims = 0.4 * (area > 8)  # of white; small points would be nothing else
            axes.scatter(*points.T, s=area, color=PALETTE[level], edgecolor="white", linewidth=rims, zorder=3)
        _look_at(axes, np.stack([view.reference, view.box]), np.array(image.shape[1::-1]))
        axes.set_title(title, loc="left")
    for axes in panels.flat[len(views) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], marker="o", linestyle="", color=PALETTE[level], markersize=5) for level in range(levels)]
    names = [f"level {level + 1}" for level in range(levels)]
    drawn.legend(handles, names, loc="outside lower center", ncols=levels)
    return drawn


@styled
def boxes_on_image(image: np.ndarray, panels: Mapping[str, tuple]) -> Figure:
    """A panel per title with (boxes [n,4], captions of length n, at least as many as are to be written)."""
    drawn, grid = _panels(image, 1, len(panels))
    for axes, (title, (boxes, captions)) in zip(grid[0], panels.items(), strict=True):
        _show(axes, image)
        for number, (box, caption) in enumerate(zip(boxes, captions, strict=True)):
            colour = PALETTE[number % len(PALETTE)]
            draw_box(axes, box, colour)
            if caption:
                axes.text(*box[:2], caption, fontsize=5, color="white", bbox={"facecolor": colour, "lw": 0, "pad": 0.8})
        axes.set_title(title, loc="left")
    return drawn


@styled
def level_maps(
    image: np.ndarray,
    maps: Mapping[str, Sequence[np.ndarray]],
    extents: Sequence[np.ndarray],
    marked: Sequence[np.ndarray] | None = None,
) -> Figure:
    """A row per title with the map [h,w] of every level laid over the image; dots on the cells `marked` [h,w].

    extents: height and width of the image in cells of each level. Colours of a row end at its highest value.
    """
    drawn, panels = _panels(image, len(maps), len(extents))
    size = np.array(image.shape[1::-1])
    for row, (title, levels) in zip(panels, maps.items(), strict=True):
        top = max(values.max() for values in levels)
        for number, (axes, values, extent) in enumerate(zip(row, levels, extents, strict=True)):
            _show(axes, image @ [0.299, 0.587, 0.114], pale=0.4)
            share = np.asarray(values, dtype=np.float32) / max(top, 1e-12)
            _lay(axes, share, extent, size, cmap=MAP_COLOURS, alpha=MAP_OPACITY * np.minimum(1, 5 * share))
            if marked is not None:
                cells = np.argwhere(marked[number])[:, ::-1] + 0.5
                axes.plot(*(cells / extent[::-1] * size).T, "o", color="black", markersize=4, markeredgecolor="white")
            axes.set_title(f"{title}, level 1" if number == 0 else f"level {number + 1}", loc="left")
    return drawn


@styled
def kept_tokens(image: np.ndarray, kept: Mapping[str, Sequence[np.ndarray]], extents: Sequence[np.ndarray]) -> Figure:
    """A row per title: of every level only the cells that are True in its mask [h,w] show the image."""
    drawn, panels = _panels(image, len(kept), len(extents))
    for row, (title, masks) in zip(panels, kept.items(), strict=True):
        for number, (axes, mask, extent) in enumerate(zip(row, masks, extents, strict=True)):
            _show(axes, image)
            hidden = np.where(mask, 0.0, 0.93)
            _lay(axes, np.ones(mask.shape), extent, np.array(image.shape[1::-1]), cmap="Blues_r", alpha=hidden)
            axes.set_title(f"{title}, level 1" if number == 0 else f"level {number + 1}", loc="left")
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
    left.set_xticks(range(count), [*(f"{(n + 1) / count:.1f}" for n in range(count - 1)), "dense"])
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


def _panels(image: np.ndarray, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Panels in the proportions of the image, [rows, columns]."""
    width = min(1.0, columns * WIDEST_PANEL / TEXT_WIDTH)
    panel = width * TEXT_WIDTH / columns
    height = rows * (panel * image.shape[0] / image.shape[1] + CAPTION_HEIGHT)
    return figure(width, height / (width * TEXT_WIDTH), nrows=rows, ncols=columns, squeeze=False)


def _show(axes: Axes, image: np.ndarray, pale: float = 0.0) -> None:
    """The image [rows, columns, 3] or [rows, columns] of 0 to 255, mixed with white by the share `pale`."""
    height, width = image.shape[:2]
    shown = ((1 - pale) * image + pale * 255).astype(np.uint8)
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")


def _look_at(axes: Axes, boxes: np.ndarray, size: np.ndarray) -> None:
    """Show the part of an image of `size` (width, height) around boxes [n,4], in the image's proportions."""
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    share = np.clip(2 * ((high - low) / size).max(), 0.3, 1.0)
    left, top = np.clip((low + high - share * size) / 2, 0, (1 - share) * size)
    axes.set(xlim=(left, left + share * size[0]), ylim=(top + share * size[1], top))


def _lay(axes: Axes, values: np.ndarray, extent: np.ndarray, size: np.ndarray, **look) -> None:
    """Cells [h,w] over an image of `size` (width, height), which is `extent` (height, width) cells large."""
    height, width = np.array(values.shape) / extent * size[::-1]
    axes.imshow(values, vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="nearest", **look)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
