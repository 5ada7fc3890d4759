"""Attention sinks of saved runs as tidy pandas tables: of single images, and of heads over a data set."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from detrlib.metrics.sinks import LIMITS, MEASURES
from detrlib.runs.folder import group_of, load_results, run_labels
from detrlib.runs.results import measures

SHOWN = [
    *("site", "layer", "head", "weight", "sink", "sink_even", "agreement"),
    *("value_norm", "does", "matched", "null_mass"),
]
COLUMNS = ["run", "group", "site", "layer", "head", *MEASURES, "agreement", "y", "x", "does", "threshold"]


def sinks_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Read the sinks of single images.

    Args:
        run_dirs: folders of finished runs.

    Returns:
        A row per image, site, layer and head: run, image_id, site, layer, head, the measures of `metrics.sinks.sinks`,
        and the best cell: row and column of rows and columns (of decoder_self: column is the number of a query).

    Raises:
        RunError: a run was evaluated without, or the table is damaged.
    """
    return measures(run_dirs, "sinks")


def sinks_frame(run_dirs: Iterable[Path], site: str | None = None) -> pd.DataFrame:
    """Read the sinks of heads over a data set.

    Args:
        run_dirs: folders of finished runs.
        site: one of them; None: all that were measured.

    Returns:
        A row per run, site, layer and head (from 0): run, group, site, layer, head, the measures of
        `metrics.sinks.sinks` (means over images), agreement (the largest share of images whose best cells cover one
        point), y and x (that point, in 0..1 of the image; of decoder_self, x tells the query), does ("nothing",
        "broadcast" or "unclear" of a head that has a sink, see `metrics.sinks.SinksOfSite.summary`), threshold (of the
        weight, from which on a key is a sink). None of runs that were evaluated before sinks were measured.

    Raises:
        RunError: a run is not finished.
    """
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        results = load_results(run_dir)
        found, threshold = results.get("sinks", {}), sink_threshold(results)
        for at in [site] if site in found else [] if site else found:
            heads = {name: found[at][name]["heads"] for name in (*MEASURES, "agreement")}
            for layer, head in np.ndindex(np.shape(heads["weight"])):
                place = found[at]["place"][layer][head] or (None, None)
                row = {"run": label, "group": group_of(label), "site": at, "layer": layer, "head": head}
                row |= {name: values[layer][head] for name, values in heads.items()}
                row |= {"y": place[0], "x": place[1], "does": found[at]["does"][layer][head]}
                rows.append(row | {"threshold": threshold})
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.astype(dict.fromkeys([*MEASURES, "agreement", "y", "x"], float))


def sink_threshold(results: Mapping) -> float:
    """The `evaluate.sink_threshold` of results, the default where they are older than sinks."""
    return results.get("evaluate", {}).get("sink_threshold", LIMITS.threshold)


def resting_most(frame: pd.DataFrame, most: int = 8) -> pd.DataFrame:
    """The heads of `sinks_frame` with the heaviest sinks, as a table to be read: layers and heads from 1.

    Columns are those that say whether it is a sink, and what it does; of several runs the run too.
    """
    rows = frame.nlargest(most, "weight")
    shown = rows[[*(["run"] if frame["run"].nunique() > 1 else []), *SHOWN]]
    return shown.assign(layer=rows["layer"] + 1, head=rows["head"] + 1).reset_index(drop=True)
