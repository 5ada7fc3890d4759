"""One pass over a data set: detections, how sparse attention is, and whether it looks at the object.

    python -m detrlib.evaluate my-run --split test2017
    python -m detrlib.evaluate my-run --on /data/voc --map motorbike=motorcycle aeroplane=airplane

Legend: B images, L layers, H heads, Q queries, K keys.
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from detrlib.config import Config, ConfigError, load_config, replace, save_config
from detrlib.criterion import Criterion
from detrlib.data import Batch, CocoDataset, DataError, build_dataset, collate
from detrlib.matcher import Match, match
from detrlib.metrics.detection import coco_ap, coco_detections
from detrlib.metrics.localisation import object_size, paibb
from detrlib.metrics.sparsity import entropy, gini, support_size, zeros_ratio
from detrlib.models import AttentionMaps, Predictions, alpha_modules, build_model
from detrlib.other_data import OtherData, prepare
from detrlib.record import Recorder, recorder
from detrlib.runs import (
    RunError,
    environment,
    load_checkpoint,
    load_results,
    load_weights,
    run_path,
    write_atomic,
    write_json,
)

DETECTIONS_PER_IMAGE = 100  # as COCO counts them


def evaluate_run(
    run_dir: Path,
    checkpoint: str = "last",
    split: str | None = None,
    *,
    on: Path | None = None,
    images: Path | None = None,
    names: Mapping[str, str] | None = None,
    by_id: bool = False,
    save_as: str | None = None,
) -> dict:
    """Evaluate a run's checkpoint on its validation split; write results.json, predictions.json, examples/, maps/.

    split: another split of the same data, such as "test2017"; its results go to a folder of that name inside the
    run, which is itself a run folder to read from. Raises RunError when the run is not finished (its results would
    say that it is), has no such checkpoint, or that is of another architecture.

    on: other data, a COCO-format folder (whose `split` is taken) or an annotation file (with its pictures in the
    folder `images`, by default near it); results go to the folder `save_as` inside the run, named after the data by
    default. Classes are those of the run with the same name, after `names` ({their name: our name}, see
    `match_classes`). Only classes that both know are scored: objects of theirs without partner (`unmapped` in the
    results) are left out, and so are detections of the model's classes that the data does not annotate
    (`unannotated`), since nobody has looked for those objects and they must not count as false. by_id: categories
    are those of the run with the same id instead, whatever their names.
    """
    load_results(run_dir)
    cfg = load_config(run_dir / "config.yaml")
    folder, described = run_dir, {}
    if on:
        other = OtherData(on, images, split, names or {}, by_id, save_as)
        cfg, folder, described = prepare(run_dir, cfg, other)
    elif images or names or by_id or save_as:
        raise ConfigError("images, names, by_id and save_as belong to data given as `on`")
    elif split:
        other = {"data.val_split": split, "data.val_images": None, "data.val_annotations": None, "data.val_limit": None}
        cfg, folder = replace(cfg, other), run_dir / split
    model = load_model(run_dir, checkpoint)
    if folder != run_dir:
        write_atomic(folder / "config.yaml", lambda path: save_config(cfg, path))
        write_json(folder / "environment.json", environment())
    dataset = build_dataset(cfg.data, "val")
    results, detections = evaluate(model, dataset, cfg, Accelerator(), run_dir=folder)
    known = load_checkpoint(run_dir / "checkpoints" / f"{checkpoint}.pt")
    results |= {"checkpoint": checkpoint, "epoch": known["epoch"], "global_step": known["global_step"]}
    return save_results(folder, results | described, detections)


def load_model(run_dir: Path, checkpoint: str = "last") -> nn.Module:
    """The trained model of a run, on the CPU, in evaluation mode; averaged weights where the run keeps them."""
    cfg = load_config(run_dir / "config.yaml")
    path = run_dir / "checkpoints" / f"{checkpoint}.pt"
    state = load_checkpoint(path)
    model = build_model(cfg.model, backbone_weights="none")
    load_weights(model, state.get("average") or state["model"], path)
    return model.eval()


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """The precision in which the model of `cfg` is run, as a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.precision == "bfloat16")


def save_results(run_dir: Path, results: dict, detections: list[dict]) -> dict:
    """Write predictions.json, then results.json, whose presence says that the run is finished."""
    write_json(run_dir / "predictions.json", detections)
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
) -> tuple[dict, list[dict]]:
    """Results and COCO-format detections of `model` on `dataset`, complete on every process.

    attention: measure attention too, of models that have it. run_dir: where examples and maps are stored, if given, in
    place of those of an earlier evaluation. Results hold `detection` (12 COCO numbers and per class), `loss` (with a
    criterion), `attention`, `paibb`, `alpha`.
    """
    with recorder(cfg, len(dataset), accelerator, run_dir) as record:
        return _evaluate(model, dataset, cfg, accelerator, criterion, attention, record)


