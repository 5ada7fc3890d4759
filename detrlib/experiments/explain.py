"""Where in the image a detection comes from, by attention maps and their gradients; and how faithful that is.

    detrlib explain my-run --images 50

Methods give every detection, a query with a class, a map over the cells of the feature map:

    raw             cross-attention of the last decoder layer, mean over heads
    rollout         attention of all layers, multiplied through decoder and encoder (Abnar & Zuidema 2020)
    grad_attention  positive part of cross-attention of the last layer times its gradient, mean over heads
    relevance       such products of all layers, propagated through encoder and decoder (Chefer, Gur & Wolf 2021)
    box             the predicted box, evenly: needs no attention, and is what the others have to beat
    random          noise

The command measures them by deletion and insertion (`detrlib.metrics.faithfulness`) and writes to the run folder

    measures/faithfulness.parquet           a row per detection and method: areas under the curves
    measures/faithfulness_curves.parquet    mean curves by method
    measures/faithfulness.json              how it was measured, and what it cost

Legend: B images, H heads, K = h x w keys, Q queries, n detections of an image, S steps.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from detrlib.boxes import cxcywh_to_xyxy, to_pixels
from detrlib.config import Config, load_config
from detrlib.data import Batch, build_dataset, collate
from detrlib.engine.evaluate import load_model
from detrlib.errors import ModelError, RunError
from detrlib.experiments.propagation import Layers, relevance, rollout
from detrlib.files import write_atomic, write_json
from detrlib.losses import Criterion, match
from detrlib.metrics.faithfulness import (
    MEASURES,
    Curves,
    Replacement,
    Unit,
    faithfulness_curves,
    mean_curves,
    pixel_ranks,
)
from detrlib.metrics.localisation import object_size
from detrlib.models import AttentionMaps, Predictions
from detrlib.models.backbone import image_sizes
from detrlib.models.deformable import DeformableDETR
from detrlib.models.faster_rcnn import FasterRCNN
from detrlib.runs.examples import EXAMPLE_SCORE, picture
from detrlib.runs.folder import load_results

METHODS = ("raw", "rollout", "grad_attention", "relevance", "box", "random")
BY_GRADIENT = ("grad_attention", "relevance")
OF_ALL_MODELS = ("raw", "box", "random")  # deformable attention has no weights between all tokens


def explain(
    model: nn.Module,
    images: Tensor,
    padding_mask: Tensor | None,
    queries: Sequence[Tensor],
    labels: Sequence[Tensor],
    methods: Iterable[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, list[Tensor]]:
    """Maps [n,h,w] of the detections of every image, by method: zero at padding, and the same in any batch.

    images [B,3,H,W] and padding_mask [B,H,W] or None as for the model, which should be in evaluation mode; queries and
    labels: the n detections of each image. methods: None for all that the model allows. seeds: of the noise of each
    image, None for all 0. Raises ModelError as `allowed_methods`, and where the model has no gradients.
    """
    methods = allowed_methods(model, methods)
    gradients = any(method in BY_GRADIENT for method in methods)
    sites = True if gradients or "rollout" in methods else ("decoder_cross",)
    with torch.set_grad_enabled(gradients):
        predictions = model(images, padding_mask, need_attention=sites)
    attention, rows = predictions.attention, pad_sequence(list(queries), batch_first=True)  # [B,most n]
    found = {}  # [B,most n,K]
    if "raw" in methods:
        found["raw"] = _rows(attention.decoder_cross[-1].detach().mean(1), rows)
    if "rollout" in methods:
        mean = [[weights.detach().mean(1) for weights in layers] for layers in _by_site(attention)]
        found["rollout"] = _rows(rollout(Layers(*mean)), rows)
    if gradients:
        found |= _explained_by_gradient(predictions, rows, pad_sequence(list(labels), batch_first=True), queries)
    maps = {}
    for name, values in found.items():
        if attention.key_padding is not None:
            values = values.masked_fill(attention.key_padding[:, None], 0.0)
        if attention.polled is not None:
            values = attention.polled.on_cells(values[:, None])[:, 0]
        values = values.unflatten(-1, attention.grid)
        maps[name] = [own[: len(q)] for own, q in zip(values, queries, strict=True)]
    if "box" in methods:
        boxes = [own[q] for own, q in zip(predictions.boxes.detach(), queries, strict=True)]
        size = tuple(images.shape[2:])
        sizes = [size] * len(images) if padding_mask is None else image_sizes(padding_mask)
        maps["box"] = _box_maps(boxes, sizes, size, attention.grid)
    if "random" in methods:
        counts = [len(q) for q in queries]
        maps["random"] = _random_maps(counts, attention, seeds or [0] * len(counts), images.device)
    return {name: maps[name] for name in methods}


def allowed_methods(model: nn.Module, methods: Iterable[str] | None = None) -> tuple[str, ...]:
    """`methods`, or all that there are for `model`.

    Raises ModelError for a model without attention, for unknown methods, and for those that need weights
    deformable attention does not have.
    """
    if isinstance(model, FasterRCNN):
        raise ModelError("Faster R-CNN has no attention to explain its detections by")
    deformable = isinstance(model, DeformableDETR)
    if methods is None:
        return OF_ALL_MODELS if deformable else METHODS
    methods = tuple(dict.fromkeys(methods))
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ModelError(f"unknown explanation {', '.join(unknown) or '(none)'}; there are {', '.join(METHODS)}")
    refused = [name for name in methods if name not in OF_ALL_MODELS]
    if deformable and refused:
        raise ModelError(
            f"{', '.join(refused)}: deformable attention samples places instead of weighing all cells, so that its "
            f"layers cannot be multiplied; for this model there are {', '.join(OF_ALL_MODELS)}"
        )
    return methods


def _by_site(attention: AttentionMaps) -> Layers:
    """All maps [B,H,...], heads not put together yet."""
    return Layers(list(attention.encoder_self), list(attention.decoder_self), list(attention.decoder_cross))


def _rows(maps: Tensor, queries: Tensor) -> Tensor:
    """maps [B,Q,K] of queries [B,n] -> [B,n,K]."""
    return maps.gather(1, queries[:, :, None].expand(-1, -1, maps.shape[-1]))


def _explained_by_gradient(
    predictions: Predictions, rows: Tensor, labels: Tensor, queries: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Maps [B,most n,K] of the methods that need gradients; rows and labels [B,most n] are filled up with 0."""
    shape = *rows.shape, predictions.attention.decoder_cross[-1].shape[-1]
    found = {name: predictions.logits.new_zeros(shape) for name in BY_GRADIENT}
    for number, weighted in enumerate(_weighted_by_gradient(predictions, rows, labels, queries)):
        query = rows[:, number : number + 1]
        found["grad_attention"][:, number] = _rows(weighted.decoder_cross[-1], query)[:, 0]
        found["relevance"][:, number] = _rows(relevance(weighted), query)[:, 0]
    return found


