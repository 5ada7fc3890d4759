"""UnRel, photographs of unusual relations such as a dog with a tie (Peyre et al., ICCV 2017), as a COCO-format file.

    detrlib unrel unrel/annotations.mat unrel/images unrel/instances_unrel.json

Its annotations are Matlab cells of structures: filename, im_id, objects {category, box} and relationships
{sub, sub_box, obj, obj_box, rels}, with boxes (xmin, ymin, xmax, ymax).
"""

import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from tqdm.auto import tqdm

from detrlib.data.classes import COCO_NAMES
from detrlib.data.coco import UNREADABLE
from detrlib.errors import DataError

# UnRel's names for classes of COCO; 22 more of its 48 names are COCO's own, 19 are no class of COCO.
SAME_CLASS = {"bike": "bicycle", "plane": "airplane", "sofa": "couch", "table": "dining table"}
# Judgement calls: COCO's class is narrower than UnRel's word.
NARROWER = {"ball": "sports ball", "phone": "cell phone", "bag": "handbag"}

NOTE = "Objects that take part in a relation are annotated, not necessarily every object of a class."
CONVENTION = {
    "coco": "x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1, height = ymax - ymin + 1, clipped to the image",
    "thesis": "x = xmin, y = ymin, width = xmax - xmin, height = ymax - ymin, whole numbers, not clipped",
}

Box = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax as in the file: pixels counted from 1, both included


class Object(NamedTuple):
    """An annotated object of the .mat file, or a side of a relationship, which may lack a box."""

    category: str
    box: Box | None


@dataclass
class Photograph:
    """One entry of the .mat file; relationships are (subject, predicate, object)."""

    file_name: str
    id: int
    objects: list[Object]
    relationships: list[tuple[Object, str, Object]] = field(default_factory=list)


