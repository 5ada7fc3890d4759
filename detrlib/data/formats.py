"""Data sets as people have them, found and read where they lie; nothing is converted on disk.

    layout      what a folder holds                            the annotations of a split are
    COCO        annotations/instances_<split>.json             that file; pictures in <split>, images/<split> or images
    Roboflow    <split>/_annotations.coco.json                 that file; pictures beside it
    YOLO        data.yaml with names, train, val, test         data.yaml/<split>, a path that is no file but is read
    Pascal VOC  Annotations/*.xml, ImageSets/Main/<split>.txt  that list, or without lists the folder; see `voc`
                <split>/*.xml, or *.xml                        that folder; pictures beside them

Whatever the layout, `open_content` gives what a file of COCO's would hold, which `annotations` then checks.
"""

import codecs
import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

from pydantic_core import to_json

from detrlib.config import Data, project_path
from detrlib.data import voc, yolo
from detrlib.data.pictures import is_picture
from detrlib.data.shapes import shapes_folder
from detrlib.errors import DataError, listed

KINDS = ("train", "val", "test")
SAME = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
LOOKED_FOR = (
    "annotations/instances_*.json (COCO), */_annotations.coco.json (Roboflow), data.yaml (YOLO), Annotations/*.xml or "
    "*.xml (Pascal VOC)"
)
REMEDIES = {
    "train": "set data.train_split",
    "val": "set data.val_split (--split), or data.holdout: 0.1 to keep a share of the training images for validation",
}


def open_content(annotations: Path) -> BinaryIO:
    """What the annotations of a split hold, as the JSON of a COCO file, which is not checked here.

    Args:
        annotations: as `find_split` gives them.

    Raises:
        DataError: nothing there can be read, or a line or an entry of YOLO's or Pascal VOC's files is faulty; names it.
    """
    if annotations.parent.is_file():
        return io.BytesIO(to_json(yolo.read(annotations)))
    if annotations.is_dir() or annotations.suffix == ".txt":
        return io.BytesIO(to_json(voc.read(annotations)))
    if annotations.suffix in yolo.SUFFIXES:
        raise DataError(f"{annotations}: has pictures of several splits; name one of them, such as {annotations}/val")
    try:
        file = annotations.open("rb")
    except OSError as error:
        raise DataError(f"{annotations}: no annotation file that can be read ({error.strerror})") from None
    file.seek(len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0)
    return file


def find_split(settings: Data, split: str) -> tuple[Path, Path]:
    """The folder of images and the annotations of a split, "train" or "val", by the settings `data`.

    With `data.holdout` both are those of the training split. Raises DataError naming what was looked for and found.
    """
    part = "train" if split == "val" and settings.holdout else split
    name, images, annotations = (getattr(settings, f"{part}_{what}") for what in ("split", "images", "annotations"))
    drawn, root = settings.root == "shapes", project_path(settings.root)
    if annotations:
        annotations = project_path(annotations)
    else:
        annotations = choose_split(shapes_folder(settings.shapes) if drawn else root, name, REMEDIES[part])
    if not (annotations.exists() or annotations.parent.is_file()):
        raise DataError(f"data.{part}_annotations: no {annotations} ({_neighbours(annotations.parent)})")
    images = project_path(images) if images else images_of(annotations, None if drawn else root / name)
    if not images.is_dir():
        raise DataError(f"data.{part}_images: no folder {images} ({_neighbours(images.parent)})")
    return images, annotations


def choose_split(root: Path, name: str, remedy: str) -> Path:
    """The annotations of the split of a folder, or of YOLO's data.yaml, that `name` means.

    It is the one of that name; else of another spelling of it (train2017 is train, val2017 is valid); else, for
    training, the only one there is. Raises DataError with the remedy.
    """
    splits = find_splits(root)
    alike = _alike(name, splits)
    if not alike and _kind(name)[0] == "train" and len(splits) == 1:
        alike = [other for other in splits if _kind(other)[0] not in KINDS]
    if len(alike) != 1:
        raise DataError(f"{root}: no split {name}, only {listed(splits)}; {remedy}")
    return splits[alike[0]]


def find_splits(root: Path) -> dict[str, Path]:
    """The annotations of every split in a folder, or in YOLO's data.yaml, by its name there.

    Raises DataError where the folder is of no known layout, or of several.
    """
    found = _layouts(root)
    if len(found) > 1:
        raise DataError(
            f"{root}: holds data sets of several layouts, {' and '.join(found)}; keep one, or name data.train_images, "
            "data.train_annotations, data.val_images and data.val_annotations"
        )
    if not found:
        raise DataError(f"{root}: {_nothing_in(root)}")
    return next(iter(found.values()))


