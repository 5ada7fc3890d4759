"""One look for every figure: sizes in text widths, one colour per transform, fonts embedded in the PDF.

Functions that draw carry `@styled`, so that settings apply to their own figures and to nothing else, and so that a
function whose data hold nothing of what it draws (`raise Nothing(why)`) returns a figure that says so.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, wraps
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.legend import Legend
from matplotlib.text import Text
from seaborn.utils import relative_luminance

from detrlib.files import write_atomic
from detrlib.runs.folder import RUNS

logger = logging.getLogger(__name__)

TEXT_WIDTH = 6.5  # inches, of a printed A4 or letter page
CAPTION_HEIGHT = 0.25  # inches of a title above an image
MUTED = "#6b6b6b"  # text and lines that should stay in the background
DASH = "–"  # a missing value, in figures and in tables
NOTHING = "nothing to show"  # label of a figure that only says so

# Okabe and Ito, "Color Universal Design", 2008: distinct for every kind of colour vision. Ordered by contrast on white.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
# Of classes: without black, which is ground truth, and yellow, too pale for a line; six of Tol's "muted" follow.
CLASS_COLOURS = [*PALETTE[:6], "#882255", "#332288", "#999933", "#AA4499", "#117733", "#88CCEE"]

OF_NO_TRANSFORM = ["#8C510A", "#7F7F7F"]  # brown and grey, of runs beside many others

COLOURS = {
    "softmax": "#0072B2",
    "sparsemax": "#D55E00",
    "entmax15": "#009E73",
    "alpha_entmax": "#CC79A7",
    "tvmax": "#E69F00",
    "entmax": "#56B4E9",
    # Paul Tol's "muted", distinct likewise
    "normmax": "#882255",
    "budget": "#999933",
    "sparsegen": "#CC6677",
    "ssmax": "#332288",
    "asentmax": "#44AA99",
    "softpick": "#AA4499",
    "topk": "#DDCC77",
    "sigmoid": "#88CCEE",
    "relu": "#117733",
}

# Fonts with the characters of Chinese, Japanese and Korean, of which those that are installed are used.
FAR_EAST = "\u2e80"  # the first of these characters, as good as
MORE_FONTS = [
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "SimHei"),
    *("Droid Sans Fallback", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS"),
]
MORE_FONTS = [name for name in MORE_FONTS if name in {font.name for font in fontManager.ttflist}]
warnings.filterwarnings("ignore", message="Glyph .* missing from")  # one for each character; see `_as_they_stand`

STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 150,  # of PNG files, which are for pages; print has the PDF
    "pdf.fonttype": 42,  # TrueType outlines: text in the PDF can be selected and searched
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", *MORE_FONTS],  # the first comes with matplotlib: the same figure everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": MUTED,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
}


SCREENS = {"page": STYLE["figure.dpi"], "class": 180}  # pixels per inch on a screen, see `use`
SCALED = ("axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")


def look() -> dict:
    """STYLE, except for what the user has changed from matplotlib's default; a font size of his own scales the others.

    What he has changed, by `plt.rcParams`, a style sheet or a matplotlibrc, stays as it is.
    """
    own = {name: value for name, value in STYLE.items() if plt.rcParams[name] == plt.rcParamsDefault[name]}
    scale = plt.rcParams["font.size"] / STYLE["font.size"] if "font.size" not in own else 1
    return own | {name: scale * own[name] for name in SCALED if name in own}


def use(screen: str) -> None:
    """Draw what follows for a "page" or for a "class": there larger on the screen, letters and lines with it.

    Saved files stay as they are. Raises ValueError for any other screen.
    """
    if screen not in SCREENS:
        raise ValueError(f"figures are drawn for {' or '.join(SCREENS)}, not for {screen!r}")
    plt.rcParams["figure.dpi"] = SCREENS[screen]


class Described(Figure):
    """A figure that says what it shows to those who cannot see it, in notebooks and pages made of them."""

    subject = ""  # what is drawn; `styled` knows

    def alternative(self) -> str:
        """What is drawn, in a sentence, and the words at its panels: titles, axes, legends."""
        axes = [text for one in self.axes for text in (one.get_title("left"), one.get_xlabel(), one.get_ylabel())]
        legends = [text.get_text() for legend in self.findobj(Legend) for text in legend.get_texts()]
        words = dict.fromkeys(" ".join(text.split()) for text in (*axes, *legends) if text.strip())
        return " ".join(filter(None, [self.subject, "; ".join(words)]))

    def _repr_mimebundle_(self, **_) -> tuple[dict, dict]:
        """To IPython: the picture is the format's own, its metadata are these."""
        return {}, {"image/png": {"alt": self.alternative()}}


