"""What goes wrong: the AP that is lost to each cause, the images behind it, curves of precision, and confusion."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from detrlib.figures.attention import draw_box, draw_image, thinner
from detrlib.figures.overlay import write_captions
from detrlib.figures.results import draw_cells, draw_runs
from detrlib.figures.style import MUTED, PALETTE, TEXT_WIDTH, Nothing, figure, panels, run_colours, styled
from detrlib.metrics.curves import ALL, BACKGROUND
from detrlib.metrics.detection import AREAS, BOX
from detrlib.metrics.failures import CAUSES, TOTALS, failures_of, worst_images
from detrlib.runs.failed import FailedRun

BAR = 0.13  # inches of a bar
ACROSS = 3  # pictures side by side
BOXES = 5  # failed detections of a picture that are drawn: those of low score cost little, and there are many
TRUTH = "black"  # of objects, which are dashed
NO_RUN = (
    "of no run there are both its detections (predictions.json, as an evaluation writes it) and its data; where data "
    "have moved, say so in data.root of its config.yaml"
)


@styled
def lost_shares(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Bars of the AP50 that each run loses to each cause, in points of 0 to 100, with 95 % intervals over images.

    tables: by the name of the run, as of `metrics.failures.lost_table`. Beside the causes, the two totals.
    """
    if not tables:
        raise Nothing(NO_RUN)
    colours = run_colours(tables)
    rows = BAR * (len(tables) + 1)
    drawn, (left, right) = figure(
        1.0, (len(CAUSES) * rows + 0.75) / TEXT_WIDTH, ncols=2, gridspec_kw={"width_ratios": [3, 2]}
    )
    for axes, causes, title in (
        (left, [*CAUSES], "AP50 lost to each cause, points"),
        (right, [*TOTALS], "lost to all of them, points"),
    ):
        _draw_shares(
            axes, {run: 100 * table.loc[causes, ["lost", "low", "high"]] for run, table in tables.items()}, colours
        )
        axes.set_title(title, loc="left")
    handles = [Patch(color=colour, label=run) for run, colour in colours.items()]
    drawn.legend(handles=handles, loc="outside lower left", ncols=min(len(tables), 5), handlelength=1)
    return drawn


