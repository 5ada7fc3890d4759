"""What is in a data set: classes, sizes of objects, annotated images, and what padding adds to a batch.

Boxes are xyxy in pixels of their image. `frame` has one row per object with columns category, area and crowd, as
`CocoDataset.frame` gives it; crowd regions are not counted, because they are no targets.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import ScalarFormatter

from detrlib.errors import listed
from detrlib.figures.attention import draw_box, draw_image, thinner
from detrlib.figures.overlay import write_captions
from detrlib.figures.results import draw_bars
from detrlib.figures.style import (
    CAPTION_HEIGHT,
    MUTED,
    PALETTE,
    TEXT_WIDTH,
    Nothing,
    class_colour,
    figure,
    panels,
    styled,
)
from detrlib.metrics.localisation import LARGE, SMALL

# Sides of squares with the area at which COCO's medium and large objects begin, pixels.
SIZE_LIMITS = (math.isqrt(SMALL), math.isqrt(LARGE))
SIZE_NAMES = ("small", "medium", "large")
LEGEND_HEIGHT, MOST_IN_LEGEND = 0.25, 8  # inches below the images; classes side by side
STRIPES = (205, 232)  # two greys of the padding; no photograph is striped like that


@styled
def class_histogram(frame: pd.DataFrame, most: int = 25, classes: Iterable[str] = ()) -> Figure:
    """Objects per class, the most frequent classes in order of frequency; a line below counts those left out.

    most: classes that are drawn; classes: names of all that there are, of which those without objects are named below.
    """
    counts = _objects(frame)["category"].value_counts()
    shown, rest = counts[:most], counts[most:]
    if shown.empty:
        raise Nothing("there are no objects")
    drawn, axes = figure(width=0.75, aspect=(0.5 + 0.16 * len(shown)) / (0.75 * TEXT_WIDTH))
    draw_bars(axes, shown, [f"{count:,}  ({count / counts.sum():.1%})" for count in shown], PALETTE[0])
    axes.set_title(f"{counts.sum():,} objects", loc="left")
    below = [f"and {len(rest)} rarer classes with {rest.sum():,} objects"] if len(rest) else []
    if missing := [name for name in classes if name not in counts]:
        below.append(fill(f"no objects in this split: {listed(missing, 12)}", 80))
    axes.set_xlabel("\n".join(below), loc="left", color=MUTED)
    return drawn


@styled
def size_distribution(frame: pd.DataFrame) -> Figure:
    """Histogram of the square root of the area, in pixels on a logarithmic axis, and the share of COCO's sizes."""
    sides = np.sqrt(_objects(frame)["area"].to_numpy(dtype=float))
    return _divided_histogram(sides, SIZE_LIMITS, SIZE_NAMES, "square root of the object's area, pixels of the file")