class Nothing(ValueError):
    """There is nothing to draw; the message says why."""


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with STYLE, and return a figure with the reason where there is nothing to draw."""

    @wraps(draw)
    def drawn(*arguments, **named) -> Figure:
        with plt.rc_context(look()):
            try:
                result = draw(*arguments, **named)
            except Nothing as reason:
                result = _note(f"Nothing to show: {reason}.")
        if isinstance(result, Described) and result.get_label() != NOTHING:
            result.subject = subject_of(draw)
        for figure in (result, *arguments):
            if isinstance(figure, Figure):
                _as_they_stand(figure)
        return result

    return drawn


def subject_of(draw: Callable[..., Figure]) -> str:
    """What a function draws, as its docstring begins; shapes of its arguments are for those who call it."""
    subject = " ".join((draw.__doc__ or "").partition("\n\n")[0].split())
    return re.sub(r" \[[^\]]*\]", "", subject)


def _as_they_stand(figure: Figure) -> None:
    """Names from outside are no formulas, which to matplotlib is what lies between two dollar signs; and it is said
    once where no font has their characters, in place of a warning by matplotlib for each of these."""
    for text in figure.findobj(Text):
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():  # which is a number at an axis
            text.set_parse_math(False)
        if not MORE_FONTS and any(character >= FAR_EAST for character in text.get_text()):
            _say_fonts()


@cache
def _say_fonts() -> None:
    logger.warning("no font here has all characters of these names, which show as boxes; one that has is Noto Sans CJK")


def _note(text: str) -> Figure:
    """A strip with a text in place of a figure; `save` writes none."""
    subject, text = text, fill(text, 110)
    drawn, axes = figure(1.0, 0.04 * (2 + text.count("\n")))
    drawn.set_label(NOTHING)
    drawn.subject = subject
    axes.axis("off")
    axes.text(0, 0.5, text, color=MUTED, va="center")
    return drawn


def figure(width: float = 1.0, aspect: float = 0.6, **subplots_arguments):
    """(figure, axes) as of `plt.subplots`, `width` text widths wide and `aspect` times as high as wide.

    The figure is taken out of pyplot's register: a notebook would show a registered figure twice when it is the
    value of a cell, and would keep every one of them in memory.
    """
    size = (width * TEXT_WIDTH, width * TEXT_WIDTH * aspect)
    with plt.rc_context(look()):
        options = {"layout": "constrained", "FigureClass": Described} | subplots_arguments
        drawn, axes = plt.subplots(figsize=size, **options)
    plt.close(drawn)
    return drawn, axes


def panels(
    count: int, columns: int, height: float, width: float = 1.0, **subplots_arguments
) -> tuple[Figure, list[Axes]]:
    """(figure, axes): `count` panels in rows of at most `columns`, each row `height` inches high, titles included.

    Places left over in the last row stay empty.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    aspect = rows * height / (width * TEXT_WIDTH)
    drawn, grid = figure(width, aspect, nrows=rows, ncols=columns, squeeze=False, **subplots_arguments)
    for axes in grid.flat[count:]:
        axes.remove()
    for axes in grid.flat[count - columns : count]:  # with a shared axis, that of panels above an empty place too
        axes.tick_params(labelbottom=True)
    return drawn, list(grid.flat[:count])


