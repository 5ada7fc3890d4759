"""The classes of one data set as those that a model was trained on, by name or by id."""

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detrlib.errors import DataError, listed

MOST_NAMES = 12  # in a message


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


def match_classes(
    content: Mapping, ours: Mapping[int, str], names: Mapping[str, str] | None = None, *, by_id: bool = False
) -> ClassMatch:
    """Find for every category of COCO-format `content` the label in `ours` (label -> name) of the same class.

    names: {their name: our name}, before equal names; an empty name leaves a class out ("mouse", the animal, is not
    "mouse", the device). Names are equal up to case, spaces and underscores. Several of their classes may become
    one of ours. by_id: every category id is taken for the label, with its name in the file, whatever our name of it;
    `ours` may be empty. Raises DataError when `names` has an unknown or ambiguous name, or nothing matches.
    """
    theirs = {category["id"]: category["name"] for category in content["categories"]}
    labels = {id: id for id in theirs} if by_id else _labels_by_name(theirs, ours, names or {})
    scored_as = theirs if by_id else ours
    counts = Counter(annotation["category_id"] for annotation in content["annotations"])
    return ClassMatch(
        labels=labels,
        names={label: scored_as[label] for label in labels.values()},
        matched={theirs[id]: ours.get(label, theirs[id]) for id, label in labels.items()},
        unmapped={name: counts[id] for id, name in theirs.items() if id not in labels},
        unannotated=[name for label, name in ours.items() if label not in labels.values()],
    )


def labels_in(content: Mapping, classes: Mapping[int, str], annotated: Counter[int], file: Path) -> dict[int, int]:
    """The classes of a split as those of the training split: the same id and name, or else the same name.

    Args:
        content: of the split, in COCO's format.
        classes: label -> name, of the training split or of a run.
        annotated: category id -> number of objects in the split.
        file: for messages.

    Returns:
        {category id: label}, without the classes that have neither a partner nor an object.

    Raises:
        DataError: a class with objects has no partner, or two have the same one; names them and the file.
    """
    labels = {}
    for category in content["categories"]:
        id, name = category["id"], category["name"]
        try:
            labels[id] = id if id in classes and _plain(classes[id]) == _plain(name) else find_label(name, classes)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
    theirs = {category["id"]: category["name"] for category in content["categories"]}
    if unknown := [id for id, label in labels.items() if label is None and annotated[id]]:
        found = listed((f"{theirs[id]!r} ({annotated[id]} objects)" for id in unknown), MOST_NAMES)
        raise DataError(
            f"{file}: {found} is no class of training, which has {listed(classes.values(), MOST_NAMES)}; correct the "
            "name, remove the objects, or add the class to the categories of the training split, or to data.classes. A "
            "trained run is evaluated without them by detrlib evaluate RUN --on DATA"
        )
    labels = {id: label for id, label in labels.items() if label is not None}
    for label, count in Counter(labels.values()).items():
        if count > 1:
            twice = listed(f"{id} {theirs[id]!r}" for id, other in labels.items() if other == label)
            raise DataError(f"{file}: categories {twice} are all class {classes[label]!r} of training; make them one")
    return labels


def names_by_label(given: Any, file: Path) -> dict[int, str]:
    """Names of classes as JSON has them, {"1": "circle"}, by their labels. Raises DataError naming the file."""
    try:
        names = {int(label): name for label, name in given.items()}
    except (AttributeError, ValueError):
        names = {0: None}
    if not all(isinstance(name, str) for name in names.values()):
        raise DataError(
            f"{file}: names of classes are {given!r:.80}; expected labels with names, such as {{'1': 'circle'}}"
        )
    return names


def class_list(names: Mapping[int, str]) -> list[str | None]:
    """Names by label as the setting data.classes has them, None where a label has no class."""
    return [names.get(label) for label in range(max(names) + 1)]


def translate(content: Mapping, match: ClassMatch) -> dict:
    """COCO-format `content` with the model's labels as category ids; classes without partner are left out."""
    annotations = [
        {**annotation, "category_id": match.labels[annotation["category_id"]]}
        for annotation in content["annotations"]
        if annotation["category_id"] in match.labels
    ]
    categories = [{"id": label, "name": name} for label, name in sorted(match.names.items())]
    return {**content, "categories": categories, "annotations": annotations}


def _labels_by_name(theirs: Mapping[int, str], ours: Mapping[int, str], names: Mapping[str, str]) -> dict[int, int]:
    """{category id in the file: label}, without the classes that have no partner."""
    given = {_require(name, theirs, "the annotation file"): partner for name, partner in names.items()}
    labels = {}
    for id, name in theirs.items():
        if given.get(id, name):
            label = _require(given[id], ours, "the model") if id in given else find_label(name, ours)
            if label is not None:
                labels[id] = label
    if not labels:
        raise DataError(
            f"no class of the annotation file ({listed(theirs.values(), MOST_NAMES)}) is one of the model's "
            f"({listed(ours.values(), MOST_NAMES)}); give their names as {{'their name': 'our name'}}, or --map "
            "THEIRS=OURS"
        )
    return labels


def find_label(name: str, among: Mapping[int, str]) -> int | None:
    """The key whose name is `name`, literally or else up to case, spaces and underscores; None if there is none."""
    literal = [key for key, other in among.items() if other == name]
    alike = literal or [key for key, other in among.items() if _plain(other) == _plain(name)]
    if len(alike) > 1:
        raise DataError(f"class {name!r} may be any of {listed(among[key] for key in alike)}; rename all but one")
    return alike[0] if alike else None


def _require(name: str, among: Mapping[int, str], where: str) -> int:
    key = find_label(name, among)
    if key is None:
        near = difflib.get_close_matches(name, list(among.values()), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {listed(among.values(), MOST_NAMES)}"
        raise DataError(f"no class {name!r} in {where}; {hint}")
    return key


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())
