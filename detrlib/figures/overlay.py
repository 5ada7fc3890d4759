"""A map of weights over an image: which colour a weight has, the bar that says so, and the numbers beside the map.

The image below is grey, so colour is weight: a cell stays without colour exactly where its weight is zero, and the
smallest weight above it has a tint that is seen on any image. Weights of softmax and of sparse transforms differ by
orders of magnitude more than a linear scale can show, hence colours are logarithmic unless told otherwise.

(Zeros of a softmax are no decision of the model: in float32 a weight underflows to exactly zero where its score lies
more than 103 below the highest. Stored maps keep every weight above zero, in float16.)

Legend: h x w cells of a map; boxes are xyxy in pixels of the image.
"""

from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from detrlib.boxes import xyxy_to_cxcywh
from detrlib.figures.style import MUTED
from detrlib.metrics.localisation import paibb
from detrlib.metrics.sparsity import gini

Sharing = Literal["shared", "own"]

# From yellow to dark purple: lightness falls evenly, for every kind of colour vision and on a projector.
COLOURS = LinearSegmentedColormap.from_list("weights", plt.get_cmap("inferno_r")(np.linspace(0.08, 0.9, 256)))
FAINTEST, DENSEST = 0.45, 0.9  # opacity of the smallest weight above zero, and of the largest
DECADES = 4  # of a logarithmic scale; weights below them have the colour of its lower end
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue
PALE = 0.55  # how much of the way to white the grey image goes
BAR_WIDTH, BAR_HEIGHT = 0.55, 2.4  # inches of a colour bar with its numbers, and of its length at most
FONT = 6  # points, of captions at boxes, and of numbers below maps of which NARROW or more are beside each other
ROUNDING = 0.005  # of the sum of a stored map
WIDE, NARROW = 4, 8  # columns in which two numbers fit beside each other; from which on their font is smaller


class Scale(NamedTuple):
    """What the ends of the colours stand for."""

    low: float
    high: float
    logarithmic: bool

    def norm(self) -> Normalize:
        """Weights -> 0..1, cut off at the ends."""
        return (LogNorm if self.logarithmic else Normalize)(self.low, self.high, clip=True)


def scale_of(maps: Sequence[np.ndarray], logarithmic: bool = True) -> Scale:
    """One scale for all maps: up to their highest weight, from DECADES below it, or from zero if it is linear."""
    high = max((float(np.max(weights, initial=0.0)) for weights in maps), default=0.0) or 1.0
    return Scale(high * 10.0**-DECADES if logarithmic else 0.0, high, logarithmic)


def overlay(weights: np.ndarray, scale: Scale | None = None) -> np.ndarray:
    """Colour a map, to be laid over a grey image.

    Args:
        weights: [h,w], not negative.
        scale: what colours stand for; None: logarithmic, up to the highest weight of this map.

    Returns:
        RGBA [h,w,4] in 0..1, float32: opacity is exactly 0 where the weight is exactly zero, and at least FAINTEST
        where it is above.
    """
    weights = np.asarray(weights, dtype=np.float32)
    positive = weights > 0
    shares = np.ma.getdata((scale or scale_of([weights])).norm()(np.where(positive, weights, 1.0)))
    colours = COLOURS(shares).astype(np.float32)
    colours[..., 3] = np.where(positive, FAINTEST + (DENSEST - FAINTEST) * shares, 0.0)
    return colours


def pale_grey(image: np.ndarray) -> np.ndarray:
    """The image uint8 [H,W,3] as grey [H,W] in 0..1, pale enough for colours to stand out."""
    return (1 - PALE) * (image @ LUMINANCE) / 255 + PALE


def draw_map(
    axes: Axes, image: np.ndarray, weights: np.ndarray, extent: np.ndarray | None = None, scale: Scale | None = None
) -> None:
    """Lay a map [h,w] over a pale grey version of `image` [H,W,3]; extent: as of `lay_cells`, scale: of `overlay`."""
    axes.imshow(pale_grey(image), cmap="gray", vmin=0, vmax=1)
    lay_cells(axes, image, overlay(weights, scale), extent)


