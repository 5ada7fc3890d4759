"""Saved results of runs as tidy pandas tables, for figures, statistics and the main table.

Every function takes run folders and reads nothing else; runs carry the names that `run_labels` gives them.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from detrlib.config import load_config
from detrlib.runs import load_results, load_table, read_metrics, run_labels

AP_CUTS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def metrics_frame(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """All logged metrics, tidy: columns run, global_step, epoch, metric, value; one row per number."""
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        for record in read_metrics(run_dir):
            where = {"run": label, "global_step": record["global_step"], "epoch": record["epoch"]}
            numbers = {k: v for k, v in record.items() if k not in ("global_step", "epoch") and v is not None}
            rows += [where | {"metric": name, "value": value} for name, value in numbers.items()]
    return pd.DataFrame(rows, columns=["run", "global_step", "epoch", "metric", "value"])


def alpha_frame(run_dirs: Iterable[Path], quantity: str = "alpha") -> pd.DataFrame:
    """Learnable alphas over training: columns run, epoch, site, layer, head, value; empty if there are none.

    One value per epoch, that at its end; epoch 0 is the first one logged. quantity: "alpha", or "pre_alpha_gradient"
    for the gradient of the parameter behind it, which is logged with training steps: the mean over those of an epoch.
    """
    frame = metrics_frame(run_dirs)
    alpha = frame[frame.metric.str.startswith(f"{quantity}/")]
    parts = alpha.metric.str.extract(rf"{quantity}/(?P<site>\w+)\.layer_(?P<layer>\d+)-head_(?P<head>\d+)")
    parts = parts.astype({"layer": int, "head": int})
    tidy = pd.concat([alpha[["run", "epoch", "value"]], parts], axis=1)
    place = ["run", "epoch", "site", "layer", "head"]
    if quantity != "alpha":
        return tidy.groupby(place, sort=False, as_index=False)["value"].mean()
    # A record of an epoch comes before those of the steps after it, which carry the same number.
    return tidy.drop_duplicates(place).reset_index(drop=True)


def attention_frame(run_dirs: Iterable[Path], site: str) -> pd.DataFrame:
    """Sparsity of one site, tidy: columns run, metric, layer (from 0), value."""
    rows = [
        {"run": label, "metric": metric, "layer": layer, "value": value}
        for run_dir, label in run_labels(run_dirs).items()
        for metric, values in load_results(run_dir).get("attention", {}).get(site, {}).items()
        for layer, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["run", "metric", "layer", "value"])


def group_of(label: str) -> str:
    """The name that runs of several seeds share: `label` without a last "-seed3" or "_seed3"."""
    return re.sub(r"[-_]seed\d+$", "", label)


def results_frame(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """All headline numbers, one row per run: run, group, seed, architecture, the transform at each site, the twelve of
    COCO, `<site>/<measure>` (means over layers), PAIBB by size, images, epoch, seconds; missing where a run has none.
    """
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        results, cfg = load_results(run_dir), load_config(run_dir / "config.yaml")
        transforms = {
            site: getattr(cfg.model.attention, site) for site in ("encoder_self", "decoder_self", "decoder_cross")
        }
        row = {"run": label, "group": group_of(label), "seed": cfg.train.seed, "architecture": cfg.model.architecture}
        row |= transforms | {name: value for name, value in results["detection"].items() if name != "per_class"}
        for site, measures in results.get("attention", {}).items():
            row |= {f"{site}/{name}": float(np.mean(values)) for name, values in measures.items()}
        row |= {f"paibb/{size}": value for size, value in results.get("paibb", {}).items()}
        rows.append(row | {name: results.get(name) for name in ("images", "epoch", "seconds")})
    return pd.DataFrame(rows)


def results_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """The main table, one row per run: AP in six cuts, Gini and zeros of decoder cross-attention, PAIBB.

    The last three are missing (NaN) for models without attention.
    """
    rows = {}
    for run_dir, label in run_labels(run_dirs).items():
        results = load_results(run_dir)
        cross = results.get("attention", {}).get("decoder_cross", {"gini": np.nan, "zeros": np.nan})
        rows[label] = {
            **{name: results["detection"][name] for name in AP_CUTS},
            "Gini": float(np.mean(cross["gini"])),
            "zeros": float(np.mean(cross["zeros"])),
            "PAIBB": results.get("paibb", {}).get("all", np.nan),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def paibb_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """PAIBB by object size, one row per run; `pairs` is how many matched objects it is a mean over.

    Models without attention have 0 pairs and no values.
    """
    rows = {label: load_results(run_dir).get("paibb", {"pairs": 0}) for run_dir, label in run_labels(run_dirs).items()}
    order = ["all", "small", "medium", "large", "pairs"]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=order).rename_axis("run")


def sparsity_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Sparsity of single images: columns run, image_id, site, layer, head, queries (all, matched, confident) and the
    measures, means over the queries. Images without such queries have no row. Raises RunError where there is none.
    """
    return _measures(run_dirs, "sparsity")


def located_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Where attention of the matched query lies for every object: columns run, image_id, object (its number in the
    image), label, area (of its box, square pixels of the file), size, score (of the query), layer, head (-1: the mean
    over heads) and the measures. Raises RunError where there is none.
    """
    return _measures(run_dirs, "located")


def _measures(run_dirs: Iterable[Path], name: str) -> pd.DataFrame:
    frames = []
    for run_dir, label in run_labels(run_dirs).items():
        frame = load_table(run_dir, name)
        frame.insert(0, "run", label)
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["run"])
    # Runs may have measured other sites: words of several lists come back as text.
    return table.astype({column: "category" for column in ("run", "site", "queries", "size") if column in table})


def final_alphas(run_dirs: Iterable[Path], site: str = "decoder_cross") -> dict[str, np.ndarray]:
    """Alphas [layers, heads] at the end of training, for the runs that have learnable ones at `site`."""
    found = {}
    for run_dir, label in run_labels(run_dirs).items():
        layers = {place: value for place, value in load_results(run_dir)["alpha"].items() if place.startswith(site)}
        if layers:
            found[label] = np.array([layers[f"{site}.{number}"] for number in range(len(layers))])
    return found


def provenance(run_dirs: Iterable[Path], made_by: str) -> str:
    """Where a figure comes from: what made it, and of each run the commit, the device and the resolved config."""
    lines = [f"made by {made_by}"]
    for run_dir, label in run_labels(run_dirs).items():
        known = json.loads((run_dir / "environment.json").read_text())
        changed = " with uncommitted changes" if known["uncommitted_changes"] else ""
        device = ", ".join(known["gpus"]) or f"CPU, {known['threads']} threads"
        lines.append(f"{label}: commit {known['commit']}{changed}; torch {known['packages']['torch']}; {device}")
    return "\n".join(lines)
