"""One pass over a data set: detections, how sparse attention is, and whether it looks at the object.

    python -m detrlib.evaluate my-run --split test2017

Legend: B images, L layers, H heads, Q queries, K keys.
"""

import argparse
import re
import time
from collections import defaultdict
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
from detrlib.metrics.detection import coco_ap, coco_detections, match_detections
from detrlib.metrics.localisation import object_size, paibb
from detrlib.metrics.sparsity import entropy, gini, support_size, zeros_ratio
from detrlib.models import AttentionMaps, Predictions, alpha_modules, build_model
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
    save_tables,
    write_atomic,
    write_json,
)

DETECTIONS_PER_IMAGE = 100  # as COCO counts them
EXAMPLE_SCORE = 0.3  # queries more confident than this are kept in an example, matched ones always


def evaluate_run(run_dir: Path, checkpoint: str = "last", split: str | None = None) -> dict:
    """Evaluate a run's checkpoint on its validation split and write results.json, predictions.json, examples/.

    split: another split of the same data, such as "test2017"; its results go to a folder of that name inside the
    run, which is itself a run folder to read from. Raises RunError when the run is not finished (its results would
    say that it is), has no such checkpoint, or that is of another architecture.
    """
    load_results(run_dir)
    cfg = load_config(run_dir / "config.yaml")
    model = load_model(run_dir, checkpoint)
    folder = run_dir
    if split:
        other = {"data.val_split": split, "data.val_images": None, "data.val_annotations": None, "data.val_limit": None}
        cfg, folder = replace(cfg, other), run_dir / split
        write_atomic(folder / "config.yaml", lambda path: save_config(cfg, path))
        write_json(folder / "environment.json", environment())
    dataset = build_dataset(cfg.data, "val")
    results, detections = evaluate(model, dataset, cfg, Accelerator(), run_dir=folder)
    known = load_checkpoint(run_dir / "checkpoints" / f"{checkpoint}.pt")
    results |= {"checkpoint": checkpoint, "epoch": known["epoch"], "global_step": known["global_step"]}
    return save_results(folder, results, detections, dataset.ground_truth)


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
) -> tuple[dict, list[dict]]:
    """Results and COCO-format detections of `model` on `dataset`, complete on every process.

    attention: measure attention too. run_dir: where examples are stored, if given. Results hold
    `detection` (12 COCO numbers and per class), `loss` (with a criterion), `attention`, `paibb`, `alpha`.
    """
    start = time.perf_counter()
    model = model.to(accelerator.device).eval()
    shard = range(accelerator.process_index, len(dataset), accelerator.num_processes)  # no image counted twice
    loader = DataLoader(
        Subset(dataset, shard), cfg.evaluate.batch_size, collate_fn=collate, num_workers=cfg.data.workers
    )
    detections, losses, looks = [], [], _AttentionSummary(cfg)
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
            looks.add(predictions.attention, batch, pairs)
            for index in range(min(keep, len(batch.targets))):
                save_example(run_dir, make_example(batch, predictions, pairs, index))
            keep = max(0, keep - len(batch.targets))
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
    if attention:
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
    parser.add_argument("--checkpoint", default="last", help="last, best, or epoch-NNNN")
    parser.add_argument("--split", help="another split of the same data, e.g. test2017")
    arguments = parser.parse_args()
    try:
        results = evaluate_run(run_path(arguments.run_name), arguments.checkpoint, arguments.split)
    except (ConfigError, DataError, RunError) as error:
        raise SystemExit(f"error: {error}") from None
    shown = {name: value for name, value in results["detection"].items() if name != "per_class"}
    print("  ".join(f"{name} {value:.3f}" for name, value in shown.items()))


if __name__ == "__main__":
    main()
