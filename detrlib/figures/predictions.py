"""Pictures of one's own with what was detected in them, runs side by side, and where each detection looked.

Legend: n detections of a picture, L layers, H heads, h x w cells of a map. Boxes are xyxy in pixels.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detrlib.errors import listed
from detrlib.figures.attention import FEW, draw_box, draw_image, thinner
from detrlib.figures.choices import cell_at, sites
from detrlib.figures.overlay import Panel, draw_maps, room, write_captions
from detrlib.figures.style import MUTED, TEXT_WIDTH, Nothing, class_colour, image_panels, panels, readable, styled
from detrlib.runs.detected import Detected
from detrlib.runs.examples import Example

PANEL = 4.6  # inches, width of a picture beside others
PROPORTIONS = (0.3, 1.7)  # height / width of a panel at least and at most, however long the picture is
SMALL_PANEL = 1.9
LINE = 0.14  # inches of a second line of the title
MOST = 6  # detections whose maps are drawn
SHEET = 48  # pictures on a contact sheet
LAYER_OF = {"decoder_cross": "layer", "encoder_self": "encoder layer"}  # whose keys are cells of the picture


@dataclass(frozen=True)
class MapChoice:
    """Which of the maps of a detection is drawn; layers and heads from 0, layers also from the end."""

    site: Literal["decoder_cross", "encoder_self"] = "decoder_cross"
    layer: int = -1
    head: int | Literal["mean"] = "mean"

    def of(self, views: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray]:
        """Title of the layer and maps [n,h,w] among those of `views_of`.

        Raises Nothing where the layer or the head is none.
        """
        layers = [title for title in views if title.startswith(f"{LAYER_OF[self.site]} ")]
        if not -len(layers) <= self.layer < len(layers):
            raise Nothing(f"there is no layer {self.layer} among {len(layers)} of {self.site}")
        title = layers[self.layer]
        column = 0 if self.head == "mean" else self.head + 1
        if not column < views[title].shape[1]:
            raise Nothing(f"there is no head {self.head} among {views[title].shape[1] - 1} of {self.site}")
        return title, views[title][:, column]

    def words(self, title: str) -> str:
        """Layer and head for a reader."""
        return f"{title}, {'mean over heads' if self.head == 'mean' else f'head {self.head + 1}'}"


def class_colours(classes: Iterable[Mapping[int, str]]) -> dict[str, str]:
    """The colour of each class by its name; classes: label -> class of every run, of which the first one decides."""
    colours = {}
    for of_run in classes:
        colours |= {name: class_colour(label, of_run) for label, name in of_run.items() if name not in colours}
    return colours


def _colours(picture: Mapping[str, Detected]) -> dict[str, str]:
    return class_colours(detected.classes for detected in picture.values())


def views_of(detected: Detected) -> dict[str, np.ndarray]:
    """The maps of the detections of a picture by title, each [n,1+H,h,w]: the mean over heads, then every head.

    Of the encoder it is the cell in the middle of the detection that asks. Explanations, scaled to sum one, follow
    with no heads: [n,1,h,w]. Empty without attention.
    """
    example, views = detected.example, {}
    if example is None:
        return views
    for site, title in LAYER_OF.items():
        if site in sites(example):
            for layer, maps in enumerate(looks_of(example, site).swapaxes(0, 1)):
                views[f"{title} {layer + 1}"] = maps
    return views | {
        f"explanation: {method}": maps[:, None] for method, maps in shares_of(detected.explanations).items()
    }


def looks_of(example: Example, site: str, rows: Sequence[int] | None = None) -> np.ndarray:
    """Where `rows` of an example look (None: all), [n,L,1+H,...]: in each layer the mean over heads, then every head.

    Of the encoder it is the cell in the middle of the detection that asks.
    """
    asking = np.arange(len(example.boxes)) if rows is None else np.asarray(rows, dtype=int)
    if site == "encoder_self":
        middles = example.boxes[asking].reshape(-1, 2, 2).mean(1)
        asking = [cell_at(example, x, y) for x, y in middles]
    return looks_from(example, site, asking)


def looks_from(example: Example, site: str, asking: Sequence[int]) -> np.ndarray:
    """The same of rows of the maps as they are stored: queries of an example, or cells of an encoder."""
    layers = []
    for layer in range(example.shape(site)[0]):
        maps = example.maps(site, layer)[:, asking].swapaxes(0, 1).astype(np.float32)
        layers.append(np.concatenate([maps.mean(1, keepdims=True), maps], 1))
    return np.stack(layers, 1)


def shares_of(explanations: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Explanations [m,h,w] scaled to sum one, or zero where there is nothing."""
    totals = {method: maps.sum((1, 2), keepdims=True) for method, maps in explanations.items()}
    return {
        method: np.divide(maps, totals[method], out=np.zeros_like(maps), where=totals[method] > 0)
        for method, maps in explanations.items()
    }


@styled
def detections_by_run(picture: Mapping[str, Detected], image: np.ndarray | None = None) -> Figure:
    """A picture with its detections, their classes and scores, a panel for each run.

    picture: run -> what it detected in this picture; image: the picture [H,W,3]; None: it is read again.
    """
    image, colours = _image(picture, image), _colours(picture)
    width = len(picture) * PANEL / TEXT_WIDTH
    header = LINE * any(len(detected) > FEW for detected in picture.values())
    drawn, grid = image_panels(_proportions(image), 1, len(picture), PANEL, width=width, header=header)
    for axes, (run, detected) in zip(grid[0], picture.items(), strict=True):
        named = draw_detections(axes, image, detected, colours)
        count = f"{len(detected)} detection{'' if len(detected) == 1 else 's'}"
        axes.set_title(f"{run}: {count}" + _crowd(detected, named), loc="left")
    return drawn


