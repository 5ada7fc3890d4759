"""Attention over images: what a query detected and where it looked for it.

Maps are drawn by `overlay`: a cell without colour has a weight of exactly zero, the same colour is the same weight in
all panels of a figure unless `sharing` is "own", and below each map stand its support, its Gini index and the share of
the weight inside the box named in the docstring. Solid boxes are predictions, dashed ones ground truth, both in the
colour of their class; numbers tell objects of one class apart.

Legend: n queries, L layers, H heads, h x w cells of the feature map. Boxes are xyxy in pixels of the image given.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detrlib.figures.choices import (
    best_of_class,
    cell_at,
    cell_box,
    cells_ask,
    chosen_labels,
    corresponding_query,
    detection,
    matched_query,
)
from detrlib.figures.overlay import Panel, Sharing, draw_maps, room, text_colour
from detrlib.figures.style import MUTED, Nothing, class_colour, image_panels, readable, styled
from detrlib.runs.examples import Example

WIDEST_PANEL = 1.7  # inches
NAME = 14  # letters of the name of a run in a line: as many as fit above a panel
FEW = 15  # boxes in a picture that need no thinner lines


def draw_box(
    axes: Axes, box: np.ndarray, colour: str, dashed: bool = False, caption: str = "", width: float = 1.3
) -> None:
    """One box; dashed ones are ground truth. A white rim keeps it visible on any background."""
    x0, y0, x1, y1 = box
    for edge, line_width in (("white", width + min(1.1, 0.85 * width)), (colour, width)):
        style = (0, (3, 2)) if dashed else "solid"
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=line_width, linestyle=style)
        )
    if caption:
        box = {"facecolor": colour, "lw": 0, "pad": 0.8}
        axes.text(x0, y0, caption, fontsize=6, color=text_colour(colour), va="top", bbox=box)


def thinner(boxes: int, width: float = 1.3) -> float:
    """The width of the lines of so many boxes in one picture: crowds get thinner ones, so that objects are seen."""
    return width * min(1.0, max(0.3, (FEW / max(boxes, 1)) ** 0.5))


def draw_image(axes: Axes, image: np.ndarray, title: str = "", alpha: float = 1.0, **look) -> None:
    """The image alone, with a title on the left whose `look` is that of a text."""
    axes.imshow(image, alpha=alpha)
    axes.axis("off")
    axes.set_title(title, loc="left", **look)


def _objects(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and labels of the annotated objects, or, in a picture without any, of the detections."""
    annotated = len(example.true_boxes) > 0
    return (example.true_boxes, example.true_labels) if annotated else (example.boxes, example.labels)


def _largest(boxes: np.ndarray, most: int) -> np.ndarray:
    return np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1))[:most]


def _colour(example: Example, query: int, names: Mapping[int, str]) -> str:
    """That of the class that a query gave."""
    return class_colour(int(example.labels[query]), names)


def _look(axes: Axes, example: Example, query: int, layer: int, box: np.ndarray | None = None) -> Panel:
    """Where a query looks in a decoder layer, mean over heads; box: of which the share is written, None: its own."""
    weights = example.maps(layer=layer)[:, query].mean(0, dtype=np.float32)
    return Panel(axes, example.image, weights, example.extent, example.boxes[query] if box is None else box)


@styled
def detections_with_attention(
    example: Example,
    names: Mapping[int, str],
    layer: int = -1,
    max_queries: int = 4,
    scale: Sharing = "shared",
    logarithmic: bool = True,
) -> Figure:
    """The image with its detections and ground truth, then where each of the best queries looked.

    Maps are those of one decoder layer, mean over heads, of at most `max_queries`. names: label -> class; scale,
    logarithmic: of the colours, as of `overlay.draw_maps`.
    """
    shown = min(max_queries, len(example.boxes))
    drawn, panels = image_panels(example.image, 1, max_queries + 1, WIDEST_PANEL, **room(max_queries + 1, scale))
    first, *rest = panels[0]
    count = len(example.true_boxes)
    draw_image(first, example.image, f"{count or 'no annotated'} object{'s' * (count != 1)}")
    for box, label in zip(example.true_boxes, example.true_labels, strict=True):
        draw_box(first, box, class_colour(int(label), names), dashed=True, width=thinner(count))
    for query, axes in enumerate(rest[:shown]):
        colour = _colour(example, query, names)
        draw_box(first, example.boxes[query], colour, caption=str(query + 1))
        draw_box(axes, example.boxes[query], colour)
        axes.set_title(f"{query + 1} {detection(example, query, names)}", loc="left", color=readable(colour))
    for axes in rest[shown:]:
        axes.remove()
    looks = [_look(axes, example, query, layer) for query, axes in enumerate(rest[:shown])]
    draw_maps(drawn, looks, scale, logarithmic)
    return drawn


