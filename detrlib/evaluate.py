"""One pass over a data set: detections, how sparse attention is, and whether it looks at the object.

    python -m detrlib.evaluate my-run --split test2017
    python -m detrlib.evaluate my-run --on /data/voc --map motorbike=motorcycle aeroplane=airplane
    python -m detrlib.evaluate my-run --checkpoint untrained          what was there before training
    python -m detrlib.evaluate my-run --set evaluate.paibb=thesis     as published PAIBB was computed

Legend: B images, L layers, H heads, Q queries, K keys.
"""

import argparse
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from detrlib.config import Config, ConfigError, load_config, replace, save_config
from detrlib.criterion import Criterion
from detrlib.data import CocoDataset, DataError, build_dataset, collate
from detrlib.matcher import match
from detrlib.metrics.attention import AttentionMeasures
from detrlib.metrics.detection import coco_ap, coco_detections, match_detections
from detrlib.models import Predictions, alpha_modules, build_model
from detrlib.other_data import OtherData, prepare, split_folder
from detrlib.pretrain import backbone_weights
from detrlib.record import Recorder, recorder
from detrlib.runs import (
    RunError,
    environment,
    load_checkpoint,
    load_results,
    load_weights,
    run_path,
    save_tables,
    write_atomic,
    write_json,
)

DETECTIONS_PER_IMAGE = 100  # as COCO counts them


UNTRAINED = "untrained"  # in place of a checkpoint's name: the model as it was before training


def evaluate_run(
    run_dir: Path,
    checkpoint: str = "last",
    split: str | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    on: Path | None = None,
    images: Path | None = None,
    names: Mapping[str, str] | None = None,
    by_id: bool = False,
    save_as: str | None = None,
) -> dict:
    """Evaluate a run's checkpoint on its validation split; write results.json, predictions.json, examples/, maps/,
    measures/.

    checkpoint: "last", "best", "epoch-0010" and so on, or "untrained" for the model as it was before training, whose
    results go to the folder untrained inside that of the others. split: another split of the same data, such as
    "test2017"; its results go to a folder of that name. Both are themselves run folders to read from. overrides: dotted
    settings of `evaluate` in place of the run's own, such as {"evaluate.paibb": "thesis"}.
    Raises RunError when the run is not finished (its results would say that it is), has no such checkpoint, or that is
    of another architecture; ConfigError for an override of anything but `evaluate`.

    on: other data, a COCO-format folder (whose `split` is taken) or an annotation file (with its pictures in the
    folder `images`, by default near it); results go to the folder `save_as` inside the run, named after the data by
    default. Classes are those of the run with the same name, after `names` ({their name: our name}, see
    `match_classes`). Only classes that both know are scored: objects of theirs without partner (`unmapped` in the
    results) are left out, and so are detections of the model's classes that the data does not annotate
    (`unannotated`), since nobody has looked for those objects and they must not count as false. by_id: categories
    are those of the run with the same id instead, whatever their names.
    """
    load_results(run_dir)
    if wrong := [key for key in overrides or {} if not key.startswith("evaluate.")]:
        raise ConfigError(f"{wrong[0]} cannot change in an evaluation: overrides are settings of evaluate.*")
    cfg = replace(load_config(run_dir / "config.yaml"), overrides or {})
    folder, described = run_dir, {}
    if on:
        other = OtherData(on, images, split, names or {}, by_id, save_as)
        cfg, folder, described = prepare(run_dir, cfg, other)
    elif images or names or by_id or save_as:
        raise ConfigError("images, names, by_id and save_as belong to data given as `on`")
    elif split:
        whole = {"data.val_images": None, "data.val_annotations": None, "data.val_limit": None}
        cfg, folder = replace(cfg, {"data.val_split": split, **whole}), split_folder(run_dir, split)
    folder = folder / UNTRAINED if checkpoint == UNTRAINED else folder
    model, known = load_model(run_dir, checkpoint), {"epoch": 0, "global_step": 0}
    if checkpoint != UNTRAINED:
        known = load_checkpoint(run_dir / "checkpoints" / f"{checkpoint}.pt")
    dataset = build_dataset(cfg.data, "val")
    if folder != run_dir:
        write_atomic(folder / "config.yaml", lambda path: save_config(cfg, path))
        write_json(folder / "environment.json", environment())
    results, detections = evaluate(model, dataset, cfg, Accelerator(), run_dir=folder)
    results |= {"checkpoint": checkpoint, "epoch": known["epoch"], "global_step": known["global_step"]}
    return save_results(folder, results | described, detections, dataset.ground_truth)


