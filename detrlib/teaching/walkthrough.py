"""Pictures of single steps of DETR: queries and keys, norms, maps over its grid, the matching, boxes and their ways.

Legend: B images, n panels, h x w cells of the feature map, K keys, Q queries, T boxes of an image. Boxes are xyxy.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detrlib.figures.attention import draw_box, draw_image, thinner
from detrlib.figures.overlay import write_captions
from detrlib.figures.style import MUTED, PALETTE, class_colour, figure, readable, styled


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
def query_and_keys(query: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> Figure:
    """A query [2] and keys [K,2] as arrows of a plane, and beside them the score [K] of each key as a bar."""
    drawn, (left, right) = figure(0.8, 0.45, ncols=2)
    reach = 1.2 * max(np.abs(keys).max(), np.abs(query).max())
    for number, key in enumerate(keys, 1):
        _arrow(left, key, PALETTE[0])
        _beyond(left, key, f"key {number}", PALETTE[0])
    _arrow(left, query, PALETTE[1])
    _beyond(left, query, "query", PALETTE[1])
    left.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="channel 1", ylabel="channel 2")
    left.grid(True)
    bars = right.bar(range(1, len(scores) + 1), scores, 0.7, color=PALETTE[0])
    right.bar_label(bars, fmt="%.2f", padding=2)
    right.axhline(0, color=MUTED, linewidth=0.6)
    right.margins(y=0.15)
    right.set(xticks=range(1, len(scores) + 1), xlabel="key", ylabel="score z")
    return drawn


@styled
def normalised_together(groups: Mapping[str, np.ndarray], images: int) -> Figure:
    """A panel per norm: numbers of a batch, tokens of all images down and channels across, [B*K,E].

    Each group of numbers that have a mean of their own has a shade of its own, and the first one is framed. images: B,
    divided by lines. groups: norm -> the group [B*K,E] of every number.
    """
    drawn, panels = figure(0.8, 0.5, ncols=len(groups), sharey=True)
    for axes, (title, group) in zip(panels, groups.items(), strict=True):
        tokens, channels = group.shape
        axes.imshow(group % 4, cmap="Blues", vmin=-1, vmax=6, aspect="auto", extent=(0, channels, tokens, 0))
        rows, columns = np.nonzero(group == 0)
        size = columns.max() + 1, rows.max() + 1
        axes.add_patch(Rectangle((0, 0), *size, fill=False, edgecolor=PALETTE[1], linewidth=2.5, clip_on=False))
        for image in range(1, images):
            axes.axhline(image * tokens / images, color="black", linewidth=1.2)
        axes.set_title(title, loc="left")
        axes.set(xlabel="channel", xticks=[], yticks=[])
    shown = [f"tokens of\nimage {image + 1}" for image in range(images)]
    panels[0].set_yticks([(image + 0.5) * tokens / images for image in range(images)], shown)
    return drawn


@styled
def box_steps(
    image: np.ndarray, steps: Mapping[str, np.ndarray], colours: Sequence[str] = PALETTE, truth: np.ndarray = ()
) -> Figure:
    """A panel per step with the boxes [n,4] of the same queries; arrows show how their centres came from the last one.

    image: [H,W,3]; colours: of the boxes, repeated where there are more; truth: dashed boxes [T,4] of every panel.
    """
    size = min(1.0, 0.32 * len(steps))
    drawn, panels = figure(size, 1.12 * image.shape[0] / image.shape[1] / len(steps), ncols=len(steps), squeeze=False)
    before, (height, width) = None, image.shape[:2]
    for axes, (title, boxes) in zip(panels[0], steps.items(), strict=True):
        draw_image(axes, image, title, alpha=0.45)
        for box in truth:
            draw_box(axes, box, "black", dashed=True)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        for number, (box, centre) in enumerate(zip(boxes, centres, strict=True)):
            colour = colours[number % len(colours)]
            draw_box(axes, box, colour, width=thinner(len(boxes)))
            axes.plot(*centre, "o", color=colour, markersize=3, markeredgecolor="white", markeredgewidth=0.5)
            if before is not None:
                # A head is no longer than its arrow, so that a small move looks small.
                head = np.clip(128 * np.hypot(*(centre - before[number])) / width, 0.1, 7)
                look = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "mutation_scale": head}
                axes.annotate("", centre, before[number], arrowprops=look)
        axes.set(xlim=(-0.08 * width, 1.08 * width), ylim=(1.08 * height, -0.08 * height))  # boxes reach out of it
        before = centres
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
        for axes, image, (boxes, labels, scores), wanted in zip(row, images, detections, truth, strict=True):
            draw_image(axes, image)
            for box, label in zip(*wanted, strict=True):
                draw_box(axes, box, class_colour(int(label), names), dashed=True)
            colours = [class_colour(int(label), names) for label in labels]
            for box, colour in zip(boxes, colours, strict=True):
                draw_box(axes, box, colour)
            words = [f"{names.get(int(label), '-')} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
            height, width = image.shape[:2]
            write_captions(axes, boxes, words, colours, (height, width), 1.9 * width / max(height, width))
        # Beside the row: above it, captions of boxes at the upper edge would run into the words.
        row[0].annotate(
            title, (-0.14, 0.5), xycoords="axes fraction", rotation=90, ha="right", va="center", fontweight="bold"
        )
    return drawn


def _arrow(axes: Axes, end: np.ndarray, colour: str) -> None:
    """From the origin to `end` (x, y)."""
    axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "linewidth": 1.6})


def _beyond(axes: Axes, end: np.ndarray, words: str, colour: str) -> None:
    """Words beyond the end of an arrow, so that they do not lie on it."""
    offset = 14 * end / np.linalg.norm(end)
    axes.annotate(words, end, offset, textcoords="offset points", ha="center", va="center", color=readable(colour))


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
