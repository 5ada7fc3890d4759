"""Detections as a table while they are in memory, 36 bytes each, and in COCO's results format where others read them.

A table has a row per detection and the columns image_id, category_id, x, y, w, h (left, top, width and height in pixels
of the original image) and score. As dictionaries, detections take 20 times the memory: they are made part by part.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from detrlib.files import write_atomic

BOX = list("xywh")


def coco_detections(image_ids: ArrayLike, boxes: ArrayLike, scores: ArrayLike, category_ids: ArrayLike) -> pd.DataFrame:
    """The table of n detections, whose boxes become (left, top, width, height).

    image_ids [n], or the one of all; boxes [n, 4] xyxy in pixels of the original image; scores [n]; category_ids [n] as
    in the annotation file. Tensors on the CPU, arrays or lists. Raises ValueError when the lengths differ.
    """
    corners = torch.as_tensor(boxes).detach().reshape(-1, 4)
    sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    ids = {"image_id": np.broadcast_to(image_ids, len(sides)), "category_id": category_ids}
    columns = {name: np.asarray(column, dtype=np.int64) for name, column in ids.items()}
    return pd.DataFrame(columns | dict(zip(BOX, sides.T.numpy(), strict=True)) | {"score": torch.as_tensor(scores)})


def box_table(entries: Sequence[Mapping] | pd.DataFrame, numbers: Sequence[str] = ("score",)) -> pd.DataFrame:
    """Entries in one of COCO's formats as a table with columns for `numbers`; what is a table stays as it is."""
    if isinstance(entries, pd.DataFrame):
        return entries
    boxes = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
    ids = {name: np.array([entry[name] for entry in entries], dtype=np.int64) for name in ("image_id", "category_id")}
    rest = {name: np.array([entry[name] for entry in entries], dtype=float) for name in numbers}
    return pd.DataFrame(ids | dict(zip(BOX, boxes.T, strict=True)) | rest)


def coco_entries(table: pd.DataFrame) -> list[dict]:
    """The detections of a table in COCO's results format."""
    columns = (table[name].tolist() for name in ("image_id", "category_id", "score"))
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for image_id, category_id, score, box in zip(*columns, table[BOX].to_numpy().tolist(), strict=True)
    ]


def save_detections(path: Path, tables: Iterable[pd.DataFrame]) -> None:
    """Write the detections of all tables as a file in COCO's results format, one table after the other in memory.

    Raises RunError when it cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w") as file:
            begin = "["
            for table in tables:
                if len(table):
                    file.write(begin + json.dumps(coco_entries(table), indent=1)[1:-2])
                    begin = ","
            file.write("[]\n" if begin == "[" else "\n]\n")

    write_atomic(path, write)
