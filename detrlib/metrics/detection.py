"""Average precision as defined by COCO, computed by faster-coco-eval.

AP is precision averaged over 101 recall levels, the IoU thresholds 0.50, 0.55, ..., 0.95 and all classes, with
at most 100 detections per image and class. As in COCO, a number that is undefined because there is no ground
truth of that class or size is -1, while ground truth without any detection gives 0.
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import ArrayLike

METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)


def coco_detections(image_id: int, boxes: ArrayLike, scores: ArrayLike, category_ids: ArrayLike) -> list[dict]:
    """The detections of one image in COCO's results format, whose boxes are (left, top, width, height).

    boxes [n, 4] xyxy in pixels of the original image; scores [n]; category_ids [n] as in the annotation file.
    Tensors of any device, arrays or lists. Raises ValueError when the lengths differ.
    """
    corners = torch.as_tensor(boxes).detach().reshape(-1, 4)
    left_top, size = corners[:, :2], corners[:, 2:] - corners[:, :2]
    return [
        {"image_id": int(image_id), "category_id": int(category), "bbox": box, "score": float(score)}
        for box, score, category in zip(
            torch.cat([left_top, size], dim=1).tolist(),
            torch.as_tensor(scores).tolist(),
            torch.as_tensor(category_ids).tolist(),
            strict=True,
        )
    ]


def coco_ap(ground_truth: Mapping | str | PathLike, detections: Sequence[Mapping]) -> dict:
    """COCO's twelve numbers (see `METRICS`) as fractions, and `per_class`: {category name: {"AP", "AP50"}}.

    `ground_truth` is a COCO instances dictionary or the path of its JSON file; `detections` is a list in COCO's
    results format. Neither is modified. Sizes are bins of the annotation's `area` (the segmentation's, in COCO).
    An annotation takes no part in the score, neither found nor missed, when its `iscrowd` is set.
    Raises ValueError when a detection belongs to an image that the ground truth does not list.
    """
    if isinstance(ground_truth, str | PathLike):
        ground_truth = json.loads(Path(ground_truth).read_text())
    truth = COCO(_boxes_only(ground_truth))
    _check_images(truth, detections)
    # loadRes writes into the entries it is given
    results = truth.loadRes([dict(detection) for detection in detections])
    evaluation = COCOeval_faster(truth, results, iouType="bbox", print_function=_silent)
    evaluation.run()
    numbers = {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}
    return numbers | {"per_class": _per_class(evaluation, truth)}


def _boxes_only(ground_truth: Mapping) -> dict:
    """A fresh dictionary with what box evaluation needs. Annotations are renumbered from 1, because 0 would read
    as "unmatched", and files in the wild start at 0 or repeat an id."""
    annotations = [
        {
            "id": number,
            "image_id": int(annotation["image_id"]),
            "category_id": int(annotation["category_id"]),
            "bbox": list(annotation["bbox"]),
            "area": annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]),
            "iscrowd": annotation.get("iscrowd", 0),
        }
        for number, annotation in enumerate(ground_truth["annotations"], start=1)
    ]
    return {
        "images": [{"id": int(image["id"])} for image in ground_truth["images"]],
        "categories": [{"id": int(entry["id"]), "name": entry["name"]} for entry in ground_truth["categories"]],
        "annotations": annotations,
    }


def _check_images(truth: COCO, detections: Sequence[Mapping]) -> None:
    unknown = {detection["image_id"] for detection in detections} - set(truth.getImgIds())
    if unknown:
        raise ValueError(
            f"detections for {len(unknown)} images that are not in the ground truth, such as {min(unknown)}"
        )


def _per_class(evaluation: COCOeval_faster, truth: COCO) -> dict[str, dict[str, float]]:
    # [IoU thresholds, recall levels, classes]: all object sizes, at most 100 detections
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    category_ids = evaluation.params.catIds
    return {
        truth.cats[category]["name"]: {
            "AP": _mean_where_defined(precision[:, :, position]),
            "AP50": _mean_where_defined(precision[0, :, position]),
        }
        for position, category in enumerate(category_ids)
    }


def _mean_where_defined(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _silent(message: str) -> None:
    """faster-coco-eval reports its progress through a callable; results here are return values."""
