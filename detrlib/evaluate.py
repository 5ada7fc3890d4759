"""One pass over a data set: detections, how sparse attention is, and whether it looks at the object.

    python -m detrlib.evaluate my-run --split test2017
    python -m detrlib.evaluate my-run --checkpoint untrained          what was there before training
    python -m detrlib.evaluate my-run --set evaluate.paibb=thesis     as published PAIBB was computed

Legend: B images, L layers, H heads, Q queries, K keys.
"""

import argparse
import re
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from detrlib.boxes import cxcywh_to_xyxy, to_pixels
from detrlib.config import Config, ConfigError, load_config, replace, save_config
from detrlib.criterion import Criterion
from detrlib.data import Batch, CocoDataset, DataError, build_dataset, collate
from detrlib.data.augment import denormalise
from detrlib.matcher import Match, match
from detrlib.metrics.attention import AttentionMeasures
from detrlib.metrics.detection import coco_ap, coco_detections
from detrlib.models import Predictions, alpha_modules, build_model
from detrlib.pretrain import backbone_weights
from detrlib.runs import (
    Example,
    RunError,
    clear_examples,
    environment,
    load_checkpoint,
    load_results,
    load_weights,
    run_path,
    save_example,
    write_atomic,
    write_json,
)

DETECTIONS_PER_IMAGE = 100  # as COCO counts them
UNTRAINED = "untrained"  # in place of a checkpoint's name: the model as it was before training
EXAMPLE_SCORE = 0.3  # queries more confident than this are kept in an example, matched ones always


