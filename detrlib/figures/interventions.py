"""Figures of what trained models find with another attention. Every function takes the tidy table of
`detrlib.runs.results.interventions_frame`: columns run, kind, site, layer, head, value, AP, zeros, trained,
trained_alpha; of one site.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from detrlib.figures.style import MUTED, figure, run_colours, styled

POINTS = 100  # AP is written in points of 0 to 100, as in papers


@styled
def alpha_sweep(frame: pd.DataFrame) -> Figure:
    """AP above exact zeros of the weights, over the alpha a model is evaluated with; a line per run.

    A ring marks each run as it was trained, at its own alpha or the mean of those it has learned; runs of transforms
    outside the family (tvmax) have none. Raises ValueError where no alpha of all layers was measured.
    """
    own = _own(frame)
    swept = _rows(frame, "alpha").assign(alpha=lambda rows: rows["value"].astype(float)).sort_values("alpha")
    colours = run_colours(swept["run"])
    drawn, panels = figure(width=0.75, aspect=0.8, nrows=2, sharex=True)
    for axes, measure in zip(panels, ("AP", "zeros"), strict=True):
        scale = POINTS if measure == "AP" else 1
        for run, colour in colours.items():
            line = swept[swept["run"] == run]
            axes.plot(line["alpha"], scale * line[measure], color=colour, marker="o", label=run)
            axes.plot(own.loc[run, "trained_alpha"], scale * own.loc[run, measure], **_ring(colour))
        axes.grid(axis="y")
    panels[0].set_ylabel("AP")
    panels[1].set(ylabel="share of weights that are zero", xlabel="alpha in evaluation (1 softmax, 2 sparsemax)")
    panels[1].set_ylim(-0.03, 1.03)
    lines = panels[0].get_lines()[::2]
    drawn.legend([*lines, Line2D([], [], **_ring(MUTED))], [*colours, "as trained"], loc="outside right upper")
    return drawn


def _ring(colour: str) -> dict:
    return {"color": colour, "marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "", "zorder": 3}


@styled
def transform_swap(frame: pd.DataFrame) -> Figure:
    """AP of models trained with one transform (rows) and evaluated with another (columns); as trained in a frame.

    Runs trained with the same transform are averaged. Raises ValueError where no transform of all layers was measured.
    """
    own, swapped = _own(frame), _rows(frame, "transform")
    found = swapped.pivot_table(index="trained", columns="value", values="AP", sort=False)
    as_trained = own[own.index.isin(swapped["run"])].groupby("trained", sort=False)["AP"].mean()
    columns = list(dict.fromkeys([*found.columns, *as_trained.index]))
    found = found.reindex(index=as_trained.index, columns=columns)
    for name, ap in as_trained.items():  # alpha_entmax: the alphas of another model would mean nothing
        found.loc[name, name] = ap
    drawn, axes = figure(width=0.3 + 0.1 * len(columns), aspect=0.25 + 0.55 * len(found) / len(columns))
    values = POINTS * found.to_numpy()
    _cells(axes, values, "cividis", (np.nanmin(values), np.nanmax(values)), "{:.1f}")
    for row, name in enumerate(found.index):
        axes.add_patch(_frame_of(row, columns.index(name)))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(found)), found.index)
    axes.set(xlabel="evaluated with", ylabel="trained with", title="AP")
    return drawn


def _frame_of(row: int, column: int) -> Rectangle:
    return Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.3)


@styled
def head_pruning(frame: pd.DataFrame) -> Figure:
    """AP over the number of heads that are pruned, least important first; a line per run.

    Raises ValueError where no gradual pruning was measured.
    """
    own, gone = _own(frame), _rows(frame, "heads").assign(count=lambda rows: rows["value"].astype(int))
    colours = run_colours(gone["run"])
    drawn, axes = figure(width=0.75, aspect=0.5)
    for run, colour in colours.items():
        line = gone[gone["run"] == run].sort_values("count")
        values = [own.loc[run, "AP"], *line["AP"]]
        axes.plot([0, *line["count"]], POINTS * np.array(values), color=colour, marker="o", label=run)
    axes.set(xlabel="heads pruned, least important first", ylabel="AP", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    drawn.legend(loc="outside right upper")
    return drawn


def head_drops(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """AP that each run loses when one head alone is pruned: {run: [layers, heads]}, negative where AP rises.

    Raises ValueError where no single heads were measured.
    """
    own, alone = _own(frame), _rows(frame, "head")
    return {
        run: own.loc[run, "AP"] - rows.pivot(index="layer", columns="head", values="AP").to_numpy(float)
        for run, rows in alone.groupby("run", sort=False)
    }


@styled
def head_importance(frame: pd.DataFrame) -> Figure:
    """AP points lost when one head alone is pruned, a panel of layers and heads per run; blue where AP rises."""
    drops = {run: POINTS * drop for run, drop in head_drops(frame).items()}
    most = max(np.nanmax(np.abs(drop)) for drop in drops.values()) or 1.0
    layers, columns = max(len(drop) for drop in drops.values()), min(2, len(drops))
    rows = -(-len(drops) // columns)
    width = 0.6 if columns == 1 else 1.0
    drawn, grid = figure(width, rows * (0.55 + 0.28 * layers) / (6.5 * width), nrows=rows, ncols=columns, squeeze=False)
    for axes, (run, drop) in zip(grid.flat, drops.items(), strict=False):
        image = _cells(axes, drop, "RdBu_r", (-most, most), "{:+.1f}")
        axes.set_title(run, loc="left")
        axes.set_xticks(range(drop.shape[1]), range(1, drop.shape[1] + 1))
        axes.set_yticks(range(drop.shape[0]), range(1, drop.shape[0] + 1))
        axes.set(xlabel="head", ylabel="layer")
    for axes in grid.flat[len(drops) :]:
        axes.remove()
    scale = drawn.colorbar(image, ax=list(grid.flat[: len(drops)]), shrink=0.9, pad=0.02, label="AP points lost")
    scale.outline.set_visible(False)
    return drawn


def _cells(axes: Axes, values: np.ndarray, colours: str, limits: tuple[float, float], text: str) -> AxesImage:
    """An image with its values written in the cells; missing ones read as a dash."""
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value)) if np.isfinite(value) else (1, 1, 1, 1)
        shade = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        words = text.format(round(value, 1) + 0.0) if np.isfinite(value) else "–"
        axes.text(column, row, words, ha="center", va="center", color=shade, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _rows(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of a kind; alphas and transforms of all layers at once. Raises ValueError where there are none."""
    rows = frame[frame["kind"] == kind]
    rows = rows[rows["layer"].isna()] if kind in ("alpha", "transform") else rows
    if rows.empty:
        raise ValueError(f"no rows of kind '{kind}' in the table; there are {_listed(frame['kind'])}")
    return rows


def _own(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of models as they were trained, by run. Raises ValueError where the table is of several sites."""
    if frame["site"].nunique() > 1:
        raise ValueError(f"the table holds several sites, {_listed(frame['site'])}; choose the rows of one")
    return frame[frame["kind"] == "none"].set_index("run")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values)) or "none"
