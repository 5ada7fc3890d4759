"""What training has logged, over steps and epochs, as tidy pandas tables; and curves of other trainings beside it."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from detrlib.errors import RunError
from detrlib.metrics.detection import UNDEFINED
from detrlib.runs.folder import read_metrics, run_labels


def metrics_frame(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Read all logged metrics of runs.

    Args:
        run_dirs: folders of runs.

    Returns:
        A row per number: run, global_step, epoch, metric, value; none for numbers that are missing or undefined.
    """
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        for record in read_metrics(run_dir):
            where = {"run": label, "global_step": record["global_step"], "epoch": record["epoch"]}
            numbers = {k: v for k, v in record.items() if k not in ("global_step", "epoch") and v is not None}
            numbers = {k: v for k, v in numbers.items() if v != UNDEFINED or not k.startswith("detection/")}
            rows += [where | {"metric": name, "value": value} for name, value in numbers.items()]
    return pd.DataFrame(rows, columns=["run", "global_step", "epoch", "metric", "value"])


def published_curves(path: Path) -> pd.DataFrame:
    """Curves of other trainings, as of `metrics_frame`: columns run, epoch, metric, value.

    path: CSV with columns metric, model, epoch, value. Raises RunError naming the file and what it lacks.
    """
    try:
        table = pd.read_csv(path).rename(columns={"model": "run"})
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no table of curves: {error}") from error
    columns = ["run", "epoch", "metric", "value"]
    if missing := set(columns) - set(table):
        raise RunError(f"{path} lacks {', '.join(sorted(missing))}; expected columns metric, model, epoch and value")
    return table[columns]


def alpha_frame(run_dirs: Iterable[Path], quantity: str = "alpha") -> pd.DataFrame:
    """Read learnable alphas over training.

    Args:
        run_dirs: folders of runs.
        quantity: "alpha", as it is at the end of an epoch; or "pre_alpha_gradient", the gradient of the parameter
            behind it, which is logged with training steps: the mean over those of an epoch.

    Returns:
        A row per epoch (0 is the first one logged), layer and head: run, epoch, site, layer, head, value; none where
        nothing is learned.
    """
    frame = metrics_frame(run_dirs)
    alpha = frame[frame.metric.str.startswith(f"{quantity}/")]
    parts = alpha.metric.str.extract(rf"{quantity}/(?P<site>\w+)\.layer_(?P<layer>\d+)-head_(?P<head>\d+)")
    parts = parts.dropna().astype({"layer": int, "head": int})  # annealed ones have neither layer nor head
    tidy = pd.concat([alpha[["run", "epoch", "value"]], parts], axis=1, join="inner")
    keys = ["run", "epoch", "site", "layer", "head"]
    if quantity != "alpha":
        return tidy.groupby(keys, sort=False, as_index=False)["value"].mean()
    # A record of an epoch comes before those of the steps after it, which carry the same number.
    return tidy.drop_duplicates(keys).reset_index(drop=True)
