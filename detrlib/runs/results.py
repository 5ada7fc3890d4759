"""Saved results of runs as tidy pandas tables, for figures, statistics and the main table.

Numbers that COCO calls undefined, -1 in results.json, are missing (NaN) in every table.

Every function takes run folders and reads nothing else; runs carry the names that `run_labels` gives them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from detrlib.config import load_config
from detrlib.config.attention import SiteName
from detrlib.errors import RunError
from detrlib.metrics.detection import UNDEFINED, Matches
from detrlib.metrics.sinks import MEASURES as SINKS
from detrlib.runs.folder import group_of, has_table, load_results, load_table, run_labels, to_measure

MADE_BY = "detrlib intervene"
NO_OBJECTS = "no objects in this split"
SITES = get_args(SiteName)
AP_CUTS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def _evaluated(run_dir: Path) -> dict:
    """The results of a run, undefined numbers missing. Raises RunError where it was made of official weights and has
    none yet.
    """
    results = load_results(run_dir)
    if "imported" in results:
        raise RunError(f"{run_dir} is made of {results['imported']} and not evaluated yet: {to_measure(run_dir)}")
    return results | {name: _defined(results.get(name, {})) for name in ("detection", "floor")}


def _defined(numbers: dict) -> dict:
    """Numbers, or numbers by class, with NaN for COCO's value of undefined ones."""
    return {
        name: _defined(value) if isinstance(value, dict) else np.nan if value == UNDEFINED else value
        for name, value in numbers.items()
    }


def _mean(layers: list[float | None]) -> float:
    """Over layers; missing where one has no such number, as Gini of rows that are all empty."""
    return float(np.mean(np.array(layers, dtype=float)))


def layer_frame(run_dirs: Iterable[Path], site: str = "decoder_cross") -> pd.DataFrame:
    """Read the measures of every layer.

    Args:
        run_dirs: folders of finished runs.

    Returns:
        A row per number: run, group, state, metric, layer (from 0), value. state is "trained", and "untrained" for
        runs that were also evaluated as they were before training; metrics are those of sparsity (means over images,
        heads and queries) and, at decoder_cross, of localisation (over objects).

    Raises:
        RunError: a run is not finished.
    """
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        for state, folder in (("trained", run_dir), ("untrained", run_dir / "untrained")):
            results = load_results(folder) if state == "trained" or (folder / "results.json").exists() else {}
            values = dict(results.get("attention", {}).get(site, {}))
            if site == "decoder_cross":
                located = results.get("localisation", {}).get("all", {})
                values |= {name: numbers["mean"] for name, numbers in located.items() if name != "pairs"}
            where = {"run": label, "group": group_of(label), "state": state}
            rows += [
                where | {"metric": name, "layer": layer, "value": value}
                for name, layers in values.items()
                for layer, value in enumerate(layers)
            ]
    frame = pd.DataFrame(rows, columns=["run", "group", "state", "metric", "layer", "value"])
    return frame.astype({"value": float})


def having(run_dirs: Iterable[Path], table: str) -> list[Path]:
    """The runs for which a table of this name was written, such as "located" or "faithfulness"."""
    return [run_dir for run_dir in run_dirs if has_table(run_dir, table)]


def first_of_groups(run_dirs: Iterable[Path]) -> list[Path]:
    """One run of each group, the first: for figures of single models."""
    first = {}
    for run_dir, label in run_labels(run_dirs).items():
        first.setdefault(group_of(label), run_dir)
    return list(first.values())


