"""Images and boxes: any COCO-format folder, or the embedded shapes."""

from pathlib import Path
from typing import Literal

from detrlib.config import Data, project_path
from detrlib.data.augment import build_augmentation
from detrlib.data.batch import Batch, collate
from detrlib.data.coco import CocoDataset
from detrlib.data.shapes import cache_folder, shapes_folder
from detrlib.errors import DataError, listed


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

    Args:
        settings: the section `data` of a config; `root` "shapes" draws the embedded data set on first use.
        split: "train" or "val"; their folders, files and limits are settings of their own.
        augment: whether images pass DETR's random flips, scales and crops; None: those of the training split do.

    Returns:
        Pairs (image float32 [3,H,W], normalised as for ImageNet; target with boxes [n,4] cxcywh in 0..1, labels [n],
        sizes in pixels), in order of image id.

    Raises:
        DataError: a file or folder is missing, or an annotation is faulty; names the file, the entry and the remedy.
    """
    images, annotations = split_paths(settings, split)
    augment = split == "train" if augment is None else augment
    return CocoDataset(
        images,
        annotations,
        build_augmentation(settings.image_size, settings.augment, augment, settings.scales),
        contiguous=settings.contiguous,
        strict=settings.strict,
        limit=getattr(settings, f"{split}_limit"),
        cache=settings.cache,
        train=split == "train",
    )
