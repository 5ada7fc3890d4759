"""Explanations of detections as pictures, and how faithful they are as curves and as a table.

Legend: n detections, h x w cells of an explanation. Boxes are xyxy in pixels of the image given.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import norm

from detrlib.errors import ConfigError
from detrlib.figures.attention import WIDEST_PANEL, draw_box, draw_image
from detrlib.figures.overlay import Panel, Sharing, draw_maps, room
from detrlib.figures.predictions import MOST
from detrlib.figures.style import (
    MUTED,
    PALETTE,
    TEXT_WIDTH,
    Nothing,
    class_colour,
    image_panels,
    panels,
    run_colours,
    styled,
)
from detrlib.metrics.faithfulness import gains, mean_interval, means_by_method
from detrlib.metrics.statistics import comparison_table
from detrlib.runs.detected import Detected

TITLES = {"grad_attention": "grad × attn", "odam": "ODAM", "odam_box": "ODAM + box", "drise": "D-RISE"}
METHOD_COLOURS = dict(zip(("raw", "rollout", "relevance", "grad_attention", "odam", "gradient"), PALETTE, strict=False))
METHOD_COLOURS |= {"odam_box": "#882255", "drise": "#999933", "box": "#000000", "random": MUTED}
DIRECTIONS = (("deletion", "lower", "deleted"), ("insertion", "higher", "inserted"))
MARKS = "os^DvPX*"  # of lines, which colours alone would not tell apart for everybody
BAND = norm.ppf(0.975)  # standard errors either side of a mean that hold 95 % of a normal distribution


@styled
def explanations_grid(
    images: Sequence[np.ndarray],
    boxes: np.ndarray,
    titles: Sequence[str],
    maps: Mapping[str, Sequence[np.ndarray]],
    extents: Sequence[np.ndarray] | None = None,
    labels: Sequence[int] = (),
    names: Mapping[int, str] | None = None,
    scale: Sharing = "own",
    logarithmic: bool = True,
) -> Figure:
    """A row per detection: its image with the box, then the map of every method over the image.

    images: n of uint8 [H,W,3], one for each detection; boxes [n,4]; titles: what each detection is; maps: method ->
    n of [h,w]; extents: height and width of each image in cells where the last cells reach beyond it, None: h and w;
    labels, names: n classes, and label -> class, which colour the boxes; scale, logarithmic: of the maps, as of
    `overlay.draw_maps`. Methods have units of their own, hence each map has a scale of its own. Below it "in box" is
    the share inside the predicted box.
    """
    extents = [None] * len(images) if extents is None else extents
    drawn, panels = image_panels(images, len(images), 1 + len(maps), WIDEST_PANEL, **room(1 + len(maps), scale))
    laid = []
    for number, (row, image) in enumerate(zip(panels, images, strict=True)):
        draw_image(row[0], image, titles[number], fontsize=7)
        for axes, (method, own) in zip(row[1:], maps.items(), strict=True):
            laid.append(Panel(axes, image, own[number], extents[number], boxes[number]))
            if number == 0:
                axes.set_title(TITLES.get(method, method), loc="left", fontsize=6)  # seven fit beside each other
        for axes in row:
            draw_box(axes, boxes[number], class_colour(int(labels[number]), names) if len(labels) else PALETTE[0])
    draw_maps(drawn, laid, scale, logarithmic, label="value")
    return drawn


def explained(detected: Detected, image: np.ndarray | None = None) -> Figure:
    """Draw the explanations of the best detections in a picture: a row for each, a column for each method.

    Args:
        detected: with explanations, as of `explain_detected` and `explained_detections` in `experiments.explain`.
        image: its picture [H,W,3] uint8; None: it is read.
    """
    image = detected.image() if image is None else image
    maps = {method: list(of_all[:MOST]) for method, of_all in detected.explanations.items()}
    count = min(map(len, maps.values()))
    scores = zip(detected.names, detected.scores[:count], strict=False)
    titles = [f"{name} {score:.2f}" for name, score in scores]
    boxes, extents = detected.boxes_in(image), [detected.example.extent] * count
    return explanations_grid([image] * count, boxes, titles, maps, extents, detected.labels, detected.classes)


@styled
def deletion_insertion_curves(
    frame: pd.DataFrame, by: str = "method", measure: str = "similarity", method: str | None = None
) -> Figure:
    """Mean curves of deletion and of insertion, a line for each method, or each run, with 95 % bands over images.

    Shares of pixels are drawn as square roots, as they were taken, so that the first per cent have room. Raises
    ConfigError where a line would be several.

    frame: as `measures/faithfulness_curves.parquet` has it (columns method, direction, fraction, measure, mean,
    standard_error), of one run; or, for by="run", those of several runs with a column run, and the method to show.
    by: the column whose values have a line each.
    """
    if frame.empty:
        raise Nothing("no explanations were tested (detrlib explain RUN)")
    lines = frame[frame["measure"] == measure].sort_values("fraction")
    lines = lines if method is None else lines[lines["method"] == method]
    if lines.duplicated([by, "direction", "fraction"]).any():
        raise ConfigError(f"several curves for one {by}; choose one run for by='method', one method for by='run'")
    if lines.empty:
        raise ConfigError(f"no curves of {measure!r}; there are {', '.join(frame['measure'].unique())}")
    names = list(frame[by].unique())
    colours = METHOD_COLOURS if by == "method" else run_colours(names)
    drawn, grid = panels(2, 2, height=0.38 * TEXT_WIDTH, sharey=True)
    for axes, (direction, better, done) in zip(grid, DIRECTIONS, strict=True):
        for name, mark in zip(sorted(names, key=list(colours).index), cycle(MARKS), strict=False):
            line = lines[(lines[by] == name) & (lines["direction"] == direction)]
            look = {"marker": mark, "markevery": 3} if name not in ("box", "random") else {"linestyle": "dashed"}
            axes.plot(line["fraction"], line["mean"], color=colours[name], label=TITLES.get(name, name), **look)
            low, high = ((line["mean"] + sign * BAND * line["standard_error"]).clip(0, 1) for sign in (-1, 1))
            axes.fill_between(line["fraction"], low, high, color=colours[name], alpha=0.15, lw=0)
        axes.set_xscale("function", functions=(np.sqrt, np.square))
        axes.set(xlabel=f"share of the pixels {done}", xlim=(0, 1), ylim=(0, None))
        axes.set_xticks([0, 0.01, 0.05, 0.2, 0.5, 1], ["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
        axes.set_title(f"{direction}: {better} is better", loc="left")
        axes.grid(axis="y")
    grid[0].set_ylabel({"iou": "IoU"}.get(measure, measure))
    drawn.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", handlelength=2)
    return drawn


def faithfulness_table(frames: Mapping[str, pd.DataFrame], measure: str = "similarity") -> pd.DataFrame:
    """Areas of deletion and insertion with 95 % intervals over images, one row per run and method.

    frames: run -> what `faithfulness_run` returned. Columns run, method, images, deletion and insertion (means of the
    images' means), each followed by the ends of its bootstrap interval. Intervals of two methods overlap where images
    differ more than methods do: whether one is better is said by `metrics.faithfulness.gains`.
    """
    rows = []
    for run, frame in frames.items():
        for method, own in means_by_method(frame, measure).items():
            row = {"run": run, "method": method, "images": len(own)}
            for direction, values in own.items():
                low, high = mean_interval(values)
                row |= {direction: values.mean(), f"{direction} low": low, f"{direction} high": high}
            rows.append(row)
    columns = [f"{direction}{end}" for direction in ("deletion", "insertion") for end in ("", " low", " high")]
    return pd.DataFrame(rows, columns=["run", "method", "images", *columns])


def gains_table(frames: Mapping[str, pd.DataFrame], measure: str = "similarity") -> pd.DataFrame:
    """How much better explanations do than the box and than raw attention, in words: `metrics.faithfulness.gains`.

    frames: run -> what `faithfulness_run` returned. A row per run, pair and metric, as of `comparison_table`.
    """
    tables = {run: comparison_table(gains(frame, measure)) for run, frame in frames.items()}
    return pd.concat(tables, names=["run"]).reset_index() if tables else pd.DataFrame()


@styled
def faithfulness_by_group(explained: pd.DataFrame, methods: Sequence[str] = ()) -> Figure:
    """Which explanation wins in which group of runs: areas of every method, a dot for each seed, a bar at the mean.

    explained: as of `runs.explained.explained_frame`; methods: those shown, in this order; (): all.
    """
    if explained.empty:
        raise Nothing("no explanations were tested (detrlib explain RUN)")
    shown = list(methods or dict.fromkeys(explained["method"]))
    groups = list(dict.fromkeys(explained["group"]))
    each = 0.09 if len(groups) <= 6 else 0.06  # inches of a method; a dozen groups should fit on a page
    drawn, grid = panels(2, 2, height=0.5 + len(groups) * (0.12 + each * len(shown)), sharey=True)
    for axes, (direction, better, _) in zip(grid, DIRECTIONS, strict=True):
        for number, method in enumerate(shown):
            own = explained[explained["method"] == method]
            offset = (number + 0.5) / len(shown) * 0.84 - 0.42
            rows = own["group"].map(groups.index) + offset
            marks = {"color": METHOD_COLOURS[method], "linestyle": "none"}
            axes.plot(own[direction], rows, marker="o", ms=2.5, alpha=0.6, **marks)
            means = own.groupby("group")[direction].mean()
            label = TITLES.get(method, method)
            axes.plot(
                means, [groups.index(g) + offset for g in means.index], marker="|", ms=8, mew=2, label=label, **marks
            )
        axes.set_title(f"{direction}: {better} is better", loc="left")
        axes.set(xlabel="area under the curve", ylim=(len(groups) - 0.5, -0.5), xlim=(0, None))
        axes.set_yticks(range(len(groups)), groups)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="y", length=0)
        for between in range(1, len(groups)):
            axes.axhline(between - 0.5, color=MUTED, lw=0.4)
        axes.grid(axis="x")
    drawn.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", handlelength=1.0)
    return drawn
