"""Queries, the objects they are matched to, and what they say to each other. Boxes are xyxy in pixels of the image."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torchvision.ops import box_iou

from detrlib.figures.attention import draw_box, draw_image
from detrlib.figures.choices import detection
from detrlib.figures.style import MUTED, PALETTE, TEXT_WIDTH, Nothing, figure, styled
from detrlib.runs.examples import Example

ON_WHITE = PALETTE[:6]  # black is ground truth elsewhere, and yellow is too pale for a line
LINE_HEIGHT = 0.19  # inches of a line in the list beside the picture


@styled
def matching(example: Example, names: Mapping[int, str]) -> Figure:
    """The Hungarian matching of one image: in the picture, and as lines between objects and queries.

    Objects are numbered and dashed, matched queries solid in the colour of their object, with class, score and IoU;
    confident queries that no object was left for are grey.
    """
    height, width = example.image.shape[:2]
    panel = 0.42 * TEXT_WIDTH
    lines = max(len(example.true_boxes), len(example.boxes)) + 1
    inches = max(panel * height / width + 0.25, lines * LINE_HEIGHT)
    drawn, (picture, lists) = figure(aspect=inches / TEXT_WIDTH, ncols=2, gridspec_kw={"width_ratios": [0.42, 0.58]})
    draw_image(picture, example.image)
    for query in np.flatnonzero(example.matched < 0):
        draw_box(picture, example.boxes[query], MUTED)
    for query in np.flatnonzero(example.matched >= 0):
        draw_box(picture, example.boxes[query], _colour(example.matched[query]))
    for number, box in enumerate(example.true_boxes):
        draw_box(picture, box, "black", dashed=True)
        _badge(picture, box[:2], number, clip_on=False)
    _draw_lists(lists, example, names, lines)
    return drawn


def _draw_lists(axes: Axes, example: Example, names: Mapping[int, str], lines: int) -> None:
    """Objects on the left, queries on the right, best first, and a line for every matched pair."""
    axes.set(xlim=(0, 1), ylim=(lines - 0.5, -0.5))
    axes.axis("off")
    left, right = 0.33, 0.52
    axes.text(0.0, 0, "object", fontweight="bold", va="center")
    axes.text(right + 0.02, 0, "query: class, score, IoU with the object", fontweight="bold", va="center")
    for number, label in enumerate(example.true_labels):
        _badge(axes, (0.03, number + 1), number)
        axes.text(0.08, number + 1, names.get(int(label), str(label)), va="center")
    overlap = box_iou(torch.from_numpy(example.boxes), torch.from_numpy(example.true_boxes)).numpy()  # [n,T]
    for line, (query, matched) in enumerate(zip(example.queries, example.matched, strict=True), start=1):
        words = f"#{query}: {detection(example, line - 1, names)}"
        if matched >= 0:
            words += f", {overlap[line - 1, matched]:.2f}"
            axes.plot([left, right], [matched + 1, line], color=_colour(matched), marker="o")
        axes.text(right + 0.02, line, words, va="center", color="black" if matched >= 0 else MUTED)


def _colour(number: int) -> str:
    return ON_WHITE[number % len(ON_WHITE)]


def _badge(axes: Axes, position: tuple[float, float], number: int, **arguments) -> None:
    """The number of an object, from 1, on its colour."""
    box = {"boxstyle": "round,pad=0.2", "facecolor": _colour(number), "edgecolor": "white", "linewidth": 0.6}
    axes.text(*position, number + 1, color="white", fontsize=6, fontweight="bold", ha="center", va="center", bbox=box)


@styled
def query_matrix(example: Example, names: Mapping[int, str], layer: int = -1, max_queries: int = 12) -> Figure:
    """Decoder self-attention of the best queries, mean over heads, in percent: a row is a query, a column whom it asks.

    The last column is what goes to all queries not shown, so that rows sum to 100.
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
    axes.imshow(among, cmap="Blues", vmin=0, vmax=max(among.max(initial=0.0), 1e-9), aspect="auto")
    for (row, column), value in np.ndenumerate(among):
        colour = "white" if value > 0.6 * among.max() else "black"
        axes.text(column, row, f"{value:.0f}" if value else "", ha="center", va="center", fontsize=6, color=colour)
    for row, value in enumerate(rest):
        axes.text(count, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=MUTED)
    labels = [f"{names.get(int(k), k)} #{query}" for k, query in zip(example.labels[shown], columns, strict=True)]
    axes.set(xlim=(-0.5, count + 0.5))
    axes.set_yticks(range(count), labels)
    axes.set_xticks(range(count + 1), [*labels, "all others"], rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("percent of the weight of a row's query", loc="left")
    return drawn
