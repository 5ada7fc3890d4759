"""UnRel, photographs of unusual relations such as a dog with a tie (Peyre et al., ICCV 2017), as a COCO-format file.

    detrlib unrel unrel/annotations.mat unrel/images unrel/instances_unrel.json

Its annotations are Matlab cells of structures: filename, im_id, objects {category, box} and relationships
{sub, sub_box, obj, obj_box, rels}, with boxes (xmin, ymin, xmax, ymax).
"""

import zlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, FiniteFloat, NonNegativeInt, StringConstraints, ValidationError
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detrlib.data.annotations import first_fault
from detrlib.data.decoding import UNREADABLE
from detrlib.engine import tracking
from detrlib.errors import DataError
from detrlib.files import write_json

# The 80 classes of COCO 2017: name -> id. Ids leave gaps, which torchvision fills.
LISTED = enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
COCO_IDS = {name: id for id, name in LISTED if name not in ("__background__", "N/A")}
# UnRel's names for classes of COCO; 22 more of its 48 names are COCO's own, 19 are no class of COCO.
SAME_CLASS = {"bike": "bicycle", "plane": "airplane", "sofa": "couch", "table": "dining table"}
# Judgement calls: COCO's class is narrower than UnRel's word.
NARROWER = {"ball": "sports ball", "phone": "cell phone", "bag": "handbag"}

NOTE = "Objects that take part in a relation are annotated, not necessarily every object of a class."
CONVENTION = {
    "coco": "x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1, height = ymax - ymin + 1, clipped to the image",
    "thesis": "x = xmin, y = ymin, width = xmax - xmin, height = ymax - ymin, whole numbers, not clipped",
}

