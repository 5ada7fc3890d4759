"""The detections of a run for FiftyOne and supervision, beside the objects and pictures that they are about."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detrlib.errors import DataError
from detrlib.files import write_atomic, write_json
from detrlib.metrics.coco_format import BOX
from detrlib.runs.detected import supervision_detections
from detrlib.runs.failed import evaluated_data, read_predictions
from detrlib.runs.folder import load_results

HOW = """\
# FiftyOne
import json, fiftyone, fiftyone.utils.coco
categories = json.load(open({labels!r}))["categories"]
data = fiftyone.Dataset.from_dir(
    dataset_type=fiftyone.types.COCODetectionDataset, data_path={pictures!r}, labels_path={labels!r}, include_id=True
)
fiftyone.utils.coco.add_coco_labels(data, "predictions", {predictions!r}, categories, coco_id_field="coco_id")
# supervision
import pathlib, supervision, detrlib.runs.exported
data = supervision.DetectionDataset.from_coco({pictures!r}, {labels!r})
detections = detrlib.runs.exported.to_supervision(pathlib.Path({run!r}))"""


def export_detections(run_dir: Path, folder: Path) -> str:
    """Write what other programs read of an evaluated run: COCO's two files, whatever format its data have.

    Args:
        run_dir: folder of the run.
        folder: becomes that of labels.json (images, objects and classes, the ids as in predictions.json) and of
            predictions.json.

    Returns:
        Lines of Python with which FiftyOne and supervision read them, wherever they are run.

    Raises:
        RunError: the run was not evaluated, or a file cannot be written.
        DataError: its data are not on this machine.
    """
    load_results(run_dir), read_predictions(run_dir)  # raise where they are missing or damaged
    dataset = evaluated_data(run_dir)
    paths = {name: folder.absolute() / f"{name}.json" for name in ("labels", "predictions")}
    write_json(paths["labels"], dict(dataset.ground_truth))
    write_atomic(paths["predictions"], partial(shutil.copyfile, run_dir / "predictions.json"))
    return HOW.format(
        pictures=str(dataset.images_path), run=str(run_dir.absolute()), **{n: str(p) for n, p in paths.items()}
    )


def to_supervision(run_dir: Path) -> dict[str, Any]:
    """The detections of an evaluated run as `supervision.Detections`, by the file name of the picture.

    Classes are numbered as `supervision.DetectionDataset.from_coco` numbers those of labels.json: from 0 in the order
    of category ids. A picture without detections has an empty entry.

    Raises ConfigError where that package is not installed, DataError where the data lack a class that was detected,
    otherwise as `export_detections`.
    """
    table, dataset = read_predictions(run_dir), evaluated_data(run_dir)
    categories = {entry["id"]: entry["name"] for entry in dataset.ground_truth["categories"]}
    if unknown := {*table["category_id"]} - {*categories}:
        raise DataError(f"{run_dir / 'predictions.json'} has class {min(unknown)}, which its data lack; evaluate again")
    positions = {id: number for number, id in enumerate(sorted(categories))}
    corner, sides = np.hsplit(table[BOX].to_numpy(float), 2)
    boxes = np.hstack([corner, corner + sides])
    numbers, names = (table["category_id"].map(known).to_numpy() for known in (positions, categories))
    columns, rows = (boxes, table["score"].to_numpy(), numbers, names), table.groupby("image_id").indices
    detections = {}
    for image_id, name in zip(dataset.image_ids, dataset.file_names, strict=True):
        own = rows.get(image_id, [])
        detections[name] = supervision_detections(*(column[own] for column in columns))
    return detections
