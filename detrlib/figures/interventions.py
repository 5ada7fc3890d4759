"""Figures of what trained models find with another attention, or without some of their parts.

Every function takes the tidy table of `detrlib.runs.results.interventions_frame`, of one site: columns run, kind, site,
layer, head, value, AP, zeros, paibb, AP_lost with its interval, trained, trained_alpha. Raises ConfigError where the
table is of several sites.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from detrlib.errors import ConfigError
from detrlib.figures.results import draw_cells, draw_runs, head_maps
from detrlib.figures.style import MUTED, Nothing, figure, panels, run_colours, styled

POINTS = 100  # AP is written in points of 0 to 100, as in papers
PARTS = ("layer", "attention", "feedforward", "level", "point")  # of a model, which are ablated one by one
ORDERS = {  # of queries that are ablated
    "least confident": {"linestyle": "-"},
    "at random": {"linestyle": (0, (4, 1.5)), "errorbar": ("pi", 100)},  # from the lowest to the highest draw
    "most confident": {"linestyle": (0, (1, 1.2))},
}


@styled
def alpha_sweep(frame: pd.DataFrame) -> Figure:
    """AP above exact zeros of the weights, over the alpha a model is evaluated with; a line per run.

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
    panels[0].set_ylabel("AP, points")
    panels[1].set(ylabel="share of weights that are zero", xlabel="alpha in evaluation (1 softmax, 2 sparsemax)")
    panels[1].set_ylim(-0.03, 1.03)
    lines = panels[0].get_lines()[: len(colours)]
    drawn.legend([*lines, Line2D([], [], **_ring(MUTED))], [*colours, "as trained"], loc="outside right upper")
    return drawn


