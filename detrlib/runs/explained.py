"""Tested explanations of several runs: which wins in which, and what a setting does to them.

    effect_of(run_dirs, "model.attention.null_key")      does raw attention explain better with a null key?
    compare_explained(run_dirs, [("zero", "none")])      does it in the first group of runs better than in the second?

Legend: a deletion or insertion is better by a gain, which is positive where it explains more.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from detrlib.config import flat_settings, load_config
from detrlib.errors import ConfigError
from detrlib.metrics.faithfulness import means_by_method
from detrlib.metrics.seeds import compare_groups
from detrlib.metrics.statistics import NO_ROWS, compare, with_verdicts
from detrlib.runs.folder import group_of, load_table, run_labels

MADE_BY = "detrlib explain"
AREAS = ("deletion", "insertion", "deletion gain", "insertion gain")
SETTING = "model.attention.decoder_cross"
APART = ("train.seed", "train.tracking.", "evaluate.")  # settings in which runs that are compared may differ


def explained_frame(run_dirs: Iterable[Path], measure: str = "similarity") -> pd.DataFrame:
    """Read the faithfulness of explanations of several runs.

    Args:
        run_dirs: folders of runs that were explained.
        measure: score, iou or similarity.

    Returns:
        A row per run and method: run, group, seed, method, images, and the areas deletion and insertion, means over
        images, with deletion gain and insertion gain, how much better than the predicted box of the same run on the
        same images; missing where the box was not measured.

    Raises:
        RunError: a run was not explained.
    """
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        where = {"run": label, "group": group_of(label), "seed": load_config(run_dir / "config.yaml").train.seed}
        for method, own in _areas(run_dir, measure).items():
            rows.append(where | {"method": method, "images": len(own)} | own.mean().to_dict())
    return pd.DataFrame(rows, columns=["run", "group", "seed", "method", "images", *AREAS])


def effect_of(run_dirs: Iterable[Path], setting: str, method: str = "raw", measure: str = "similarity") -> pd.DataFrame:
    """Compare runs that differ in one setting by how well a method explains them.

    Runs with all other settings alike but the seed belong together. Of these, every value of the setting is compared
    with the one that configs have by default, or with the first where none of the runs has it.

    Args:
        run_dirs: folders of runs that were explained; those without a counterpart are left out.
        setting: such as "model.attention.null_key", "model.registers" or "model.attention.decoder_cross".
        method: of explaining.
        measure: score, iou or similarity.

    Returns:
        Rows as of `metrics.statistics.compare_groups`, of the areas and gains over seeds: first (a group of runs),
        second (its counterpart), metric, difference, low, high, p, verdict, ...; and images_low, images_high,
        images_p: of the models as they are, over the `images` that all of them were explained on, means over the seeds
        that both groups have. Empty where nothing can be compared.

    Raises:
        RunError: a run was not explained.
        ConfigError: configs have no such setting.
    """
    return _compared(_pairs(_groups(run_dirs, setting), setting), method, measure)


def compare_explained(
    run_dirs: Iterable[Path],
    pairs: Sequence[tuple[str, str]] = (),
    method: str = "raw",
    measure: str = "similarity",
    metrics: Sequence[str] = AREAS,
) -> pd.DataFrame:
    """Compare groups of runs by how well a method explains them.

    Args:
        run_dirs: folders of runs that were explained.
        pairs: names of the groups to compare; (): all. Pairs of which one was not explained by the method are left out.
        method: of explaining.
        measure: score, iou or similarity.
        metrics: some of deletion, insertion, deletion gain and insertion gain.

    Returns:
        Rows as of `effect_of`.

    Raises:
        RunError: a run was not explained.
    """
    groups = {}
    for run_dir, label in run_labels(run_dirs).items():
        seed = load_config(run_dir / "config.yaml").train.seed
        groups.setdefault(group_of(label), {"name": group_of(label), "runs": {}})["runs"][seed] = run_dir
    chosen = [(a, b) for a, b in pairs or combinations(groups, 2) if a in groups and b in groups]
    return _compared([(groups[a], groups[b]) for a, b in chosen], method, measure, metrics)


def _compared(
    pairs: list[tuple[dict, dict]], method: str, measure: str, metrics: Sequence[str] = AREAS
) -> pd.DataFrame:
    """Rows of `effect_of`, of pairs of groups {"name", "runs": {seed: run}}."""
    rows = {}
    every = dict.fromkeys(run for pair in pairs for group in pair for run in group["runs"].values())
    tables = {run: _areas(run, measure) for run in every}
    pairs = [pair for pair in pairs if all(method in tables[run] for one in pair for run in one["runs"].values())]
    for group in (group for pair in pairs for group in pair):
        for seed, run in group["runs"].items():
            means = tables[run][method].mean().to_dict()
            rows[group["name"], seed] = {"group": group["name"], "seed": seed} | means
    if not rows:
        return with_verdicts(NO_ROWS)
    named = {(first["name"], second["name"]): (first["runs"], second["runs"]) for first, second in pairs}
    table = compare_groups(pd.DataFrame(rows.values()), metrics, list(named))
    areas = {run: by_method[method] for run, by_method in tables.items() if method in by_method}
    over_images = [
        _over_images(areas, *named[first, second], metric)
        for first, second, metric in table[["first", "second", "metric"]].itertuples(index=False)
    ]
    return table.join(pd.DataFrame(over_images))


def _over_images(areas: dict[Path, pd.DataFrame], first: dict, second: dict, metric: str) -> dict[str, float]:
    """The difference of two groups {seed: run} over the images that runs of their common seeds were explained on."""
    seeds = [seed for seed in first if seed in second]
    means = [
        pd.concat([areas[runs[seed]][metric] for seed in seeds], axis=1, join="inner").mean(axis=1)
        for runs in (first, second)
        if seeds
    ]
    means = [own.dropna() for own in means]  # gains where the box was not measured
    both = means[0].index.intersection(means[1].index) if seeds else []
    if len(both) < 2:
        return {"images": len(both), "images_low": np.nan, "images_high": np.nan, "images_p": np.nan}
    numbers = compare(*(own[both] for own in means), metric)
    return {"images": len(both)} | {f"images_{name}": numbers[name] for name in ("low", "high", "p")}


def _areas(run_dir: Path, measure: str) -> dict[str, pd.DataFrame]:
    """{method: a row per image with the columns AREAS} of a run."""
    means = means_by_method(load_table(run_dir, "faithfulness", MADE_BY), measure)
    box = means.get("box")
    tables = {}
    for method, own in means.items():
        gain = (own - (own * float("nan") if box is None else box)) * [-1, 1]
        tables[method] = own.join(gain.add_suffix(" gain"))
    return tables


def _groups(run_dirs: Iterable[Path], setting: str) -> list[dict[str, Any]]:
    """Groups of runs alike but for the seed: name, the value of the setting, all other settings, {seed: run}."""
    groups = {}
    for run_dir, label in run_labels(run_dirs).items():
        settings = flat_settings(load_config(run_dir / "config.yaml"))
        if setting not in settings:
            raise ConfigError(f"{run_dir / 'config.yaml'}: no setting {setting!r}; give one such as {SETTING}")
        changed = {setting, f"{setting}_sites"}  # where it applies means nothing where it is none
        others = {key: value for key, value in settings.items() if not (key in changed or key.startswith(APART))}
        value, rest = settings[setting], repr(sorted(others.items()))
        group = {"name": group_of(label), "value": value, "rest": rest, "runs": {}}
        groups.setdefault((repr(value), rest), group)["runs"][settings["train.seed"]] = run_dir
    return list(groups.values())


def _pairs(groups: list[dict[str, Any]], setting: str) -> list[tuple[dict, dict]]:
    """Each group with that of the setting's default, or of the first value, and all else alike."""
    usual, pairs = flat_settings(load_config()).get(setting), []
    for group in groups:
        family = [other for other in groups if other["rest"] == group["rest"]]
        second = next((other for other in family if other["value"] == usual), family[0])
        if group is not second:
            pairs.append((group, second))
    return pairs