def _evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    cfg: Config,
    accelerator: Accelerator,
    criterion: Criterion | None,
    attention: bool,
    record: Recorder | None,
) -> tuple[dict, list[dict]]:
    start = time.perf_counter()
    model = model.to(accelerator.device).eval()
    shard = range(accelerator.process_index, len(dataset), accelerator.num_processes)  # no image counted twice
    loader = DataLoader(
        Subset(dataset, shard), cfg.evaluate.batch_size, collate_fn=collate, num_workers=cfg.data.workers
    )
    detections, losses, looks = [], [], _AttentionSummary(cfg)
    for batch in tqdm(loader, desc="evaluating", leave=False, disable=None):
        batch = batch.to(accelerator.device)
        with autocast(cfg, accelerator.device):
            sites = {*looks.sites, *(record.sites(batch) if record else ())} if attention else ()
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
        if predictions.attention is not None:
            pairs = match(predictions, batch.targets, cfg.loss)
            looks.add(predictions.attention, batch, pairs)
            if record:
                record.add(batch, predictions, pairs)
    if accelerator.num_processes > 1:
        detections, losses, looks.rows = (gather_object(x) for x in (detections, losses, looks.rows))
    results = {
        "detection": coco_ap(dataset.ground_truth, detections),
        "images": len(dataset),
        "annotations": str(dataset.annotations_path.name),
        "alpha": {place: module.alpha.tolist() for place, module in alpha_modules(model).items()},
        "names": {str(label): name for label, name in dataset.names.items()},
    }
    if criterion is not None:
        results["loss"] = {name: _weighted_mean([row[name] for row in losses]) for name in losses[0]}
    if looks.rows:
        results |= looks.summary()
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


MEASURES = ("gini", "zeros", "zeros_thresholded", "support", "entropy")


class _AttentionSummary:
    """Per-image attention metrics, gathered in rows so that processes can be put together."""

    def __init__(self, cfg: Config):
        transforms = cfg.model.attention
        # Maps of the encoder are large: they are made and measured where their sparsity is a question.
        self.sites = [site for site in ("encoder_self", "decoder_self") if getattr(transforms, site) != "softmax"]
        self.sites.append("decoder_cross")
        self.threshold = cfg.evaluate.zero_threshold
        self.rows = []

    def add(self, maps: AttentionMaps, batch: Batch, pairs: list[Match]) -> None:
        """Measure one batch: means over heads and queries for every image and layer, PAIBB for every matched pair."""
        sizes = torch.stack([target["size"] for target in batch.targets])
        per_image = [defaultdict(list) for _ in pairs]
        for site in self.sites:
            valid = None if site == "decoder_self" else ~maps.key_padding[:, None, None]
            for weights in getattr(maps, site):  # [B,H,Q,K]
                measures = {
                    "gini": gini(weights, valid),
                    "zeros": zeros_ratio(weights, valid),
                    "zeros_thresholded": zeros_ratio(weights, valid, self.threshold),
                    "support": support_size(weights, valid).float(),
                    "entropy": entropy(weights, valid),
                }
                for name, value in measures.items():  # [B,H,Q]
                    means = value.mean((1, 2)) if site != "encoder_self" else _masked_mean(value, ~maps.key_padding)
                    for row, number in zip(per_image, means.tolist(), strict=True):
                        row[f"{site}/{name}"].append(number)
        stride = batch.images.shape[-2] / maps.grid[0], batch.images.shape[-1] / maps.grid[1]
        last = maps.as_images("decoder_cross", -1).mean(1)  # [B,Q,h,w], mean over heads
        for image, (query, index) in enumerate(pairs):
            target = batch.targets[image]
            extent = (sizes[image, 0].item() / stride[0], sizes[image, 1].item() / stride[1])
            boxes = target["boxes"][index]
            share = paibb(last[image, query], boxes, extent).tolist()
            height, width = target["original_size"].tolist()
            areas = (boxes[:, 2] * width * boxes[:, 3] * height).tolist()
            per_image[image]["paibb"] = [(object_size(area), value) for area, value in zip(areas, share, strict=True)]
        self.rows += [dict(row) for row in per_image]

    def summary(self) -> dict:
        """Means over images (sparsity) and over matched pairs (PAIBB)."""
        attention = {
            site: {
                name: torch.tensor([row[f"{site}/{name}"] for row in self.rows]).mean(0).tolist() for name in MEASURES
            }
            for site in self.sites
        }
        shares = [pair for row in self.rows for pair in row["paibb"]]
        located = {"all": _mean([value for _, value in shares]), "pairs": len(shares)}
        for size in ("small", "medium", "large"):
            located[size] = _mean([value for this, value in shares if this == size])
        return {"attention": attention, "paibb": located}


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Means [B] of values [B,H,K] over heads and valid keys; valid [B,K]."""
    return (values.mean(1) * valid).sum(1) / valid.sum(1)


def _weighted_mean(pairs: list[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def main() -> None:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_name", help="folder under papermill_runs/")
    parser.add_argument("--checkpoint", default="last", help="last, best, or epoch-NNNN")
    parser.add_argument("--split", help="another split of the same data, or of that given as --on, e.g. test2017")
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
    options = {name: getattr(arguments, name) for name in ("on", "images", "by_id", "save_as")}
    names = dict(pair.split("=", 1) for pair in arguments.map or [])
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