def load_model(run_dir: Path, checkpoint: str = "last") -> nn.Module:
    """The model of a run, on the CPU, in evaluation mode; averaged weights where the run keeps them.

    checkpoint "untrained": the model as it was before training, its pretrained backbone included.
    """
    cfg = load_config(run_dir / "config.yaml")
    if checkpoint == UNTRAINED:
        weights = None
        if cfg.model.backbone.weights == "crops":
            weights = backbone_weights(cfg.model.backbone, build_dataset(cfg.data, "train"), cfg.data.image_size)
        return initial_model(cfg, weights).eval()
    path = run_dir / "checkpoints" / f"{checkpoint}.pt"
    state = load_checkpoint(path)
    model = build_model(cfg.model, backbone_weights="none")
    load_weights(model, state.get("average") or state["model"], path)
    return model.eval()


def initial_model(cfg: Config, weights: str | Path | None = None) -> nn.Module:
    """The model that training starts from: weights follow from cfg.train.seed alone, those of the backbone given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.train.seed)
        return build_model(cfg.model, weights)


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """The precision in which the model of `cfg` is run, as a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.precision == "bfloat16")


def save_results(run_dir: Path, results: dict, detections: list[dict], ground_truth: dict) -> dict:
    """Write predictions.json and matches, then results.json, whose presence says that the run is finished."""
    write_json(run_dir / "predictions.json", detections)
    matches = match_detections(ground_truth, detections)
    save_tables(run_dir, {"matches": matches.detections, "annotations": matches.annotations})
    write_json(run_dir / "results.json", results)
    return results


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    cfg: Config,
    accelerator: Accelerator,
    *,
    criterion: Criterion | None = None,
    attention: bool = True,
    run_dir: Path | None = None,
    progress: bool = True,
) -> tuple[dict, list[dict]]:
    """Results and COCO-format detections of `model` on `dataset`, complete on every process.

    attention: measure attention too, of models that have it. run_dir: where examples, maps and measures of single
    images and objects are stored, if given, in place of those of an earlier evaluation. Results hold `detection` (12
    COCO numbers and per class), `loss` (with a criterion), `alpha`, the settings `evaluate`, and what
    `AttentionMeasures.summary` says: `attention`, `sparsity`, `paibb`, `localisation`. progress: show a bar.
    """
    with recorder(cfg, len(dataset), accelerator, run_dir) as record:
        folder = run_dir / "measures" if run_dir else None
        looks = AttentionMeasures(cfg, folder, accelerator.process_index) if attention and cfg.model.attends else None
        return _evaluate(model, dataset, cfg, accelerator, criterion, looks, record, progress)


def _evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    cfg: Config,
    accelerator: Accelerator,
    criterion: Criterion | None,
    looks: AttentionMeasures | None,
    record: Recorder | None,
    progress: bool,
) -> tuple[dict, list[dict]]:
    start = time.perf_counter()
    model = model.to(accelerator.device).eval()
    shard = range(accelerator.process_index, len(dataset), accelerator.num_processes)  # no image counted twice
    loader = DataLoader(
        Subset(dataset, shard), cfg.evaluate.batch_size, collate_fn=collate, num_workers=cfg.data.workers
    )
    detections, losses = [], []
    for batch in tqdm(loader, desc="evaluating", leave=False, disable=None if progress else True):
        batch = batch.to(accelerator.device)
        with autocast(cfg, accelerator.device):
            sites = {*looks.sites, *(record.sites(batch) if record else ())} if looks else ()
            predictions = model(batch.images, batch.padding_mask, need_attention=sites)
        detections += _detections(predictions, batch.targets, dataset)
        if criterion is not None:
            terms, counts = criterion(predictions, batch.targets)[1], criterion.counts(predictions, batch.targets)
            losses.append(
                {
                    name: (value.item(), counts.get(re.sub(r"(_enc)?(_\d+)?$", "", name), len(batch.targets)))
                    for name, value in terms.items()
                }
            )
        if looks:
            pairs = match(predictions, batch.targets, cfg.loss)
            looks.add(predictions, batch, pairs)
            if record:
                record.add(batch, predictions, pairs)
    sums = [looks.close()] if looks else []
    if accelerator.num_processes > 1:  # comes back once all processes have closed their tables
        detections, losses, sums = (gather_object(x) for x in (detections, losses, sums))
    results = {
        "detection": coco_ap(dataset.ground_truth, detections),
        "images": len(dataset),
        "annotations": str(dataset.annotations_path.name),
        "evaluate": cfg.evaluate.model_dump(mode="json"),
        "alpha": {place: module.alpha.tolist() for place, module in alpha_modules(model).items()},
        "names": {str(label): name for label, name in dataset.names.items()},
    }
    if criterion is not None:
        results["loss"] = {name: _weighted_mean([row[name] for row in losses]) for name in losses[0]}
    if looks:
        looks.merge(sums, tables=accelerator.is_main_process)
        results |= looks.summary(results["alpha"])
    results["seconds"] = round(time.perf_counter() - start, 2)
    return results, detections


def _detections(predictions: Predictions, targets: list[dict], dataset: CocoDataset) -> list[dict]:
    sizes = torch.stack([target["original_size"] for target in targets])
    rows = []
    for target, found in zip(targets, predictions.detections(sizes, DETECTIONS_PER_IMAGE), strict=True):
        # Labels between two category ids can be predicted, but name no category.
        known = torch.tensor([label in dataset.category_ids for label in found.labels.tolist()], dtype=torch.bool)
        boxes, scores, labels = (x.cpu()[known] for x in (found.boxes, found.scores, found.labels))
        ids = [dataset.category_ids[label] for label in labels.tolist()]
        rows += coco_detections(target["image_id"], boxes, scores, ids)
    return rows


def _weighted_mean(pairs: list[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def main() -> None:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_name", help="folder under papermill_runs/")
    parser.add_argument("--checkpoint", default="last", help="last, best, epoch-NNNN, or untrained")
    parser.add_argument("--split", help="another split of the same data, or of that given as --on, e.g. test2017")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="e.g. evaluate.paibb=thesis")
    other = parser.add_argument_group("data with other classes")
    other.add_argument("--on", type=Path, metavar="DATA", help="a COCO-format folder or an annotation file")
    other.add_argument("--images", type=Path, help="folder of its pictures, if not near the annotation file")
    other.add_argument(
        "--map", nargs="+", action="extend", metavar="THEIRS=OURS", help="names of classes; an empty one leaves it out"
    )
    other.add_argument("--by-id", action="store_true", help="its category ids are the run's, whatever the names")
    other.add_argument("--as", dest="save_as", metavar="NAME", help="folder of the results inside the run")
    arguments = parser.parse_args()
    malformed = [pair for pair in arguments.map or [] if not pair.partition("=")[1]]
    if malformed:
        parser.error(f"--map {malformed[0]}: expected their name=our name, e.g. bike=bicycle")
    if malformed := [item for item in arguments.set if "=" not in item]:
        parser.error(f"--set {malformed[0]}: expected name=value, e.g. evaluate.paibb=thesis")
    options = {name: getattr(arguments, name) for name in ("on", "images", "by_id", "save_as")}
    names = dict(pair.split("=", 1) for pair in arguments.map or [])
    options["overrides"] = dict(item.split("=", 1) for item in arguments.set)
    run_dir = run_path(arguments.run_name)
    try:
        results = evaluate_run(run_dir, arguments.checkpoint, arguments.split, names=names, **options)
    except (ConfigError, DataError, RunError) as error:
        raise SystemExit(f"error: {error}") from None
    shown = {name: value for name, value in results["detection"].items() if name != "per_class"}
    print("  ".join(f"{name} {value:.3f}" for name, value in shown.items()))
    if "on" in results:
        _print_classes(results)


def _print_classes(results: dict) -> None:
    """What was scored on other data, and what was not."""
    renamed = [f"{theirs} = {ours}" for theirs, ours in results["matched"].items() if theirs != ours]
    print(f"{len(results['matched'])} classes scored" + (f", {', '.join(renamed)}" if renamed else ""))
    lost = [f"{name} ({count} objects)" for name, count in results["unmapped"].items()]
    print(f"not classes of the run, left out: {', '.join(lost) or 'none'}")
    print(f"not annotated there, their detections left out: {', '.join(results['unannotated']) or 'none'}")
    print(results["note"])


if __name__ == "__main__":
    main()
