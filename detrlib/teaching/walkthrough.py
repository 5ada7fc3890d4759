"""Pictures of single steps of DETR: maps over its grid, the matching, pairs of boxes, a loss.

Legend: B images, n panels, h x w cells of the feature map, Q queries, T boxes of an image. Boxes are xyxy.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detrlib.figures.attention import draw_box, draw_image
from detrlib.figures.style import MUTED, PALETTE, class_colour, figure, styled


@styled
def grid_maps(
    maps: np.ndarray, titles: Sequence[str], padding: np.ndarray, cells: Sequence[tuple[int, int]], label: str = ""
) -> Figure:
    """Maps [n,h,w] over the feature grid, padded cells [h,w] hatched; a cross marks each map's own (row, column)."""
    width = min(1.0, 0.25 * len(maps))
    drawn, panels = figure(width, 1.2 / len(maps), ncols=len(maps), squeeze=False)
    high, low = maps.max(), min(0.0, maps.min())
    for axes, values, title, (row, column) in zip(panels[0], maps, titles, cells, strict=True):
        shown = axes.imshow(values, cmap="viridis", vmin=low, vmax=high)
        _hatch(axes, padding)
        axes.plot(column, row, "x", color="white", markersize=6, markeredgewidth=2.6)
        axes.plot(column, row, "x", color=PALETTE[1], markersize=5, markeredgewidth=1.3)
        axes.set_title(title, loc="left")
        axes.set(xticks=[], yticks=[])
    drawn.colorbar(shown, ax=panels.ravel().tolist(), shrink=0.8, label=label)
    return drawn


@styled
def cost_matrix(cost: np.ndarray, queries: np.ndarray, targets: np.ndarray, objects: Sequence[str]) -> Figure:
    """Cost [Q,T] above the cheapest query of each object, queries across, objects down; chosen pairs are framed."""
    drawn, axes = figure(1.0, 0.3)
    shown = axes.imshow(cost.T, cmap="viridis_r", aspect="auto")
    for query, target in zip(queries, targets, strict=True):
        axes.add_patch(Rectangle((query - 0.5, target - 0.5), 1, 1, fill=False, edgecolor=PALETTE[1], linewidth=2))
    axes.set(xlabel="query", xticks=range(len(cost)), yticks=range(len(objects)))
    axes.set_yticklabels(objects)
    axes.spines[:].set_visible(False)
    drawn.colorbar(shown, ax=axes, label="cost above the cheapest")
    return drawn


@styled
def box_pairs(pairs: np.ndarray, titles: Sequence[str]) -> Figure:
    """Pairs of boxes [n,2,4]: both filled, their overlap darker, and dashed around them the smallest box C."""
    drawn, panels = figure(1.0, 1.15 / len(pairs), ncols=len(pairs), squeeze=False)
    for axes, pair, title in zip(panels[0], pairs, titles, strict=True):
        hull = (*pair[:, :2].min(0), *pair[:, 2:].max(0))
        _rectangle(axes, hull, fill=False, edgecolor=MUTED, linestyle="--")
        for box, colour in zip(pair, PALETTE, strict=False):
            _rectangle(axes, box, facecolor=colour, edgecolor=colour, alpha=0.5)
        axes.set(xlim=(-0.5, 10.5), ylim=(10.5, -0.5), xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_visible(False)
        axes.set_title(title, loc="left")
    return drawn


@styled
def loss_curve(losses: Sequence[float]) -> Figure:
    """Total loss after every update."""
    drawn, axes = figure(0.6, 0.5)
    axes.plot(range(1, len(losses) + 1), losses, color=PALETTE[0])
    axes.set(xlabel="step", ylabel="total loss", ylim=(0, None))
    axes.grid(True)
    return drawn


@styled
def boxes_before_and_after(
    images: Sequence[np.ndarray], stages: Mapping[str, Sequence], truth: Sequence, names: Mapping[int, str]
) -> Figure:
    """A row per stage, a column per image [H,W,3]: solid boxes are predictions, dashed ones ground truth.

    stages: title -> for each image (boxes [n,4], labels [n], scores [n]); truth: for each image (boxes [T,4], labels
    [T]); names: label -> class.
    """
    drawn, panels = figure(0.7, 0.5 * len(stages), nrows=len(stages), ncols=len(images), squeeze=False)
    for row, (title, detections) in zip(panels, stages.items(), strict=True):
        for axes, image, detected, wanted in zip(row, images, detections, truth, strict=True):
            draw_image(axes, image)
            for box, label in zip(*wanted, strict=True):
                draw_box(axes, box, class_colour(int(label), names), dashed=True)
            for box, label, score in zip(*detected, strict=True):
                words = f"{names.get(int(label), '-')} {score:.2f}"
                draw_box(axes, box, class_colour(int(label), names), caption=words)
        row[0].set_title(title, loc="left", fontweight="bold")
    return drawn


def _hatch(axes: Axes, hidden: np.ndarray) -> None:
    """Hatch the hidden part of a grid [h,w]: all right of and below the part that is not."""
    rows, columns = (~hidden).any(1).sum(), (~hidden).any(0).sum()
    height, width = hidden.shape
    for x, y, w, h in ((columns, 0, width - columns, height), (0, rows, columns, height - rows)):
        if w and h:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, facecolor="#f2f2f2", edgecolor=MUTED, hatch="///", lw=0))


def _rectangle(axes: Axes, box: Sequence[float], **look) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **look))
