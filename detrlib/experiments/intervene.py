"""What a trained model detects with another attention: its transform swapped, its alpha fixed, or heads pruned.

    detrlib intervene my-run --alphas 1,1.5,2 --transforms softmax,sparsemax --prune-heads --images 200

How a model is changed, and for how long, is said in `detrlib.experiments.interventions`. An `Intervention` is such a
change with the names under which its results are kept; one of your own needs no more than a context.

Legend: L layers of a site, H heads, both numbered from 0.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from detrlib.config import Config, replace
from detrlib.data import CocoDataset, build_dataset
from detrlib.engine.evaluate import evaluate, load_model
from detrlib.experiments.interventions import attention_modules, fixed_alpha, learned_alphas, pruned, swapped
from detrlib.files import write_atomic
from detrlib.losses.criterion import Criterion
from detrlib.metrics.detection import UNDEFINED
from detrlib.models import transform_settings
from detrlib.models.huggingface_weights import num_heads
from detrlib.models.outputs import Site
from detrlib.runs.folder import load_table, run_config
from detrlib.runs.results import MADE_BY

RESULTS = "measures/interventions.parquet"  # read by `runs.results.interventions_frame`
KEY = ["kind", "site", "layer", "head", "value", "images", "checkpoint"]
MEASURES = ["AP", "AP50", "loss", "gini", "zeros", "paibb"]
ORDER_IMAGES = 100  # of the training split, which give the order of gradual pruning


@dataclass(frozen=True)
class Intervention:
    """One row of results. `enter(model)` is a context in which the model is different."""

    kind: str  # none, transform, alpha, learned_alpha, head (a single one pruned), heads (that one and those before)
    site: Site
    enter: Callable[[nn.Module], AbstractContextManager]
    value: str = ""  # name of the transform, alpha, "mean" or "shuffled", number of heads pruned
    layer: int | None = None  # None: all
    head: int | None = None  # None: all


def swaps(site: Site, names: Iterable[str], layer: int | None = None, **settings) -> list[Intervention]:
    """Each transform of `names` in turn, in all layers or in one; `settings` as of `build_transform`."""
    layers = None if layer is None else [layer]
    return [
        Intervention(
            "transform", site, partial(swapped, site=site, transform=name, layers=layers, **settings), name, layer
        )
        for name in names
    ]


def fixed_alphas(site: Site, alphas: Iterable[float], layer: int | None = None) -> list[Intervention]:
    """entmax with each alpha in turn, the same for all heads, in all layers or in one."""
    layers = None if layer is None else [layer]
    return [
        Intervention("alpha", site, partial(fixed_alpha, site=site, alpha=alpha, layers=layers), f"{alpha:g}", layer)
        for alpha in alphas
    ]


def rearranged_alphas(model: nn.Module, site: Site, seed: int = 0) -> list[Intervention]:
    """Learned alphas replaced by their mean, and shuffled among the heads of each layer."""
    alphas = learned_alphas(model, site)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in alphas])
    choices = {"mean": alphas.mean().item(), "shuffled": shuffled}
    return [
        Intervention("learned_alpha", site, partial(fixed_alpha, site=site, alpha=alpha), name)
        for name, alpha in choices.items()
    ]


def single_heads(model: nn.Module, site: Site) -> list[Intervention]:
    """Every head pruned alone (Michel et al. 2019, "Are Sixteen Heads Really Better than One?", Sec. 3.2)."""
    heads = [(layer, head) for layer, m in enumerate(attention_modules(model, site)) for head in range(num_heads(m))]
    return [
        Intervention("head", site, partial(pruned, site=site, heads={layer: [head]}), "pruned", layer, head)
        for layer, head in heads
    ]


def gradual(site: Site, order: Sequence[tuple[int, int]]) -> list[Intervention]:
    """Heads (layer, head) pruned one after the other in the given order (Sec. 4 there)."""
    steps = []
    for count, (layer, head) in enumerate(order, start=1):
        gone = {one: [other for at, other in order[:count] if at == one] for one, _ in order[:count]}
        steps.append(Intervention("heads", site, partial(pruned, site=site, heads=gone), str(count), layer, head))
    return steps


def plan(
    run_dir: Path,
    site: Site = "decoder_cross",
    *,
    alphas: Iterable[float] = (),
    transforms: Iterable[str] = (),
    layer: int | None = None,
    learned: bool = False,
    prune_heads: bool = False,
    order_images: int = ORDER_IMAGES,
    checkpoint: str = "last",
) -> list[Intervention]:
    """The interventions asked for, all of them possible; transforms have the run's own settings.

    Args:
        run_dir: folder of a run.
        site: where the model is changed.
        alphas: of entmax, 1 to 2, in all layers or in `layer`.
        transforms: names, in all layers or in `layer`.
        layer: numbered from 0; None: all.
        learned: learned alphas replaced by their mean, and shuffled.
        prune_heads: every head alone, then one after the other.
        order_images: training images that give the order of heads.
        checkpoint: as of `evaluate_run`.

    Returns:
        What `intervene_run` measures: alphas first, then transforms, learned alphas, and heads.

    Raises:
        RunError: there is no such run, or it has no such checkpoint.
        ModelError: the model lacks the site, layer, transform or alphas asked for.
    """
    settings = run_config(run_dir).model.attention
    model = load_model(run_dir, checkpoint)
    planned = fixed_alphas(site, alphas, layer)
    planned += swaps(site, transforms, layer, **transform_settings(settings))
    if learned:
        planned += rearranged_alphas(model, site)
    _try(model, planned)  # before heads are put in order, which takes a while
    if prune_heads:
        order = prune_order(run_dir, site, order_images, checkpoint)
        planned += single_heads(model, site) + gradual(site, order)
    return planned


def _try(model: nn.Module, experiments: Iterable[Intervention]) -> None:
    """Enter and leave every intervention: mistakes show before long work."""
    for experiment in experiments:
        with experiment.enter(model):
            pass


# Measuring


def intervene_run(
    run_dir: Path, experiments: Sequence[Intervention], images: int | None = None, checkpoint: str = "last"
) -> pd.DataFrame:
    """Evaluate a run under every intervention, and without any, on its validation split.

    Rows are kept in measures/interventions.parquet of the run as they come, in place of earlier ones of the same key;
    those of gradual pruning replace each other altogether. One process at a time may write there.

    Args:
        run_dir: folder of a run.
        experiments: as of `plan`, `swaps`, `fixed_alphas`, ...
        images: how many validation images, the first ones; None: all.
        checkpoint: as of `evaluate_run`.

    Returns:
        A row per intervention, those without one (kind "none") first: columns as in `KEY`, the detection numbers, the
        loss of the last decoder layer, and at the site the mean over layers of Gini and zeros, PAIBB of decoder_cross.
        A pruned head counts as all zeros; PAIBB is 0 where its layer has no head left.

    Raises:
        RunError: there is no such run, or its table of earlier rows is damaged.
        ModelError: an intervention is impossible; before the first is measured.
    """
    cfg = run_config(run_dir)
    cfg = cfg if images is None else replace(cfg, {"data.val_limit": images})
    model = load_model(run_dir, checkpoint)
    sites = list(dict.fromkeys(experiment.site for experiment in experiments)) or ["decoder_cross"]
    for site in sites:
        attention_modules(model, site)
    _try(model, experiments)
    experiments = [*(Intervention("none", site, nullcontext) for site in sites), *experiments]
    dataset, accelerator = build_dataset(cfg.data, "val"), Accelerator()
    where = {"images": len(dataset), "checkpoint": checkpoint}
    path, rows = run_dir / RESULTS, []
    earlier = load_table(run_dir, "interventions", MADE_BY) if path.exists() else None
    for experiment in tqdm(experiments, desc="interventions", disable=None):
        with experiment.enter(model):
            results = _measure(model, dataset, cfg, accelerator, experiment.site)
        key = {name: getattr(experiment, name) for name in KEY if name not in where}
        rows.append(key | where | results)
        # Half a series of pruned heads would take the place of a whole one measured before.
        whole = rows if len(rows) == len(experiments) else [row for row in rows if row["kind"] != "heads"]
        table = _together(earlier, _frame(whole))
        write_atomic(path, partial(table.to_parquet, index=False))
    return _frame(rows)


def _measure(
    model: nn.Module, dataset: CocoDataset, cfg: Config, accelerator: Accelerator, site: Site
) -> dict[str, float | None]:
    """The measures of a row, maps of the site included, be its transform softmax or not."""
    criterion = Criterion(**dict(cfg.loss))
    results, _ = evaluate(model, dataset, cfg, accelerator, criterion=criterion, sites=[site], progress=False)
    looks = {name: float(np.mean(results["attention"][site][name])) for name in ("gini", "zeros")}
    detection = {name: results["detection"][name] for name in ("AP", "AP50")}
    detection = {name: np.nan if value == UNDEFINED else value for name, value in detection.items()}
    return detection | {"loss": _last_loss(results, criterion)} | looks | {"paibb": results["paibb"]["all"]}


def _last_loss(results: dict, criterion: Criterion) -> float:
    """The weighted loss of the last decoder layer, which is the one that detects."""
    return sum(weight * results["loss"][name] for name, weight in criterion.weights.items())


def prune_order(run_dir: Path, site: Site, images: int = ORDER_IMAGES, checkpoint: str = "last") -> list:
    """All heads (layer, head), that whose pruning alone leaves the lowest loss first.

    The loss is that of the first `images` training images, without augmentation: images on which the effect of pruning
    is measured have no say in the order.
    """
    cfg = replace(run_config(run_dir), {"data.train_limit": images})
    model, dataset = load_model(run_dir, checkpoint), build_dataset(cfg.data, "train", augment=False)
    criterion, accelerator, losses = Criterion(**dict(cfg.loss)), Accelerator(), {}
    for one in tqdm(single_heads(model, site), desc="importance of heads", disable=None):
        with one.enter(model):
            results, _ = evaluate(model, dataset, cfg, accelerator, criterion=criterion, sites=(), progress=False)
        losses[one.layer, one.head] = _last_loss(results, criterion)
    return sorted(losses, key=losses.get)


def _frame(rows: list[dict]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=[*KEY, *MEASURES])
    return frame.astype({"layer": "Int64", "head": "Int64"} | dict.fromkeys(MEASURES, float))


def _together(earlier: pd.DataFrame | None, new: pd.DataFrame) -> pd.DataFrame:
    """New rows after those of the earlier ones that they do not replace; a run cut short loses nothing."""
    if earlier is None:
        return new
    kept = earlier[~_names(earlier).isin(set(_names(new)))]
    return pd.concat([kept, new], ignore_index=True) if len(kept) else new


def _names(frame: pd.DataFrame) -> pd.Series:
    """One text per row that tells rows apart; rows of one gradual pruning share theirs."""
    parts = frame[KEY].astype("string").fillna("")
    parts.loc[frame["kind"] == "heads", ["layer", "head", "value"]] = ""
    return parts.agg("|".join, axis=1)
