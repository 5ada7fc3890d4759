"""One pass over a data set: detections, how sparse attention is, and whether it looks at the object.

    detrlib evaluate my-run --split test2017
    detrlib evaluate my-run --on /data/voc --map motorbike=motorcycle --map aeroplane=airplane
    detrlib evaluate my-run --checkpoint untrained          what was there before training
    detrlib evaluate my-run --set evaluate.paibb=thesis     as published PAIBB was computed
    detrlib evaluate my-run --set data.root=/scratch/coco   its data lie there now
    detrlib evaluate my-run --gpus 8                        shared by 8 processes, with the same results

Processes share batches, whole ones (`data.batch.Shared`), and what they find is put in the order of the data. So
losses, detections and all that is made of these, and tables and maps of single images, are those of one process bit for
bit where its arithmetic is the same (on a CPU: as many threads each). Sums over images are added up in another order:
means of sparsity, sinks, localisation and spread are the same but for rounding in float64.

Legend: B images, L layers, H heads, Q queries, K keys.
"""

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from detrlib.config import Config, replace
from detrlib.data import CocoDataset, build_dataset, describe_data
from detrlib.data.batch import Shared, batches, open_loader
from detrlib.data.classes import class_list
from detrlib.data.formats import other_split
from detrlib.engine import tracking
from detrlib.engine.start import starting_model
from detrlib.errors import ConfigError, DataError, RunError, Stopped, listed
from detrlib.files import load_checkpoint, write_json
from detrlib.losses import Criterion, match
from detrlib.metrics.accumulate import AttentionMeasures
from detrlib.metrics.coco_format import box_table, coco_detections, save_detections
from detrlib.metrics.collapse import BestDetections
from detrlib.metrics.detection import NO_CATEGORY, coco_ap, match_detections
from detrlib.metrics.floor import fixed_boxes, floor
from detrlib.models import Predictions, alpha_modules
from detrlib.models.outputs import Site
from detrlib.runs.examples import recorder
from detrlib.runs.folder import (
    RESERVED,
    class_names,
    has_table,
    is_finished,
    load_results,
    load_table,
    run_config,
    save_tables,
)
from detrlib.runs.opening import WHERE, begin_folder, refuse_other_data
from detrlib.runs.owner import owning
from detrlib.runs.sources import build_source, refuse_predictions, run_source

logger = logging.getLogger(__name__)

DETECTIONS_PER_IMAGE = 100  # as COCO counts them
DETECTIONS_AT_ONCE = 10_000  # that are text in memory, on their way to a file
FIXED_BOXES = "fixed_boxes"  # in measures/: kept, so that the annotations of the training split are read once
MAY_MOVE = {key for key in WHERE if not key.endswith("split")}  # of settings of data, in an evaluation
UNTRAINED = "untrained"  # in place of a checkpoint's name: the model as it was before training


def evaluate_run(
    run_dir: Path, checkpoint: str = "last", split: str | None = None, *, overrides: Mapping[str, Any] | None = None
) -> dict:
    """Evaluate a run's checkpoint on its validation split; write results.json, predictions.json, examples/, maps/,
    measures/.

    Args:
        run_dir: folder of a run. The results of one that was interrupted say `unfinished`, and it can still go on.
        checkpoint: "last", "best", "epoch-0010" and so on, or "untrained" for the model as it was before training,
            whose results go to the folder untrained inside that of the others.
        split: another split of the same data, such as "test2017"; its results go to a folder of that name. Both are
            themselves run folders to read from.
        overrides: dotted settings of `evaluate` in place of the run's own, such as {"evaluate.paibb": "thesis"}, and
            of where its data lie now, such as {"data.root": "/scratch/cells"}.

    Returns:
        What results.json holds, see `evaluate`.

    Raises:
        RunError: there is no such run, it has no such checkpoint, or that is of another architecture; or the data are
            said to lie elsewhere, and are others.
        ConfigError: an override is of anything else.
    """
    cfg, folder = evaluation_config(run_dir, overrides), run_dir
    if split:
        cfg, folder = on_split(cfg, split), results_folder(run_dir, split)
    elif MAY_MOVE & (overrides or {}).keys() and (run_dir / "data.json").exists():
        refuse_other_data(run_dir, describe_data(cfg.data, {"val": build_dataset(cfg.data, "val")}))
    return evaluate_into(folder, run_dir, cfg, checkpoint)


