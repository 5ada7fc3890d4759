"""The floor of a run: what fixed boxes of its training split reach (`metrics.floor`), beside what the model does."""

import logging
from collections.abc import Mapping
from pathlib import Path

from detrlib.config import load_config
from detrlib.data import CocoDataset, build_dataset
from detrlib.errors import DataError
from detrlib.metrics.collapse import signs_of_collapse
from detrlib.metrics.detection import UNDEFINED
from detrlib.metrics.floor import fixed_boxes, floor
from detrlib.runs.folder import has_table, load_table, save_tables

log = logging.getLogger(__name__)

TABLE = "fixed_boxes"  # in measures/: kept, so that the annotations of the training split are read once


def keep_fixed_boxes(run_dir: Path, train_set: CocoDataset) -> None:
    """Choose the fixed boxes of a training split, and store them in the run's folder."""
    save_tables(run_dir, {TABLE: fixed_boxes(train_set)})


def run_floor(run_dir: Path, dataset: CocoDataset, engine: str) -> dict:
    """What results.json is to say of the floor on a data set.

    Args:
        run_dir: of the run, whose fixed boxes are chosen now where it has none yet.
        dataset: what it is evaluated on.
        engine: `evaluate.engine`.

    Returns:
        {"floor": as of `metrics.floor.floor`}, or nothing where the training split is not on this machine.
    """
    if not has_table(run_dir, TABLE):
        try:
            keep_fixed_boxes(run_dir, build_dataset(load_config(run_dir / "config.yaml").data, "train"))
        except DataError as error:
            log.info("no floor beside AP, which takes the annotations of the training split: %s", error)
            return {}
    return {"floor": floor(load_table(run_dir, TABLE), dataset, engine)}


def floor_in_words(results: Mapping) -> list[str]:
    """The floor of results, and what looks collapsed in them, in one line each; none for what they do not hold."""
    lines = []
    numbers = results.get("floor", {"AP": UNDEFINED})
    if numbers["AP"] != UNDEFINED:
        reached = f"AP {numbers['AP']:.3f}  AP50 {numbers['AP50']:.3f}, on {numbers['images']} images"
        lines.append(f"the floor: boxes that are the same in every image reach {reached}")
    return [*lines, *(f"warning: {line}" for line in signs_of_collapse(results).values())]
