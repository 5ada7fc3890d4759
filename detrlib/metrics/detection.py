"""Average precision as defined by COCO, computed by faster-coco-eval, or by pycocotools for a published number.

AP is precision averaged over 101 recall levels, the IoU thresholds 0.50, 0.55, ..., 0.95 and all classes, with
at most 100 detections per image and class. As in COCO, a number that is undefined because there is no ground
truth of that class or size is -1, while ground truth without any detection gives 0.

`match_detections` keeps what AP is made of, image by image, for statistics over images (`metrics.statistics`).
Legend: D detections, G annotations, A area ranges (all, small, medium, large), T IoU thresholds.
"""

import contextlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import ArrayLike

from detrlib.errors import DataError

METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Square pixels of the annotation; both ends belong to a range, as in COCO.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
DETECTIONS_PER_CLASS = 100  # of an image and class, the best of which count
UNDEFINED = -1  # COCO's value for a number that has no ground truth to be computed from; missing (NaN) in our tables
NO_CATEGORY = -1  # stands for "no annotations" in the row of an image that has none
PAIRS_AT_ONCE = 2**21  # detections and annotations whose IoU is held in memory together


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


def coco_ap(
    ground_truth: Mapping | str | PathLike,
    detections: Sequence[Mapping],
    engine: Literal["faster_coco_eval", "pycocotools"] = "faster_coco_eval",
) -> dict:
    """Compute COCO's numbers for boxes.

    Args:
        ground_truth: a COCO instances dictionary or the path of its JSON file. Sizes are bins of the annotation's
            `area` (the segmentation's, in COCO). An annotation takes no part in the score, neither detected nor missed,
            when its `iscrowd` is set.
        detections: a list in COCO's results format. Neither argument is modified.
        engine: the evaluator; pycocotools is the official code, several times slower.

    Returns:
        The twelve numbers (see `METRICS`) as fractions, and `per_class`: {category name: {"AP", "AP50"}}.

    Raises:
        DataError: a detection belongs to an image that the ground truth does not list.
    """
    truth = _boxes_only(ground_truth)
    _check_images([image["id"] for image in truth["images"]], detections)
    results = [dict(detection) for detection in detections]  # evaluators write into the entries they are given
    evaluation = _official(truth, results) if engine == "pycocotools" else _fast(truth, results)
    numbers = {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}
    return numbers | {
        "per_class": _per_class(evaluation, {entry["id"]: entry["name"] for entry in truth["categories"]})
    }


def _fast(truth: dict, results: list[dict]) -> COCOeval_faster:
    index = COCO(truth)
    evaluation = COCOeval_faster(index, index.loadRes(results), iouType="bbox", print_function=lambda message: None)
    evaluation.run()
    return evaluation