def results_frame(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Read all headline numbers.

    Args:
        run_dirs: folders of finished runs.

    Returns:
        A row per run: run, group, seed, architecture, the transform at each site, the twelve numbers of COCO, floor
        (AP of fixed boxes, see `metrics.floor`), `<site>/<measure>` (means over layers, of sinks too: sink is the share
        of heads and images with one), `<measure>/<size>` of the last layer for what is measured of matched queries
        (paibb, paibb_normalised, pointing, distance, mass, paibb_without_sink), images, epoch, seconds; missing where a
        run has none.

    Raises:
        RunError: a run is not finished.
    """
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        results, cfg = _evaluated(run_dir), load_config(run_dir / "config.yaml")
        detector = results.get("detector")  # of a run made of predictions, of whose model nothing is known
        transforms = {site: None if detector else cfg.model.transform_at(site) for site in SITES}
        row = {"run": label, "group": group_of(label), "seed": cfg.train.seed}
        row["architecture"] = detector or getattr(cfg.model, "type", cfg.model.architecture)
        row |= transforms | {name: value for name, value in results["detection"].items() if name != "per_class"}
        row["floor"] = results["floor"].get("AP", np.nan)
        for site, measures in results.get("attention", {}).items():
            row |= {f"{site}/{name}": _mean(values) for name, values in measures.items()}
        for site, measures in results.get("sinks", {}).items():
            row |= {f"{site}/{name}": _mean(measures[name]["mean"]) for name in (*SINKS, "agreement")}
        for size, measures in results.get("localisation", {}).items():
            numbers = {name: value for name, value in measures.items() if name != "pairs"}
            row |= {f"{name}/{size}": value["mean"][-1] for name, value in numbers.items()}
        rows.append(row | {name: results.get(name) for name in ("images", "epoch", "seconds")})
    return pd.DataFrame(rows)


def by_site(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The rows of `results_frame` once for each site of attention, to be read as a narrow table.

    names: of measures, such as "gini". Columns group ("decoder_cross: softmax"), seed and the measures, site by site;
    sites of which a run has none are left out.
    """
    parts = []
    for site in SITES:
        own = frame.reindex(columns=[f"{site}/{name}" for name in names]).set_axis(names, axis=1).astype(float)
        parts.append(own.assign(group=f"{site}: " + frame["group"], seed=frame["seed"]).dropna(subset=names, how="all"))
    return pd.concat(parts, ignore_index=True)


def results_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Make the main table.

    Args:
        run_dirs: folders of finished runs.

    Returns:
        A row per run, named by the index: AP in six cuts, floor (AP of fixed boxes, see `metrics.floor`; missing where
        it was not measured), Gini and zeros of decoder cross-attention (means over layers), PAIBB (of the last layer);
        the last three are missing (NaN) for models without attention.

    Raises:
        RunError: a run is not finished.
    """
    rows = {}
    for run_dir, label in run_labels(run_dirs).items():
        results = _evaluated(run_dir)
        cross = results.get("attention", {}).get("decoder_cross", {"gini": np.nan, "zeros": np.nan})
        rows[label] = {
            **{name: results["detection"][name] for name in AP_CUTS},
            "floor": results["floor"].get("AP", np.nan),
            "Gini": _mean(cross["gini"]),
            "zeros": _mean(cross["zeros"]),
            "PAIBB": results.get("paibb", {}).get("all", np.nan),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def floor_numbers(run_dir: Path) -> pd.Series:
    """The AP that fixed boxes reach on a run's data in the six cuts; missing where there is nothing to be measured."""
    return pd.Series(_evaluated(run_dir)["floor"], dtype=object).reindex(AP_CUTS).astype(float)


def class_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Read AP by class.

    Args:
        run_dirs: folders of runs.

    Returns:
        A row per run and class, in order of AP: run, class, AP, AP50, floor (AP of fixed boxes; missing where it was
        not measured) and note, which says of classes without objects why they have no AP.

    Raises:
        RunError: a run is not finished.
    """
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        results = _evaluated(run_dir)
        floors = results["floor"].get("per_class", {})
        rows += [
            {"run": label, "class": name, **numbers, "floor": floors.get(name, {}).get("AP", np.nan)}
            | {"note": NO_OBJECTS if np.isnan(numbers["AP"]) else ""}
            for name, numbers in results["detection"]["per_class"].items()
        ]
    return pd.DataFrame(rows).sort_values("AP", ascending=False, ignore_index=True)


def paibb_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Read PAIBB by object size.

    Args:
        run_dirs: folders of finished runs.

    Returns:
        A row per run, named by the index: all, small, medium, large, without_sink (all, of what heads that have a sink
        leave beside it; missing where sinks were not measured), and how many pairs of queries and objects `all` is a
        mean over; 0 pairs and no values for models without attention.

    Raises:
        RunError: a run is not finished.
    """
    rows = {label: load_results(run_dir).get("paibb", {"pairs": 0}) for run_dir, label in run_labels(run_dirs).items()}
    order = ["all", "small", "medium", "large", "without_sink", "pairs"]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=order).rename_axis("run")