def _layouts(root: Path) -> dict[str, dict[str, Path]]:
    """The splits found in a folder, by layout. Single XML files are looked for where nothing else is found."""
    coco = {path.stem.removeprefix("instances_"): path for path in sorted(root.glob("annotations/instances_*.json"))}
    roboflow = [*root.glob("_annotations.coco.json"), *sorted(root.glob("*/_annotations.coco.json"))]
    layouts = {
        "COCO": coco,
        "Roboflow": {path.parent.name: path for path in roboflow},
        "YOLO": yolo.splits(root),
        "Pascal VOC": voc.splits(root),
    }
    found = {layout: splits for layout, splits in layouts.items() if splits}
    return found or ({"Pascal VOC": beside} if (beside := voc.splits_beside_pictures(root)) else {})


def same_split(one: str, other: str) -> bool:
    """Whether two names mean the same split: of the same kind, and not of different years."""
    (kind, year), (other_kind, other_year) = _kind(one), _kind(other)
    return one == other or (kind == other_kind and kind in KINDS and (year == other_year or not (year and other_year)))


def _alike(name: str, splits: Iterable[str]) -> list[str]:
    """The split of a name, or else those that other spellings of it mean."""
    return [name] if name in splits else [other for other in splits if same_split(name, other)]


def _kind(name: str) -> tuple[str, str]:
    """What a split is for, and its year: train2017 -> train, 2017."""
    word, year = re.fullmatch(r"(.*?)[\W_]*(\d*)", name.casefold(), re.DOTALL).groups()
    return SAME.get(word, word), year


def images_of(annotations: Path, otherwise: Path | None = None) -> Path:
    """The folder of pictures that annotations belong to. Raises DataError naming the places tried."""
    near, split = annotations.parent, annotations.stem.removeprefix("instances_")
    if near.is_file():
        return yolo.pictures(annotations)[0]
    if annotations.is_dir() or annotations.suffix == ".txt":
        return voc.images_of(annotations)
    tried = [near.parent / split, near.parent / "images" / split, near.parent / "images", near / "images"]
    tried += [near] if any(map(is_picture, near.iterdir())) else []
    tried += [otherwise] if otherwise else []
    for folder in tried:
        if folder.is_dir():
            return folder
    places = listed(dict.fromkeys(map(str, tried)))
    raise DataError(f"{annotations}: there is no folder of its pictures: none of {places}; name it")


def other_split(settings: Data, split: str) -> dict[str, Any]:
    """The settings by which the whole of another split of the same data stands for validation.

    Where annotations are explicit it is looked for around them. Raises DataError where it is not there.
    """
    chosen = dict.fromkeys(("val_images", "val_annotations", "val_limit", "holdout")) | {"val_split": split}
    explicit = [(part, getattr(settings, f"{part}_annotations")) for part in ("val", "train")]
    explicit = [(part, path) for part, path in explicit if path]
    for part, path in explicit:
        if same_split(split, getattr(settings, f"{part}_split")):
            return chosen | {"val_annotations": path, "val_images": getattr(settings, f"{part}_images")}
    for path in (project_path(path) for _, path in explicit):
        for splits in (splits for root in list(path.parents)[:3] for splits in _layouts(root).values()):
            if path in splits.values() and len(alike := _alike(split, splits)) == 1:
                there = splits[alike[0]]
                return chosen | {"val_annotations": str(there), "val_images": str(images_of(there))}
    if explicit and settings.root == "shapes":
        raise DataError(
            f"data.{explicit[0][0]}_annotations {explicit[0][1]}: near it there is no split {split}; choose another "
            "(split, --split), or name its file as other data (--on, --images)"
        )
    if settings.val_images and (sibling := project_path(settings.val_images).parent / split).is_dir():
        chosen["val_images"] = str(sibling)
    return chosen


def held_out(file_names: Iterable[str], share: float, seed: int) -> set[str]:
    """The names of a share of the images, at least one, which do not depend on what other images there are.

    The name of an image decides, so that those that train go on to train when others are added. Copies that Roboflow
    has augmented of one picture, <name>.rf.<hash>.jpg, stay together.
    """
    places = {name: _place(f"{seed} {Path(name).name.split('.rf.')[0]}") for name in file_names}
    least = max(share, min(places.values()))
    return {name for name, place in places.items() if place <= least}


def _place(text: str) -> float:
    """A number in 0..1 that looks drawn at random, and is always the same for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _nothing_in(root: Path) -> str:
    """In words, why a folder is no data set."""
    if not root.exists():
        return f"no such folder ({_neighbours(root.parent)}); correct data.root (--on, --data)"
    if not root.is_dir():
        return "neither a folder nor a data.yaml of YOLO with train and val; correct data.root (--on, --data)"
    unannotated = [
        *root.glob("annotations/image_info_*.json"),
        *([root] if any(map(is_picture, root.iterdir())) else []),
    ]
    if unannotated:
        remedy = f"detrlib predict RUN {quote(str(unannotated[0]))}"
        return f"pictures without annotations can be predicted on ({remedy}), not more"
    return f"no data set of a known layout: looked for {LOOKED_FOR}; {_neighbours(root)}"


def _neighbours(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor is there {folder}"
    return f"{folder} holds {listed(sorted(other.name for other in folder.iterdir()), 10) or 'nothing'}"