def evaluate_run(
    run_dir: Path, checkpoint: str = "last", split: str | None = None, overrides: dict | None = None
) -> dict:
    """Evaluate a run's checkpoint on its validation split; write results.json, predictions.json, examples/, measures/.

    checkpoint: "last", "best", "epoch-0010" and so on, or "untrained" for the model as it was before training, whose
    results go to the folder untrained inside the run. split: another split of the same data, such as "test2017"; its
    results go to a folder of that name. Both folders are themselves run folders to read from. overrides: dotted
    settings of `evaluate` in place of the run's own, such as {"evaluate.paibb": "thesis"}.
    Raises RunError when the run is not finished (its results would say that it is), has no such checkpoint, or that is
    of another architecture; ConfigError for an override of anything but `evaluate`.
    """
    load_results(run_dir)
    overrides = overrides or {}
    if wrong := [key for key in overrides if not key.startswith("evaluate.")]:
        raise ConfigError(f"{wrong[0]} cannot change in an evaluation: overrides are settings of evaluate.*")
    cfg = replace(load_config(run_dir / "config.yaml"), overrides)
    model, folder = load_model(run_dir, checkpoint), run_dir
    if checkpoint == UNTRAINED:
        folder, known = folder / UNTRAINED, {"epoch": 0, "global_step": 0}
    else:
        known = load_checkpoint(run_dir / "checkpoints" / f"{checkpoint}.pt")
    if split:
        other = {"data.val_split": split, "data.val_images": None, "data.val_annotations": None, "data.val_limit": None}
        cfg, folder = replace(cfg, other), folder / split
    dataset = build_dataset(cfg.data, "val")
    if folder != run_dir:
        write_atomic(folder / "config.yaml", lambda path: save_config(cfg, path))
        write_json(folder / "environment.json", environment())
    results, detections = evaluate(model, dataset, cfg, Accelerator(), run_dir=folder)
    results |= {"checkpoint": checkpoint, "epoch": known["epoch"], "global_step": known["global_step"]}
    return save_results(folder, results, detections)


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

    attention: measure attention too. run_dir: where examples are stored, and measures of single images and objects, if
    given. Results hold `detection` (12 COCO numbers and per class), `loss` (with a criterion), `alpha`, the settings
    `evaluate`, and what `AttentionMeasures.summary` says: `attention`, `sparsity`, `paibb`, `localisation`.
    """
    start = time.perf_counter()
    model = model.to(accelerator.device).eval()
    shard = range(accelerator.process_index, len(dataset), accelerator.num_processes)  # no image counted twice
    loader = DataLoader(
        Subset(dataset, shard), cfg.evaluate.batch_size, collate_fn=collate, num_workers=cfg.data.workers
    )
    detections, losses = [], []
    folder = run_dir / "measures" if run_dir and attention else None
    looks = AttentionMeasures(cfg, folder, accelerator.process_index)
    keep = cfg.evaluate.examples if run_dir and accelerator.is_main_process else 0
    if keep:
        clear_examples(run_dir)
    for batch in tqdm(loader, desc="evaluating", leave=False, disable=None):
        batch = batch.to(accelerator.device)
        with autocast(cfg, accelerator.device):
            predictions = model(batch.images, batch.padding_mask, need_attention=looks.sites if attention else ())
        detections += _detections(predictions, batch.targets, dataset)
        if criterion is not None:
            terms, counts = criterion(predictions, batch.targets)[1], criterion.counts(predictions, batch.targets)
            losses.append(
                {
                    name: (value.item(), counts.get(re.sub(r"(_enc)?(_\d+)?$", "", name), len(batch.targets)))
                    for name, value in terms.items()
                }
            )
        if attention:
            pairs = match(predictions, batch.targets, cfg.loss)
            looks.add(predictions, batch, pairs)
            for index in range(min(keep, len(batch.targets))):
                save_example(run_dir, make_example(batch, predictions, pairs, index))
            keep = max(0, keep - len(batch.targets))
    looks.close()
    sums = [looks.sums()]
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
    if attention:
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


def make_example(batch: Batch, predictions: Predictions, pairs: list[Match], index: int) -> Example:
    """Image number `index` of a batch with its confident and matched queries and their maps."""
    target, attention = batch.targets[index], predictions.attention
    size = target["size"]
    height, width = size.tolist()
    scores, labels = predictions.class_scores()[index].max(-1)  # [Q]
    matched = torch.full_like(labels, -1)
    query, box = pairs[index]
    matched[query] = box
    order = scores.argsort(descending=True)
    order = order[(scores[order] > EXAMPLE_SCORE) | (matched[order] >= 0)]
    rows, columns = attention.valid_grid(index)
    maps = torch.stack([attention.as_images("decoder_cross", i)[index] for i in range(len(attention.decoder_cross))])
    stride = torch.tensor([s / g for s, g in zip(batch.images.shape[-2:], attention.grid, strict=True)])

    def pixels(boxes: Tensor) -> Tensor:
        return to_pixels(cxcywh_to_xyxy(boxes.float()), size)

    values = {
        "image": _picture(batch.images[index, :, :height, :width]),
        "true_boxes": pixels(target["boxes"]),
        "true_labels": target["labels"],
        "boxes": pixels(predictions.boxes[index, order]),
        "labels": labels[order],
        "scores": scores[order],
        "matched": matched[order],
        "maps": maps[:, :, order, :rows, :columns].half(),  # [L,H,n,h,w]
        "extent": size.cpu() / stride,
    }
    return Example(target["image_id"], **{name: value.cpu().numpy() for name, value in values.items()})


def _picture(image: Tensor) -> Tensor:
    """Normalised [3,H,W] -> uint8 [H,W,3]."""
    return (denormalise(image.float()) * 255).round().to(torch.uint8).permute(1, 2, 0)


def main() -> None:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_name", help="folder under papermill_runs/")
    parser.add_argument("--checkpoint", default="last", help="last, best, epoch-NNNN, or untrained")
    parser.add_argument("--split", help="another split of the same data, e.g. test2017")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="e.g. evaluate.paibb=thesis")
    arguments = parser.parse_args()
    if malformed := [item for item in arguments.set if "=" not in item]:
        parser.error(f"--set {malformed[0]}: expected name=value, e.g. evaluate.paibb=thesis")
    overrides = dict(item.split("=", 1) for item in arguments.set)
    try:
        results = evaluate_run(run_path(arguments.run_name), arguments.checkpoint, arguments.split, overrides)
    except (ConfigError, DataError, RunError) as error:
        raise SystemExit(f"error: {error}") from None
    shown = {name: value for name, value in results["detection"].items() if name != "per_class"}
    print("  ".join(f"{name} {value:.3f}" for name, value in shown.items()))


if __name__ == "__main__":
    main()