T = TypeVar("T")
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
# xmin, ymin, xmax, ymax as in the file: pixels counted from 1, both included.
Box = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
# A cell with one element is read as the element.
Cell = Annotated[list[T], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
# A few sides of relationships come without a box.
BoxIfAny = Annotated[
    Box | None, BeforeValidator(lambda box: box if np.size(box) == 4 and np.isfinite(box).all() else None)
]


class Object(BaseModel):
    """An annotated object."""

    category: Text
    box: Box


class Relationship(BaseModel):
    """Subject, predicates, object."""

    sub: Text
    sub_box: BoxIfAny
    obj: Text
    obj_box: BoxIfAny
    rels: Cell[str]


class Photograph(BaseModel):
    """One entry of the .mat file."""

    filename: Text
    im_id: NonNegativeInt
    objects: Cell[Object]
    relationships: Cell[Relationship]


class MatFile(BaseModel):
    """The whole file."""

    annotations: Annotated[Cell[Photograph], Field(min_length=1)]


def read_mat(path: Path) -> list[Photograph]:
    """UnRel's annotations.mat. Raises DataError naming the file, the entry (from 1, as in Matlab) and the field."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give UnRel's annotations.mat")
    try:
        content = loadmat(path, appendmat=False, simplify_cells=True)  # structures become dicts, cells arrays or lists
        photographs = MatFile.model_validate(_plain(content)).annotations
    except NotImplementedError:
        raise DataError(f"{path}: saved as Matlab 7.3 (HDF5); save it again in Matlab with the option -v7") from None
    except ValidationError as error:
        raise DataError(f"{path}: {first_fault(error, '({})', 1)}; is this UnRel's annotations.mat?") from None
    except (ValueError, TypeError, OSError, MatReadError, zlib.error) as error:
        raise DataError(f"{path}: not readable as a .mat file ({error}); was the download complete?") from error
    repeated = [id for id, count in Counter(one.im_id for one in photographs).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: im_id {repeated[0]} occurs twice; ids must be unique")
    return photographs


def _plain(value: Any) -> Any:
    """Arrays as flat lists and numbers as Python's: the file stores small ones as bytes, whose sums wrap around."""
    if isinstance(value, dict):
        return {name: _plain(field) for name, field in value.items() if not name.startswith("__")}
    if isinstance(value, np.ndarray):
        value = value.ravel().tolist()
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value.item() if isinstance(value, np.generic) else value


def convert_unrel(
    mat: Path,
    images: Path,
    out: Path,
    ids: Literal["coco", "thesis"] = "coco",
    unmapped: Literal["drop", "ignore"] = "drop",
) -> dict:
    """Write UnRel as a COCO-format file; relationships are kept as a field of each image.

    They are names, boxes, and ids of annotations, null where an object was left out.

    Args:
        mat: UnRel's annotations.mat.
        images: the folder of its pictures, whose sizes are read from the files.
        out: the file to write.
        ids: "coco": COCO's category ids by name, annotations numbered from 1. Matlab's pixels, counted from 1 with xmin
            to xmax included, become COCO's continuous coordinates: a box over the whole width is [0, width]. Boxes are
            clipped to the image, those without area and exact repetitions left out.
            "thesis": the numbering behind published numbers, faults included. Categories are numbered 1 to 48 by first
            appearance, annotations from 0; boxes are not shifted and end a pixel early.
        unmapped: objects of names that are no class of COCO: "drop" them, or "ignore" them: as a crowd region of every
            class, so that detections of which half or more lies on them (at IoU 0.5) are neither right nor wrong.

    Returns:
        The file's "info", which also says what was left out.

    Raises:
        DataError: the .mat file is not as expected, pictures are missing, or no name is a class of COCO.
    """
    if ids not in CONVENTION or unmapped not in ("drop", "ignore"):
        raise DataError(f"ids={ids!r}, unmapped={unmapped!r}: expected ids coco or thesis, unmapped drop or ignore")
    photographs = read_mat(Path(mat))
    sizes, unreadable = _sizes(photographs, Path(images))
    names = list(dict.fromkeys(one.category for photograph in photographs for one in photograph.objects))
    if ids == "thesis":
        classes = {name: (number, name) for number, name in enumerate(names, 1)}
    else:
        classes = {name: (COCO_IDS[partner], partner) for name in names if (partner := coco_name(name))}
    if not classes:
        raise DataError(f"{mat}: none of its categories ({', '.join(names)}) is a class of COCO")
    writer = _Writer(ids == "thesis", {name: id for name, (id, _) in classes.items()}, unmapped == "ignore")
    for photograph in photographs:
        if photograph.im_id in sizes:
            writer.add(photograph, *sizes[photograph.im_id])
    info = {
        "description": f"UnRel. {NOTE}",
        "ids": ids,
        "boxes": CONVENTION[ids],
        "judgement_calls": {name: classes[name][1] for name in NARROWER if ids == "coco" and name in classes},
        "unmapped_are": "ignored" if unmapped == "ignore" else "left out",
        "images": len(writer.images),
        "annotations": len(writer.annotations),
        "objects": dict(sorted(writer.objects.items())),
        "unmapped": dict(sorted(writer.unmapped.items())),
        **writer.left_out,
        "unreadable": unreadable,
    }
    categories = [{"id": id, "name": name} for id, name in sorted(set(classes.values()))]
    content = {"info": info, "images": writer.images, "annotations": writer.annotations, "categories": categories}
    write_json(Path(out), content)
    return info


def coco_name(name: str) -> str | None:
    """COCO's name for one of UnRel's, None for those that are no class of COCO."""
    name = SAME_CLASS.get(name) or NARROWER.get(name) or name
    return name if name in COCO_IDS else None


def _sizes(photographs: list[Photograph], images: Path) -> tuple[dict[int, tuple[int, int]], list[str]]:
    """{image id: (width, height)} of the pictures, and the names of those that cannot be decoded."""
    missing = [one.filename for one in photographs if not (images / one.filename).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{images / missing[0]}{more}: no such picture; is {images} UnRel's folder of images?")
    sizes, unreadable = {}, []
    for one in tracking.progress(photographs, "pictures"):
        try:
            with Image.open(images / one.filename) as file:
                file.load()
                sizes[one.im_id] = file.size
        except UNREADABLE:
            unreadable.append(one.filename)
    if not sizes:
        raise DataError(f"{images}: none of its {len(unreadable)} pictures can be decoded, e.g. {unreadable[0]}")
    return sizes, unreadable


class _Writer:
    """Lists of images and annotations that grow photograph by photograph, and counts of what was left out."""

    def __init__(self, thesis: bool, category_ids: dict[str, int], ignore: bool):
        self.thesis, self.category_ids = thesis, category_ids
        self.ignored_as = sorted(set(category_ids.values())) if ignore else []
        self.images, self.annotations = [], []
        self.objects, self.unmapped, self.left_out = Counter(), Counter(), Counter(repeated=0, without_area=0)

    def add(self, photograph: Photograph, width: int, height: int) -> None:
        """One photograph of `width` x `height` pixels with its objects."""
        ids: dict[tuple[str, Box | None], int | None] = {}  # of the annotation that an object has become, if it has
        for one in photograph.objects:
            if (one.category, one.box) in ids and not self.thesis:
                self.left_out["repeated"] += 1
            else:
                box = self._box(one.box, width, height)
                ids[one.category, one.box] = self._add_object(one.category, photograph.im_id, box)

        def side(name: str, category: str, box: Box | None) -> dict:
            known = {f"{name}_box": self._box(box, width, height), f"{name}_id": ids.get((category, box))}
            return {name: category, **known}

        relationships = [
            {"predicate": predicate, **side("subject", one.sub, one.sub_box), **side("object", one.obj, one.obj_box)}
            for one in photograph.relationships
            for predicate in one.rels
        ]
        image = {"id": photograph.im_id, "file_name": photograph.filename, "width": width, "height": height}
        self.images.append(image | {"relationships": relationships})

    def _add_object(self, category: str, image_id: int, box: list[float]) -> int | None:
        """The id of its annotation; None for an object that is left out or ignored."""
        if not self.thesis and min(box[2:]) <= 0:
            self.left_out["without_area"] += 1
            return None
        known = category in self.category_ids
        (self.objects if known else self.unmapped)[category] += 1
        for category_id in [self.category_ids[category]] if known else self.ignored_as:
            id = len(self.annotations) + (0 if self.thesis else 1)
            entry = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": box}
            self.annotations.append(entry | {"area": box[2] * box[3], "iscrowd": int(not known)})
        return id if known else None

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
    left_out = f"repeated boxes {info['repeated']}, without area {info['without_area']}"
    return "\n".join([*lines, f"{left_out}, pictures not readable: {', '.join(info['unreadable']) or 'none'}"])
