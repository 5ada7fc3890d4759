"""Any folder that `formats` knows as a data set of images and boxes, checked before the first training step."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from detrlib.boxes import xyxy_to_cxcywh
from detrlib.data.annotations import Annotation, Annotations, ImageRecord, read_annotations
from detrlib.data.pictures import UNREADABLE, open_picture, read_picture
from detrlib.errors import DataError, listed

logger = logging.getLogger(__name__)


class CocoDataset(Dataset):
    """Images of one split with their boxes, in order of image id.

    `dataset[i]` is `(image, target)`: image float32 [3, H, W] and
        boxes          [n, 4] cxcywh in 0..1 of the transformed image, before any padding
        labels         [n] int64, indices into `names`
        image_id       int
        original_size  [2] (height, width) of the file, pixels
        size           [2] (height, width) after the transform, pixels

    Crowd regions are no targets, as in DETR, but stay in `ground_truth`. Boxes are clipped to the image. Boxes
    without an area are left out of both and counted in `dropped`. Images without objects are kept.

    images       folder of the image files
    annotations  JSON file with `images`, `annotations` and `categories`, or what `formats` reads as one
    transform    callable(image uint8 [3, H, W], boxes [n, 4] xyxy pixels, labels [n]) -> the same three
    contiguous   labels 0..n-1 in order of category id; otherwise labels are the category ids themselves
    strict       refuse boxes without an area
    limit        keep the first `limit` images
    cache        keep decoded images in memory after first use, once per worker process
    keep         choose images: from their file names, those that are kept; `limit` counts these
    train        refuse a set without a single box: it could only teach that there is nothing to see

    Raises `DataError` for every fault that can be seen without decoding the images, and for an unreadable
    image when it is used.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        transform: Callable | None = None,
        *,
        contiguous: bool = False,
        strict: bool = False,
        limit: int | None = None,
        cache: bool = False,
        keep: Callable[[list[str]], set[str]] = set,
        train: bool = False,
    ):
        self.images_path, self.annotations_path = Path(images), Path(annotations)
        self.transform, self._cache = transform, {} if cache else None

        content = read_annotations(self.annotations_path)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        ids = [category["id"] for category in categories]
        self._label_of = {id: label if contiguous else id for label, id in enumerate(ids)}
        self.category_ids = {label: id for id, label in self._label_of.items()}
        self.names = {self._label_of[category["id"]]: category["name"] for category in categories}
        self.num_classes = max(self.names) + 1

        kept = keep([record["file_name"] for record in content["images"]])
        records = [record for record in content["images"] if record["file_name"] in kept]
        self._records = sorted(records, key=lambda record: record["id"])[:limit]
        self.image_ids = [record["id"] for record in self._records]
        of_image = {id: [] for id in self.image_ids}
        for annotation in content["annotations"]:
            if annotation["image_id"] in of_image:
                of_image[annotation["image_id"]].append(annotation)
        self._check_files(of_image)
        self.dropped = self._collect_boxes(of_image, strict)
        if train and not len(self._labels):
            raise DataError(f"{annotations}: no usable box in {len(self)} images: nothing to learn from")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        pixels = self._pixels(index)
        boxes, labels = self.objects(index)
        original_size = torch.tensor(pixels.shape[-2:])
        if self.transform is not None:
            pixels, boxes, labels = self.transform(pixels, boxes, labels)
        image = functional.to_dtype(pixels, torch.float32, scale=True)
        height, width = image.shape[-2:]
        target = {
            "boxes": xyxy_to_cxcywh(boxes) / torch.tensor([width, height, width, height]),
            "labels": labels,
            "image_id": self.image_ids[index],
            "original_size": original_size,
            "size": torch.tensor([height, width]),
        }
        return image, target

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, dict]]:
        """The samples of one batch, which is how a `DataLoader` asks for them."""
        with getattr(self.transform, "batch", nullcontext)():
            return [self[index] for index in indices]

    def image(self, index: int) -> Image.Image:
        """The picture as stored, in RGB. Raises `DataError` when it is unreadable or not of the annotated size."""
        record = self._records[index]
        path = self.images_path / record["file_name"]
        try:
            # The orientation in EXIF is ignored, because COCO's annotations refer to the pixels as they are stored.
            image, _ = read_picture(path)
        except UNREADABLE as error:
            raise DataError(
                f"{path}: not readable as an image ({error}); {self._used_by(record)}; replace it or remove its entry"
            ) from error
        if image.size != (record["width"], record["height"]):
            raise DataError(
                f"{path}: the file is {image.size[0]} x {image.size[1]} pixels, {self.annotations_path} says "
                f"{record['width']} x {record['height']}; boxes would be misplaced (was it resized, or annotated "
                f"after rotation by EXIF?)"
            )
        return image

    def objects(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes [n, 4] xyxy in pixels of the file and labels [n] of one image, crowds left out."""
        first, last = self._first[index], self._first[index + 1]
        return self._boxes[first:last].clone(), self._labels[first:last].clone()

    @property
    def file_names(self) -> list[str]:
        """Of the images, as the annotations have them."""
        return [record["file_name"] for record in self._records]

    def description(self) -> dict[str, Any]:
        """What is in this data set, wherever it lies: images, objects, classes, and a digest of all that is taught."""
        records = [[record[key] for key in ("id", "file_name", "width", "height")] for record in self._records]
        digest = hashlib.sha256(json.dumps(records).encode())
        for tensor in (self._boxes, self._labels, torch.tensor(self._first)):
            digest.update(tensor.numpy().tobytes())
        classes = {str(label): name for label, name in self.names.items()}
        counts = {"images": len(self), "objects": len(self._labels)}
        return counts | {"classes": classes, "digest": digest.hexdigest()[:16]}

    def frame(self) -> pd.DataFrame:
        """One row per annotated object, crowds included: image_id, label, category, width, height, area, crowd.

        Sizes are in pixels; area is that of the object's mask where the file has it, of its box elsewhere.
        """
        rows = []
        for annotation in self.ground_truth["annotations"]:
            label = self._label_of[annotation["category_id"]]
            _, _, width, height = annotation["bbox"]
            area, crowd = annotation["area"], bool(annotation["iscrowd"])
            rows.append((annotation["image_id"], label, self.names[label], width, height, area, crowd))
        return pd.DataFrame(rows, columns=["image_id", "label", "category", "width", "height", "area", "crowd"])

    @cached_property
    def ground_truth(self) -> Annotations:
        """The annotation file, restricted to the images of this dataset and without boxes that have no area.

        Read again when asked for, so that training need not hold it in memory.
        """
        content = read_annotations(self.annotations_path)
        sizes = {record["id"]: (record["width"], record["height"]) for record in self._records}
        content["images"] = [record for record in content["images"] if record["id"] in sizes]
        content["annotations"] = [
            annotation
            for annotation in content["annotations"]
            if annotation["image_id"] in sizes and _has_area(annotation, *sizes[annotation["image_id"]])
        ]
        return content

    def _pixels(self, index: int) -> Tensor:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        pixels = functional.pil_to_tensor(self.image(index))  # uint8 [3, H, W]
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels

    def _check_files(self, of_image: dict[int, list[Annotation]]) -> None:
        """Every file must exist and every size be known. One listing per folder: fast for 118,000 files."""
        if not self.images_path.is_dir():
            raise DataError(f"{self.images_path}: no such folder of images; {self.annotations_path} refers to it")
        paths = [self.images_path / record["file_name"] for record in self._records]
        present = set()
        for folder in {path.parent for path in paths}:
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    present.update(folder / entry.name for entry in entries)
        missing = [i for i, path in enumerate(paths) if path not in present]
        if missing:
            record = self._records[missing[0]]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"{self.annotations_path}: image file {paths[missing[0]]}{more} is missing; "
                f"{_mention(record, of_image[record['id']])}; add the file or remove the entry"
            )
        for record, path in zip(self._records, paths, strict=True):
            if not (record.get("width") and record.get("height")):
                record["width"], record["height"] = _size_from_header(path)

    def _collect_boxes(self, of_image: dict[int, list[Annotation]], strict: bool) -> int:
        """Keep the boxes of all images in two flat tensors, which workers share; returns how many had no area."""
        boxes, labels, counts, without_area = [], [], [], []
        for record in self._records:
            annotations, size = of_image[record["id"]], (record["width"], record["height"])
            without_area += [a["id"] for a in annotations if not _has_area(a, *size)]
            targets = [a for a in annotations if _has_area(a, *size) and not a["iscrowd"]]
            boxes += [_clipped(a["bbox"], *size) for a in targets]
            labels += [self._label_of[a["category_id"]] for a in targets]
            counts.append(len(targets))
        if without_area:
            message = f"{self.annotations_path}: {len(without_area)} boxes have no area inside their image"
            if strict:
                raise DataError(f"{message}, annotation ids {listed(without_area)}; correct them or set strict: false")
            logger.warning("%s and are left out", message)
        self._boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        self._labels = torch.tensor(labels, dtype=torch.int64)
        self._first = [0, *accumulate(counts)]
        return len(without_area)

    def _used_by(self, record: ImageRecord) -> str:
        content = read_annotations(self.annotations_path)
        return _mention(record, [a for a in content["annotations"] if a["image_id"] == record["id"]])


def _size_from_header(path: Path) -> tuple[int, int]:
    try:
        with open_picture(path) as file:
            return file.size
    except UNREADABLE as error:
        raise DataError(f"{path}: not readable as an image ({error}); replace it or remove its entry") from error


def _clipped(box: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """xywh -> xyxy inside the image."""
    x, y, w, h = box
    return max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)


def _has_area(annotation: Annotation, width: int, height: int) -> bool:
    x0, y0, x1, y1 = _clipped(annotation["bbox"], width, height)
    return x1 > x0 and y1 > y0  # False for NaN as well


def _mention(record: ImageRecord, annotations: list[Annotation]) -> str:
    if not annotations:
        return f"image id {record['id']}, which has no annotations"
    return f"image id {record['id']}, annotation ids {listed(a['id'] for a in annotations)}"