@styled
def objects_by_run(
    examples: Mapping[str, Example],
    names: Mapping[int, str] | Mapping[str, Mapping[int, str]],
    layer: int = -1,
    max_objects: int = 5,
    scale: Sharing = "shared",
    logarithmic: bool = True,
) -> Figure:
    """The same image in several runs: a row is a run, a column an annotated object, in order of size.

    Each panel shows the map (mean over heads) of the query matched to the object, its box and the class it gave; "in
    box" is the share of the weight inside the annotated box, which is dashed: PAIBB. In a picture without annotated
    objects a column is a detection of the first run, the best one first, and what other runs have in its place. names:
    label -> class, or run -> label -> class; scale, logarithmic: of the colours, as of `overlay.draw_maps`. Objects
    have the numbers that `queries.matching` gives them.
    """
    if not examples:
        raise Nothing("no run has stored examples with attention")
    first = next(iter(examples.values()))
    annotated = len(first.true_boxes) > 0
    objects = _largest(first.true_boxes, max_objects) if annotated else range(min(max_objects, len(first.boxes)))
    columns = len(objects) + 1
    drawn, panels = image_panels(first.image, len(examples), columns, WIDEST_PANEL, **room(columns, scale))
    looks = []
    for row, (run, example) in zip(panels, examples.items(), strict=True):
        own = names.get(run, names)
        draw_image(row[0], example.image, fill(run, NAME), fontweight="bold", fontsize=7)
        for axes, index in zip(row[1:], objects, strict=True):
            number = index + 1
            query = matched_query(example, index) if annotated else corresponding_query(first, index, example)
            if annotated:
                truth, colour = example.true_boxes[index], class_colour(int(example.true_labels[index]), own)
                draw_box(row[0], truth, colour, dashed=True, caption=str(number))
            if query is None:
                missing = "no query left" if annotated else "not detected"
                draw_image(axes, example.image, f"{number} {missing}", alpha=0.3, color=MUTED)
                continue
            given = _colour(example, query, own)
            if annotated:
                draw_box(axes, truth, colour, dashed=True)
            else:
                draw_box(row[0], example.boxes[query], given, caption=str(number))
            draw_box(axes, example.boxes[query], given)
            axes.set_title(f"{number} {detection(example, query, own)}", loc="left", color=readable(given))
            looks.append(_look(axes, example, query, layer, truth if annotated else None))
    draw_maps(drawn, looks, scale, logarithmic)
    return drawn


@styled
def queries_by_layer(
    example: Example,
    names: Mapping[int, str],
    max_queries: int = 4,
    scale: Sharing = "shared",
    logarithmic: bool = True,
) -> Figure:
    """A row per detection, best first: its box on the image, then its map (mean over heads) in every decoder layer.

    scale, logarithmic: of the colours, as of `overlay.draw_maps`.
    """
    layers, looks = example.shape()[0], []
    rows = min(max_queries, len(example.boxes))
    drawn, panels = image_panels(example.image, rows, layers + 1, WIDEST_PANEL, **room(layers + 1, scale))
    for query, (first, *rest) in enumerate(panels):
        colour = _colour(example, query, names)
        draw_image(first, example.image, detection(example, query, names), color=colour)
        for axes in (first, *rest):
            draw_box(axes, example.boxes[query], colour)
        for layer, axes in enumerate(rest):
            looks.append(_look(axes, example, query, layer))
            axes.set_title(f"layer {layer + 1}" if query == 0 else "", loc="left")
    draw_maps(drawn, looks, scale, logarithmic)
    return drawn


@styled
def chosen_classes(
    examples: Mapping[str, Sequence[Example]],
    names: Mapping[int, str] | Mapping[str, Mapping[int, str]],
    classes: Sequence[str] = (),
    layer: int = -1,
    scale: Sharing = "shared",
    logarithmic: bool = True,
) -> Figure:
    """A row per class: the image with its best detection, then the map (mean over heads) in every run.

    examples: those stored of every run; names: label -> class, or run -> label -> class, which must be the same in all;
    classes: which to show, () for the first three. Each run's panel has the box and the class of its own query. scale,
    logarithmic: of the colours, as of `overlay.draw_maps`. Raises ConfigError for a class that does not exist.
    """
    names, *others = [names.get(run, names) for run in examples] or [names]
    if any(other != names for other in others):
        raise Nothing(f"the classes of {', '.join(examples)}, or their numbers, are not the same")
    labels = chosen_labels(classes, names) if classes else list(names)[:3]
    rows = [row for row in (best_of_class(examples, label) for label in labels) if row is not None]
    if not rows:
        raise Nothing(f"no detections of {', '.join(names[label] for label in labels)} are stored")
    runs, looks = list(rows[0].queries), []
    pictures = [row.queries[row.best][0].image for row in rows]
    left = room(len(runs) + 1, scale)
    drawn, panels = image_panels(pictures, len(rows), len(runs) + 1, WIDEST_PANEL, header=0.15, **left)
    for number, (row, picture, (first, *rest)) in enumerate(zip(rows, pictures, panels, strict=True)):
        example, query = row.queries[row.best]
        colour = class_colour(row.label, names)
        draw_image(first, picture, names.get(row.label, str(row.label)), fontweight="bold", color=readable(colour))
        draw_box(first, example.boxes[query], colour)
        for axes, run in zip(rest, runs, strict=True):
            example, query = row.queries[run]
            if query is None:
                draw_image(axes, example.image, alpha=0.3)
            else:
                looks.append(_look(axes, example, query, layer))
                draw_box(axes, example.boxes[query], _colour(example, query, names))
            words = "no detection" if query is None else detection(example, query, names)
            axes.set_title(f"{fill(run, NAME)}\n{words}" if number == 0 else words, loc="left")
    draw_maps(drawn, looks, scale, logarithmic)
    return drawn


