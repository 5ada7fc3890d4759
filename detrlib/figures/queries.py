"""Queries, the objects they are matched to, and what they say to each other. Boxes are xyxy in pixels of the image."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torchvision.ops import box_iou

from detrlib.figures.attention import draw_box, draw_image, thinner
from detrlib.figures.choices import detection
from detrlib.figures.overlay import colour_bar, overlay, scale_of, text_colour
from detrlib.figures.style import MUTED, TEXT_WIDTH, Nothing, class_colour, figure, styled
from detrlib.runs.examples import Example

LINE_HEIGHT = 0.19  # inches of a line in the list beside the picture


@styled
def matching(example: Example, names: Mapping[int, str]) -> Figure:
    """The Hungarian matching of one image: in the picture, and as lines between objects and queries.

    Objects are numbered and dashed, matched queries solid, both in the colour of the object's class, with class, score
    and IoU of the query; confident queries that no object was left for are grey.
    """
    colours = [class_colour(int(label), names) for label in example.true_labels]
    height, width = example.image.shape[:2]
    panel = 0.42 * TEXT_WIDTH
    lines = max(len(example.true_boxes), len(example.boxes)) + 1
    inches = max(panel * height / width + 0.25, lines * LINE_HEIGHT)
    drawn, (picture, lists) = figure(aspect=inches / TEXT_WIDTH, ncols=2, gridspec_kw={"width_ratios": [0.42, 0.58]})
    draw_image(picture, example.image, f"image {example.image_id}")
    width = thinner(lines)
    for query in np.flatnonzero(example.matched < 0):
        draw_box(picture, example.boxes[query], MUTED, width=width)
    for query in np.flatnonzero(example.matched >= 0):
        draw_box(picture, example.boxes[query], colours[example.matched[query]], width=width)
    for number, box in enumerate(example.true_boxes):
        draw_box(picture, box, colours[number], dashed=True, width=width)
        _badge(picture, box[:2], number, colours[number])
    _draw_lists(lists, example, names, colours, lines)
    return drawn


def _draw_lists(axes: Axes, example: Example, names: Mapping[int, str], colours: Sequence[str], lines: int) -> None:
    """Objects on the left, queries on the right, best first, and a line for every matched pair."""
    axes.set(xlim=(0, 1), ylim=(lines - 0.5, -0.5))
    axes.axis("off")
    left, right = 0.33, 0.52
    annotated = len(example.true_boxes) > 0
    axes.text(0.0, 0, "object" if annotated else "no annotated objects", fontweight="bold", va="center")
    about = "#query: class, score" + ", IoU with object" * annotated
    axes.text(right + 0.02, 0, about, fontweight="bold", va="center")
    for number, label in enumerate(example.true_labels):
        _badge(axes, (0.03, number + 1), number, colours[number])
        axes.text(0.08, number + 1, names.get(int(label), str(label)), va="center")
    overlap = box_iou(torch.from_numpy(example.boxes), torch.from_numpy(example.true_boxes)).numpy()  # [n,T]
    for line, (query, matched) in enumerate(zip(example.queries, example.matched, strict=True), start=1):
        words = f"#{query}: {detection(example, line - 1, names)}"
        if matched >= 0:
            words += f", {overlap[line - 1, matched]:.2f}"
            axes.plot([left, right], [matched + 1, line], color=colours[matched], marker="o")
        axes.text(right + 0.02, line, words, va="center", color="black" if matched >= 0 else MUTED)


def _badge(axes: Axes, position: tuple[float, float], number: int, colour: str) -> None:
    """The number of an object, from 1, on its colour."""
    box = {"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "white", "linewidth": 0.6}
    look = {
        "color": text_colour(colour),
        "fontsize": 6,
        "fontweight": "bold",
        "ha": "center",
        "va": "center",
        "bbox": box,
    }
    axes.text(*position, number + 1, **look)


@styled
def query_matrix(
    example: Example, names: Mapping[int, str], layer: int = -1, max_queries: int = 12, logarithmic: bool = True
) -> Figure:
    """Decoder self-attention of the best queries, mean over heads, in percent: a row is a query, a column whom it asks.

    The last column is what goes to all queries not shown, so that rows sum to 100; a cell without colour and number is
    exactly zero. logarithmic: whether colours are.
    """
    if "decoder_self" not in example.sites:
        raise Nothing("maps of decoder_self are not stored")
    shown = slice(min(max_queries, len(example.boxes)))
    weights = example.maps("decoder_self", layer).mean(0, dtype=np.float32)[shown]  # [n,Q]
    columns = example.queries[shown]
    among = 100 * weights[:, columns]
    rest = 100 * weights.sum(1) - among.sum(1)
    count = len(columns)
    drawn, axes = figure(width=min(0.95, 0.25 + 0.06 * (count + 1)), aspect=0.75)
    scale = scale_of([among], logarithmic)
    axes.imshow(overlay(among, scale), aspect="auto")
    for (row, column), value in np.ndenumerate(among):
        words = "" if value == 0 else "<1" if value < 0.5 else f"{value:.0f}"
        colour = "white" if scale.norm()(value) > 0.5 else "black"
        axes.text(column, row, words, ha="center", va="center", fontsize=7, color=colour)
    for row, value in enumerate(rest):
        axes.text(count, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=MUTED)
    labels = [f"{names.get(int(k), k)} #{query}" for k, query in zip(example.labels[shown], columns, strict=True)]
    axes.set(xlim=(-0.5, count + 0.5))
    axes.set_yticks(range(count), labels)
    axes.set_xticks(range(count + 1), [*labels, "all others"], rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("percent of the weight of a row's query", loc="left")
    colour_bar(drawn, [axes], scale, "percent")
    return drawn