def read_mat(path: Path) -> list[Photograph]:
    """UnRel's annotations.mat. Raises DataError naming the file, the entry (from 1, as in Matlab) and the field."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        # Structures become dicts and cells lists, except that a cell with one element becomes the element.
        content = loadmat(path, appendmat=False, simplify_cells=True)
    except NotImplementedError:
        raise DataError(f"{path}: saved as Matlab 7.3 (HDF5); save it again in Matlab with the option -v7") from None
    except (ValueError, TypeError, OSError, MatReadError, zlib.error) as error:
        raise DataError(f"{path}: not readable as a .mat file ({error}); was the download complete?") from error
    entries = _field(content, "annotations", str(path))
    read = [_photograph(entry, f"{path}: annotations({n})") for n, entry in enumerate(_cell(entries), 1)]
    repeated = [id for id, count in Counter(one.id for one in read).items() if count > 1]
    if repeated or not read:
        raise DataError(f"{path}: " + (f"im_id {repeated[0]} occurs twice" if repeated else "'annotations' is empty"))
    return read


def _photograph(entry: Any, where: str) -> Photograph:
    objects = [
        Object(_text(one, "category", at), _box(one, "box", at))
        for at, one in _numbered(_field(entry, "objects", where), f"{where}.objects")
    ]
    relationships = []
    for at, one in _numbered(_field(entry, "relationships", where), f"{where}.relationships"):
        # A few sides of relationships come without a box.
        subject, object = (
            Object(_text(one, side, at), _box(one, f"{side}_box", at, needed=False)) for side in ("sub", "obj")
        )
        relationships += [(subject, str(predicate), object) for predicate in _cell(_field(one, "rels", at))]
    id = _field(entry, "im_id", where)
    if not isinstance(id, int | float | np.number) or id != int(id) or id < 0:
        raise DataError(f"{where}: im_id is {id!r}; expected a whole number from 0 up")
    return Photograph(_text(entry, "filename", where), int(id), objects, relationships)


def _cell(value: Any) -> list:
    """The elements of a cell, also where it had one or none."""
    return list(value) if isinstance(value, list | np.ndarray) else [value]


def _numbered(value: Any, where: str) -> list[tuple[str, Any]]:
    return [(f"{where}({number})", one) for number, one in enumerate(_cell(value), 1)]


def _field(structure: Any, name: str, where: str) -> Any:
    if not isinstance(structure, dict):
        raise DataError(f"{where}: expected a structure with a field '{name}', found {type(structure).__name__}")
    if name not in structure:
        found = ", ".join(key for key in structure if not key.startswith("__"))
        raise DataError(f"{where}: no '{name}', only {found or 'nothing'}; is this UnRel's annotations.mat?")
    return structure[name]


def _text(structure: Any, name: str, where: str) -> str:
    value = _field(structure, name, where)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name} is {value!r}; expected a text")
    return value.strip()


def _box(structure: Any, name: str, where: str, needed: bool = True) -> Box | None:
    value = _field(structure, name, where)
    try:
        # As floats: the file stores small numbers as bytes, whose sums and differences would wrap around.
        box = tuple(np.asarray(value, dtype=float).ravel().tolist())
    except (TypeError, ValueError):
        box = ()
    if len(box) == 4 and np.isfinite(box).all():
        return box
    if needed:
        raise DataError(f"{where}: {name} is {value!r}; expected four numbers [xmin ymin xmax ymax]")
    return None


def convert_unrel(
    mat: Path,
    images: Path,
    out: Path,
    ids: Literal["coco", "thesis"] = "coco",
    unmapped: Literal["drop", "ignore"] = "drop",
) -> dict:
    """Write UnRel as the COCO-format file `out`; returns its "info", which also says what was left out.

    Sizes are read from the files in `images`. Relationships are kept as a field of each image: names, boxes, and
    ids of annotations, null where an object was left out.

    ids       "coco": COCO's category ids by name, annotations numbered from 1. Matlab's pixels, counted from 1 with
              xmin to xmax included, become COCO's continuous coordinates: a box over the whole width is [0, width].
              Boxes are clipped to the image, those without area and exact repetitions left out.
              "thesis": the numbering behind published numbers, faults included. Categories are numbered 1 to 48 by
              first appearance, annotations from 0; boxes are not shifted and end a pixel early.
    unmapped  objects of names that are no class of COCO: "drop" them, or "ignore" them: as a crowd region of every
              class, so that detections of which half or more lies on them (at IoU 0.5) are neither right nor wrong.

    Raises DataError where the .mat file is not as expected, pictures are missing, or no name is a class of COCO.
    """
    if ids not in CONVENTION or unmapped not in ("drop", "ignore"):
        raise DataError(f"ids={ids!r}, unmapped={unmapped!r}: expected ids coco or thesis, unmapped drop or ignore")
    photographs = read_mat(Path(mat))
    sizes, unreadable = _sizes(photographs, Path(images))
    names = list(dict.fromkeys(found.category for one in photographs for found in one.objects))  # as they appear
    classes = _classes(names, ids)
    if not classes:
        raise DataError(f"{mat}: none of its categories ({', '.join(names)}) is a class of COCO")
    writer = _Writer(ids == "thesis", {name: id for name, (id, _) in classes.items()}, unmapped == "ignore")
    for one in photographs:
        if one.id in sizes:
            writer.add(one, *sizes[one.id])
    content = {
        "info": {
            "description": f"UnRel. {NOTE}",
            "ids": ids,
            "boxes": CONVENTION[ids],
            "judgement_calls": {name: classes[name][1] for name in NARROWER if ids == "coco" and name in classes},
            "unmapped_are": "ignored" if unmapped == "ignore" else "left out",
            **writer.counts(),
            "unreadable": unreadable,
        },
        "images": writer.images,
        "annotations": writer.annotations,
        "categories": [{"id": id, "name": name} for id, name in sorted(set(classes.values()))],
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(content))
    return content["info"]


def _classes(names: list[str], ids: str) -> dict[str, tuple[int, str]]:
    """Category id and name in the new file for each of UnRel's names that gets one."""
    if ids == "thesis":
        return {name: (number, name) for number, name in enumerate(names, 1)}
    id_of = {name: id for id, name in COCO_NAMES.items()}
    return {name: (id_of[partner], partner) for name in names if (partner := coco_name(name))}


def coco_name(name: str) -> str | None:
    """COCO's name for one of UnRel's, None for those that are no class of COCO."""
    name = SAME_CLASS.get(name) or NARROWER.get(name) or name
    return name if name in COCO_NAMES.values() else None


