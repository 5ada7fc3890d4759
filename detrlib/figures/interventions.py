"""Figures of what trained models find with another attention. Every function takes the tidy table of
`detrlib.runs.results.interventions_frame`, of one site: columns run, kind, site, layer, head, value, AP, zeros,
trained, trained_alpha. Raises ConfigError where the table is of several sites.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from detrlib.errors import ConfigError
from detrlib.figures.results import draw_cells, draw_runs, head_maps
from detrlib.figures.style import MUTED, Nothing, figure, run_colours, styled

POINTS = 100  # AP is written in points of 0 to 100, as in papers


@styled
def alpha_sweep(frame: pd.DataFrame) -> Figure:
    """AP above exact zeros of the weights, over the alpha a model is evaluated with (kind alpha); a line per run.

    A ring marks each run as it was trained, at its own alpha or the mean of those it has learned; runs of transforms
    outside the family (tvmax) have none.
    """
    own = _own(frame)
    swept = _rows(frame, "alpha").assign(alpha=lambda rows: rows["value"].astype(float))
    colours = run_colours(swept["run"])
    drawn, panels = figure(width=0.75, aspect=0.8, nrows=2, sharex=True)
    for axes, measure in zip(panels, ("AP", "zeros"), strict=True):
        scale = POINTS if measure == "AP" else 1
        draw_runs(axes, swept.assign(shown=scale * swept[measure]), "alpha", "shown", colours, marker="o")
        for run, colour in colours.items():
            axes.plot(own.loc[run, "trained_alpha"], scale * own.loc[run, measure], **_ring(colour))
    panels[0].set_ylabel("AP")
    panels[1].set(ylabel="share of weights that are zero", xlabel="alpha in evaluation (1 softmax, 2 sparsemax)")
    panels[1].set_ylim(-0.03, 1.03)
    lines = panels[0].get_lines()[: len(colours)]
    drawn.legend([*lines, Line2D([], [], **_ring(MUTED))], [*colours, "as trained"], loc="outside right upper")
    return drawn


def _ring(colour: str) -> dict:
    return {"color": colour, "marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "", "zorder": 3}


@styled
def transform_swap(frame: pd.DataFrame) -> Figure:
    """AP of models trained with one transform (rows) and evaluated with another (columns, kind transform).

    Cells of models as trained are framed. Runs trained with the same transform are averaged.
    """
    own, swapped = _own(frame), _rows(frame, "transform")
    table = swapped.pivot_table(index="trained", columns="value", values="AP", sort=False)
    as_trained = own[own.index.isin(swapped["run"])].groupby("trained", sort=False)["AP"].mean()
    columns = list(dict.fromkeys([*table.columns, *as_trained.index]))
    table = table.reindex(index=as_trained.index, columns=columns)
    for name, ap in as_trained.items():  # alpha_entmax: the alphas of another model would mean nothing
        table.loc[name, name] = ap
    table *= POINTS
    drawn, axes = figure(width=0.3 + 0.1 * len(columns), aspect=0.25 + 0.55 * len(table) / len(columns))
    draw_cells(axes, table, "cividis", (table.min(axis=None), table.max(axis=None)), ".1f")
    for row, name in enumerate(table.index):
        corner = columns.index(name) + 0.04, row + 0.04
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.3))
    axes.set(xlabel="evaluated with", ylabel="trained with", title="AP")
    return drawn


@styled
def head_pruning(frame: pd.DataFrame) -> Figure:
    """AP over the number of heads that are pruned, least important first (kind heads); a line per run."""
    own, pruned = _own(frame), _rows(frame, "heads")
    whole = own.loc[pruned["run"].unique()].reset_index().assign(value=0)
    rows = pd.concat([whole, pruned], ignore_index=True)
    rows = rows.assign(heads=rows["value"].astype(int), AP=POINTS * rows["AP"])
    colours = run_colours(pruned["run"])
    drawn, axes = figure(width=0.75, aspect=0.5)
    draw_runs(axes, rows, "heads", "AP", colours, marker="o")
    axes.set(xlabel="heads pruned, least important first", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn.legend(axes.get_lines(), colours, loc="outside right upper")
    return drawn


def head_drops(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """AP that each run loses when one head alone is pruned: {run: [layers, heads]}, negative where AP rises.

    Raises ConfigError where no single heads (kind head) were measured.
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
    drawn, scale = head_maps(drops, "RdBu_r", (-most, most), "+z.1f")
    scale.set_label("AP points lost")
    return drawn


def _rows(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of a kind; alphas and transforms of all layers at once."""
    rows = frame[frame["kind"] == kind]
    rows = rows[rows["layer"].isna()] if kind in ("alpha", "transform") else rows
    if rows.empty:
        raise Nothing(f"no interventions of the kind '{kind}' were measured, only {_listed(map(repr, frame['kind']))}")
    return rows


def _own(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of models as they were trained, by run."""
    if frame.empty:
        raise Nothing("no interventions were measured")
    if frame["site"].nunique() > 1:
        raise ConfigError(f"the table holds several sites, {_listed(frame['site'])}; choose the rows of one")
    return frame[frame["kind"] == "none"].set_index("run")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values)) or "none"
