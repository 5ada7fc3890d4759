"""What went wrong in saved runs: their stored detections against the annotation file of their data, read again.

Nothing is stored for it and no model is built, so that runs of any age have it where their data are.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from detrlib.data import CocoDataset, build_dataset
from detrlib.errors import DamagedFile, DataError, RunError, in_one_line
from detrlib.metrics.coco_format import box_table
from detrlib.metrics.curves import precision_recall
from detrlib.metrics.detection import match_detections
from detrlib.metrics.failures import CAUSES, TOTALS, Failures, find_failures, lost_ap
from detrlib.runs.folder import group_of, load_results, run_config, run_labels, to_measure
from detrlib.runs.results import having, load_matches

logger = logging.getLogger(__name__)


@dataclass(repr=False)
class FailedRun:
    """The failures of a run with what it takes to show them."""

    failures: Failures
    dataset: CocoDataset = field(compare=False)  # whose pictures they are in

    @property
    def categories(self) -> dict[int, str]:
        """The class of each category id."""
        return {id: self.dataset.names[label] for label, id in self.dataset.category_ids.items()}

    def image(self, image_id: int) -> np.ndarray:
        """A picture as [H,W,3] uint8. Raises DataError when it is unreadable."""
        return np.asarray(self.dataset.image(self.dataset.image_ids.index(image_id)))


def open_failures(run_dir: Path) -> FailedRun:
    """Find what went wrong in an evaluated run, or in results inside it, such as those on another split.

    Raises:
        RunError: the run was not evaluated, or its predictions.json is missing or damaged.
        DataError: its data are not on this machine, or are not those that it was evaluated on.
    """
    load_results(run_dir)  # raises where there are none
    detections = read_predictions(run_dir)
    dataset = evaluated_data(run_dir)
    return FailedRun(find_failures(dataset.ground_truth, detections), dataset)


def evaluated_data(run_dir: Path) -> CocoDataset:
    """The data that a run was evaluated on. Raises DataError, which names its settings, where they are not here."""
    try:
        return build_dataset(run_config(run_dir).data, "val")
    except DataError as error:
        raise DataError(f"{error}; of data that have moved, in {run_dir / 'config.yaml'}") from error


def read_predictions(run_dir: Path) -> pd.DataFrame:
    """The table of the detections that an evaluation has stored. Raises RunError where they are missing or damaged."""
    path = run_dir / "predictions.json"
    if not path.exists():
        raise RunError(f"no {path}; measure the run (again): {to_measure(run_dir)}")
    try:
        return box_table(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"delete it, then: {to_measure(run_dir)}"
        raise DamagedFile(f"{path} is damaged ({in_one_line(error)}); {remedy}") from error


def failed_runs(run_dirs: Iterable[Path]) -> dict[str, FailedRun]:
    """`open_failures` of several runs by name; those whose detections or data are not here are left out and logged.

    Raises RunError as `open_failures`.
    """
    runs = {}
    for run_dir, label in run_labels(run_dirs).items():
        if not (run_dir / "predictions.json").exists():
            logger.warning("what went wrong in %s is not known: its predictions.json is not here", label)
            continue
        try:
            runs[label] = open_failures(run_dir)
        except DataError as error:
            logger.warning("what went wrong in %s is not known, which takes its data: %s", label, error)
    return runs


def objects_frame(runs: Mapping[str, FailedRun]) -> pd.DataFrame:
    """The objects that the first of the runs was evaluated on, as of `CocoDataset.frame`; of no run none."""
    none = pd.DataFrame(columns=["image_id", "category", "area", "crowd"])
    return next((run.dataset.frame() for run in runs.values()), none)


def curves_frame(run_dirs: Iterable[Path], runs: Mapping[str, FailedRun], iou: float = 0.5) -> pd.DataFrame:
    """Precision over recall of each run, from the matches that its evaluation has stored, or those of its detections.

    Args:
        run_dirs: folders of the runs.
        runs: as of `failed_runs`; those that lack there are left out.
        iou: from which a detection is true.

    Returns:
        Rows of `metrics.curves.precision_recall` with a column run.

    Raises:
        RunError: matches or detections are damaged.
    """
    parts = [pd.DataFrame(columns=["run", "class", "size", "recall", "precision", "score"])]
    for run_dir, label in run_labels(run_dirs).items():
        if label in runs:
            own, stored = runs[label], having([run_dir], "matches")
            truth = own.dataset.ground_truth
            matches = load_matches(run_dir) if stored else match_detections(truth, read_predictions(run_dir))
            parts.append(precision_recall(matches, own.categories, iou).assign(run=label))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def lost_frame(run_dirs: Iterable[Path], runs: Mapping[str, FailedRun]) -> pd.DataFrame:
    """What AP50 loses in each run, for statistics over seeds.

    Args:
        run_dirs: folders of the runs.
        runs: as of `failed_runs`; those that lack there are left out.

    Returns:
        A row per run: run, group, seed, and a column for each cause and total of `metrics.failures`.
    """
    labels = {label: run_dir for run_dir, label in run_labels(run_dirs).items() if label in runs}
    names = [{"run": run, "group": group_of(run), "seed": run_config(labels[run]).train.seed} for run in labels]
    rows = [name | lost_ap(runs[name["run"]].failures).to_dict() for name in names]
    return pd.DataFrame(rows, columns=["run", "group", "seed", *CAUSES, *TOTALS])