def on_split(cfg: Config, split: str) -> Config:
    """Settings with the whole of another split of the same data for validation. Raises DataError as `other_split`."""
    return replace(cfg, {f"data.{name}": value for name, value in other_split(cfg.data, split).items()})


def evaluation_config(run_dir: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The settings of a run with others of `evaluate`, or of where its data lie. Raises as `evaluate_run`."""
    cfg = run_config(run_dir)
    if wrong := [key for key in overrides or {} if not key.startswith("evaluate.") and key not in MAY_MOVE]:
        raise ConfigError(
            f"{wrong[0]} cannot change in an evaluation: overrides are evaluate.* or {listed(sorted(MAY_MOVE))}"
        )
    names = None if cfg.data.classes else class_names(run_dir)  # of a run made by an earlier version
    return replace(cfg, ({"data.classes": class_list(names)} if names else {}) | dict(overrides or {}))


@owning
def evaluate_into(
    folder: Path, run_dir: Path, cfg: Config, checkpoint: str = "last", described: Mapping[str, Any] | None = None
) -> dict:
    """Evaluate a checkpoint of `run_dir` on the validation data of `cfg`, with results in `folder`.

    described: what the results are to say besides. Raises as `evaluate_run`.
    """
    folder = folder / UNTRAINED if checkpoint == UNTRAINED else folder
    model, known = load_model(run_dir, checkpoint, cfg), {"epoch": 0, "global_step": 0}
    if checkpoint != UNTRAINED:
        known = load_checkpoint(run_dir / "checkpoints" / f"{checkpoint}.pt", ("epoch", "global_step"))
    dataset, accelerator = build_dataset(cfg.data, "val"), Accelerator()
    if accelerator.is_main_process and folder != run_dir:
        begin_folder(folder, cfg)
    results, detections = evaluate(model, dataset, cfg, accelerator, run_dir=folder)
    if accelerator.is_main_process:
        results |= {"checkpoint": checkpoint, "epoch": known["epoch"], "global_step": known["global_step"]}
        results |= run_floor(run_dir, dataset, cfg.evaluate.engine)
        if checkpoint != UNTRAINED and known["epoch"] < cfg.train.epochs and not is_finished(run_dir):
            results["unfinished"] = f"epoch {known['epoch']} of {cfg.train.epochs}"
        save_results(folder, results := results | dict(described or {}), detections, dataset.ground_truth)
    return broadcast_object_list([results])[0]


def results_folder(run_dir: Path, name: str, on: Path | None = None) -> Path:
    """Where results on another split of the run's data go, or on other data, whose annotation file `on` is.

    Raises RunError where the name is reserved, or taken by results on something else.
    """
    folder = run_dir / name
    if folder.parent != run_dir or folder.name in ("..", *RESERVED):
        raise RunError(f"{folder.name!r} cannot name a folder of results in {run_dir}; choose another (--split, --as)")
    if (folder / "results.json").exists() and load_results(folder).get("on") != (on and str(on)):
        raise RunError(f"{folder} holds results on other data; choose another name (--as), or move that folder away")
    return folder


def load_model(run_dir: Path, checkpoint: str = "last", cfg: Config | None = None) -> nn.Module:
    """The model of a run, on the CPU, in evaluation mode; averaged weights where the run keeps them.

    checkpoint "untrained": the model as it was before training, its pretrained backbone or `train.start` included.
    cfg: settings to make that one with, where its data lie elsewhere now; None: the run's own.
    Raises RunError for a run that has no such checkpoint, or is made of another detector's predictions.
    """
    if checkpoint != UNTRAINED:
        return build_source(run_source(run_dir, checkpoint))
    refuse_predictions(run_dir)
    return starting_model(cfg or run_config(run_dir))[0].eval()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a model is run in `train.precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def keep_fixed_boxes(run_dir: Path, train_set: CocoDataset) -> None:
    """Choose the fixed boxes of a training split, and store them in the run's folder."""
    save_tables(run_dir, {FIXED_BOXES: fixed_boxes(train_set)})


def run_floor(run_dir: Path, dataset: CocoDataset, engine: str) -> dict:
    """What results.json is to say of the floor on a data set.

    Args:
        run_dir: of the run, whose fixed boxes are chosen now where it has none yet.
        dataset: what it is evaluated on.
        engine: `evaluate.engine`.

    Returns:
        {"floor": as of `metrics.floor.floor`}, or nothing where the training split is not on this machine.
    """
    if not has_table(run_dir, FIXED_BOXES):
        try:
            keep_fixed_boxes(run_dir, build_dataset(run_config(run_dir).data, "train"))
        except DataError as error:
            logger.info("no floor beside AP, which takes the annotations of the training split: %s", error)
            return {}
    return {"floor": floor(load_table(run_dir, FIXED_BOXES), dataset, engine)}


def save_results(
    run_dir: Path, results: dict, detections: pd.DataFrame | Sequence[Mapping], ground_truth: dict
) -> dict:
    """Write predictions.json and matches, then results.json, which says of a run that it is finished."""
    table = box_table(detections)
    parts = (table[first : first + DETECTIONS_AT_ONCE] for first in range(0, len(table), DETECTIONS_AT_ONCE))
    save_detections(run_dir / "predictions.json", parts)
    matches = match_detections(ground_truth, table)
    save_tables(run_dir, {"matches": matches.detections, "annotations": matches.annotations})
    write_json(run_dir / "results.json", results, checksum=True)
    return results


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    cfg: Config,
    accelerator: Accelerator,
    *,
    criterion: Criterion | None = None,
    sites: Collection[Site] | None = None,
    looked_at: int | None = None,
    run_dir: Path | None = None,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict, pd.DataFrame]:
    """Run `model` over `dataset` once, each process over its share.

    Args:
        model: moved to the accelerator's device and left in evaluation mode.
        dataset: images and objects, without augmentation.
        cfg: settings of the model, of the loss that matches queries, and of `evaluate`.
        accelerator: puts together what the processes find.
        criterion: measure the loss too.
        sites: whose attention is measured besides decoder_cross; None: those whose transform is not softmax; an empty
            one: no attention at all, which is faster.
        looked_at: measure the attention to the first batches only, of so many images; None: to all.
        run_dir: where examples, maps and measures of single images and objects are stored, in place of those of an
            earlier evaluation; None: nowhere.
        progress: show a bar.
        stop: whether to give up after a batch; it is enough that one process is told so.

    Returns:
        Results and a table of detections (`coco_detections`), both of all processes. Results hold `detection` (12 COCO
        numbers and per class), `spread` (`BestDetections.summary`), `loss` (with a criterion), `alpha`, the settings
        `evaluate`, and what `AttentionMeasures.summary` says: `attention`, `sparsity`, `paibb`, `localisation`.

    Raises:
        RunError: what is stored cannot be written.
        Stopped: it was given up, in all processes.
    """
    start, device = time.perf_counter(), accelerator.device
    model = model.to(device).eval()
    detections, losses, looks, best = {}, {}, None, BestDetections()
    share = Shared(len(dataset), cfg.evaluate.batch_size, accelerator.process_index, accelerator.num_processes)
    # May be refused: before what is stored is removed.
    loader = open_loader(dataset, cfg.data, device.type == "cuda", batch_sampler=share)
    with recorder(cfg, len(dataset), accelerator, run_dir) as record:
        if sites is None or sites:
            folder = run_dir / "measures" if run_dir else None
            looks = AttentionMeasures(cfg, folder, accelerator.process_index, accelerator.num_processes, sites)
        bar = tracking.progress(loader, "evaluating", progress)
        for first, batch in zip(share.firsts, batches(bar), strict=True):
            batch = batch.to(device)
            looking = looks and (looked_at is None or first < looked_at)
            wanted = {*looks.sites, *(record.sites(first) if record else ())} if looking else ()
            with autocast(cfg.train.precision, device):
                predictions = model(batch.images, batch.padding_mask, need_attention=wanted)
            detections[first] = _detections(predictions, batch.targets, dataset)
            best.add(predictions, batch.targets)
            if criterion is not None:
                losses[first] = _losses(criterion, predictions, batch.targets)
            if looking:
                indices = match(predictions, batch.targets, Criterion(**dict(cfg.loss)).costs)
                looks.add(predictions, batch, indices)
                if record:
                    record.add(first, batch, predictions, indices)
            if stop():
                break
        if any(gather_object([stop()])):  # those that were not told come here too, after their share
            raise Stopped("the evaluation was given up")
        # Comes back once all processes have closed their tables.
        sums, spread = gather_object([looks.close()] if looks else []), gather_object([best.boxes.sums])
        losses, detections = in_order(losses), pd.concat(in_order(detections), ignore_index=True)
        best.boxes.sums = torch.stack(spread).sum(0)
        results = _results(model, dataset, cfg, detections) | {"spread": best.summary()}
        if criterion is not None:
            results["loss"] = {name: _weighted_mean([row[name] for row in losses]) for name in losses[0]}
        if looks:
            looks.merge(sums, tables=accelerator.is_main_process)
            results |= looks.summary(results["alpha"])
    results["seconds"] = round(time.perf_counter() - start, 2)
    return results, detections


