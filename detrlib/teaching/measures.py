"""Pictures of the measures: a small map beside its interpolation, maps and pictures in a row, what resampling gives.

Legend: h x w cells, n maps or pictures.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detrlib.figures.attention import draw_box, draw_image
from detrlib.figures.overlay import draw_map, scale_of, text_colour
from detrlib.figures.style import MUTED, PALETTE, figure, image_panels, styled


@styled
def cells_and_surface(cells: np.ndarray, surface: np.ndarray, box: Sequence[float]) -> Figure:
    """A map [h,w] with its numbers, and beside it the surface that it stands for, with a box (x0, y0, x1, y1) in cells.

    surface: the map's interpolation, at any resolution.
    """
    drawn, panels = figure(0.7, 0.5, ncols=2)
    height, width = cells.shape
    high = max(cells.max(), surface.max())
    for axes, values, title in zip(panels, (cells, surface), ("cells", "interpolated"), strict=True):
        shown = axes.imshow(values, extent=(0, width, height, 0), cmap="viridis", vmin=0, vmax=high)
        _frame(axes, box)
        axes.set(xticks=range(width + 1), yticks=range(height + 1))
        axes.set_title(title, loc="left")
    for (row, column), value in np.ndenumerate(cells):
        colour = text_colour(to_hex(shown.cmap(shown.norm(value))))
        panels[0].text(column + 0.5, row + 0.5, f"{value:g}", ha="center", va="center", color=colour)
    return drawn


def _frame(axes: Axes, box: Sequence[float]) -> None:
    x0, y0, x1, y1 = box
    for colour, line in (("white", 3.4), (PALETTE[1], 1.8)):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=line, clip_on=False))


@styled
def row_of_images(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    boxes: Sequence[np.ndarray] = (),
    maps: Sequence[np.ndarray] = (),
) -> Figure:
    """Images [H,W,3] in rows of at most five, with a dashed box xyxy in each if given, and maps [h,w] over them.

    Colours of maps are logarithmic, of one scale for all; a cell without colour has a weight of exactly zero.
    """
    columns = min(5, len(images))  # more of them could not be read from the back of a room
    drawn, panels = image_panels(images[0], -(-len(images) // columns), columns, widest=1.6)
    scale = scale_of(list(maps))
    for number, axes in enumerate(panels.flat):
        if number >= len(images):
            axes.remove()
            continue
        if len(maps):
            draw_map(axes, images[number], maps[number], scale=scale)
            axes.set_title(titles[number], loc="left")
        else:
            draw_image(axes, images[number], titles[number])
        if len(boxes):
            draw_box(axes, boxes[number], PALETTE[1], dashed=True)
    return drawn


@styled
def resampled(samples: Mapping[str, np.ndarray], ends: Mapping[str, tuple[float, float, float]], label: str) -> Figure:
    """A histogram of the values of each name, above it a bar from low to high with a dot at the estimate.

    ends: name -> (low, estimate, high); label: what the values are.
    """
    drawn, grid = figure(0.5 * len(samples), 0.45 / len(samples), ncols=len(samples), squeeze=False, sharex=True)
    for axes, (name, values), colour in zip(grid[0], samples.items(), PALETTE, strict=False):
        ends_of_bins = min(values) - 0.01, max(values) + 0.01  # wide enough where all are equal
        counts, _, _ = axes.hist(values, bins=30, range=ends_of_bins, color=colour, alpha=0.6)
        low, estimate, high = ends[name]
        above = 1.12 * counts.max()
        axes.plot([low, high], [above, above], color=MUTED, linewidth=2)
        axes.plot(estimate, above, "o", color="black", markersize=5)
        axes.set_title(name, loc="left")
        axes.set(xlabel=label, ylabel="resamples", ylim=(0, 1.25 * counts.max()))
    return drawn