def draw_detections(
    axes: Axes, image: np.ndarray, detected: Detected, colours: Mapping[str, str], captions: bool = True
) -> int:
    """Lay the detections of a picture over it, the best one in front; returns how many have room for a caption."""
    draw_image(axes, image)
    axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    boxes, own = detected.boxes_in(image), [colours.get(name, MUTED) for name in detected.names]
    for index in reversed(range(len(detected))):
        draw_box(axes, boxes[index], own[index], width=thinner(len(detected)))
    if not captions:
        return 0
    texts = [f"{name} {score:.2f}" for name, score in zip(detected.names, detected.scores, strict=True)]
    return write_captions(axes, boxes, texts, own, image.shape[:2], PANEL)


def _crowd(detected: Detected, named: int) -> str:
    """A second line for the title where not all detections could be named: how many there are of each class."""
    counts = listed((f"{name} {count}" for name, count in Counter(detected.names).most_common()), 4)
    return "" if named == len(detected) else f", {named} of them named\n{counts}"


@styled
def maps_by_detection(
    picture: Mapping[str, Detected], view: MapChoice | None = None, image: np.ndarray | None = None, most: int = MOST
) -> Figure:
    """Where the best detections of a picture looked: a row is a run, the same colour is the same weight.

    most: detections that are drawn. Over the picture stand the means over its detections and heads, below each map its
    own numbers, of which the last is the share of the weight inside the box. picture, image: as of `detections_by_run`.
    """
    view, image, colours = view or MapChoice(), _image(picture, image), _colours(picture)
    rows = {run: detected for run, detected in picture.items() if len(detected) and views_of(detected)}
    if not rows:
        raise Nothing("there is no detection with a map")
    columns = 1 + max(min(len(detected), most) for detected in rows.values())
    free = room(columns)
    free |= {"header": 0.45 * len(rows), "width": (columns * SMALL_PANEL + free["beside"]) / TEXT_WIDTH}
    drawn, grid = image_panels([_proportions(image)] * len(rows), len(rows), columns, SMALL_PANEL, **free)
    looks = []
    for row, (run, detected) in zip(grid, rows.items(), strict=True):
        title, maps = view.of(views_of(detected))
        draw_detections(row[0], image, detected, colours, captions=False)
        row[0].set_title(f"{run}\n{view.words(title)}\n{_means(detected, title)}", loc="left", fontsize=6)
        boxes = detected.boxes_in(image)
        for index, axes in enumerate(row[1:]):
            if index >= min(len(detected), most):
                axes.remove()
                continue
            colour = colours.get(detected.names[index], MUTED)
            draw_box(axes, boxes[index], colour)
            title = f"{detected.names[index]} {detected.scores[index]:.2f}"
            axes.set_title(title, loc="left", color=readable(colour))
            extent = detected.example.extent_of(maps[index])
            looks.append(Panel(axes, image, maps[index], extent, boxes[index]))
    draw_maps(drawn, looks)
    return drawn


def _means(detected: Detected, title: str) -> str:
    """The sparsity of a layer in this picture in words."""
    site = next(site for site, start in LAYER_OF.items() if title.startswith(f"{start} "))
    table, layer = detected.sparsity, int(title.rpartition(" ")[2]) - 1
    rows = table[(table["site"] == site) & (table["layer"] == layer)]
    row = rows.iloc[-1]  # of the detections in the decoder, of all cells in the encoder
    numbers = f"Gini {row['gini']:.2f}, {row['zeros']:.1%} zeros"
    return f"each head: {row['support']:.1f} of {row['keys']} keys,\n{numbers}"


@styled
def contact_sheet(pictures: Sequence[tuple[np.ndarray, Detected]]) -> Figure:
    """The first pictures, small, with what one run detected in them."""
    if not pictures:
        raise Nothing("there are no pictures")
    shown = pictures[:SHEET]
    columns = min(len(shown), 4 if len(shown) <= 12 else 6)
    height = TEXT_WIDTH / columns * 0.8 + 0.2
    drawn, grid = panels(len(shown), columns, height, min(1.0, columns / 4))
    for axes, (image, detected) in zip(grid, shown, strict=True):
        draw_detections(axes, image, detected, class_colours([detected.classes]), captions=False)
        title = detected.source.title
        short = title if len(title) <= 22 else f"{title[:10]}…{title[-10:]}"
        axes.set_title(f"{short}: {len(detected)}", loc="left", fontsize=6, color=MUTED, parse_math=False)
        axes.set_anchor("NW")
    return drawn


def _image(picture: Mapping[str, Detected], image: np.ndarray | None) -> np.ndarray:
    return next(iter(picture.values())).image() if image is None else image


def _proportions(image: np.ndarray) -> np.ndarray:
    """An array in the proportions of a panel for `image`: those of the picture, within bounds."""
    low, high = PROPORTIONS
    ratio = min(max(image.shape[0] / image.shape[1], low), high)
    return np.empty((round(1000 * ratio), 1000, 0))