def in_order(found: Mapping[int, Any]) -> list:
    """What all processes have found, each of it by a number, in the order of the numbers; the same in all of them."""
    return [one for _, one in sorted(gather_object(list(found.items())), key=itemgetter(0))]


def _losses(criterion: Criterion, predictions: Predictions, targets: list[dict]) -> dict[str, tuple[float, float]]:
    """Every term of the loss of a batch, with its weight in the mean over batches."""
    terms, counts = criterion(predictions, targets)[1], criterion.counts(predictions, targets)
    values = torch.stack(list(terms.values())).tolist()
    return {
        name: (value, counts.get(re.sub(r"(_enc)?(_\d+)?$", "", name), len(targets)))
        for name, value in zip(terms, values, strict=True)
    }


def _results(model: nn.Module, dataset: CocoDataset, cfg: Config, detections: pd.DataFrame) -> dict:
    """What results.json holds besides losses and attention."""
    return {
        "detection": coco_ap(dataset.ground_truth, detections, cfg.evaluate.engine),
        "images": len(dataset),
        "annotations": dataset.annotations_path.name,
        "evaluate": cfg.evaluate.model_dump(mode="json"),
        "alpha": {layer: module.alpha.tolist() for layer, module in alpha_modules(model).items()},
        "names": {str(label): name for label, name in dataset.names.items()},
    }


def _detections(predictions: Predictions, targets: list[dict], dataset: CocoDataset) -> pd.DataFrame:
    sizes = torch.stack([target["original_size"] for target in targets])
    each = predictions.detections(sizes, DETECTIONS_PER_IMAGE)
    images = np.repeat([target["image_id"] for target in targets], [len(detected.scores) for detected in each])
    boxes, scores, labels = (
        torch.cat([getattr(own, name) for own in each]).cpu() for name in ("boxes", "scores", "labels")
    )
    table = coco_detections(images, boxes, scores, [dataset.category_ids.get(x, NO_CATEGORY) for x in labels.tolist()])
    # Labels between two category ids can be predicted, but name no category.
    return table[table["category_id"] != NO_CATEGORY]


def _weighted_mean(pairs: list[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