def lay_cells(axes: Axes, image: np.ndarray, colours: np.ndarray, extent: np.ndarray | None = None) -> None:
    """Lay cells of RGBA colours [h,w,4] over `image`, which is drawn already.

    extent: height and width of the image in cells, where the last cells reach beyond it; None: exactly h and w.
    """
    height, width = image.shape[:2]
    cells = colours.shape[:2]
    rows, columns = cells if extent is None else extent
    right, bottom = cells[1] * width / columns - 0.5, cells[0] * height / rows - 0.5
    # Cells are drawn as what they are, squares; smoothing would show weight where there is none.
    axes.imshow(colours, extent=(-0.5, right, bottom, -0.5), interpolation="nearest")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.axis("off")


def numbers(
    weights: np.ndarray,
    image: np.ndarray,
    box: np.ndarray | None = None,
    extent: np.ndarray | None = None,
    mass: bool = True,
) -> list[str]:
    """Say how sparse a map [h,w] is, and how much of it lies in a box: support, Gini, PAIBB (`metrics.localisation`).

    box: [4], in pixels of `image` [H,W,3]; None: no such number. extent: as of `lay_cells`. mass: what the map sums to
    is said where that is not one, as beside a null key.
    """
    total = float(weights.sum())
    if mass and not total:
        return ["no weight on any cell"]
    height, width = image.shape[:2]
    boxes = np.array([[0, 0, width, height] if box is None else box])
    support, concentration, inside = map_numbers(weights[None], boxes, (height, width), extent)[0]
    words = [f"{support:.0f}/{weights.size} cells", f"Gini {concentration:.2f}"]
    words += [] if box is None else [f"in box {inside:.2f}"]
    return [*words, f"mass {total:.2f}"] if mass and abs(total - 1) > ROUNDING else words


def map_numbers(
    maps: np.ndarray, boxes: np.ndarray, size: tuple[int, int], extent: np.ndarray | None = None
) -> np.ndarray:
    """Measure maps [n,...,h,w] with a box [n,4] for each n: cells with weight, Gini and share in the box, [n,...,3].

    size: height and width of the image in the unit of the boxes; extent: as of `lay_cells`.
    """
    cells, (height, width) = maps.shape[-2:], size
    extent = cells if extent is None else np.minimum(extent, cells)  # rounding may have added to it
    weights = torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32))
    corners = torch.from_numpy(boxes) / torch.tensor([width, height, width, height])
    inside = paibb(weights, xyxy_to_cxcywh(corners), tuple(map(float, extent)))
    flat = weights.flatten(-2)
    return torch.stack([(flat > 0).sum(-1), gini(flat), inside], -1).numpy()


def text_colour(background: str) -> str:
    """Black or white, whichever has more contrast by WCAG 2's relative luminance: 4.5 to 1 or more on any colour."""
    light = np.power(to_rgb(background), 2.2) @ (0.2126, 0.7152, 0.0722)
    return "black" if light > 0.179 else "white"


def write_captions(
    axes: Axes,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[str],
    size: tuple[int, int],
    inches: float,
    most: int = 30,
) -> int:
    """Write captions at the first `most` of the boxes [n,4] that have room for one: above, within, or below.

    They keep inside the picture and off each other. size: height and width of the picture, which is `inches` wide.
    Returns how many were written.
    """
    (height, width), taken = size, np.zeros((0, 4))
    point = width / inches / 72  # pixels
    line = 1.6 * FONT * point
    for (x0, y0, x1, y1), text, colour in zip(np.clip(boxes, 0, (width, height) * 2), texts, colours, strict=True):
        if len(taken) == most:
            break
        look = {"color": text_colour(colour), "bbox": {"facecolor": colour, "lw": 0, "pad": 1}}
        caption = axes.text(0, 0, text, fontsize=FONT, va="bottom", parse_math=False, **look)
        length = (72 / axes.get_figure().dpi * caption.get_window_extent().width + 2) * point
        within = *np.arange(y0 + line, y1, line / 2), y1
        heights = (y0, *within, y1 + line) if y1 - y0 > 3 * line else (y0, y1 + line, *within)  # small ones stay seen
        for y, x in product(heights, (x0, x1 - length)):
            x = np.clip(x, 0, max(width - length, 0))
            own = np.array([x, y - line, x + length, y])
            apart = (taken[:, :2] >= own[2:]) | (taken[:, 2:] <= own[:2])
            if line <= y <= height and apart.any(1).all():
                taken = np.vstack([taken, own])
                caption.set_position((x, y))
                break
        else:
            caption.remove()
    return len(taken)