def sparsity_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Read the sparsity of single images.

    Args:
        run_dirs: folders of finished runs.

    Returns:
        A row per image, site, layer, head and selection of queries: run, image_id, site, layer, head, queries (all,
        matched, confident) and the measures, means over the queries; no row where an image has no such queries.

    Raises:
        RunError: a run was evaluated without, or the table is damaged.
    """
    return measures(run_dirs, "sparsity")


def located_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Read where attention of the matched query lies, for every object.

    Args:
        run_dirs: folders of finished runs.

    Returns:
        A row per object, layer and head: run, image_id, object (its number in the image), label, area (of its box,
        square pixels of the file), size, score (of the query), layer, head (-1: the mean over heads) and the measures.

    Raises:
        RunError: a run was evaluated without, or the table is damaged.
    """
    return measures(run_dirs, "located")


def measures(run_dirs: Iterable[Path], name: str) -> pd.DataFrame:
    """One of the tables in measures/ of several runs together, with a column run before its own.

    Raises RunError naming the run that has none.
    """
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
    alphas = {}
    for run_dir, label in run_labels(run_dirs).items():
        layers = {name: values for name, values in _evaluated(run_dir)["alpha"].items() if name.startswith(site)}
        if layers:
            alphas[label] = np.array([layers[f"{site}.{number}"] for number in range(len(layers))])
    return alphas


def interventions_frame(run_dirs: Iterable[Path], images: int | None = None, checkpoint: str = "last") -> pd.DataFrame:
    """Read stored interventions on runs.

    Args:
        run_dirs: folders of runs that `intervene_run` has measured.
        images: only rows measured on so many; None: all.
        checkpoint: only rows of this one.

    Returns:
        Rows as of `intervene_run`, with columns run, trained (the transform that the run was trained with at the site)
        and trained_alpha (mean of learned ones; NaN for tvmax); none without runs.

    Raises:
        RunError: rows of different numbers of images would meet, or a run has none of these images and checkpoint.
    """
    tables = [pd.DataFrame(columns=["run", "kind", "site", "layer", "images"])]
    for run_dir, label in run_labels(run_dirs).items():
        table = load_table(run_dir, "interventions", MADE_BY)
        table = table[(table["checkpoint"] == checkpoint) & (table["images"] == (images or table["images"]))]
        if table.empty:
            asked = f"checkpoint {checkpoint}" + (f" on {images} images" if images else "")
            raise RunError(
                f"{run_dir}: no interventions of {asked} are stored; measure them: {to_measure(run_dir, MADE_BY)}"
            )
        trained = {site: _trained(run_dir, site) for site in table["site"].unique()}
        table = table.replace({name: {UNDEFINED: np.nan} for name in ("AP", "AP50")})
        names, alphas = ([trained[site][part] for site in table["site"]] for part in (0, 1))
        tables.append(table.assign(run=label, trained=names, trained_alpha=alphas))
    frame = pd.concat(tables[1:] or tables, ignore_index=True)
    if frame["images"].nunique() > 1:
        raise RunError(f"measured on {sorted(frame['images'].unique().tolist())} images; name one of them as `images`")
    return frame


def _trained(run_dir: Path, site: str) -> tuple[str, float]:
    """The transform a run was trained with at a site, and its alpha."""
    model = load_config(run_dir / "config.yaml").model
    transform = model.transform_at(site)
    alphas = _evaluated(run_dir)["alpha"]
    learned = [alpha for name, heads in alphas.items() if name.startswith(f"{site}.") for alpha in heads]
    fixed = model.alpha_at(site)
    return transform, float(np.mean(learned)) if learned else float("nan") if fixed is None else fixed


def load_matches(run_dir: Path) -> Matches:
    """The matches that the evaluation of a run has stored. Raises RunError when it was evaluated without."""
    return Matches(load_table(run_dir, "matches"), load_table(run_dir, "annotations"))
