"""The detections of any detector as a run: the same AP, intervals, paired tests and tables as the runs beside it.

detrlib evaluate faster-rcnn --predictions detections.json --data papermill_runs/configs/detr-r50.yaml
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from detrlib.config import Config, load_config, project_path, replace
from detrlib.data import build_dataset
from detrlib.data.yolo import is_data_yaml
from detrlib.engine.evaluate import on_split, run_floor, save_results
from detrlib.errors import DataError
from detrlib.experiments.transfer import find_data
from detrlib.metrics.coco_format import box_table
from detrlib.metrics.detection import coco_ap
from detrlib.runs.opening import begin_folder
from detrlib.runs.owner import owning
from detrlib.runs.sources import free_path

FIELDS = ("image_id", "category_id", "bbox", "score")


@owning
def evaluate_predictions(
    run_dir: Path,
    predictions: Path,
    data: Path,
    split: str | None = None,
    *,
    images: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict:
    """Make a run folder of the detections that any detector has written in COCO's results format.

    Args:
        run_dir: the folder to make.
        predictions: JSON list of {"image_id", "category_id", "bbox": [left, top, width, height] in pixels, "score"},
            with ids as in the annotation file; or with file names for image_id, as of YOLO and Pascal VOC, whose
            classes are numbered as in data.yaml, or from 1 in alphabetical order.
        data: what the detections are of: a config (its validation split), a folder that `formats` knows, YOLO's
            data.yaml, or a COCO annotation file.
        split: another split than the validation split.
        images: the folder of the pictures, if not where `data` has them.
        overrides: dotted settings of `evaluate`, such as {"evaluate.engine": "pycocotools"}.

    Returns:
        What results.json holds: `detector` says where the detections are from; there is no attention in it.

    Raises:
        RunError: the folder is there already.
        DataError: the file holds anything but detections in these images, or the data are not in order.
    """
    free_path(run_dir)
    cfg = replace(_config(project_path(data), split, images and project_path(images)), dict(overrides or {}))
    dataset = build_dataset(cfg.data, "val")
    images = dict(zip(dataset.file_names, dataset.image_ids, strict=True))
    detections = read_detections(predictions, dataset.image_ids, list(dataset.category_ids.values()), images)
    cfg = replace(cfg, {"model.num_classes": dataset.num_classes})
    results = {
        "detector": f"predictions from {predictions.name}",
        "detection": coco_ap(dataset.ground_truth, detections, cfg.evaluate.engine),
        "images": len(dataset),
        "annotations": dataset.annotations_path.name,
        "alpha": {},
        "names": {str(label): name for label, name in dataset.names.items()},
        "epoch": None,
        "global_step": None,
        "seconds": None,
    }
    begin_folder(run_dir, cfg)
    results |= run_floor(run_dir, dataset, cfg.evaluate.engine)
    return save_results(run_dir, results, detections, dataset.ground_truth)


def _config(data: Path, split: str | None, images: Path | None) -> Config:
    """Settings whose validation data are those asked for; the others, which say nothing here, as by default."""
    if data.suffix in (".yaml", ".yml") and not is_data_yaml(data):
        given = load_config(data)
        cfg = Config(data=given.data, evaluate=given.evaluate)
        cfg = on_split(cfg, split) if split else cfg
        return replace(cfg, {"data.val_images": str(images)} if images else {})
    images, annotations = find_data(data, images, split, Config().data.val_split)
    root = str(data if data != annotations else data.parent)
    return replace(
        Config(), {"data.root": root, "data.val_images": str(images), "data.val_annotations": str(annotations)}
    )


def read_detections(
    path: Path, image_ids: Collection[int], category_ids: Collection[int], file_names: Mapping[str, int] | None = None
) -> pd.DataFrame:
    """A table of the detections in a file of COCO's results format, which may name images by file, {file name: id}.

    Raises DataError naming the file and the first wrong entry.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: holds a {type(content).__name__}; expected a list of {{{', '.join(FIELDS)}}}")
    known = {"image_id": set(image_ids), "category_id": set(category_ids)}
    ids = {key: id for name, id in (file_names or {}).items() for key in (name, Path(name).name, Path(name).stem)}
    for number, entry in enumerate(content):
        if isinstance(entry, dict) and isinstance(entry.get("image_id"), str):
            entry["image_id"] = ids.get(entry["image_id"], entry["image_id"])
        if fault := _fault(entry, known):
            raise DataError(f"{path}: entry {number}: {fault}")
    return box_table(content)


def _fault(entry: Any, known: dict[str, set[int]]) -> str | None:
    """In words, why an entry is no detection."""
    if not isinstance(entry, dict) or (missing := [name for name in FIELDS if name not in entry]):
        return f"has no {', '.join(missing)}" if isinstance(entry, dict) else f"{entry!r} is no detection"
    for name, ids in known.items():
        if type(entry[name]) is not int or entry[name] not in ids:
            shown = ", ".join(map(str, sorted(ids)[:5]))
            return f"{name} {entry[name]!r} is none of the {len(ids)} of the data ({shown}, ...); write its ids"
    if not _numbers(entry["bbox"], 4) or min(entry["bbox"][2:]) < 0:
        return f"bbox {entry['bbox']!r} is not left, top, width and height in pixels"
    return None if _numbers([entry["score"]], 1) else f"score {entry['score']!r} is no number"


def _numbers(values: Any, count: int) -> bool:
    """Whether these are so many finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )
