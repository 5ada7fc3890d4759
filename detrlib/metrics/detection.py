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
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import faster_coco_eval
import numpy as np
import pandas as pd
from faster_coco_eval import COCOeval_faster

from detrlib.errors import DataError
from detrlib.metrics.coco_format import BOX, box_table, coco_entries

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
IMAGES_AT_ONCE = 500  # whose detections are matched together
COMPACT = {"image_id": np.int64, "category_id": np.int32}


def coco_ap(
    ground_truth: Mapping | str | PathLike,
    detections: Sequence[Mapping] | pd.DataFrame,
    engine: Literal["faster_coco_eval", "pycocotools"] = "faster_coco_eval",
) -> dict:
    """Compute COCO's numbers for boxes.

    Args:
        ground_truth: a COCO instances dictionary or the path of its JSON file. Sizes are bins of the annotation's
            `area` (the segmentation's, in COCO). An annotation takes no part in the score, neither detected nor missed,
            when its `iscrowd` is set.
        detections: a list in COCO's results format, or a table, see `metrics.coco_format`. Neither argument is
            modified.
        engine: the evaluator; pycocotools is the official code, several times slower.

    Returns:
        The twelve numbers (see `METRICS`) as fractions, and `per_class`: {category name: {"AP", "AP50"}}.

    Raises:
        DataError: a detection belongs to an image that the ground truth does not list.
    """
    truth, table = _boxes_only(ground_truth), box_table(detections)
    images = {image["id"] for image in truth["images"]}
    _check_images(images, table)
    names = {entry["id"]: entry["name"] for entry in sorted(truth["categories"], key=lambda entry: entry["id"])}
    annotations = {category_id: [] for category_id in names or (NO_CATEGORY,)}
    for annotation in truth["annotations"]:
        if annotation["image_id"] in images and annotation["category_id"] in annotations:
            annotations[annotation["category_id"]].append(annotation)
    precision, recall, per_class = [], [], {}
    with contextlib.redirect_stdout(io.StringIO()):  # the official evaluator prints a line for every step
        for category_id, own in annotations.items():
            evaluation = _evaluated(engine, category_id, own, table[table["category_id"] == category_id])
            precision.append(evaluation.eval["precision"])  # [T,recall levels,1,A,most detections]
            recall.append(evaluation.eval["recall"])  # [T,1,A,most detections]
        evaluation.eval = {"precision": np.concatenate(precision, 2), "recall": np.concatenate(recall, 1)}
        evaluation.summarize()
    for name, values in zip(names.values(), precision, strict=False):
        largest = values[:, :, 0, 0, -1]  # all object sizes, at most 100 detections
        per_class[name] = {"AP": _mean_where_defined(largest), "AP50": _mean_where_defined(largest[0])}
    return dict(zip(METRICS, map(float, evaluation.stats), strict=True)) | {"per_class": per_class}


def _evaluated(engine: str, category_id: int, annotations: list[dict], table: pd.DataFrame) -> Any:
    """An evaluator that has judged the detections of one class, which classes share nothing of.

    It takes a dictionary for each detection, and room for each image it is told of: those of all classes at once would
    be most of the memory of an evaluation.
    """
    if engine == "pycocotools":
        from pycocotools.coco import COCO  # which a machine for speed alone may lack
        from pycocotools.cocoeval import COCOeval
    else:
        COCO, COCOeval = faster_coco_eval.COCO, partial(COCOeval_faster, print_function=lambda message: None)
    entries = coco_entries(table)
    for number, entry in enumerate(entries, start=1):
        entry |= {"id": number, "area": entry["bbox"][2] * entry["bbox"][3]}
    indices = COCO(), COCO()
    images = [{"id": id} for id in sorted({one["image_id"] for one in (*annotations, *entries)})]
    for index, own in zip(indices, (annotations, entries), strict=True):
        index.dataset = {"images": images, "categories": [{"id": category_id}], "annotations": own}
        index.createIndex()
    evaluation = COCOeval(*indices, iouType="bbox")
    evaluation.evaluate()
    evaluation.accumulate()
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


def _check_images(image_ids: Collection[int], table: pd.DataFrame) -> None:
    unknown = table["image_id"][~table["image_id"].isin(image_ids)]
    if len(unknown):
        raise DataError(
            f"detections for {unknown.nunique()} images that are not in the ground truth, such as {unknown.min()}; "
            "give the annotation file that they were made for"
        )


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


def match_detections(ground_truth: Mapping | str | PathLike, detections: Sequence[Mapping] | pd.DataFrame) -> Matches:
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
    table, annotated, image_ids = match_boxes(ground_truth, detections)
    return Matches(table.drop(columns=[*BOX, "annotation"]), count_objects(annotated, image_ids))


def match_boxes(
    ground_truth: Mapping | str | PathLike, detections: Sequence[Mapping] | pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """As `match_detections`, with boxes: what is matched with what.

    Returns:
        `Matches.detections` with the box x, y, w, h of each and `annotation`, the row of the annotation that it has
        taken at an IoU of 0.5 (-1: none); the annotations, by image and class, with their boxes, area, iscrowd and, for
        each area range, whether they are to be detected (0 or 1); and the ids of all images.

    Raises:
        DataError: a detection belongs to an image that the ground truth does not list.
    """
    truth = _boxes_only(ground_truth)
    image_ids = np.unique([image["id"] for image in truth["images"]])
    category_ids = np.unique([category["id"] for category in truth["categories"]])
    detected = box_table(detections)
    _check_images(image_ids, detected)
    annotated = box_table(truth["annotations"], ("area", "iscrowd"))
    annotated = annotated[annotated["category_id"].isin(category_ids) & annotated["image_id"].isin(image_ids)]
    annotated = annotated.sort_values(["image_id", "category_id"], kind="stable", ignore_index=True)
    skipped = _outside(annotated["area"]) | (annotated["iscrowd"] != 0).to_numpy()[:, None]  # [G,A]
    detected = detected[detected["category_id"].isin(category_ids)].sort_values("image_id", kind="stable")
    later = image_ids[IMAGES_AT_ONCE::IMAGES_AT_ONCE]
    blocks = (np.split(np.arange(len(one)), np.searchsorted(one["image_id"], later)) for one in (detected, annotated))
    table = pd.concat(
        [_judged(detected.iloc[d], annotated.iloc[g], skipped[g], g) for d, g in zip(*blocks, strict=True)],
        ignore_index=True,
    )
    counts = {area: (~skipped[:, a]).astype(np.int32) for a, area in enumerate(AREAS)}
    return table, annotated.assign(**counts), image_ids


def count_objects(annotated: pd.DataFrame, image_ids: np.ndarray) -> pd.DataFrame:
    """`Matches.annotations` of annotations as of `match_boxes`."""
    counts = annotated.groupby(["image_id", "category_id"], as_index=False)[list(AREAS)].sum()
    bare = np.setdiff1d(image_ids, annotated["image_id"])
    empty = pd.DataFrame({"image_id": bare, "category_id": NO_CATEGORY, **dict.fromkeys(AREAS, np.int32(0))})
    counts = pd.concat([counts, empty]).sort_values(["image_id", "category_id"], ignore_index=True)
    return counts.astype(COMPACT | dict.fromkeys(AREAS, np.int32))


def _judged(detected: pd.DataFrame, annotated: pd.DataFrame, skipped: np.ndarray, rows: np.ndarray) -> pd.DataFrame:
    """Detections of `match_boxes` of some images, of which nothing else is kept; rows: of all annotations, theirs."""
    detected = detected.astype(dict.fromkeys((*BOX, "score"), float)).assign(area=lambda table: table["w"] * table["h"])
    # Equal scores keep their order.
    order = np.lexsort((-detected["score"], detected["category_id"], detected["image_id"]))
    detected = detected.iloc[order]
    rank = detected.groupby(["image_id", "category_id"]).cumcount()
    detected = detected[rank < DETECTIONS_PER_CLASS].reset_index(drop=True)
    flags, taken = _match(detected, annotated, skipped)
    columns = {f"{kind}_{area}": flags[kind][:, a] for kind in flags for a, area in enumerate(AREAS)}
    columns["annotation"] = np.append(rows, -1)[taken]
    return detected[["image_id", "category_id", "score", *BOX]].assign(**columns).astype(COMPACT)


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


def _outside(areas: pd.Series) -> np.ndarray:
    """[n,A] whether an area is outside each range."""
    low, high = np.array(list(AREAS.values())).T
    return (areas.to_numpy()[:, None] < low) | (areas.to_numpy()[:, None] > high)


def _match(
    detected: pd.DataFrame, annotated: pd.DataFrame, skipped: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """ "true" and "ignored" [D,A] of sorted tables, bits over IoU thresholds, and [D] the annotation taken at the first
    threshold, whatever the areas, -1 where none is; skipped [G,A].

    All images and classes advance together: first their best detections choose, then their second best.
    """
    every = np.uint16(2 ** len(IOU_THRESHOLDS) - 1)
    outside = _outside(detected["area"])
    flags = {"true": np.zeros_like(outside, np.uint16), "ignored": np.where(outside, every, np.uint16(0))}
    own = np.full(len(detected), -1)
    detection, annotation, iou = overlapping(detected, annotated)
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
        own[taker[first]] = np.where(took[:, 0, 0], taken[:, 0, 0], -1)
        unused = took & skipped[taken, np.arange(len(AREAS))[:, None]]
        flags["true"][taker[first]] = ((took & ~unused) * bits).sum(-1)
        flags["ignored"][taker[first]] = ((unused | ~took & outside[taker[first], :, None]) * bits).sum(-1)
    return flags, own


def overlapping(
    detected: pd.DataFrame, annotated: pd.DataFrame, within: Sequence[str] = ("image_id", "category_id"), least=0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of detections and annotations with an IoU of at least `least`, and that IoU.

    Both tables are sorted by the columns `within`, whose values the two of a pair share. The IoU with a crowd is the
    share of the detection that lies inside it.
    """
    names = list(within)
    groups = pd.concat([detected[names], annotated[names]]).groupby(names).ngroup().to_numpy()
    group, groups = groups[: len(detected)], groups[len(detected) :]
    begin = np.searchsorted(groups, group)
    count = np.searchsorted(groups, group, side="right") - begin
    ends = np.cumsum(count)
    theirs, ours = (table[BOX].to_numpy() for table in (annotated, detected))
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
        keep = iou >= least
        parts.append((d[keep], g[keep], iou[keep]))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
