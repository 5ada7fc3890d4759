"""Classes by name: those of COCO, and the classes of one data set as those that a model was trained on."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from detrlib.config import Data
from detrlib.data import split_paths
from detrlib.data.coco import read_annotations
from detrlib.errors import DataError

# The 80 classes of COCO 2017 with their ids, which leave gaps.
# fmt: off
COCO_NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}
# fmt: on


@dataclass(frozen=True)
class ClassMatch:
    """Which classes of an annotation file ("theirs") a model knows ("ours").

    labels       category id in the file -> label of the model, for the classes that have a partner
    names        those labels -> the names to score them under
    matched      their name -> our name
    unmapped     their names without partner -> number of annotated objects, crowds included
    unannotated  our names without partner
    """

    labels: dict[int, int]
    names: dict[int, str]
    matched: dict[str, str]
    unmapped: dict[str, int]
    unannotated: list[str]


def match_classes(content: Mapping, ours: Mapping[int, str], names: Mapping[str, str] | None = None) -> ClassMatch:
    """Find for every category of COCO-format `content` the label in `ours` (label -> name) of the same class.

    names: {their name: our name}, before equal names; an empty name leaves a class out ("mouse", the animal, is not
    "mouse", the device). Names are equal up to case, spaces and underscores. Several of their classes may become
    one of ours. Raises DataError when `names` has an unknown or ambiguous name, or nothing matches.
    """
    theirs = _names(content)
    given = {_require(name, theirs, "the annotation file"): partner for name, partner in (names or {}).items()}
    labels = {}
    for id, name in theirs.items():
        if given.get(id, name):
            label = _require(given[id], ours, "the model") if id in given else _find(name, ours)
            if label is not None:
                labels[id] = label
    if not labels:
        raise DataError(
            f"no class of the annotation file ({_listed(theirs.values())}) is one of the model's "
            f"({_listed(ours.values())}); give their names as {{'their name': 'our name'}}, or --map THEIRS=OURS"
        )
    counts = Counter(annotation["category_id"] for annotation in content["annotations"])
    return ClassMatch(
        labels=labels,
        names={label: ours[label] for label in labels.values()},
        matched={theirs[id]: ours[label] for id, label in labels.items()},
        unmapped={name: counts[id] for id, name in theirs.items() if id not in labels},
        unannotated=[name for label, name in ours.items() if label not in labels.values()],
    )


def match_ids(content: Mapping, ours: Mapping[int, str]) -> ClassMatch:
    """Take every category id of `content` for the model's label, and keep its name there; `ours` may be empty."""
    theirs = _names(content)
    return ClassMatch(
        labels={id: id for id in theirs},
        names=theirs,
        matched={name: ours.get(id, name) for id, name in theirs.items()},
        unmapped={},
        unannotated=[name for label, name in ours.items() if label not in theirs],
    )


def translate(content: Mapping, found: ClassMatch) -> dict:
    """COCO-format `content` with the model's labels as category ids; classes without partner are left out.

    Segmentations, which boxes do not need and which make files large, are left out too.
    """
    annotations = [
        {field: value for field, value in annotation.items() if field != "segmentation"}
        | {"category_id": found.labels[annotation["category_id"]]}
        for annotation in content["annotations"]
        if annotation["category_id"] in found.labels
    ]
    categories = [{"id": label, "name": name} for label, name in sorted(found.names.items())]
    return {**content, "categories": categories, "annotations": annotations}


def locate(data: Path, images: Path | None, split: str | None, usual: str) -> tuple[Path, Path]:
    """Image folder and annotation file of other data: a COCO-format folder, or the annotation file itself.

    Of a folder `split` is taken; if that is None, the `usual` one where it is there, otherwise the only one.
    Pictures of a file are in `images`; if that is None, in the COCO layout's folder of the same split, in a folder
    "images" beside the file, or beside the file itself, whichever holds the first one. Raises DataError.
    """
    if data.suffix != ".json":
        there = sorted(path.stem.removeprefix("instances_") for path in data.glob("annotations/instances_*.json"))
        split = split or (usual if usual in there or len(there) != 1 else there[0])
        if split not in there:
            found = f"only {', '.join(there)}; choose one (split, --split)" if there else "nor any other"
            raise DataError(f"{data}: no annotations/instances_{split}.json, {found}")
        return split_paths(Data(root=str(data), val_split=split, val_images=images and str(images)), "val")
    first = read_annotations(data)["images"][0]["file_name"]
    layout = data.parent.parent / data.stem.removeprefix("instances_")
    tried = [images] if images else [layout, data.parent / "images", data.parent]
    for folder in tried:
        if (folder / first).is_file():
            return folder, data
    listed = ", ".join(map(str, tried))
    raise DataError(f"{data}: its first picture, {first}, is not in {listed}; give the folder (images, --images)")


def _names(content: Mapping) -> dict[int, str]:
    return {category["id"]: category["name"] for category in content["categories"]}


def _find(name: str, among: Mapping[int, str]) -> int | None:
    """The key whose name is `name`, literally or else up to case, spaces and underscores; None if there is none."""
    literal = [key for key, other in among.items() if other == name]
    alike = literal or [key for key, other in among.items() if _plain(other) == _plain(name)]
    if len(alike) > 1:
        raise DataError(f"class {name!r} may be any of {_listed(among[key] for key in alike)}; rename all but one")
    return alike[0] if alike else None


def _require(name: str, among: Mapping[int, str], where: str) -> int:
    found = _find(name, among)
    if found is None:
        near = difflib.get_close_matches(name, list(among.values()), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {_listed(among.values())}"
        raise DataError(f"no class {name!r} in {where}; {hint}")
    return found


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