def room(columns: int, scale: Sharing = "shared") -> dict[str, float]:
    """What `style.image_panels` leaves free for the numbers and the bar of `draw_maps`."""
    lines = -(-(3 if scale == "shared" else 4) // _numbers_beside(columns))
    return {"footer": 0.04 + 1.4 * _numbers_font(columns) / 72 * lines, "beside": BAR_WIDTH}


def _numbers_beside(columns: int) -> int:
    """How many numbers fit beside each other below a panel."""
    return 2 if columns <= WIDE else 1


def _numbers_font(columns: int) -> int:
    """The size of their letters in points."""
    return FONT + 1 if columns < NARROW else FONT


class Panel(NamedTuple):
    """A map that is to be drawn, for `draw_maps`."""

    axes: Axes
    image: np.ndarray  # [H,W,3]
    weights: np.ndarray  # [h,w]
    extent: np.ndarray | None = None
    box: np.ndarray | None = None  # whose share of the weight is written below


def draw_maps(
    drawn: Figure,
    panels: Sequence[Panel],
    scale: Sharing = "shared",
    logarithmic: bool = True,
    label: str = "weight",
    measured: bool = True,
) -> None:
    """Draw maps that are compared with each other, their numbers below each, and one colour bar for all.

    Args:
        drawn: the figure that the panels are part of.
        panels: the maps, and where each is drawn.
        scale: "shared": the same colour is the same weight in every panel; "own": in each panel colours end at its own
            highest weight, which is written below it, and the bar shows shares of it.
        logarithmic: whether colours are logarithmic, over DECADES; otherwise they are linear, from zero.
        label: what the maps show.
        measured: whether to write numbers below the maps.
    """
    if not panels:
        return
    shared = scale_of([panel.weights for panel in panels], logarithmic) if scale == "shared" else None
    for panel in panels:
        colours = shared or scale_of([panel.weights], logarithmic)
        draw_map(panel.axes, panel.image, panel.weights, panel.extent, colours)
        what = panel.weights, panel.image, panel.box, panel.extent
        words = numbers(*what, mass=label == "weight") if measured else []
        write_numbers(panel.axes, words if shared else [*words, f"max {colours.high:.1g}"])
    shares = scale_of([np.ones(1)], logarithmic)
    words = label if shared else f"{label} / highest of its map"
    colour_bar(drawn, [panel.axes for panel in panels], shared or shares, words)


def write_numbers(axes: Axes, words: Sequence[str]) -> None:
    """Write numbers below a map, in the room left there."""
    columns = axes.get_subplotspec().get_gridspec().ncols
    count = _numbers_beside(columns)
    lines = [", ".join(words[start : start + count]) for start in range(0, len(words), count)]
    drawn = axes.get_figure()
    # A text of the figure, not of the axes: images need not make way for it, and notebooks, which crop, keep it.
    below = axes.transAxes + ScaledTranslation(0, -2 / 72, drawn.dpi_scale_trans)
    drawn.text(0, 0, "\n".join(lines), transform=below, va="top", fontsize=_numbers_font(columns), color=MUTED)
    axes.set_anchor("N")


def colour_bar(drawn: Figure, beside: Sequence[Axes], scale: Scale, label: str) -> Colorbar:
    """The bar of a scale to the right of panels of a figure, in the colours that weights have over a grey image."""
    steps = np.geomspace if scale.logarithmic else np.linspace
    colours = overlay(steps(scale.low or scale.high / 256, scale.high, 256)[None], scale)[0]
    over_grey = colours[:, 3:] * colours[:, :3] + (1 - colours[:, 3:]) * (PALE + 1) / 2
    shown = ScalarMappable(scale.norm(), LinearSegmentedColormap.from_list("over grey", over_grey))
    tops, bottoms = zip(*((spot.y1, spot.y0) for spot in (axes.get_position() for axes in beside)), strict=True)
    height = (max(tops) - min(bottoms)) * drawn.get_figheight()
    length = min(BAR_HEIGHT, 0.85 * height)
    look = {"shrink": length / height, "aspect": length / 0.09, "pad": 0.015}
    bar = drawn.colorbar(shown, ax=list(beside), **look)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.set_label(label, fontsize=7)
    bar.ax.set_xlabel("0: no colour", fontsize=6, color=MUTED, loc="left")
    return bar