@styled
def sizes_in_view(
    sides: np.ndarray, image_size: int, stride: int, view: int, suggested: tuple[int, int] | None = None
) -> Figure:
    """Histogram of the objects' longer sides as the model meets them, beside its cells and what one of them sees.

    Args:
        sides: [n] in parts of the shorter side of their image.
        image_size: that side in pixels, `data.image_size`.
        stride, view: side of a cell, and of what it sees without attention, pixels. Objects below two cells have hardly
            one of their own; of those beyond the view no cell sees the whole.
        suggested: the smallest and largest image size at which most objects lie between, written below.
    """
    words = f"longer side of the object, pixels at data.image_size {image_size}"
    if suggested is not None:
        low, high = suggested
        said = f"nine of ten objects would lie between the lines at {low} to {high}"
        if low > high:
            said = f"no size puts nine of ten objects between the lines: small ones need {low}, large ones {high}"
        words = f"{words}\n{said}"
    limits, names = (2 * stride, view), ("below two cells", "seen whole", "beyond the view")
    drawn = _divided_histogram(np.asarray(sides, dtype=float) * image_size, limits, names, words)
    for limit, name in zip(limits, (f"2 cells, {2 * stride}", f"view, {view}"), strict=True):
        at = {"rotation": 90, "ha": "right", "va": "top", "color": MUTED}
        at["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # bars may stand behind it
        drawn.axes[0].text(limit, 0.97, name, transform=drawn.axes[0].get_xaxis_transform(), **at)
    return drawn


def _divided_histogram(sides: np.ndarray, limits: Sequence[float], names: Sequence[str], label: str) -> Figure:
    """Histogram of sides on a logarithmic axis, with the share of each of the three parts that two limits make."""
    if not len(sides):
        raise Nothing("there are no objects")
    drawn, axes = figure(width=0.75, aspect=0.5)
    low, high = min(sides.min(), limits[0] / 2) / 1.1, max(sides.max(), limits[1] * 2) * 1.1
    sns.histplot(x=sides, bins=np.geomspace(low, high, 50), color=PALETTE[0], alpha=1, edgecolor="white", ax=axes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    edges = [low, *limits, high]
    for name, start, end in zip(names, edges, edges[1:], strict=False):
        share = np.mean((sides >= start) & (sides < end))
        words = {"s": f"{name} {share:.0%}", "transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(np.sqrt(start * end), 1.02, **words)
    for limit in limits:
        axes.axvline(limit, color=MUTED, linestyle=(0, (3, 2)), linewidth=0.8)
    axes.set_xlim(low, high)
    powers = [2**power for power in range(20) if low <= 2**power <= high]
    axes.set_xticks(powers + [limit for limit in limits if limit not in powers])
    axes.minorticks_off()
    axes.set(xlabel=label, ylabel="objects")
    return drawn


@styled
def annotated_images(
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    names: Mapping[int, str],
    titles: Sequence[str] = (),
) -> Figure:
    """Images of any sizes with their boxes in the colour of their class.

    images: uint8 [H,W,3], with boxes [n,4] and labels [n]; names: label -> class. The classes stand in a legend while
    each has a colour of its own, otherwise at the boxes. titles: what to write above each image instead of its size and
    number of objects.
    """
    present = sorted({int(label) for of_image in labels for label in of_image})
    colour_of = {label: class_colour(label, names) for label in present}
    distinct = len(set(colour_of.values())) == len(present) <= MOST_IN_LEGEND
    drawn, grid = _gallery(images, LEGEND_HEIGHT if distinct else 0)
    for number, (axes, image) in enumerate(zip(grid, images, strict=True)):
        count = len(labels[number])
        size = f"{image.shape[0]} high, {image.shape[1]} wide; {count} object{'s' * (count != 1)}"
        draw_image(axes, image, titles[number] if titles else size)
        _draw_objects(axes, image, boxes[number], labels[number], names, captions=not distinct)
    if distinct and present:
        patches = [Patch(color=colour_of[label], label=names[label]) for label in present]
        drawn.legend(handles=patches, loc="outside lower center", ncols=len(present), handlelength=1)
    return drawn


@styled
def images_with_padding(
    images: np.ndarray,
    padding_mask: np.ndarray,
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    names: Mapping[int, str],
) -> Figure:
    """What the model receives: images of one size, whose padding is striped, with their named boxes.

    images: uint8 [B,H,W,3]; padding_mask: [B,H,W], True = padding; boxes, labels: B times [n,4] and [n]. Above each
    image its own size and the share of the batch's pixels that it fills.
    """
    drawn, grid = _gallery(images)
    height, width = padding_mask.shape[1:]
    y, x = np.mgrid[:height, :width]
    stripes = np.choose((x + y) // max(max(height, width) // 40, 1) % 2, STRIPES).astype(np.uint8)
    for axes, image, padding, *objects in zip(grid, images, padding_mask, boxes, labels, strict=True):
        axes.imshow(np.where(padding[..., None], stripes[..., None], image))
        _draw_objects(axes, image, *objects, names)
        inner_height, inner_width = (int((~padding).any(axis=axis).sum()) for axis in (1, 0))
        axes.set_title(f"{inner_height} high, {inner_width} wide; fills {np.mean(~padding):.0%}", loc="left")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    drawn.supxlabel(f"padded: {height} high, {width} wide", fontsize=8)
    return drawn


def _draw_objects(
    axes: Axes,
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    names: Mapping[int, str],
    captions: bool = True,
) -> None:
    """Boxes in the colours of their classes, whose names those have that find room, large ones first."""
    boxes, labels = np.asarray(boxes).reshape(-1, 4), np.asarray(labels)  # from tensors and tables, too
    order = np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1), kind="stable")
    colours = [class_colour(int(labels[index]), names) for index in order]
    for index, colour in zip(order, colours, strict=True):
        draw_box(axes, boxes[index], colour, width=thinner(len(boxes)))
    if captions:
        texts = [names[int(labels[index])] for index in order]
        write_captions(axes, boxes[order], texts, colours, image.shape[:2], TEXT_WIDTH / 3, most=12)


def _objects(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[~frame["crowd"].astype(bool)]


def _gallery(images: Sequence[np.ndarray], extra_height: float = 0.2) -> tuple[Figure, list[Axes]]:
    """A panel per image, up to three beside each other, each row as high as the tallest image needs."""
    if not len(images):
        raise Nothing("there are no images")
    columns = min(len(images), 3)
    rows = -(-len(images) // columns)
    width = {1: 0.4, 2: 0.7, 3: 1.0}[columns]
    tallest = max(image.shape[0] / image.shape[1] for image in images)
    height = width * TEXT_WIDTH / columns * tallest + CAPTION_HEIGHT + extra_height / rows
    drawn, grid = panels(len(images), columns, height, width)
    for axes in grid:
        axes.set_anchor("N")  # images of a row begin at the same height
    return drawn, grid
