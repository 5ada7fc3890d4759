"""Attention sinks over a data set: where heads rest, and how much. Tables as `detrlib.runs.sinks` makes them in."""

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from detrlib.figures.overlay import COLOURS
from detrlib.figures.style import MUTED, Nothing, panels, run_colours, styled
from detrlib.metrics.sinks import AGREED, MEASURES, PLACE, Places

COLUMNS, PANEL = 6, 1.25  # heads in a row, and inches of a panel with its words


@styled
def sink_cells(table: pd.DataFrame, site: str = "decoder_cross", most: int = 12) -> Figure:
    """The best cells of heads, those that rest most first: which share of the images has it at each point of the image.

    Above each panel the weight of the best cell, mean over queries and images; below it the largest share of images
    that have it at one point, and the norm of the value there relative to the other cells. Images are drawn as
    squares, whatever their shape.

    Args:
        table: of one run, as of `runs.sinks.sinks_table`.
        site: encoder_self or decoder_cross, whose keys are cells.
        most: heads that are drawn.
    """
    if site == "decoder_self":
        raise Nothing("the keys of decoder_self are queries, which have no place in the image")
    table = table[table["site"] == site]
    if table.empty:
        raise Nothing(f"sinks of {site} were not measured")
    shares = shares_of_images(table)
    means = table.groupby(["layer", "head"])[list(MEASURES)].mean().sort_values("weight", ascending=False)[:most]
    drawn, grid = panels(len(means), COLUMNS, PANEL, width=min(1.0, 0.12 + 0.16 * len(means)))
    for axes, ((layer, head), row) in zip(grid, means.iterrows(), strict=True):
        share = shares[layer, head]
        _draw_shares(axes, share)
        axes.set_title(f"layer {layer + 1}, head {head + 1}: {row.weight:.2f}", loc="left", fontsize=6)
        value = "" if np.isnan(row.value_norm) else f", value {row.value_norm:.2f}"
        axes.set_xlabel(f"{share.max():.0%}{value}", fontsize=6, color=MUTED, loc="left", labelpad=2)
    bar = drawn.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), ax=grid, shrink=0.8, aspect=25, pad=0.01)
    bar.set_label("share of images", fontsize=7)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)
    return drawn


def shares_of_images(table: pd.DataFrame) -> np.ndarray:
    """Shares of the images whose best cell covers each point, [L,H,points,points]; table: of one run and site."""
    table = table.sort_values(["image_id", "layer", "head"])
    layers, heads = table["layer"].max() + 1, table["head"].max() + 1
    columns = torch.from_numpy(table[[*PLACE, "weight"]].to_numpy(dtype=np.float64)).view(-1, layers, heads, 5)
    places = Places(layers, heads)
    places.add(columns[..., :4].movedim(-1, 1), columns[..., 4])
    return places.shares().numpy()


def _draw_shares(axes: Axes, shares: np.ndarray) -> None:
    axes.imshow(np.ma.masked_equal(shares, 0), cmap=COLOURS, vmin=0, vmax=1, extent=(0, 1, 1, 0))
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(True)


@styled
def sink_weights(frame: pd.DataFrame) -> Figure:
    """A panel for each site: the heads of every run by how much they rest, those that do so most first.

    Filled: the best key is the same in at least half of the images, hollow: it differs. Above the dashed line a head
    has a sink: `evaluate.sink_threshold`, of every run its own.

    frame: of several runs, as of `runs.sinks.sinks_frame`.
    """
    if frame.empty:
        raise Nothing("sinks were not measured of any run")
    sites, colours = list(dict.fromkeys(frame["site"])), run_colours(frame["run"])
    drawn, grid = panels(len(sites), 3, height=2.3, width=min(1.0, 0.25 + 0.35 * len(sites)), sharey=True)
    for axes, site in zip(grid, sites, strict=True):
        for run, rows in frame[frame["site"] == site].groupby("run", sort=False):
            rows = rows.sort_values("weight", ascending=False, ignore_index=True)
            axes.plot(rows.index + 1, rows["weight"], color=colours[run], lw=0.8, label=run)
            for agreed, face in ((True, colours[run]), (False, "white")):
                some = rows[(rows["agreement"] >= AGREED) == agreed]
                look = {"facecolor": face, "edgecolor": colours[run], "linewidth": 0.8, "zorder": 3}
                axes.scatter(some.index + 1, some["weight"], s=10, **look)
        for limit in frame["threshold"].unique():
            axes.axhline(limit, color=MUTED, lw=0.7, ls=(0, (4, 3)))
        axes.set_title(site, loc="left")
        axes.set_xlabel("heads, in order")
        axes.grid(axis="y")
    grid[0].set_ylim(0, None)
    grid[0].set_ylabel("weight of the best key")
    grid[-1].legend()
    return drawn
