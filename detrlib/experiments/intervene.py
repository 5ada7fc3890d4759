"""What a trained model detects with another attention, or without some of its parts.

    detrlib intervene my-run --alphas 1,1.5,2 --transforms softmax,sparsemax --prune-heads --images 200
    detrlib intervene my-run --sinks masked,zeroed --ablate queries,layers,sites,feedforward
    detrlib intervene my-run --prune-heads --gpus 8         each evaluation is shared by 8 processes

What can be changed stands in `planned`, and how in `interventions` and `ablations`. Huetten et al. 2025 (see there)
measure what the best boxes lose in generalised IoU and F1; here are AP and the loss, with where attention lies.

Legend: L layers of a site, H heads, both numbered from 0.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn

from detrlib.config import Config, replace
from detrlib.data import CocoDataset, build_dataset
from detrlib.data.batch import Shared, batches, open_loader
from detrlib.engine import tracking
from detrlib.engine.evaluate import autocast, evaluate, in_order, load_model
from detrlib.errors import ConfigError, ModelError, listed
from detrlib.experiments.interventions import How
from detrlib.experiments.parts import attention_at, stack_of
from detrlib.experiments.planned import (
    ABLATIONS,
    OF_QUERIES,
    Intervention,
    fixed_alphas,
    gradual,
    possible,
    query_shares,
    rearranged_alphas,
    single_heads,
    sinks_away,
    swaps,
)
from detrlib.losses.criterion import Criterion
from detrlib.metrics.bootstrap import bootstrap_ap, interval
from detrlib.metrics.detection import UNDEFINED, Matches, match_detections
from detrlib.metrics.tables import write_table
from detrlib.models import transform_settings
from detrlib.models.outputs import Site
from detrlib.runs.folder import load_table, run_config
from detrlib.runs.owner import owning
from detrlib.runs.results import MADE_BY

RESULTS = "measures/interventions.parquet"  # read by `runs.results.interventions_frame`
KEY = ["kind", "site", "layer", "head", "value", "images", "checkpoint"]
MEASURES = ["AP", "AP50", "loss", "gini", "zeros", "paibb", "AP_lost", "AP_lost_low", "AP_lost_high"]
ORDER_IMAGES = 100  # of the training split, which give the order of gradual pruning
RESAMPLES = 500  # of the images, for the interval of what is lost


def plan(
    run_dir: Path,
    site: Site = "decoder_cross",
    *,
    alphas: Iterable[float] = (),
    transforms: Iterable[str] = (),
    layer: int | None = None,
    learned: bool = False,
    prune_heads: bool = False,
    sinks: Iterable[How] = (),
    ablate: Iterable[str] = (),
    order_images: int = ORDER_IMAGES,
    checkpoint: str = "last",
) -> list[Intervention]:
    """The interventions asked for, all of them possible; transforms have the run's own settings.

    Args:
        run_dir: folder of a run.
        site: where attention is changed; of what is ablated, where Gini and zeros are measured.
        alphas: of entmax, 1 to 2, in all layers or in `layer`.
        transforms: names, in all layers or in `layer`.
        layer: numbered from 0; None: all.
        learned: learned alphas replaced by their mean, and shuffled.
        prune_heads: every head alone, then one after the other.
        sinks: "masked", "zeroed": sinks of all heads, in all layers and in every one alone.
        ablate: "queries" (ever more of them), "embeddings" (of as many queries, to zero), "single_queries", "layers",
            "sites" (attention of a site, in all layers and in every one alone), "feedforward" (blocks), and where
            points are sampled "levels" and "points". A message says what the model cannot do without.
        order_images: training images that give the order of heads and of queries.
        checkpoint: as of `evaluate_run`.

    Returns:
        What `intervene_run` measures: alphas first, then transforms, learned alphas, sinks, heads, and ablations.

    Raises:
        RunError: there is no such run, or it has no such checkpoint.
        ConfigError: an ablation is none of these.
        ModelError: the model lacks the site, layer, transform or alphas asked for, or all of what is to be ablated.
    """
    if unknown := [name for name in ablate if name not in (*OF_QUERIES, *ABLATIONS)]:
        raise ConfigError(f"unknown ablation '{unknown[0]}'; there are {listed((*OF_QUERIES, *ABLATIONS))}")
    settings = run_config(run_dir).model.attention
    model = load_model(run_dir, checkpoint)
    planned = fixed_alphas(site, alphas, layer)
    planned += swaps(site, transforms, layer, **transform_settings(settings))
    if learned:
        planned += rearranged_alphas(model, site)
    planned += sinks_away(model, site, sinks)
    _try(model, planned)  # before heads and queries are put in order, which takes a while
    parts = [possible(model, ABLATIONS[name](model, site)) for name in ablate if name in ABLATIONS]
    if prune_heads:
        order = prune_order(run_dir, site, order_images, checkpoint)
        planned += single_heads(model, site) + gradual(site, order)
    if chosen := [name for name in ablate if name in OF_QUERIES]:
        possible(model, query_shares([0, 1], site, "embeddings" in chosen))
        order = query_order(run_dir, order_images, checkpoint)
        parts = [query_shares(order, site, zeroed=name == "embeddings") for name in chosen] + parts
    return [*planned, *(one for part in parts for one in part)]


def _try(model: nn.Module, experiments: Iterable[Intervention]) -> None:
    """Enter and leave every intervention: mistakes show before long work."""
    for experiment in experiments:
        with experiment.enter(model):
            pass


# Measuring


@owning
def measure_plan(run_dir: Path, images: int | None = None, checkpoint: str = "last", **asked: Any) -> pd.DataFrame:
    """Plan interventions, `asked` for as of `plan`, and measure them: `intervene_run` and `plan` in one call.

    Returns rows as of `intervene_run`. Raises as both.
    """
    return intervene_run(run_dir, plan(run_dir, checkpoint=checkpoint, **asked), images, checkpoint)


@owning
def intervene_run(
    run_dir: Path, experiments: Sequence[Intervention], images: int | None = None, checkpoint: str = "last"
) -> pd.DataFrame:
    """Evaluate a run under every intervention, and without any, on its validation split.

    Rows are kept in measures/interventions.parquet of the run as they come, in place of earlier ones of the same key;
    those of gradual pruning replace each other altogether. Processes that torchrun has started share the images.

    Args:
        run_dir: folder of a run.
        experiments: as of `plan`, `swaps`, `fixed_alphas`, ...
        images: how many validation images, the first ones; None: all.
        checkpoint: as of `evaluate_run`.

    Returns:
        A row per intervention, those without one (kind "none") first: columns as in `KEY`, the detection numbers, the
        loss of the last decoder layer, and at the site the mean over layers of Gini and zeros, PAIBB of decoder_cross.
        A pruned head counts as all zeros and has no Gini; PAIBB is 0 where its layer has no head left. Both are missing
        where there is nothing of which they could be. AP_lost is the difference to the row without an intervention,
        with its 95 % interval over images (`metrics.bootstrap.interval` of the same samples for both). Of several
        processes the main one has them.

    Raises:
        RunError: there is no such run, or its table of earlier rows is damaged.
        ModelError: an intervention is impossible; before the first is measured.
    """
    cfg = run_config(run_dir)
    cfg = cfg if images is None else replace(cfg, {"data.val_limit": images})
    model = load_model(run_dir, checkpoint)
    sites = list(dict.fromkeys(experiment.site for experiment in experiments)) or ["decoder_cross"]
    for site in sites:
        attention_at(model, site)
    _try(model, experiments)
    experiments = [*(Intervention("none", site, nullcontext) for site in sites), *experiments]
    dataset, accelerator = build_dataset(cfg.data, "val"), Accelerator()
    where = {"images": len(dataset), "checkpoint": checkpoint}
    path, rows, whole = run_dir / RESULTS, [], None
    earlier = None
    if accelerator.is_main_process and path.exists():
        earlier = load_table(run_dir, "interventions", MADE_BY)
    for experiment in tracking.progress(experiments, "interventions"):
        with experiment.enter(model):
            results, found = _measure(model, dataset, cfg, accelerator, experiment.site)
        if not accelerator.is_main_process:
            continue
        matches = match_detections(dataset.ground_truth, found)
        whole = whole or _sampled(matches, results["AP"])
        key = {name: getattr(experiment, name) for name in KEY if name not in where}
        rows.append(key | where | results | (_lost(whole, _sampled(matches, results["AP"])) if key["value"] else {}))
        # Half a series of pruned heads would take the place of a whole one measured before.
        kept = rows if len(rows) == len(experiments) else [row for row in rows if row["kind"] != "heads"]
        table = _together(earlier, _frame(kept))
        write_table(path, table)
    return _frame(rows)


def _measure(
    model: nn.Module, dataset: CocoDataset, cfg: Config, accelerator: Accelerator, site: Site
) -> tuple[dict[str, float | None], pd.DataFrame]:
    """The measures of a row, maps of the site included, be its transform softmax or not; and what was detected."""
    criterion, cfg = Criterion(**dict(cfg.loss)), _as_it_is(cfg, model)
    sites = [site] if site != "encoder_self" or cfg.model.encoder_layers else ["decoder_cross"]
    results, found = evaluate(model, dataset, cfg, accelerator, criterion=criterion, sites=sites, progress=False)
    layers = results["attention"].get(site, {})
    looks = {name: pd.Series(layers.get(name, []), dtype=float).mean() for name in ("gini", "zeros")}
    detection = {name: results["detection"][name] for name in ("AP", "AP50")}
    detection = {name: np.nan if value == UNDEFINED else value for name, value in detection.items()}
    return detection | {"loss": _last_loss(results, criterion)} | looks | {"paibb": results["paibb"]["all"]}, found


def _as_it_is(cfg: Config, model: nn.Module) -> Config:
    """The settings with as many layers as the model has now: measures have an axis of them."""
    layers = {}
    for part in ("encoder", "decoder"):
        try:
            layers[f"{part}_layers"] = len(stack_of(model, part).layers())
        except ModelError:
            layers[f"{part}_layers"] = 0
    if hasattr(cfg.model, "configuration"):  # of transformers, in which the numbers stand
        layers = {"configuration": cfg.model.configuration | layers}
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=layers)})


def _sampled(matches: Matches, ap: float) -> tuple[float, pd.Series]:
    """AP and that of samples of the images, the same ones whatever is detected."""
    return ap, bootstrap_ap(matches, RESAMPLES, metrics=["AP"])["AP"]


def _lost(whole: tuple[float, pd.Series], changed: tuple[float, pd.Series]) -> dict[str, float]:
    """How much less AP there is."""
    lost = whole[0] - changed[0]
    ends = interval(lost, whole[1] - changed[1])
    return {"AP_lost": lost, "AP_lost_low": ends["low"], "AP_lost_high": ends["high"]}


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
    for one in tracking.progress(single_heads(model, site), "importance of heads"):
        with one.enter(model):
            results, _ = evaluate(model, dataset, cfg, accelerator, criterion=criterion, sites=(), progress=False)
        losses[one.layer, one.head] = _last_loss(results, criterion)
    return sorted(losses, key=losses.get)


@torch.no_grad()
def query_order(run_dir: Path, images: int = ORDER_IMAGES, checkpoint: str = "last") -> list[int]:
    """All queries, the least confident first, by the mean of their best class scores.

    On the first `images` training images, without augmentation. Queries that a model proposes go by rank.
    """
    cfg, accelerator = replace(run_config(run_dir), {"data.train_limit": images}), Accelerator()
    model, device = load_model(run_dir, checkpoint).to(accelerator.device), accelerator.device
    dataset, scores = build_dataset(cfg.data, "train", augment=False), {}
    share = Shared(len(dataset), cfg.evaluate.batch_size, accelerator.process_index, accelerator.num_processes)
    loader = open_loader(dataset, cfg.data, device.type == "cuda", batch_sampler=share)
    for first, batch in zip(share.firsts, batches(loader), strict=True):
        batch = batch.to(device)
        with autocast(cfg.train.precision, device):
            scores[first] = model(batch.images, batch.padding_mask).class_scores().amax(-1).sum(0).cpu()  # [Q]
    return sum(in_order(scores)).argsort(stable=True).tolist()


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