def _ring(colour: str) -> dict:
    return {"color": colour, "marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "", "zorder": 3}


@styled
def transform_swap(frame: pd.DataFrame) -> Figure:
    """AP of models trained with one transform (rows) and evaluated with another (columns).

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
    axes.set(xlabel="evaluated with", ylabel="trained with", title="AP, points")
    return drawn


@styled
def head_pruning(frame: pd.DataFrame) -> Figure:
    """AP over the number of heads that are pruned, least important first; a line per run."""
    own, pruned = _own(frame), _rows(frame, "heads")
    whole = own.loc[pruned["run"].unique()].reset_index().assign(value=0)
    rows = pd.concat([whole, pruned], ignore_index=True)
    rows = rows.assign(heads=rows["value"].astype(int), AP=POINTS * rows["AP"])
    colours = run_colours(pruned["run"])
    drawn, axes = figure(width=0.75, aspect=0.5)
    draw_runs(axes, rows, "heads", "AP", colours, marker="o")
    axes.set(xlabel="heads pruned, least important first", ylabel="AP, points", ylim=(0, None))
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


@styled
def query_removal(frame: pd.DataFrame, kind: str = "queries") -> Figure:
    """AP, and PAIBB below, over the share of queries that are gone; a line per run and order in which they go.

    Solid the least confident first, dotted the most confident; dashed at random, with a band over the draws. kind
    "embeddings": of queries whose embedding is zero.
    """
    own, gone = _own(frame), _rows(frame, kind)
    told = gone["value"].str.split(" ", n=1, expand=True)
    gone = gone.assign(share=told[0].astype(float), order=told[1].where(told[1].isin(list(ORDERS)), "at random"))
    whole = own.loc[gone["run"].unique()].reset_index().assign(share=0.0)
    colours = run_colours(gone["run"])
    drawn, grid = figure(width=0.75, aspect=0.8, nrows=2, sharex=True)
    for axes, measure in zip(grid, ("AP", "paibb"), strict=True):
        scale = POINTS if measure == "AP" else 1
        for order, look in ORDERS.items():
            rows = pd.concat([whole, gone[gone["order"] == order]], ignore_index=True)
            draw_runs(axes, rows.assign(shown=scale * rows[measure]), "share", "shown", colours, marker="o", **look)
        axes.set(ylabel={"AP": "AP, points", "paibb": "PAIBB"}[measure], ylim=(0, None))
    what = "removed" if kind == "queries" else "whose embedding is zero"
    grid[1].set_xlabel(f"share of queries {what}")
    lines = [Line2D([], [], color=MUTED, linestyle=look["linestyle"]) for look in ORDERS.values()]
    handles, labels = [*grid[0].get_lines()[: len(colours)], *lines], [*colours, *ORDERS]
    drawn.legend(handles, labels, loc="outside right upper")
    return drawn


@styled
def query_importance(frame: pd.DataFrame) -> Figure:
    """AP points lost when one query alone is gone, those that cost most first; a line per run."""
    _own(frame)
    alone = _rows(frame, "query")
    ranked = alone.assign(rank=alone.groupby("run")["AP_lost"].rank(ascending=False, method="first"))
    colours = run_colours(alone["run"])
    drawn, axes = figure(width=0.75, aspect=0.5)
    draw_runs(axes, ranked.assign(lost=POINTS * ranked["AP_lost"]), "rank", "lost", colours, marker="o")
    axes.axhline(0, color=MUTED, linewidth=0.6)
    axes.set(xlabel="queries, by what they cost", ylabel="AP points lost")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn.legend(axes.get_lines()[: len(colours)], colours, loc="outside right upper")
    return drawn


@styled
def part_importance(frame: pd.DataFrame, kinds: Sequence[str] = PARTS) -> Figure:
    """AP points lost without a layer, site, block, level or point, a panel per run, with 95 % intervals over images."""
    _own(frame)
    rows = frame[frame["kind"].isin(kinds)]
    if rows.empty:
        raise Nothing(f"no interventions of the kinds {_listed(kinds)} were measured, only {_listed(frame['kind'])}")
    rows = rows.assign(part=[_part(row) for row in rows.itertuples()])
    rows = rows.iloc[np.argsort([kinds.index(kind) for kind in rows["kind"]], kind="stable")]
    parts, colours = list(dict.fromkeys(rows["part"])), run_colours(rows["run"])
    drawn, grid = panels(len(colours), 3, height=0.6 + 0.16 * len(parts), sharey=True, sharex=True)
    for axes, (run, colour) in zip(grid, colours.items(), strict=True):
        own = POINTS * rows[rows["run"] == run].set_index("part")[["AP_lost", "AP_lost_low", "AP_lost_high"]]
        lost, low, high = own.astype(float).reindex(parts).to_numpy().T
        axes.barh(range(len(parts)), lost, height=0.72, color=colour, alpha=0.55)
        axes.hlines(range(len(parts)), low, high, color="black", linewidth=0.9)
        axes.axvline(0, color=MUTED, linewidth=0.6)
        axes.set_yticks(range(len(parts)), parts)
        axes.set_ylim(len(parts) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_title(run, loc="left")
        axes.grid(axis="x")
    drawn.supxlabel("AP points lost", fontsize=8)
    return drawn


def sink_importance(frame: pd.DataFrame) -> Figure:
    """AP points lost with the sinks of all heads masked, or their values zeroed (kind sink), as `part_importance`."""
    return part_importance(frame, ("sink",))


def _part(row: NamedTuple) -> str:
    """What was ablated, in words; numbers from one."""
    layer = "all layers" if pd.isna(row.layer) else f"layer {row.layer + 1}"
    if row.kind in ("level", "point"):
        site, number = row.value.split(" ")
        return f"{site}, {row.kind} {int(number) + 1}"
    kind = {"layer": "{} {}", "feedforward": "{} feed-forward, {}", "sink": "sinks {}, {}"}.get(row.kind, "{}, {}")
    return kind.format(row.value, layer)


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
        raise Nothing("no interventions were measured (detrlib intervene RUN)")
    if frame["site"].nunique() > 1:
        raise ConfigError(f"the table holds several sites, {_listed(frame['site'])}; choose the rows of one")
    return frame[frame["kind"] == "none"].set_index("run")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values)) or "none"
