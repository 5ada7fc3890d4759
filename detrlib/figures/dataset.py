"""What is in a data set: classes, sizes of objects, annotated images, and what padding adds to a batch.

Boxes are xyxy in pixels of their image. `frame` has one row per object with columns category, area and crowd, as
`CocoDataset.frame` gives it; crowd regions are not counted, because they are no targets.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import ScalarFormatter

from detrlib.figures.attention import draw_box
from detrlib.figures.style import MUTED, PALETTE, TEXT_WIDTH, figure, styled
from detrlib.metrics.localisation import LARGE, SMALL

# Sides of squares with the area at which COCO's medium and large objects begin, pixels.
SIZE_LIMITS = (math.isqrt(SMALL), math.isqrt(LARGE))
SIZE_NAMES = ("small", "medium", "large")
CAPTION_HEIGHT = 0.22  # inches above an image
LEGEND_HEIGHT = 0.25  # inches below the images
STRIPES = (205, 232)  # two greys of the padding; no photograph is striped like that


@styled
def class_histogram(frame: pd.DataFrame, most: int = 25) -> Figure:
    """Objects per class, the `most` frequent classes in order of frequency; a line below counts those left out."""
    counts = _objects(frame)["category"].value_counts()
    shown, rest = counts[:most], counts[most:]
    drawn, axes = figure(width=0.75, aspect=(0.5 + 0.16 * len(shown)) / (0.75 * TEXT_WIDTH))
    bars = axes.barh(range(len(shown)), shown, height=0.72, color=PALETTE[0])
    total = max(counts.sum(), 1)
    axes.bar_label(bars, [f"{count:,}  ({count / total:.1%})" for count in shown], padding=3, fontsize=7)
    axes.set_yticks(range(len(shown)), shown.index)
    axes.set_xlim(0, 1.2 * max(shown, default=1))
    axes.set_ylim(max(len(shown), 1) - 0.5, -0.5)  # the most frequent class on top
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=False, length=0)  # the bars carry their counts
    axes.spines["bottom"].set_visible(False)
    axes.set_title(f"{counts.sum():,} objects", loc="left")
    if len(rest):
        axes.set_xlabel(f"and {len(rest)} rarer classes with {rest.sum():,} objects", loc="left", color=MUTED)
    return drawn


@styled
def size_distribution(frame: pd.DataFrame) -> Figure:
    """Histogram of the square root of the area, in pixels on a logarithmic axis, and the share of COCO's sizes."""
    sides = np.sqrt(_objects(frame)["area"].to_numpy(dtype=float))
    drawn, axes = figure(width=0.75, aspect=0.5)
    low, high = min(sides.min(initial=16), 16) / 1.1, max(sides.max(initial=192), 192) * 1.1
    axes.hist(sides, np.geomspace(low, high, 50), color=PALETTE[0], edgecolor="white", linewidth=0.3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    edges = np.array([low, *SIZE_LIMITS, high])
    for limit in SIZE_LIMITS:
        axes.axvline(limit, color=MUTED, linestyle=(0, (3, 2)), linewidth=0.8)
    class_of = np.digitize(sides, SIZE_LIMITS)
    for number, name in enumerate(SIZE_NAMES):
        share = f"{np.mean(class_of == number):.0%}" if len(sides) else "n/a"
        middle = np.sqrt(edges[number] * edges[number + 1])
        axes.text(middle, 1.02, f"{name} {share}", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    axes.set_xlim(low, high)
    axes.set_xticks([2**power for power in range(20) if low <= 2**power <= high] + [96])
    axes.minorticks_off()
    axes.set(xlabel="square root of the object's area, pixels of the file", ylabel="objects")
    return drawn


@styled
def annotated_images(
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    names: Mapping[int, str],
    titles: Sequence[str] = (),
) -> Figure:
    """Images uint8 [H,W,3] of any sizes with their boxes [n,4] in the colour of their class, labels [n].

    names: label -> class. The classes stand in a legend while each has a colour of its own, otherwise at the boxes.
    titles: what to write above each image instead of its size and number of objects.
    """
    present = sorted({int(label) for of_image in labels for label in of_image})
    # Where the palette suffices for all classes, each keeps its colour from figure to figure.
    coloured = sorted(names) if len(names) <= len(PALETTE) else present
    colour_of = {label: PALETTE[place % len(PALETTE)] for place, label in enumerate(coloured)}
    distinct = len(present) <= len(PALETTE)
    drawn, panels = _panels(images, LEGEND_HEIGHT if distinct else 0)
    for number, (axes, image) in enumerate(zip(panels, images, strict=True)):
        axes.imshow(image)
        for box, label in zip(boxes[number], labels[number], strict=True):
            draw_box(axes, box, colour_of[int(label)])
            if not distinct:
                _write_at(axes, box, names[int(label)])
        count = len(labels[number])
        size = f"{image.shape[0]} × {image.shape[1]}, {count} object{'s' * (count != 1)}"
        axes.set_title(titles[number] if titles else size, loc="left")
        axes.axis("off")
    if distinct and present:
        patches = [Patch(color=colour_of[label], label=names[label]) for label in present]
        drawn.legend(handles=patches, loc="outside lower center", ncols=len(present), handlelength=1)
    return drawn


@styled
def padded_batch(images: np.ndarray, padding_mask: np.ndarray, boxes: Sequence[np.ndarray]) -> Figure:
    """What the model receives: images uint8 [B,H,W,3], padding_mask [B,H,W] (True = padding, striped), boxes B x [n,4].

    Above each image its own size and the share of the batch's pixels that it fills.
    """
    drawn, panels = _panels(images)
    height, width = padding_mask.shape[1:]
    y, x = np.mgrid[:height, :width]
    stripes = np.choose((x + y) // max(max(height, width) // 40, 1) % 2, STRIPES).astype(np.uint8)
    for axes, image, padding, image_boxes in zip(panels, images, padding_mask, boxes, strict=True):
        axes.imshow(np.where(padding[..., None], stripes[..., None], image))
        for box in image_boxes:
            draw_box(axes, box, PALETTE[1])
        inner_height, inner_width = (int((~padding).any(axis=axis).sum()) for axis in (1, 0))
        axes.set_title(f"{inner_height} × {inner_width}, fills {np.mean(~padding):.0%}", loc="left")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    drawn.supxlabel(f"padded to {height} × {width}", fontsize=8)
    return drawn


def _objects(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[~frame["crowd"].astype(bool)]


def _panels(images: Sequence[np.ndarray], extra_height: float = 0.2) -> tuple[Figure, list[Axes]]:
    """A panel per image, up to three beside each other, each row as high as the tallest image needs."""
    columns = min(len(images), 3)
    rows = -(-len(images) // columns)
    width = {1: 0.4, 2: 0.7, 3: 1.0}[columns]
    tallest = max(image.shape[0] / image.shape[1] for image in images)
    height = rows * (width * TEXT_WIDTH / columns * tallest + CAPTION_HEIGHT) + extra_height
    drawn, grid = figure(width, height / (width * TEXT_WIDTH), nrows=rows, ncols=columns, squeeze=False)
    for axes in grid.flat[len(images) :]:
        axes.remove()
    for axes in grid.flat[: len(images)]:
        axes.set_anchor("N")  # images of a row begin at the same height
    return drawn, list(grid.flat[: len(images)])


def _write_at(axes: Axes, box: np.ndarray, name: str) -> None:
    """A class name in the upper left corner of its box."""
    backing = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    axes.text(box[0], box[1], name, fontsize=5, va="top", bbox=backing, clip_on=True)
