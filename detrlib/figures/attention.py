"""Attention over images: what a query detected and where it looked for it.

Legend: n queries, L layers, H heads, h x w cells of the feature map. Boxes are xyxy in pixels of the image given.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detrlib.figures.choices import best_of_class, cell_at, cell_box, cells_ask, chosen_labels, detection
from detrlib.figures.style import MUTED, PALETTE, Nothing, image_panels, styled
from detrlib.runs.examples import Example

MAP_COLOURS = "YlOrRd"
MAP_OPACITY = 0.85  # where a map is highest; a cell without weight leaves the image as it is
WIDEST_PANEL = 1.7  # inches


def draw_map(
    axes: Axes, image: np.ndarray, weights: np.ndarray, extent: np.ndarray | None = None, top: float | None = None
) -> None:
    """Lay a map [h,w] over a pale grey version of `image` [H,W,3].

    extent: as of `lay_cells`; top: the weight of the brightest colour, None: the highest one of this map.
    """
    grey = image @ np.array([0.299, 0.587, 0.114])
    axes.imshow(0.6 * grey + 0.4 * 255, cmap="gray", vmin=0, vmax=255)
    weights = np.asarray(weights, dtype=np.float32)
    share = weights / max(weights.max() if top is None else top, 1e-12)
    lay_cells(axes, image, share, extent, cmap=MAP_COLOURS, alpha=MAP_OPACITY * np.minimum(1.0, 5 * share))


def lay_cells(axes: Axes, image: np.ndarray, values: np.ndarray, extent: np.ndarray | None = None, **look) -> None:
    """Lay cells [h,w] with values in 0..1 over `image`, which is drawn already.

    extent: height and width of the image in cells, where the last cells reach beyond it; None: exactly h and w.
    """
    height, width = image.shape[:2]
    rows, columns = values.shape if extent is None else extent
    right, bottom = values.shape[1] * width / columns - 0.5, values.shape[0] * height / rows - 0.5
    # Cells are drawn as what they are, squares; smoothing would show weight where there is none.
    axes.imshow(values, vmin=0, vmax=1, extent=(-0.5, right, bottom, -0.5), interpolation="nearest", **look)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.axis("off")


def draw_box(axes: Axes, box: np.ndarray, colour: str, dashed: bool = False, caption: str = "") -> None:
    """One box; dashed ones are ground truth. A white rim keeps it visible on any background."""
    x0, y0, x1, y1 = box
    for edge, line_width in (("white", 2.4), (colour, 1.3)):
        style = (0, (3, 2)) if dashed else "solid"
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=line_width, linestyle=style)
        )
    if caption:
        axes.text(x0, y0, caption, fontsize=5, color="white", bbox={"facecolor": colour, "lw": 0, "pad": 0.8})


def draw_image(axes: Axes, image: np.ndarray, title: str = "", alpha: float = 1.0, **look) -> None:
    """The image alone, with a title on the left whose `look` is that of a text."""
    axes.imshow(image, alpha=alpha)
    axes.axis("off")
    axes.set_title(title, loc="left", **look)


def _largest_objects(example: Example, most: int) -> np.ndarray:
    sides = example.true_boxes[:, 2:] - example.true_boxes[:, :2]
    return np.argsort(-sides.prod(1))[:most]


@styled
def detections_with_attention(
    example: Example, names: Mapping[int, str], layer: int = -1, max_queries: int = 4
) -> Figure:
    """The image with its detections and ground truth, then where each of the best `max_queries` queries looked.

    Maps are those of one decoder layer, mean over heads; solid boxes are predictions, dashed ones ground truth.
    names: label -> class.
    """
    shown = min(max_queries, len(example.boxes))
    drawn, panels = image_panels(example.image, 1, max_queries + 1, WIDEST_PANEL)
    first, *rest = panels[0]
    count = len(example.true_boxes)
    draw_image(first, example.image, f"{count} object{'s' * (count != 1)}")
    for box in example.true_boxes:
        draw_box(first, box, "black", dashed=True)
    for query, axes in enumerate(rest[:shown]):
        colour = PALETTE[query % len(PALETTE)]
        draw_box(first, example.boxes[query], colour)
        _draw_look(axes, example, query, layer, colour)
        axes.set_title(detection(example, query, names), loc="left", color=colour)
    for axes in rest[shown:]:
        axes.set_visible(False)
    return drawn


@styled
def objects_by_run(
    examples: Mapping[str, Example], names: Mapping[int, str], layer: int = -1, max_objects: int = 5
) -> Figure:
    """The same image in several runs: a row is a run, a column an annotated object, in order of size.

    Each panel shows the map (mean over heads) of the query matched to the object, its box and the class it gave.
    """
    if not examples:
        raise Nothing("no run has stored examples with attention")
    first = next(iter(examples.values()))
    objects = _largest_objects(first, max_objects)
    drawn, panels = image_panels(first.image, len(examples), len(objects) + 1, WIDEST_PANEL)
    for row, (run, example) in zip(panels, examples.items(), strict=True):
        draw_image(row[0], example.image, run, fontweight="bold", fontsize=6)  # names of runs are long
        for number, (axes, index) in enumerate(zip(row[1:], objects, strict=True)):
            colour = PALETTE[number % len(PALETTE)]
            draw_box(row[0], example.true_boxes[index], colour, dashed=True)
            matched = np.flatnonzero(example.matched == index)
            if not len(matched):
                draw_image(axes, example.image, "no query left", alpha=0.3, color=MUTED)
                continue
            draw_box(axes, example.true_boxes[index], colour, dashed=True)
            _draw_look(axes, example, matched[0], layer, colour)
            axes.set_title(detection(example, matched[0], names), loc="left", color=colour)
    return drawn


def _draw_look(axes: Axes, example: Example, query: int, layer: int, colour: str) -> None:
    """Where a query looks in a decoder layer, mean over heads, and its box."""
    draw_map(axes, example.image, example.maps(layer=layer)[:, query].mean(0, dtype=np.float32), example.extent)
    draw_box(axes, example.boxes[query], colour)


@styled
def queries_by_layer(example: Example, names: Mapping[int, str], max_queries: int = 4) -> Figure:
    """A row per detection, best first: its box on the image, then its map (mean over heads) in every decoder layer."""
    layers = example.shape()[0]
    drawn, panels = image_panels(example.image, min(max_queries, len(example.boxes)), layers + 1, WIDEST_PANEL)
    for query, (first, *rest) in enumerate(panels):
        colour = PALETTE[query % len(PALETTE)]
        draw_image(first, example.image, detection(example, query, names), color=colour)
        draw_box(first, example.boxes[query], colour)
        for layer, axes in enumerate(rest):
            _draw_look(axes, example, query, layer, colour)
            axes.set_title(f"layer {layer + 1}" if query == 0 else "", loc="left")
    return drawn


@styled
def chosen_classes(
    examples: Mapping[str, Sequence[Example]], names: Mapping[int, str], classes: Sequence[str] = (), layer: int = -1
) -> Figure:
    """A row per class: the image with its best detection, then the map (mean over heads) in every run.

    examples: those stored of every run; names: label -> class; classes: which to show, () for the first three. Each
    run's panel has the box and the class of its own query. Raises ConfigError for a class that does not exist.
    """
    labels = chosen_labels(classes, names) if classes else list(names)[:3]
    rows = [row for row in (best_of_class(examples, label) for label in labels) if row is not None]
    if not rows:
        raise Nothing(f"no detections of {', '.join(names[label] for label in labels)} are stored")
    runs = list(rows[0].queries)
    pictures = [row.queries[row.best][0].image for row in rows]
    drawn, panels = image_panels(pictures, len(rows), len(runs) + 1, WIDEST_PANEL, header=0.15)
    for number, (row, picture, (first, *rest)) in enumerate(zip(rows, pictures, panels, strict=True)):
        example, query = row.queries[row.best]
        draw_image(first, picture, names.get(row.label, str(row.label)), fontweight="bold")
        draw_box(first, example.boxes[query], PALETTE[0])
        for axes, run in zip(rest, runs, strict=True):
            example, query = row.queries[run]
            if query is None:
                draw_image(axes, example.image, alpha=0.3)
            else:
                _draw_look(axes, example, query, layer, PALETTE[0])
            words = "no detection" if query is None else detection(example, query, names)
            axes.set_title(f"{run}\n{words}" if number == 0 else words, loc="left")
    return drawn


@styled
def cells_grid(example: Example, max_objects: int = 4) -> Figure:
    """Encoder self-attention: where the cell in the middle of an object looks, mean over heads.

    A column per object, largest first, a row per encoder layer; the cell that asks is outlined.
    """
    if not cells_ask(example):
        raise Nothing("maps of encoder_self are not stored, or their queries are not the cells of one level")
    centres = example.true_boxes[_largest_objects(example, max_objects)].reshape(-1, 2, 2).mean(1)
    cells = [cell_at(example, x, y) for x, y in centres]
    drawn, panels = image_panels(example.image, example.shape("encoder_self")[0], len(cells) + 1, WIDEST_PANEL)
    for layer, (first, *rest) in enumerate(panels):
        draw_image(first, example.image, f"encoder layer {layer + 1}")
        weights = example.maps("encoder_self", layer)
        for number, (cell, axes) in enumerate(zip(cells, rest, strict=True)):
            colour = PALETTE[number % len(PALETTE)]
            draw_map(axes, example.image, weights[:, cell].mean(0, dtype=np.float32), example.extent)
            for panel in (first, axes):
                draw_box(panel, cell_box(example, cell), colour)
    return drawn


@styled
def layers_grid(example: Example, query: int = 0) -> Figure:
    """One query through the decoder: a row per layer, a column per head, the mean over heads first."""
    maps = example.maps()[:, :, query]  # [L,H,h,w]
    layers, heads = maps.shape[:2]
    drawn, panels = image_panels(example.image, layers, heads + 1, WIDEST_PANEL)
    for layer, row in enumerate(panels):
        columns = [("mean", maps[layer].mean(0, dtype=np.float32))]
        columns += [(f"head {head + 1}", maps[layer, head]) for head in range(heads)]
        for axes, (name, weights) in zip(row, columns, strict=True):
            draw_map(axes, example.image, weights, example.extent)
            draw_box(axes, example.boxes[query], PALETTE[0])
            title = f"layer {layer + 1}, {name}" if name == "mean" else name if layer == 0 else ""
            axes.set_title(title, loc="left", fontsize=6)
    return drawn


@styled
def single_map(
    image: np.ndarray, weights: np.ndarray, box: np.ndarray, title: str, extent: np.ndarray | None = None
) -> Figure:
    """The image with a query's box, and its map [h,w] beside it with the share of cells that have any weight."""
    drawn, panels = image_panels(image, 1, 2, WIDEST_PANEL, width=0.7)
    left, right = panels[0]
    draw_image(left, image, title)
    draw_map(right, image, weights, extent)
    right.set_title(f"{np.count_nonzero(weights)} of {weights.size} cells have weight", loc="left")
    for axes in (left, right):
        draw_box(axes, box, PALETTE[0])
    return drawn