def _draw_shares(axes: Axes, shares: Mapping[str, pd.DataFrame], colours: Mapping[str, str]) -> None:
    """Bars of one width, run beside run, for each row of their tables, the first on top."""
    causes, height = next(iter(shares.values())).index, 0.8 / len(shares)
    for number, (run, table) in enumerate(shares.items()):
        y = np.arange(len(causes)) + (number - (len(shares) - 1) / 2) * height
        # An interval is that of the basic bootstrap, of which the value may lie outside.
        ends = np.clip([table["lost"] - table["low"], table["high"] - table["lost"]], 0, None)
        look = {"xerr": ends, "error_kw": {"elinewidth": 0.7, "ecolor": MUTED}, "height": height}
        axes.barh(y, table["lost"], color=colours[run], label=run, **look)
    axes.set_yticks(range(len(causes)), causes)
    axes.set_ylim(len(causes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, color=MUTED, lw=0.6)
    axes.grid(axis="x")


@styled
def precision_recall(curves: pd.DataFrame, by: Literal["size", "class"] = "size", most: int = 12) -> Figure:
    """A panel per size of objects or per class, and a line per run: the highest precision from each recall on.

    Args:
        curves: of one or several runs, as of `metrics.curves.precision_recall`, with a column run.
        by: "size", means over classes; or "class", of objects of all sizes.
        most: panels: the mean over classes, then those whose area under the curve is smallest.
    """
    chosen = curves[curves["class"] == ALL] if by == "size" else curves[curves["size"] == "all"]
    if chosen.empty:
        raise Nothing(NO_RUN if curves.empty else "no run was evaluated on objects")
    means = chosen.groupby("class")["precision"].mean().drop(ALL, errors="ignore")
    names = (
        [size for size in AREAS if size in {*chosen[by]}] if by == "size" else [ALL, *means.nsmallest(most - 1).index]
    )
    colours = run_colours(chosen["run"])
    drawn, grid = panels(len(names), 4, height=1.75, sharex=True, sharey=True)
    for axes, name in zip(grid, names, strict=True):
        draw_runs(axes, chosen[chosen[by] == name], "recall", "precision", colours)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.set_title(name, loc="left")
    handles = [Line2D([], [], color=colour, label=run) for run, colour in colours.items()]
    drawn.legend(handles=handles, loc="outside lower left", ncols=min(len(colours), 5))
    return drawn


@styled
def confusion_matrix(counts: pd.DataFrame, most: int = 15) -> Figure:
    """The share of each class's objects that are taken for each class, and, in the last column, that are not found.

    The last row says of detections on no object which classes they are of. Cells hold shares of their row.

    counts: as of `metrics.curves.confusion`; of more than `most` classes those with most objects taken for others.
    """
    wrong = counts.sum(axis=1) - np.diag(counts)
    classes = [name for name in counts.index[:-1] if name in wrong[:-1].nlargest(most).index]
    if not counts.to_numpy().any():
        raise Nothing("there are neither objects nor detections of such scores")
    shares = counts.div(counts.sum(axis=1), axis=0).loc[[*classes, BACKGROUND], [*classes, BACKGROUND]]
    side = min(1.0, 0.3 + 0.06 * len(shares))
    drawn, axes = figure(side, 0.75)
    draw_cells(axes, shares, "Blues", (0, 1), ".2f" if len(shares) <= 10 else ".1f")
    axes.tick_params(axis="x", rotation=45 if len(shares) > 6 else 0)
    axes.set(xlabel="detected as", ylabel="object")
    axes.set_yticks(axes.get_yticks(), [f"{name} ({counts.loc[name].sum()})" for name in shares.index])
    return drawn


@styled
def behind_share(run: FailedRun, cause: str, most: int = 6) -> Figure:
    """The worst images of a run for a cause: what failed for it in its colour, dashed the objects that are concerned.

    Args:
        run: as of `runs.failed.open_failures`.
        cause: one of `metrics.failures.CAUSES`. Of "class" and "both" the caption says what was detected and what it
            is, of "miss" what was missed. Of many in a picture the five of highest score are drawn.
        most: pictures.
    """
    images = worst_images(run.failures, cause)[:most]
    if images.empty:
        raise Nothing(f"no detection failed so: {cause}" if cause != "miss" else "no object was missed")
    pictures = [run.image(image_id) for image_id in images.index]
    columns = min(ACROSS, len(pictures))
    proportion = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    inches = TEXT_WIDTH / ACROSS
    drawn, grid = panels(len(pictures), columns, inches * min(proportion, 1.5) + 0.25, columns / ACROSS)
    failed = failures_of(run.failures, cause)
    for axes, picture, row in zip(grid, pictures, images.itertuples(), strict=True):
        what = "missed" if cause == "miss" else "failure" if row.failures == 1 else "failures"
        shown = f", {BOXES} shown" if cause != "miss" and row.failures > BOXES else ""
        draw_image(axes, picture, f"image {row.Index}: {row.failures} {what}{shown}")
        axes.set(xlim=(-0.5, picture.shape[1] - 0.5), ylim=(picture.shape[0] - 0.5, -0.5))
        _draw_failed(axes, run, cause, failed[failed["image_id"] == row.Index], picture.shape[:2], inches)
    return drawn


def _draw_failed(
    axes: Axes, run: FailedRun, cause: str, failed: pd.DataFrame, size: tuple[int, int], inches: float
) -> None:
    """The failed detections or missed objects of one picture, best first, and the objects that they are about."""
    names, colour = run.categories, cause_colours()[cause]
    failed = failed if cause == "miss" else failed.nlargest(BOXES, "score")
    texts = [names[category] for category in failed["category_id"]]
    if cause != "miss":
        about = run.failures.annotations.iloc[failed["annotation"][failed["annotation"] >= 0].unique()]
        for box in _corners(about):
            draw_box(axes, box, TRUTH, dashed=True, width=1.0)
        truly = [
            names[run.failures.annotations["category_id"].iat[row]] if row >= 0 else "" for row in failed["annotation"]
        ]
        differs = [f" for {other}" if other not in ("", text) else "" for text, other in zip(texts, truly, strict=True)]
        texts = [f"{a}{b} {score:.2f}" for a, b, score in zip(texts, differs, failed["score"], strict=True)]
    boxes = _corners(failed)
    for box in boxes[::-1]:
        draw_box(axes, box, colour, dashed=cause == "miss", width=thinner(len(boxes)))
    write_captions(axes, boxes, texts, [colour] * len(boxes), size, inches)


def _corners(table: pd.DataFrame) -> np.ndarray:
    boxes = table[BOX].to_numpy(float)
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def cause_colours() -> dict[str, str]:
    """A colour for each cause, the same in every figure."""
    return dict(zip(CAUSES, PALETTE, strict=False))