def image_panels(
    image: np.ndarray | Sequence[np.ndarray],
    rows: int,
    columns: int,
    widest: float,
    width: float = 1.0,
    header: float = 0.0,
    footer: float = 0.0,
    beside: float = 0.0,
) -> tuple[Figure, np.ndarray]:
    """(figure, axes [rows, columns]): panels in the proportions of `image` [H,W,...], each with room for a title.

    image: one for all, or one for every row; widest: inches of a panel at most, where `width` text widths would allow
    more; header: inches more above them all; footer: inches more below each panel; beside: inches to the right of all.
    """
    width = min(width, (columns * widest + beside) / TEXT_WIDTH)
    panel = (width * TEXT_WIDTH - beside) / columns
    images = [image] * rows if isinstance(image, np.ndarray) else image
    heights = [panel * image.shape[0] / image.shape[1] + CAPTION_HEIGHT + footer for image in images]
    aspect = (sum(heights) + header) / (width * TEXT_WIDTH)
    return figure(width, aspect, nrows=rows, ncols=columns, squeeze=False, height_ratios=heights)


def in_parts(runs: Mapping[str, Any], most: int) -> dict[str, dict[str, Any]]:
    """`runs`, at most so many at a time, as a figure has room for: {"": the first, "_2": the next, ...}."""
    parts = [dict(list(runs.items())[start : start + most]) for start in range(0, len(runs), most)] or [{}]
    return {f"_{number}" if number > 1 else "": part for number, part in enumerate(parts, 1)}


def class_colour(label: int, names: Mapping[int, str]) -> str:
    """The colour of a class in every figure: by its position among all classes, grey where it is none of them.

    names: label -> class, of all classes of the data.
    """
    return CLASS_COLOURS[sorted(names).index(label) % len(CLASS_COLOURS)] if label in names else MUTED


def readable(colour: str) -> str:
    """The colour of letters on white: darker where it is too pale to be read, to WCAG's contrast of 4.5 to 1."""
    shares = np.array(to_rgb(colour))
    while relative_luminance(shares) > 1.05 / 4.5 - 0.05:
        shares *= 0.95
    return to_hex(shares)


def run_colours(runs: Iterable[str]) -> dict[str, str]:
    """A colour for every run: that of its transform where the name holds one, otherwise the next unused one, of 19.

    "shapes_entmax15_seed1" counts as entmax15; of several runs with the same transform the first takes its colour.
    """
    runs = list(dict.fromkeys(runs))
    colours = {}
    for run in runs:
        colour = COLOURS.get(_transform_in(run))
        if colour not in (None, *colours.values()):
            colours[run] = colour
    # Colours that belong to no transform come first: a run without one should not look like another's.
    every = [*PALETTE[:7], *OF_NO_TRANSFORM, *dict.fromkeys(COLOURS.values()), PALETTE[7]]
    by_preference = sorted(dict.fromkeys(every), key=lambda colour: colour in COLOURS.values() or colour == PALETTE[7])
    free = [colour for colour in by_preference if colour not in colours.values()]
    next_colour = cycle(free or PALETTE)
    return {run: colours[run] if run in colours else next(next_colour) for run in runs}


def save(drawn: Figure, name: str, folder: str | Path = "papermill_runs/figures", note: str = "") -> Figure:
    r"""Write a figure for LaTeX and for pages: <name>.pdf and <name>.png; nothing where nothing is shown.

    The PDF is as wide as the figure was made (a text width of 6.5 inches, or part of it) and holds its fonts as text:
    `\includegraphics{<name>}` needs no scaling.

    Args:
        drawn: any matplotlib figure.
        name: of the files, without their endings.
        folder: where they go; relative ones start at the project root.
        note: where the figure comes from (see `runs.provenance`), written to <name>.txt; empty: no such file.

    Returns:
        The figure, to be shown as the value of a cell.
    """
    if drawn.get_label() == NOTHING:
        return drawn
    folder = RUNS.parent / folder
    with plt.rc_context(look()):
        for kind, more in {"pdf": {"CreationDate": None}, "png": {}}.items():  # no date: the same file again
            write_atomic(folder / f"{name}.{kind}", partial(drawn.savefig, format=kind, metadata=more))
    if note:
        write_atomic(folder / f"{name}.txt", lambda file: file.write_text(note.rstrip("\n") + "\n"))
    return drawn


def _transform_in(run: str) -> str | None:
    """The longest name of a transform within the name of a run ("alpha_entmax" before "entmax")."""
    return max((name for name in COLOURS if name in run), key=len, default=None)