def _weighted_by_gradient(
    predictions: Predictions, rows: Tensor, labels: Tensor, queries: Sequence[Tensor]
) -> Iterator[Layers]:
    """mean over heads of (gradient * A)^+ for the first detection of every image, then for the second, and so on.

    The gradient is that of the logit of the detection's class. Images do not meet in the model, so that the gradient
    of a sum over images is that of each of them.
    """
    by_site = _by_site(predictions.attention)
    maps = [weights for layers in by_site for weights in layers]
    if not all(weights.requires_grad for weights in maps):
        raise ModelError("explanations by gradient need a model with gradients: call model.requires_grad_()")
    counts = torch.tensor([len(own) for own in queries], device=rows.device)
    for number in range(rows.shape[1]):
        (image,) = (counts > number).nonzero(as_tuple=True)
        logits = predictions.logits[image, rows[image, number], labels[image, number]]
        gradients = torch.autograd.grad(logits.sum(), maps, retain_graph=True)
        weighted = ((g * w.detach()).clamp(min=0).mean(1) for g, w in zip(gradients, maps, strict=True))
        yield Layers(*([next(weighted) for _ in layers] for layers in by_site))


def _box_maps(
    boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], batch_size: tuple[int, int], grid: tuple[int, int]
) -> list[Tensor]:
    """The share of every cell that lies in each box, [n,h,w]; boxes [n,4] cxcywh in 0..1 of the image.

    sizes: (height, width) of every image in pixels; batch_size: of the batch, with padding; grid: its cells.
    """
    stride = [pixels / cells for pixels, cells in zip(batch_size, grid, strict=True)]
    maps = []
    for own, (height, width) in zip(boxes, sizes, strict=True):
        x0, y0, x1, y1 = cxcywh_to_xyxy(own).clamp(0, 1).unbind(-1)
        rows = _covered(y0 * height / stride[0], y1 * height / stride[0], grid[0])
        columns = _covered(x0 * width / stride[1], x1 * width / stride[1], grid[1])
        maps.append(rows[:, :, None] * columns[:, None])
    return maps


