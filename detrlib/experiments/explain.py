"""The detections of a run explained by attention, gradients and masks, and how faithful that is.

    detrlib explain my-run --images 50
    detrlib explain my-run --images 20 --methods raw,odam,drise,box --masks 5000
    detrlib explain my-run --images 500 --gpus 8            shared by 8 processes, image by image: the same bit for bit

Explanations (`detrlib.experiments.attribution`) are tested by deletion and insertion (`detrlib.metrics.faithfulness`).
The command writes to the run folder

    measures/faithfulness.parquet           a row per detection and method: areas under the curves
    measures/faithfulness_curves.parquet    mean curves by method
    measures/faithfulness.json              how it was measured, and what it cost

Legend: n detections of an image, h x w cells, Q queries, C classes, S steps.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detrlib.config import Config
from detrlib.data import Batch, build_dataset, collate
from detrlib.data.pictures import Picture
from detrlib.engine import tracking
from detrlib.engine.evaluate import in_order, load_model
from detrlib.engine.predict import Detector, open_detector, predict_each
from detrlib.errors import ConfigError, RunError
from detrlib.experiments.attribution import allowed_methods, explain, passes
from detrlib.experiments.drise import MASKS
from detrlib.files import write_json
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
from detrlib.metrics.tables import write_table
from detrlib.models import Predictions
from detrlib.runs.detected import Detected
from detrlib.runs.examples import EXAMPLE_SCORE
from detrlib.runs.folder import run_config
from detrlib.runs.owner import owning

logger = logging.getLogger(__name__)


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


@owning
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
    masks: int = MASKS,
    batch_size: int = 64,
    allow_empty: bool = False,
) -> pd.DataFrame:
    """Measure deletion and insertion for the detections of a run's validation images; write measures/faithfulness*.

    Args:
        run_dir: folder of a run.
        images: how many, the first ones.
        methods: names of `METHODS`; None: those that the model allows at a pass or two.
        steps: of deletion and of insertion, 2 or more.
        checkpoint: whose weights, see `load_model`.
        unit, replacement: what is deleted at a time, and what it becomes, see `pixel_ranks`, `replacement_image`.
        min_score: of the detections that are explained, in 0..1.
        matched: only queries that are matched to an object, see `detections_to_explain`.
        masks: of D-RISE, see `explain`.
        batch_size: pictures that the model sees at a time.
        allow_empty: return an empty table, and write nothing, where no detection has the score.

    Returns:
        A row per detection and method: image_id, query, label, category, score, size (small, medium, large), method,
        and the areas in 0..1 deletion_score, deletion_iou, deletion_similarity, insertion_score, ... Noise and masks
        are drawn from the image's id: the same for all runs.

    Raises:
        RunError: there is no such run or checkpoint, or no detection has the score.
        ConfigError: fewer than one image or mask, or than two steps.
        ModelError: the model cannot be explained so.
    """
    if images < 1 or steps < 2 or masks < 1:
        raise ConfigError(f"{images} images, {steps} steps, {masks} masks: there must be one, two and one at least")
    cfg, model = run_config(run_dir), load_model(run_dir, checkpoint)
    methods, accelerator = allowed_methods(model, methods), Accelerator()
    device, dataset = accelerator.device, build_dataset(cfg.data, "val")
    model, start, found = model.to(device), time.perf_counter(), {}
    own = range(accelerator.process_index, min(images, len(dataset)), accelerator.num_processes)
    for index in tracking.progress(own, f"explaining {run_dir.name}"):
        batch = collate([dataset[index]]).to(device)
        with torch.no_grad():
            predictions = model(batch.images, batch.padding_mask)
        chosen = detections_to_explain(predictions, batch, cfg, min_score, matched)
        if len(chosen[0]):
            image_id, padding = batch.targets[0]["image_id"], batch.mask()[0]
            asked = methods, image_id, masks, batch_size
            maps = explain(model, batch.images, batch.padding_mask, *chosen[:2], *asked)
            ranks = torch.cat([pixel_ranks(own, padding, unit, image_id) for own in maps.values()])
            options = {"steps": steps, "replacement": replacement, "batch_size": batch_size}
            found[index] = _tested(model, batch, predictions, chosen, dataset.names, methods, ranks, **options)
    if not (found := in_order(found)):
        nothing = f"{run_dir}: no detection with a score of {min_score} in {images} images"
        if not allow_empty:
            raise RunError(f"{nothing}; lower min_score (--min-score)")
        logger.warning("%s; detrlib explain has --min-score for lower ones", nothing)
        return pd.DataFrame()
    settings = {"images": images, "methods": methods, "steps": steps, "checkpoint": checkpoint, "unit": unit}
    settings |= {"replacement": replacement, "min_score": min_score, "matched": matched, "device": str(device)}
    settings |= {"masks": masks} if "drise" in methods else {}
    frame = pd.concat([table for table, _ in found], ignore_index=True)
    if accelerator.is_main_process:
        _save(run_dir / "measures", frame, [curves for _, curves in found], settings, start)
    accelerator.wait_for_everyone()
    return frame


def _tested(
    model: nn.Module,
    batch: Batch,
    predictions: Predictions,
    chosen: tuple[Tensor, Tensor, Tensor],
    names: Mapping[int, str],
    methods: Sequence[str],
    ranks: Tensor,
    **options: Any,
) -> tuple[pd.DataFrame, Curves]:
    """Rows and curves of the explanations of n detections in a batch of one image: first all of one method, then of
    the next, as in `ranks`. `chosen` is what `detections_to_explain` returns.
    """
    queries, labels, areas = chosen
    image_id, boxes, padding = batch.targets[0]["image_id"], predictions.boxes[0, queries], batch.mask()[0]
    repeated = boxes.repeat(len(methods), 1), labels.repeat(len(methods))
    curves = faithfulness_curves(model, batch.images[0], padding, *repeated, ranks, **options)
    detections = pd.DataFrame(
        {
            "image_id": image_id,
            "query": queries.tolist(),
            "label": labels.tolist(),
            "category": [names[label] for label in labels.tolist()],
            "score": predictions.class_scores()[0, queries, labels].tolist(),
            "size": [object_size(area) for area in areas.tolist()],
        }
    )
    curves = Curves(curves.fractions.cpu(), curves.deletion.cpu(), curves.insertion.cpu(), curves.passes)
    frame = pd.concat([detections.assign(method=method) for method in methods], ignore_index=True)
    for direction, under in zip(("deletion", "insertion"), curves.areas(), strict=True):
        frame[[f"{direction}_{measure}" for measure in MEASURES]] = under.tolist()
    return frame, curves


def _save(folder: Path, frame: pd.DataFrame, curves: Sequence[Curves], settings: dict, start: float) -> None:
    """Write the three files of a measurement that began at `start`; the rows of all images, and curves of each."""
    methods = settings["methods"]
    write_table(folder / "faithfulness.parquet", frame)
    per_image = [torch.stack([one.deletion, one.insertion]).unflatten(1, (len(methods), -1)) for one in curves]
    means = torch.stack([one.mean(2) for one in per_image])
    table = mean_curves(means, methods, curves[0].fractions)
    write_table(folder / "faithfulness_curves.parquet", table)
    count = len(frame) // len(methods)
    cost = {"detections": count, "passes": sum(one.passes for one in curves)}
    cost["passes_to_explain"] = passes(methods, frame["image_id"].nunique(), count, settings.get("masks", 0))
    write_json(folder / "faithfulness.json", settings | cost | {"seconds": round(time.perf_counter() - start, 1)})


def explained_detections(run_dir: Path, image: int = 0, most: int = 3, checkpoint: str = "last") -> Detected:
    """Explain the best detections of the first validation image, from number `image` on, that has any.

    Args:
        run_dir: folder of a run.
        image: number of the first image that may be taken, in order of image id.
        most: how many detections at most are explained, those with the highest scores.
        checkpoint: "last", "best", "epoch-0010" and so on.

    Returns:
        What is detected in that image with a score of `EXAMPLE_SCORE` or more, with explanations of the best, for
        `figures.explanations.explained`.

    Raises:
        RunError: no image from there on has such a detection.
    """
    detector, dataset = open_detector(run_dir, checkpoint=checkpoint), build_dataset(run_config(run_dir).data, "val")
    for index in range(image, len(dataset)):
        own = Picture(dataset.file_names[index], dataset.image_ids[index], dataset.image(index))
        options = {"min_score": EXAMPLE_SCORE, "sites": ["decoder_cross"], "progress": False}
        ((detected,),) = predict_each([detector], [own], **options)
        if len(detected):
            return explain_detected(detector, detected, most=most)
    raise RunError(f"{run_dir}: no detection with a score of {EXAMPLE_SCORE} from image {image} on")


def explain_detected(
    detector: Detector,
    detected: Detected,
    methods: Iterable[str] | None = None,
    most: int | None = None,
    masks: int = MASKS,
) -> Detected:
    """Explain what a detector found in a picture of one's own, which is read again.

    Returns the same with `explanations` {method: [n,h,w]} of its detections, or of the best `most`, over the cells of
    the picture. Other arguments and faults are those of `explain`; DataError where the picture is no longer there.
    """
    batch = detector.batch([(detected.source, *detected.source.read())])
    queries, labels = (torch.from_numpy(x[:most]).to(detector.device) for x in (detected.queries, detected.labels))
    given = batch.images, batch.padding_mask, queries, labels
    maps = explain(detector.model, *given, methods, detected.image_id, masks)
    rows, columns = (math.ceil(cells) for cells in detected.example.extent)
    own = {method: of_all[:, :rows, :columns].cpu().numpy() for method, of_all in maps.items()}
    return replace(detected, explanations=own)


def explained_each(
    detectors: Sequence[Detector], pictures: Iterable[Sequence[Detected]], methods: Iterable[str] | None = None
) -> Iterator[tuple[Detected, ...]]:
    """What `predict_each` yields for several detectors, with explanations of all detections."""
    for of_each in pictures:
        yield tuple(
            explain_detected(detector, one, methods) if len(one) else one
            for detector, one in zip(detectors, of_each, strict=True)
        )
