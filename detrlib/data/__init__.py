"""Images and boxes: any COCO-format folder, or the embedded shapes."""

from pathlib import Path
from typing import Literal

from detrlib.config import Data, project_path
from detrlib.data.augment import build_transform
from detrlib.data.batch import Batch, collate
from detrlib.data.coco import CocoDataset
from detrlib.data.shapes import cache_folder, shapes_folder
from detrlib.errors import DataError

__all__ = ["Batch", "CocoDataset", "DataError", "build_dataset", "cache_folder", "collate", "split_paths"]


def split_paths(settings: Data, split: Literal["train", "val"]) -> tuple[Path, Path]:
    """Image folder and annotation file of a split. Raises `DataError` listing what was looked for and what exists."""
    name = getattr(settings, f"{split}_split")
    explicit = getattr(settings, f"{split}_images"), getattr(settings, f"{split}_annotations")
    root = shapes_folder(settings.shapes) if settings.root == "shapes" else project_path(settings.root)
    images = project_path(explicit[0]) if explicit[0] else root / name
    annotations = project_path(explicit[1]) if explicit[1] else root / "annotations" / f"instances_{name}.json"
    for path in (images, annotations):
        if not path.exists():
            there = sorted(found.name for found in path.parent.glob("*"))[:10] if path.parent.exists() else None
            found = f"{path.parent} holds {', '.join(there) or 'nothing'}" if there is not None else "nor its folder"
            raise DataError(
                f"no {path} ({found}); a COCO-format folder has {name}/ and annotations/instances_{name}.json: set "
                f"data.root, data.{split}_split, or data.{split}_images and data.{split}_annotations"
            )
    return images, annotations


def build_dataset(settings: Data, split: Literal["train", "val"], *, augment: bool | None = None) -> CocoDataset:
    """The data set of a split as `settings` describe it; `augment`: None augments the training split only."""
    images, annotations = split_paths(settings, split)
    augment = split == "train" if augment is None else augment
    return CocoDataset(
        images,
        annotations,
        build_transform(settings.image_size, settings.augment, augment),
        contiguous=settings.contiguous,
        strict=settings.strict,
        limit=getattr(settings, f"{split}_limit"),
        cache=settings.cache,
        train=split == "train",
    )