def _covered(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Share of each of `cells` unit intervals that lies between start [n] and end [n] -> [n,cells]."""
    left = torch.arange(cells, device=start.device)
    return (torch.minimum(end[:, None], left + 1) - torch.maximum(start[:, None], left)).clamp(min=0)


def _random_maps(
    counts: Sequence[int], attention: AttentionMaps, seeds: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Even noise [n,h,w] over the cells of each image."""
    maps = []
    for image, (count, seed) in enumerate(zip(counts, seeds, strict=True)):
        rows, columns = attention.valid_grid(image)
        noise = torch.rand(count, rows, columns, generator=torch.Generator().manual_seed(seed))
        own = torch.zeros(count, *attention.grid, device=device)
        own[:, :rows, :columns] = noise.to(own)
        maps.append(own)
    return maps


def detections_to_explain(
    predictions: Predictions, batch: Batch, cfg: Config, min_score: float, matched: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [n], labels [n] and areas [n] (square pixels of the file) of the detections of a batch of one image.

    matched: queries matched to an annotated object, explained as its class, with its area; otherwise all queries,
    explained as their best class, with the area of their box. In both cases of a score of at least `min_score`.
    """
    (target,), scores = batch.targets, predictions.class_scores()[0]  # [Q,C]
    if matched:
        ((queries, objects),) = match(predictions, batch.targets, Criterion(**dict(cfg.loss)).costs)
        labels, boxes = target["labels"][objects], target["boxes"][objects]
    else:
        labels, boxes = scores.argmax(-1), predictions.boxes[0]
        queries = torch.arange(len(labels), device=labels.device)
    keep = scores[queries, labels] >= min_score
    areas = boxes[:, 2:].prod(-1) * target["original_size"].prod()
    return queries[keep], labels[keep], areas[keep]


def faithfulness_run(
    run_dir: Path,
    images: int = 50,
    methods: Iterable[str] | None = None,
    steps: int = 16,
    *,
    checkpoint: str = "last",
    unit: Unit = "cell",
    replacement: Replacement = "mean",
    min_score: float = EXAMPLE_SCORE,
    matched: bool = True,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Deletion and insertion for the detections of the first validation images of a run; writes measures/ there.

    Arguments as of `explain`, `faithfulness_curves` and `detections_to_explain`. A row per detection and method:
    image_id, query, label, category, score, size (small, medium, large), method, and the areas deletion_score,
    deletion_iou, deletion_similarity, insertion_score, ... Noise is drawn from the image's id: the same for all runs.
    Raises RunError when the run is not finished or finds nothing, ModelError for what cannot be measured.
    """
    if images < 1 or steps < 2:
        raise ModelError(f"{images} images in {steps} steps: there must be one image and two steps at least")
    load_results(run_dir)
    cfg = load_config(run_dir / "config.yaml")
    model = load_model(run_dir, checkpoint)
    methods = allowed_methods(model, methods)
    device = Accelerator().device
    model, dataset = model.to(device), build_dataset(cfg.data, "val")
    start, rows, curves, passes = time.perf_counter(), [], [], 0
    for index in tqdm(range(min(images, len(dataset))), desc=f"explaining {run_dir.name}", disable=None):
        batch = collate([dataset[index]]).to(device)
        with torch.no_grad():
            predictions = model(batch.images, batch.padding_mask)
        queries, labels, areas = detections_to_explain(predictions, batch, cfg, min_score, matched)
        if not len(queries):
            continue
        seed, boxes = batch.targets[0]["image_id"], predictions.boxes[0, queries]
        maps = explain(model, batch.images, batch.padding_mask, [queries], [labels], methods, [seed])
        ranks = torch.cat([pixel_ranks(own, batch.mask()[0], unit, seed) for (own,) in maps.values()])
        repeated = boxes.repeat(len(methods), 1), labels.repeat(len(methods))
        found = faithfulness_curves(
            model, batch.images[0], batch.mask()[0], *repeated, ranks, steps, replacement, batch_size
        )
        scores = predictions.class_scores()[0, queries, labels]
        known = pd.DataFrame({"image_id": seed, "query": queries.tolist(), "label": labels.tolist()})
        known["category"] = known["label"].map(dataset.names)
        known["score"], known["size"] = scores.tolist(), [object_size(area) for area in areas.tolist()]
        rows.append(_with_areas(known, methods, found))
        both = torch.stack([found.deletion, found.insertion]).unflatten(1, (len(methods), len(queries)))
        curves.append(both.mean(2).cpu())
        passes += found.passes
    if not rows:
        raise RunError(f"{run_dir}: no detection with a score of {min_score} in {images} images; lower min_score")
    frame = pd.concat(rows, ignore_index=True)
    folder = run_dir / "measures"
    write_atomic(folder / "faithfulness.parquet", frame.to_parquet)
    means = mean_curves(torch.stack(curves), methods, found.fractions.cpu())
    write_atomic(folder / "faithfulness_curves.parquet", means.to_parquet)
    settings = {"images": images, "methods": methods, "steps": steps, "checkpoint": checkpoint, "unit": unit}
    settings |= {"replacement": replacement, "min_score": min_score, "matched": matched}
    cost = {"detections": len(frame) // len(methods), "passes": passes, "device": str(device)}
    cost["seconds"] = round(time.perf_counter() - start, 1)
    write_json(folder / "faithfulness.json", settings | cost)
    return frame


def explained_detections(
    run_dir: Path, image: int = 0, most: int = 3, checkpoint: str = "last"
) -> tuple[list[np.ndarray], np.ndarray, list[str], dict[str, list[np.ndarray]], list[np.ndarray]]:
    """The best detections of the first validation image from number `image` on that has any, with every explanation.

    Returns what `figures.explanations.explanations_grid` draws: images, boxes [n,4], titles, maps by method, extents.
    """
    cfg, model = load_config(run_dir / "config.yaml"), load_model(run_dir, checkpoint)
    dataset = build_dataset(cfg.data, "val")
    for index in range(image, len(dataset)):
        batch = collate([dataset[index]])
        with torch.no_grad():
            predictions = model(batch.images, batch.padding_mask, need_attention=("decoder_cross",))
        queries, labels, _ = detections_to_explain(predictions, batch, cfg, EXAMPLE_SCORE, True)
        if len(queries):
            break
    else:
        raise RunError(f"{run_dir}: no detection with a score of {EXAMPLE_SCORE} from image {image} on")
    scores = predictions.class_scores()[0, queries, labels]
    best = scores.argsort(descending=True)[:most]
    queries, labels, scores = queries[best], labels[best], scores[best]
    found = explain(model, batch.images, batch.padding_mask, [queries], [labels])
    size = batch.targets[0]["size"]
    stride = torch.tensor([s / g for s, g in zip(batch.images.shape[-2:], predictions.attention.grid, strict=True)])
    titles = [f"{dataset.names[label]} {score:.2f}" for label, score in zip(labels.tolist(), scores, strict=True)]
    maps = {name: list(own.cpu().numpy()) for name, (own,) in found.items()}
    boxes = to_pixels(cxcywh_to_xyxy(predictions.boxes[0, queries]), size).numpy()
    count = len(queries)
    return [picture(batch.images[0]).numpy()] * count, boxes, titles, maps, [(size / stride).numpy()] * count


def _with_areas(detections: pd.DataFrame, methods: Sequence[str], found: Curves) -> pd.DataFrame:
    """`detections`, n rows, once for each method, with the areas under their curves [methods * n,S+1,3]."""
    frame = pd.concat([detections.assign(method=method) for method in methods], ignore_index=True)
    for direction, areas in zip(("deletion", "insertion"), found.areas(), strict=True):
        for measure, column in zip(MEASURES, areas.unbind(1), strict=True):
            frame[f"{direction}_{measure}"] = column.tolist()
    return frame