@styled
def cells_grid(
    example: Example,
    names: Mapping[int, str],
    max_objects: int = 4,
    scale: Sharing = "shared",
    logarithmic: bool = True,
) -> Figure:
    """Encoder self-attention: where the cell in the middle of an object looks, mean over heads.

    A column per object, largest first, or per detection where none are annotated, a row per encoder layer; the cell
    that asks is outlined in the colour of the object's class, "in box" is the share of the weight inside the object's
    box. scale, logarithmic: of the colours, as of `overlay.draw_maps`.
    """
    if "encoder_self" not in example.sites:
        raise Nothing("maps of encoder_self are not stored, or the model has no encoder layers")
    if not cells_ask(example):
        raise Nothing("queries of encoder_self are tokens of several levels, not the cells of one")
    (boxes, labels), looks = _objects(example), []
    objects = _largest(boxes, max_objects)
    centres = boxes[objects].reshape(-1, 2, 2).mean(1)
    cells = [cell_at(example, x, y) for x, y in centres]
    layers = example.shape("encoder_self")[0]
    drawn, panels = image_panels(example.image, layers, len(cells) + 1, WIDEST_PANEL, **room(len(cells) + 1, scale))
    for layer, (first, *rest) in enumerate(panels):
        draw_image(first, example.image, f"encoder layer {layer + 1}")
        weights = example.maps("encoder_self", layer)
        for index, cell, axes in zip(objects, cells, rest, strict=True):
            label = int(labels[index])
            mean = weights[:, cell].mean(0, dtype=np.float32)
            looks.append(Panel(axes, example.image, mean, example.extent_of(mean), boxes[index]))
            axes.set_title(names.get(label, str(label)) if layer == 0 else "", loc="left")
            for panel in (first, axes):
                draw_box(panel, cell_box(example, cell), class_colour(label, names))
    draw_maps(drawn, looks, scale, logarithmic)
    return drawn


@styled
def layers_grid(
    example: Example,
    names: Mapping[int, str],
    query: int = 0,
    scale: Sharing = "shared",
    logarithmic: bool = True,
) -> Figure:
    """One query through the decoder: a row per layer, a column per head, the mean over heads first.

    scale, logarithmic: of the colours, as of `overlay.draw_maps`.
    """
    maps, looks = example.maps()[:, :, query], []  # [L,H,h,w]
    layers, heads = maps.shape[:2]
    drawn, panels = image_panels(example.image, layers, heads + 1, WIDEST_PANEL, **room(heads + 1, scale))
    for layer, row in enumerate(panels):
        columns = [("mean", maps[layer].mean(0, dtype=np.float32))]
        columns += [(f"head {head + 1}", maps[layer, head]) for head in range(heads)]
        for axes, (name, weights) in zip(row, columns, strict=True):
            looks.append(Panel(axes, example.image, weights, example.extent, example.boxes[query]))
            draw_box(axes, example.boxes[query], _colour(example, query, names))
            title = f"layer {layer + 1}, {name}" if name == "mean" else name if layer == 0 else ""
            axes.set_title(title, loc="left", fontsize=6)
    draw_maps(drawn, looks, scale, logarithmic)
    return drawn


@styled
def single_map(
    image: np.ndarray,
    weights: np.ndarray,
    box: np.ndarray,
    title: str,
    extent: np.ndarray | None = None,
    logarithmic: bool = True,
    colour: str = MUTED,
) -> Figure:
    """The image with a query's box, and its map beside it.

    weights: [h,w]; logarithmic: of the colours; colour: of the box.
    """
    drawn, panels = image_panels(image, 1, 2, WIDEST_PANEL, width=0.7, **room(2))
    left, right = panels[0]
    draw_image(left, image, title)
    for axes in (left, right):
        draw_box(axes, box, colour)
    draw_maps(drawn, [Panel(right, image, weights, extent, box)], logarithmic=logarithmic)
    return drawn