def _official(truth: dict, results: list[dict]) -> Any:
    from pycocotools import coco, cocoeval  # which a machine for speed alone may lack

    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for every step
        index = coco.COCO()
        index.dataset = truth
        index.createIndex()
        listed = index.loadRes(results) if results else coco.COCO()
        if not results:  # which loadRes refuses
            listed.dataset = truth | {"annotations": []}
            listed.createIndex()
        evaluation = cocoeval.COCOeval(index, listed, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _boxes_only(ground_truth: Mapping | str | PathLike) -> dict:
    """A fresh dictionary with what box evaluation needs. Annotations are renumbered from 1, because 0 would read
    as "unmatched", and files in the wild start at 0 or repeat an id."""
    if isinstance(ground_truth, str | PathLike):
        ground_truth = json.loads(Path(ground_truth).read_text())
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


def _check_images(image_ids: Iterable[int], detections: Sequence[Mapping]) -> None:
    unknown = {detection["image_id"] for detection in detections} - set(image_ids)
    if unknown:
        raise DataError(
            f"detections for {len(unknown)} images that are not in the ground truth, such as {min(unknown)}; "
            "give the annotation file that they were made for"
        )


def _per_class(evaluation: Any, names: Mapping[int, str]) -> dict[str, dict[str, float]]:
    """AP and AP50 by name of class, of either engine's evaluation."""
    # [IoU thresholds, recall levels, classes]: all object sizes, at most 100 detections
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    category_ids = evaluation.params.catIds
    return {
        names[category]: {
            "AP": _mean_where_defined(precision[:, :, position]),
            "AP50": _mean_where_defined(precision[0, :, position]),
        }
        for position, category in enumerate(category_ids)
    }


def _mean_where_defined(values: np.ndarray) -> float:
    defined = values[values > UNDEFINED]
    return float(defined.mean()) if defined.size else float(UNDEFINED)


# Matches, image by image


class Matches(NamedTuple):
    """What the AP of any selection of images is computed from, without their ground truth.

    detections: a row per detection that counts, by image, class and falling score: image_id, category_id, score, and
    for each area range `true_<range>` and `ignored_<range>`, whose bit t is set where the detection is a true positive
    (takes no part) at IOU_THRESHOLDS[t]; where neither is set it is a false positive.
    annotations: a row per image and class: image_id, category_id, and `<range>`, the number of annotations to be
    detected; an image without annotations has one row with NO_CATEGORY and zeros, so that every image is listed.
    """

    detections: pd.DataFrame
    annotations: pd.DataFrame


def match_detections(ground_truth: Mapping | str | PathLike, detections: Sequence[Mapping]) -> Matches:
    """Say which detections are true, false or ignored, by COCO's rules.

    From the best detection of an image and class to the worst, each takes the annotation of highest IoU among those
    that nobody took. Annotations that do not count (crowds, which any number of detections may take, and those
    outside the area range) are taken only where no other fits, and their detections are ignored; so are detections
    outside the area range that took nothing.

    Args:
        ground_truth, detections: as of `coco_ap`; boxes are in pixels of the image file.

    Returns:
        Tables of detections and annotations, see `Matches`.

    Raises:
        DataError: a detection belongs to an image that the ground truth does not list.
    """
    truth = _boxes_only(ground_truth)
    image_ids = np.unique([image["id"] for image in truth["images"]])
    category_ids = np.unique([category["id"] for category in truth["categories"]])
    _check_images(image_ids, detections)
    annotated = _table(truth["annotations"], ("area", "iscrowd"))
    annotated = annotated[annotated["category_id"].isin(category_ids)]
    annotated = annotated.sort_values(["image_id", "category_id"], kind="stable", ignore_index=True)
    detected = _table(detections, ("score",))
    detected = detected[detected["category_id"].isin(category_ids)].assign(area=lambda table: table["w"] * table["h"])
    # Equal scores keep their order.
    order = np.lexsort((-detected["score"], detected["category_id"], detected["image_id"]))
    detected = detected.iloc[order]
    rank = detected.groupby(["image_id", "category_id"]).cumcount()
    detected = detected[rank < DETECTIONS_PER_CLASS].reset_index(drop=True)

    skipped = _outside(annotated["area"]) | (annotated["iscrowd"] != 0).to_numpy()[:, None]  # [G,A]
    flags = _match(detected, annotated, skipped)
    columns = {f"{kind}_{area}": flags[kind][:, a] for kind in flags for a, area in enumerate(AREAS)}
    table = detected[["image_id", "category_id", "score"]].assign(**columns)
    counts = annotated[["image_id", "category_id"]].assign(
        **{area: (~skipped[:, a]).astype(np.int32) for a, area in enumerate(AREAS)}
    )
    bare = np.setdiff1d(image_ids, annotated["image_id"])
    empty = pd.DataFrame({"image_id": bare, "category_id": NO_CATEGORY, **dict.fromkeys(AREAS, np.int32(0))})
    counts = pd.concat([counts.groupby(["image_id", "category_id"], as_index=False).sum(), empty])
    counts = counts.sort_values(["image_id", "category_id"], ignore_index=True)
    compact = {"image_id": np.int64, "category_id": np.int32}
    return Matches(table.astype(compact), counts.astype(compact | dict.fromkeys(AREAS, np.int32)))


def errors_by_image(matches: Matches, min_score: float = 0.3) -> pd.DataFrame:
    """Say how badly each image went, at an IoU of 0.5.

    Args:
        matches: as of `match_detections` or `load_matches`.
        min_score: of the detections that count, in 0..1.

    Returns:
        A row per image, image_id being the index, those with most missed objects first, then those with most false
        positives: objects (annotated), missed (of them, by all detections that count), false_positives.
    """
    objects = matches.annotations.groupby("image_id")["all"].sum()
    counted = matches.detections[matches.detections["score"] >= min_score]
    true, ignored = ((counted[f"{kind}_all"] & 1) > 0 for kind in ("true", "ignored"))  # bit 0: IOU_THRESHOLDS[0]
    true, false = (
        flags.groupby(counted["image_id"]).sum().reindex(objects.index, fill_value=0)
        for flags in (true, ~(true | ignored))
    )
    table = pd.DataFrame({"objects": objects, "missed": objects - true, "false_positives": false})
    return table.sort_values(["missed", "false_positives"], ascending=False, kind="stable")


def _table(entries: Sequence[Mapping], numbers: Sequence[str]) -> pd.DataFrame:
    """Boxes as columns x, y, w, h beside ids and the `numbers` asked for."""
    boxes = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
    ids = {name: np.array([entry[name] for entry in entries], dtype=np.int64) for name in ("image_id", "category_id")}
    rest = {name: np.array([entry[name] for entry in entries], dtype=float) for name in numbers}
    return pd.DataFrame(ids | dict(zip("xywh", boxes.T, strict=True)) | rest)


def _outside(areas: pd.Series) -> np.ndarray:
    """[n,A] whether an area is outside each range."""
    low, high = np.array(list(AREAS.values())).T
    return (areas.to_numpy()[:, None] < low) | (areas.to_numpy()[:, None] > high)


def _match(detected: pd.DataFrame, annotated: pd.DataFrame, skipped: np.ndarray) -> dict[str, np.ndarray]:
    """ "true" and "ignored" [D,A] of sorted tables, bits over IoU thresholds; skipped [G,A].

    All images and classes advance together: first their best detections choose, then their second best.
    """
    every = np.uint16(2 ** len(IOU_THRESHOLDS) - 1)
    outside = _outside(detected["area"])
    flags = {"true": np.zeros_like(outside, np.uint16), "ignored": np.where(outside, every, np.uint16(0))}
    detection, annotation, iou = _overlapping(detected, annotated)
    # In falling order of preference, last first: of equal IoU the later annotation is taken.
    order = np.lexsort((annotation, iou, detection))
    detection, annotation, iou = detection[order], annotation[order], iou[order]
    able, which = np.unique(detection, return_inverse=True)  # detections that overlap with anything
    turn = detected.iloc[able].groupby(["image_id", "category_id"]).cumcount().to_numpy()[which]
    order = np.argsort(turn, kind="stable")
    free = np.ones((*skipped.shape, len(IOU_THRESHOLDS)), bool)  # [G,A,T]
    crowd = (annotated["iscrowd"] != 0).to_numpy()
    bits = 1 << np.arange(len(IOU_THRESHOLDS), dtype=np.uint16)
    for now in np.split(order, np.flatnonzero(np.diff(turn[order])) + 1) if len(order) else ():
        taker, offered = detection[now], annotation[now]
        fits = free[offered] & (iou[now, None, None] >= IOU_THRESHOLDS)  # [pairs,A,T]
        preference = 1 + np.arange(len(now))[:, None] + len(now) * ~skipped[offered]  # [pairs,A]
        first = np.flatnonzero(np.diff(taker, prepend=-1))
        best = np.maximum.reduceat(np.where(fits, preference[:, :, None], 0), first)  # [takers,A,T], 0 = nothing fits
        taken, took = offered[(best - 1) % len(now)], best > 0
        _, area, threshold = np.nonzero(took)
        free[taken[took], area, threshold] = crowd[taken[took]]
        unused = took & skipped[taken, np.arange(len(AREAS))[:, None]]
        flags["true"][taker[first]] = ((took & ~unused) * bits).sum(-1)
        flags["ignored"][taker[first]] = ((unused | ~took & outside[taker[first], :, None]) * bits).sum(-1)
    return flags


def _overlapping(detected: pd.DataFrame, annotated: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of detections and annotations of one image and class with an IoU of at least 0.5, and that IoU.

    The IoU with a crowd is the share of the detection that lies inside it.
    """
    names = ["image_id", "category_id"]
    groups = pd.concat([detected[names], annotated[names]]).groupby(names).ngroup().to_numpy()
    group, groups = groups[: len(detected)], groups[len(detected) :]
    begin = np.searchsorted(groups, group)
    count = np.searchsorted(groups, group, side="right") - begin
    ends = np.cumsum(count)
    theirs, ours = (table[list("xywh")].to_numpy() for table in (annotated, detected))
    crowd, parts = (annotated["iscrowd"] != 0).to_numpy(), []
    cuts = np.searchsorted(ends, np.arange(PAIRS_AT_ONCE, ends[-1] if len(ends) else 0, PAIRS_AT_ONCE))
    for rows in np.split(np.arange(len(detected)), np.unique(cuts)):
        d = np.repeat(rows, count[rows])
        g = np.arange(len(d)) - np.repeat(np.cumsum(count[rows]) - count[rows], count[rows]) + begin[d]
        a, b = ours[d], theirs[g]
        sides = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        inside = np.where((sides > 0).all(1), sides[:, 0] * sides[:, 1], 0.0)
        area, other = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
        union = np.where(crowd[g], area, area + other - inside)
        iou = np.divide(inside, union, out=np.zeros_like(inside), where=inside > 0)
        keep = iou >= IOU_THRESHOLDS[0]
        parts.append((d[keep], g[keep], iou[keep]))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
