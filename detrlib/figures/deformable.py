"""Pictures of deformable attention and of sparse encoders: sampling locations, proposals, scores and kept tokens.

Legend: H heads, L levels, P points, h x w cells of a level, n boxes. Images are [rows, columns, 3]; sampling locations
are (x, y) and boxes xyxy, both in pixels of the image, whose left and upper borders are at 0.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from detrlib.figures.attention import draw_box, draw_image
from detrlib.figures.overlay import BAR_WIDTH, Panel, Sharing, draw_maps, lay_cells
from detrlib.figures.style import MUTED, PALETTE, image_panels, styled

WIDEST_PANEL = 2.1  # inches
LARGEST_POINT = 60.0  # area in square points of the highest weight


class Sampling(NamedTuple):
    """Where one query looks, for `sampling_points`."""

    locations: np.ndarray  # [H,L,P,2]
    weights: np.ndarray  # [H,L,P]
    reference: np.ndarray  # the box [4] that it starts from
    box: np.ndarray  # the box [4] that it then predicts


@styled
def sampling_points(
    image: np.ndarray, samplings: Mapping[str, Sampling], columns: int = 4, scale: Sharing = "shared"
) -> Figure:
    """A panel per title: the sampling locations of a query, in the colour of their level, as large as their weight.

    scale: "shared": the same area is the same weight in every panel; "own": areas of a panel end at its own highest
    weight. Crosses are weights of exactly zero, which softmax has only where float32 underflows. The dashed box is the
    one that the query starts from, the solid one what it predicts; a panel shows what is around.
    """
    drawn, panels = image_panels(image, -(-len(samplings) // columns), min(columns, len(samplings)), WIDEST_PANEL)
    highest = max(sampling.weights.max() for sampling in samplings.values())
    for axes, (title, sampling) in zip(panels.flat, samplings.items(), strict=False):
        axes.imshow((0.55 * image + 0.45 * 255).astype(np.uint8), extent=(0, image.shape[1], image.shape[0], 0))
        axes.axis("off")
        draw_box(axes, sampling.reference, MUTED, dashed=True)
        draw_box(axes, sampling.box, "black")
        levels = sampling.locations.shape[1]
        for level in reversed(range(levels)):  # the finest on top
            points, weights = sampling.locations[:, level].reshape(-1, 2), sampling.weights[:, level].ravel()
            some = weights > 0
            area = LARGEST_POINT * weights[some] / (highest if scale == "shared" else sampling.weights.max())
            rims = 0.4 * (area > 8)  # of white; small points would be nothing else
            look = {"color": PALETTE[level], "edgecolor": "white", "linewidth": rims, "zorder": 3}
            axes.scatter(*points[some].T, s=np.maximum(2.0, area), **look)
            axes.plot(*points[~some].T, "x", color=PALETTE[level], markersize=2, markeredgewidth=0.5)
        _look_at(axes, np.stack([sampling.reference, sampling.box]), np.array(image.shape[1::-1]))
        axes.set_title(title, loc="left")
    for axes in panels.flat[len(samplings) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], marker="o", linestyle="", color=PALETTE[level], markersize=5) for level in range(levels)]
    names = [f"level {level + 1}" for level in range(levels)]
    largest = {"marker": "o", "linestyle": "", "color": MUTED, "markersize": LARGEST_POINT**0.5}
    handles.append(Line2D([], [], **largest))
    names.append(f"weight {highest:.2g}" if scale == "shared" else "highest weight of its panel")
    drawn.legend(handles, names, loc="outside lower center", ncols=levels + 1)
    return drawn


@styled
def boxes_on_image(
    image: np.ndarray, panels: Mapping[str, tuple], colours: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """The image in a panel per title, each with boxes of its own and their captions.

    panels: by title boxes [n,4] and n captions; colours: by title, those of the boxes' classes (`style.class_colour`);
    boxes of no class differ from one another.
    """
    drawn, grid = image_panels(image, 1, len(panels), WIDEST_PANEL)
    for axes, (title, (boxes, captions)) in zip(grid[0], panels.items(), strict=True):
        draw_image(axes, image, title)
        for number, (box, caption) in enumerate(zip(boxes, captions, strict=True)):
            colour = (colours or {}).get(title, PALETTE)[number % len(PALETTE)]
            draw_box(axes, box, colour, caption=caption)
    return drawn


@styled
def level_maps(
    image: np.ndarray,
    maps: Mapping[str, Sequence[np.ndarray]],
    extents: Sequence[np.ndarray],
    marked: Sequence[np.ndarray] | None = None,
) -> Figure:
    """A row per title with the map of every level laid over the image; dots on marked cells.

    maps, marked: [h,w] of each level; extents: height and width of the image in cells of each level. Each row has a
    linear scale of its own.
    """
    drawn, panels = image_panels(image, len(maps), len(extents), WIDEST_PANEL, beside=BAR_WIDTH)
    size = np.array(image.shape[1::-1])
    for row, (title, levels) in zip(panels, maps.items(), strict=True):
        laid = [Panel(axes, image, values, extent) for axes, values, extent in zip(row, levels, extents, strict=True)]
        draw_maps(drawn, laid, logarithmic=False, label=title, measured=False)
        for number, (axes, extent) in enumerate(zip(row, extents, strict=True)):
            if marked is not None:
                centres = (np.argwhere(marked[number])[:, ::-1] + 0.5) / extent[::-1] * size - 0.5
                axes.plot(*centres.T, "o", color="black", markersize=4, markeredgecolor="white")
            axes.set_title(f"{title}, level 1" if number == 0 else f"level {number + 1}", loc="left")
    return drawn


@styled
def kept_tokens(image: np.ndarray, kept: Mapping[str, Sequence[np.ndarray]], extents: Sequence[np.ndarray]) -> Figure:
    """A row per title: of every level only the cells that are kept show the image.

    kept: by title masks [h,w], True = kept.
    """
    drawn, panels = image_panels(image, len(kept), len(extents), WIDEST_PANEL)
    for row, (title, masks) in zip(panels, kept.items(), strict=True):
        for number, (axes, mask, extent) in enumerate(zip(row, masks, extents, strict=True)):
            draw_image(axes, image, f"{title}, level 1" if number == 0 else f"level {number + 1}")
            veil = np.dstack([np.ones((*mask.shape, 3)), np.where(mask, 0.0, 0.93)])  # white, where nothing is kept
            lay_cells(axes, image, veil, extent)
    return drawn


def _look_at(axes: Axes, boxes: np.ndarray, size: np.ndarray) -> None:
    """Show the part of an image of `size` (width, height) around boxes [n,4], in the image's proportions."""
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    share = np.clip(2 * ((high - low) / size).max(), 0.3, 1.0)
    left, top = np.clip((low + high - share * size) / 2, 0, (1 - share) * size)
    axes.set(xlim=(left, left + share * size[0]), ylim=(top + share * size[1], top))
