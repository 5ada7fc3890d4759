"""Images and boxes: any COCO-format folder, or the embedded shapes."""

import logging
from pathlib import Path
from typing import Literal

from detrlib.config import Data, project_path
from detrlib.data.augment import build_augmentation
from detrlib.data.batch import Batch, collate
from detrlib.data.coco import CocoDataset
from detrlib.data.findings import Findings, look_over
from detrlib.data.shapes import cache_folder, shapes_folder
from detrlib.errors import DataError, listed

logger = logging.getLogger(__name__)


def split_paths(settings: Data, split: Literal["train", "val"]) -> tuple[Path, Path]:
    """Image folder and annotation file of a split. Raises `DataError` listing what was looked for and what exists."""
    name = getattr(settings, f"{split}_split")
    explicit = getattr(settings, f"{split}_images"), getattr(settings, f"{split}_annotations")
    root = shapes_folder(settings.shapes) if settings.root == "shapes" else project_path(settings.root)
    images = project_path(explicit[0]) if explicit[0] else root / name
    annotations = project_path(explicit[1]) if explicit[1] else root / "annotations" / f"instances_{name}.json"
    for path in (images, annotations):
        if not path.exists():
            raise DataError(
                f"no {path} ({_neighbours(path)}); a COCO-format folder has {name}/ and annotations/instances_{name}"
                f".json: set data.root, data.{split}_split, or data.{split}_images and data.{split}_annotations"
            )
    return images, annotations


def _neighbours(path: Path) -> str:
    if not path.parent.exists():
        return "nor its folder"
    return f"{path.parent} holds {listed(sorted(other.name for other in path.parent.iterdir()), 10) or 'nothing'}"


def build_dataset(settings: Data, split: Literal["train", "val"], *, augment: bool | None = None) -> CocoDataset:
    """Open the data set of a split as `settings` describe it, checked before the first step; see `CocoDataset`.

    What was done to the content of its file, such as boxes left out, is logged.

    Args:
        settings: the section `data` of a config; `root` "shapes" draws the embedded data set on first use.
        split: "train" or "val"; their folders, files and limits are settings of their own.
        augment: whether images pass DETR's random flips, scales and crops; None: those of the training split do.

    Returns:
        Pairs (image float32 [3,H,W], normalised as for ImageNet; target with boxes [n,4] cxcywh in 0..1, labels [n],
        sizes in pixels), in order of image id. Labels are those of `settings.classes`, or of the split's own file.

    Raises:
        DataError: a file or folder is missing, or an annotation is faulty; names the file, the entry and the remedy.
    """
    dataset = _open(settings, split, augment)
    for note in dataset.notes:
        logger.warning("%s: %s", dataset.annotations_path, note)
    return dataset


def open_splits(settings: Data, augment: bool | None = None) -> dict[Literal["train", "val"], CocoDataset]:
    """Open both splits, whose labels are those of the training split: classes of the other are matched by name.

    Arguments are those of `build_dataset`. What was done to the content of their files is for `look_over` to say.

    Raises:
        DataError: as `build_dataset`, and for classes with objects that training has not.
    """
    train = _open(settings, "train", augment)
    return {"train": train, "val": _open(settings, "val", augment, classes=train.names)}


def _open(
    settings: Data, split: Literal["train", "val"], augment: bool | None, classes: dict[int, str] | None = None
) -> CocoDataset:
    images, annotations = split_paths(settings, split)
    return CocoDataset(
        images,
        annotations,
        build_augmentation(settings.image_size, settings.augment, split == "train" if augment is None else augment),
        classes=classes or settings.names,
        contiguous=settings.contiguous,
        strict=settings.strict,
        clip=settings.clip == "both",
        upright=settings.orientation == "exif",
        truncated=settings.truncated == "accept",
        limit=getattr(settings, f"{split}_limit"),
        cache=settings.cache,
        train=split == "train",
    )