def _sizes(photographs: list[Photograph], images: Path) -> tuple[dict[int, tuple[int, int]], list[str]]:
    """{image id: (width, height)} of the pictures, and the names of those that cannot be decoded."""
    missing = [one.file_name for one in photographs if not (images / one.file_name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{images / missing[0]}{more}: no such picture; is {images} UnRel's folder of images?")
    sizes, unreadable = {}, []
    for one in tqdm(photographs, desc="pictures", disable=None, leave=False):
        try:
            with Image.open(images / one.file_name) as file:
                file.load()
                sizes[one.id] = file.size
        except UNREADABLE:
            unreadable.append(one.file_name)
    if not sizes:
        raise DataError(f"{images}: none of its {len(unreadable)} pictures can be decoded, e.g. {unreadable[0]}")
    return sizes, unreadable


class _Writer:
    """Lists of images and annotations that grow photograph by photograph."""

    def __init__(self, thesis: bool, category_ids: dict[str, int], ignore: bool):
        self.thesis, self.category_ids, self.ignore = thesis, category_ids, ignore
        self.images, self.annotations = [], []
        self.kept, self.unmapped, self.repeated, self.without_area = Counter(), Counter(), 0, 0

    def counts(self) -> dict:
        """What was written and what was left out."""
        return {
            "images": len(self.images),
            "annotations": len(self.annotations),
            "objects": dict(sorted(self.kept.items())),
            "unmapped": dict(sorted(self.unmapped.items())),
            "repeated": self.repeated,
            "without_area": self.without_area,
        }

    def add(self, photograph: Photograph, width: int, height: int) -> None:
        """One photograph of `width` x `height` pixels with its objects."""
        seen: dict[Object, int | None] = {}  # to the annotation's id, where it has become one
        for found in photograph.objects:
            if found in seen and not self.thesis:
                self.repeated += 1
            else:
                seen[found] = self._add_object(found, photograph.id, width, height)
        relationships = []
        for subject, predicate, object in photograph.relationships:
            entry = {"predicate": predicate}
            for side, one in (("subject", subject), ("object", object)):
                box = self._box(one.box, width, height)
                entry |= {side: one.category, f"{side}_box": box, f"{side}_id": seen.get(one)}
            relationships.append(entry)
        image = {"id": photograph.id, "file_name": photograph.file_name, "width": width, "height": height}
        self.images.append(image | {"relationships": relationships})

    def _add_object(self, found: Object, image_id: int, width: int, height: int) -> int | None:
        box = self._box(found.box, width, height)
        if not self.thesis and min(box[2:]) <= 0:
            self.without_area += 1
            return None
        if found.category in self.category_ids:
            self.kept[found.category] += 1
            return self._annotate(image_id, self.category_ids[found.category], box, crowd=0)
        self.unmapped[found.category] += 1
        if self.ignore:
            for category_id in sorted(set(self.category_ids.values())):
                self._annotate(image_id, category_id, box, crowd=1)
        return None

    def _annotate(self, image_id: int, category_id: int, box: list[float], crowd: int) -> int:
        id = len(self.annotations) + (0 if self.thesis else 1)
        entry = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": box}
        self.annotations.append(entry | {"area": box[2] * box[3], "iscrowd": crowd})
        return id

    def _box(self, box: Box | None, width: int, height: int) -> list[float] | None:
        """[x, y, width, height] by the convention of the file."""
        if box is None:
            return None
        xmin, ymin, xmax, ymax = box
        if self.thesis:
            return [int(xmin), int(ymin), int(xmax - xmin), int(ymax - ymin)]
        left, top = max(xmin - 1, 0), max(ymin - 1, 0)
        return [left, top, min(xmax, width) - left, min(ymax, height) - top]


def summary(out: Path, info: dict) -> str:
    """In words, what `convert_unrel` has written, and what it left out."""
    lines = [f"{out}: {info['images']} images, {info['annotations']} annotations of {len(info['objects'])} classes"]
    for title, counts in (("kept", info["objects"]), (info["unmapped_are"] + ", no class of COCO", info["unmapped"])):
        lines.append(f"{title}: {', '.join(f'{name} {count}' for name, count in counts.items()) or 'none'}")
    if calls := info["judgement_calls"]:
        lines.append("judgement calls: " + ", ".join(f"{name} as {partner}" for name, partner in calls.items()))
    unreadable = ", ".join(info["unreadable"]) or "none"
    lines.append(
        f"repeated boxes {info['repeated']}, without area {info['without_area']}, pictures not readable: {unreadable}"
    )
    return "\n".join(lines)
