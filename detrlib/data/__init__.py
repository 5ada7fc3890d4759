"""Images and boxes: any folder that `formats` knows, or the embedded shapes.

formats (yolo, voc), shapes    what lies on a disk, read as a file of COCO's
annotations, objects, classes  what may stand in it, which of that are objects, and of which classes
columns, blocks, index         the same at the size of COCO: as columns, read in blocks, once on a machine
decoding, pictures             how the file of a picture is read; pictures without annotations
coco                           the data set: images with their boxes
check, findings                before training: every picture decoded, what would otherwise be silent
augment, batch                 what images pass on their way to a model
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from detrlib.config import Data
from detrlib.data.augment import build_augmentation
from detrlib.data.batch import Batch, collate
from detrlib.data.coco import CocoDataset
from detrlib.data.findings import Findings, look_over
from detrlib.data.formats import find_split, held_out
from detrlib.data.objects import suggested_image_sizes
from detrlib.errors import DataError

logger = logging.getLogger(__name__)


def build_dataset(settings: Data, split: Literal["train", "val"], *, augment: bool | None = None) -> CocoDataset:
    """Open the data set of a split as `settings` describe it, checked before the first step; see `CocoDataset`.

    What was done to the content of its file, such as boxes left out, is logged.

    Args:
        settings: the section `data` of a config; `root` "shapes" draws the embedded data set on first use.
        split: "train" or "val"; their folders, files and limits are settings of their own.
        augment: whether images pass DETR's random flips, scales and crops; None: those of the training split do.

    Returns:
        Pairs (pixels uint8 [3,H,W]; target with boxes [n,4] cxcywh in 0..1, labels [n], sizes in pixels), in order of
        image id. `collate` makes batches of them, whose `images` are what models see. Labels are those of
        `settings.classes`, or of the split's own file.

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
    images, annotations = find_split(settings, split)

    def keep(file_names: list[str]) -> set[str]:
        chosen = set(file_names)
        if settings.holdout:
            held = held_out(chosen, settings.holdout, settings.holdout_seed)
            if split == "val":
                logger.info("%s: %d of %d images are held out", annotations, len(held), len(chosen))
            chosen = held if split == "val" else chosen - held
        if not chosen:
            raise DataError(f"{annotations}: data.holdout {settings.holdout} leaves nothing to train on; lower it")
        return chosen

    augment = split == "train" if augment is None else augment
    return CocoDataset(
        images,
        annotations,
        build_augmentation(settings.image_size, settings.augment, augment, settings.scales),
        classes=classes or settings.names,
        contiguous=settings.contiguous,
        strict=settings.strict,
        clip=settings.clip == "both",
        upright=settings.orientation == "exif",
        truncated=settings.truncated == "accept",
        limit=getattr(settings, f"{split}_limit"),
        cache=settings.cache,
        keep=keep,
        train=split == "train",
    )


def describe_data(settings: Data, splits: Mapping[str, CocoDataset] | None = None) -> dict[str, Any]:
    """What a run is trained and judged on, wherever it lies; with `data.holdout`, the names of the images held out.

    splits: the data sets train and val, or one of them; None: they are opened.
    """
    splits = splits or {part: build_dataset(settings, part) for part in ("train", "val")}
    held_out = {"held_out": splits["val"].file_names} if settings.holdout and "val" in splits else {}
    return {part: dataset.description() for part, dataset in splits.items()} | held_out
