"""YOLO's layout: a data.yaml with names of classes and places of pictures, and a text file of boxes for each picture.

    path: .                    # the folder that the others are relative to; default: that of this file
    train: images/train        # a folder, a text file with a path in each line, or a list of these
    val: [images/val, more.txt]
    names: {0: cat, 1: dog}    # or a list

The boxes of images/train/a.jpg stand in labels/train/a.txt, or beside the picture where no folder is called images. A
line is a class and the centre and the size of a box, or the corners of a polygon or a rotated box, of which the
enclosing box is taken; all are shares of the width and height of the picture as it is shown. Where data.yaml has a
kpt_shape, keypoints follow the box. A picture without a file, or with an empty one, has no objects.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from detrlib.config.yaml_text import strict
from detrlib.data.pictures import is_picture, numbered, sizes_in_files
from detrlib.errors import DataError, listed

logger = logging.getLogger(__name__)
log_once = cache(logger.info)  # the same files are read several times

SUFFIXES = (".yaml", ".yml")
SPLITS = ("train", "val", "valid", "validation", "test")
SLACK = 0.01  # by which rounding may take a coordinate out of 0..1


def splits(root: Path) -> dict[str, Path]:
    """The splits that a data.yaml names, which `root` is or holds: {its name: data.yaml/name}; {} without one."""
    named = [root / f"data{suffix}" for suffix in SUFFIXES if (root / f"data{suffix}").is_file()]
    files = [root] if root.is_file() else named or sorted(root.glob("*.y*ml"))
    for file in files:
        if file.suffix in SUFFIXES and (values := _settings(file, refuse=file in (root, *named))):
            return {name: file / name for name in SPLITS if _entries(values.get(name))}
    return {}


def is_data_yaml(path: Path) -> bool:
    """Whether a file is a data.yaml, and not one of settings of this project."""
    return path.is_file() and path.suffix in SUFFIXES and bool(_settings(path, refuse=False))


def read(annotations: Path) -> dict:
    """The content of a split, data.yaml/<split>, as COCO has it; categories are classes by their number.

    Raises DataError naming file and line.
    """
    values = _settings(annotations.parent, refuse=True)
    names = _names(annotations.parent, values)
    folder, files = pictures(annotations)
    content = {"images": [], "annotations": [], "categories": [{"id": id, "name": name} for id, name in names.items()]}
    labels = [_label_file(file) for file in files]
    if not any(label.is_file() for label in labels):
        raise DataError(
            f"{annotations}: none of its {len(files)} pictures has a file of boxes; looked for {listed(labels, 1)}"
        )
    if lacking := [file.name for file, label in zip(files, labels, strict=True) if not label.is_file()]:
        said = f"{len(lacking)} of {len(files)} pictures have no file of boxes ({listed(lacking, 2)})"
        log_once(f"{annotations}: {said} and count as pictures without objects")
    ids, sizes = numbered([file.stem for file in files]), sizes_in_files(files, upright=True)  # to which shares refer
    for id, file, label, (width, height) in zip(ids, files, labels, sizes, strict=True):
        image = {"id": id, "file_name": os.path.relpath(file, folder), "width": width, "height": height}
        content["images"].append(image)
        for number, line in enumerate(_text(label).splitlines() if label.is_file() else (), 1):
            if words := line.split():
                try:
                    found = _object(words, names, (width, height), "kpt_shape" in values)
                except ValueError as error:
                    raise DataError(f"{label}: line {number}: {error}") from None
                content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": id} | found)
    return content


def pictures(annotations: Path) -> tuple[Path, list[Path]]:
    """The folder that all pictures of a split lie in, and their files. Raises DataError naming a place not there."""
    file, split = annotations.parent, annotations.name
    values = _settings(file, refuse=True)
    bases = [file.parent / str(values.get("path") or "."), file.parent]
    folders, files = [], []
    for entry in _entries(values.get(split)):
        # Roboflow writes ../train/images for what lies beside the file.
        tried = [os.path.normpath(base / to) for base in bases for to in (entry.removeprefix("../"), entry)]
        place = next((Path(path) for path in tried if os.path.exists(path)), None)
        if place is None:
            raise DataError(f"{file}: {split}: no {entry}; looked for {', '.join(dict.fromkeys(tried))}")
        if place.is_dir():
            found, folder = sorted(filter(is_picture, place.rglob("*"))), [place]
        elif place.suffix == ".txt":
            lines = filter(None, map(str.strip, _text(place).splitlines()))
            found = [_listed_picture(line, place, bases) for line in lines]
            folder = [path.parent for path in found]
        else:
            raise DataError(f"{file}: {split}: {entry} is neither a folder nor a text file of paths")
        folders, files = [*folders, *folder], [*files, *found]
    if not files:
        raise DataError(f"{file}: {split}: no pictures in {listed(_entries(values.get(split))) or 'it'}")
    return Path(os.path.commonpath(folders)), list(dict.fromkeys(files))


def _listed_picture(line: str, place: Path, bases: Sequence[Path]) -> Path:
    """The picture that a line of a text file means: relative to that file, or else to the data set."""
    line = line.replace("\\", "/")
    tried = [Path(os.path.normpath(base / line)) for base in (place.parent, *bases)]
    for path in tried:
        if path.is_file():
            return path
    raise DataError(f"{place}: no picture {line}; looked for {listed(dict.fromkeys(tried))}")


@strict
class _Loader(yaml.BaseLoader):
    """Every value as text."""


def _settings(file: Path, refuse: bool) -> dict[str, Any]:
    """What a data.yaml holds, every value as text; {} for a file of another kind. Raises DataError if `refuse`."""
    try:
        values = yaml.load(_text(file), Loader=_Loader)
    except (yaml.YAMLError, DataError) as error:
        if refuse:
            raise DataError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from None
        return {}
    if isinstance(values, dict) and any(_entries(values.get(name)) for name in SPLITS):
        return values
    if refuse:
        raise DataError(f"{file}: names no pictures; a data.yaml has train, val (places of pictures) and names")
    return {}


def _entries(places: Any) -> list[str]:
    """The places of pictures that a value names."""
    places = [places] if isinstance(places, str) and places else places
    strings = isinstance(places, list) and all(isinstance(place, str) for place in places)
    return [place.replace("\\", "/") for place in places] if strings else []  # written on Windows


def _names(file: Path, values: Mapping[str, Any]) -> dict[int, str]:
    """The classes by their number."""
    names = values.get("names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not names or not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise DataError(f"{file}: names: {names or 'missing'}; give the names of the classes, as [cat, dog]")
    if wrong := [number for number in names if not str(number).isdecimal()]:
        raise DataError(f"{file}: names: {wrong[0]!r} is no number of a class, from 0")
    if (count := values.get("nc")) and count != str(len(names)):
        raise DataError(f"{file}: nc is {count}, but there are {len(names)} names; correct one of them")
    return {int(number): name for number, name in names.items()}


def _label_file(picture: Path) -> Path:
    """The text file of a picture: in the folder labels that lies where its folder images does, or beside it."""
    beside, parts = picture.with_suffix(".txt"), list(picture.parts[:-1])
    if "images" not in parts or beside.is_file():
        return beside
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, beside.name)


def _object(words: Sequence[str], names: Mapping[int, str], size: tuple[int, int], keypoints: bool) -> dict:
    """One line as an annotation of COCO. Raises ValueError saying what is wrong."""
    numbers = []
    for word in words:
        try:
            numbers.append(float(word))
        except ValueError:
            raise ValueError(f"{word!r} is no number") from None
        if not math.isfinite(numbers[-1]):
            raise ValueError(f"{word} is no finite number")
    given, *shares = numbers[:5] if keypoints else numbers
    if len(shares) != 4 and (len(shares) < 6 or len(shares) % 2):
        raise ValueError(f"{len(numbers)} numbers; a box has 5 (class, centre, size), corners an odd number from 7 on")
    if given not in names:
        raise ValueError(f"class {words[0]} has no name; there are {min(names)} to {max(names)}")
    if outside := [share for share in shares if not -SLACK <= share <= 1 + SLACK]:
        raise ValueError(f"{outside[0]} is outside 0..1; coordinates are shares of the picture's width and height")
    xs, ys = [share * size[0] for share in shares[0::2]], [share * size[1] for share in shares[1::2]]
    if len(shares) == 4:
        return {"category_id": int(given), "bbox": [xs[0] - xs[1] / 2, ys[0] - ys[1] / 2, xs[1], ys[1]], "iscrowd": 0}
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    following = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    area = abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in following)) / 2
    return {"category_id": int(given), "bbox": box, "area": area, "iscrowd": 0}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not readable as text ({error})") from None
