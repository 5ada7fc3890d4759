"""Pascal VOC's layout: an XML file for each picture.

Pictures lie in JPEGImages or images beside the folder Annotations, or else beside their XML files.

Coordinates are those of VOC: the first pixel is 1, and the last one belongs to the box, so that a box of a whole
picture goes from 1 to its width. Several programs that write such files count from 0; their boxes come out one pixel
larger, to the left and above. An object that is `difficult` is treated as in VOC: it is no target, and who finds it is
neither right nor wrong. In COCO's terms it is a crowd, which also forgives detections of parts of it.

Classes are all names that occur in any split, in alphabetical order, so that splits agree on them.
"""

import logging
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from detrlib.data.pictures import is_picture, numbered
from detrlib.errors import DataError, listed

logger = logging.getLogger(__name__)
warn_once = cache(logger.warning)  # the same files are read several times

XML_FOLDERS, IMAGE_FOLDERS = ("Annotations", "annotations"), ("JPEGImages", "images")


def splits(root: Path) -> dict[str, Path]:
    """The lists of a folder with Annotations; where it has none, that folder itself; {} without XML files in it."""
    if (folder := _xml_folder(root)) is None:
        return {}
    lists = {path.stem: path for path in sorted(root.glob("ImageSets/Main/*.txt"))}
    # Lists of single classes are called cat_train.
    return {name: path for name, path in lists.items() if name.rpartition("_")[2] == name} or {"all": folder}


def splits_beside_pictures(root: Path) -> dict[str, Path]:
    """Folders that hold XML files: `root` itself, or those in it."""
    folders = [root, *sorted(path for path in root.glob("*") if path.is_dir())]
    return {path.name: path for path in folders if any(path.glob("*.xml"))}


def images_of(annotations: Path) -> Path:
    """The folder of the pictures of a list or of a folder of XML files. Raises DataError where there is none."""
    if annotations.is_dir() and annotations.name not in XML_FOLDERS:
        return annotations
    root = annotations.parent if annotations.is_dir() else annotations.parents[2]
    for name in IMAGE_FOLDERS:
        if (root / name).is_dir():
            return root / name
    if annotations.is_dir() and any(map(is_picture, annotations.iterdir())):
        return annotations
    raise DataError(
        f"{annotations}: there is no folder of its pictures: neither {' nor '.join(IMAGE_FOLDERS)} in {root}"
    )


def read(annotations: Path) -> dict:
    """The content of a list or of a folder of XML files as COCO has it. Raises DataError naming file and object."""
    folder = annotations if annotations.is_dir() else _xml_folder(annotations.parents[2])
    if folder is None:
        raise DataError(f"{annotations}: no Annotations with XML files in {annotations.parents[2]}")
    trees, images = _trees(folder), images_of(annotations)
    stems = list(trees) if annotations.is_dir() else _listed(annotations, trees)
    there = {path.stem: path.name for path in sorted(images.iterdir()) if is_picture(path)}
    if annotations.is_dir() and (others := there.keys() - trees.keys()):
        warn_once(f"{images}: {len(others)} pictures have no XML file in {folder} and are left out")
    names = sorted({name for tree in (*trees.values(), *_others(folder)) for name in _names(tree)})
    if not names:
        raise DataError(f"{folder}: no object in any XML file: there are no classes to learn")
    category_ids = {name: id for id, name in enumerate(names, 1)}
    content = {"images": [], "annotations": [], "categories": [{"id": id, "name": n} for n, id in category_ids.items()]}
    for id, stem in zip(numbered(stems), stems, strict=True):
        path, tree = folder / f"{stem}.xml", trees[stem]
        file_name = there.get(stem) or (tree.findtext("filename") or "").strip()
        if not file_name or not (stem in there or (images / file_name).is_file()):
            raise DataError(f"{path}: its picture {file_name or stem} is not in {images}; add it or remove the file")
        content["images"].append({"id": id, "file_name": file_name} | _size(tree, path))
        for number, element in enumerate(tree.findall("object"), 1):
            found = _object(element, f"{path}: object {number}", category_ids)
            content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": id} | found)
    return content


def _xml_folder(root: Path) -> Path | None:
    return next((root / name for name in XML_FOLDERS if any((root / name).glob("*.xml"))), None)


def _trees(folder: Path) -> dict[str, ElementTree.Element]:
    """The content of the XML files of a folder, by the name that they share with their pictures."""
    trees = {}
    for path in sorted(folder.glob("*.xml")):
        try:
            trees[path.stem] = ElementTree.parse(path).getroot()
        except (OSError, ElementTree.ParseError) as error:
            raise DataError(f"{path}: not readable as XML ({error})") from None
        if trees[path.stem].tag != "annotation":
            raise DataError(
                f"{path}: begins with <{trees[path.stem].tag}>; files of Pascal VOC begin with <annotation>"
            )
    return trees


def _others(folder: Path) -> Iterator[ElementTree.Element]:
    """The content of the files of other splits, where each has a folder of its own."""
    names = ("train", "valid", "val", "test")
    if folder.name in names:
        for other in names:
            if other != folder.name:
                yield from _trees(folder.parent / other).values()


def _listed(annotations: Path, trees: dict[str, ElementTree.Element]) -> list[str]:
    """The names in a list, of which each has an XML file."""
    try:
        lines = annotations.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{annotations}: not readable as text ({error})") from None
    stems = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    if lost := [stem for stem in stems if stem not in trees]:
        raise DataError(
            f"{annotations}: {len(lost)} of {len(stems)} have no XML file in Annotations: {listed(lost, 3)}"
        )
    return stems


def _names(tree: ElementTree.Element) -> list[str]:
    return [name.strip() for element in tree.findall("object") if (name := element.findtext("name", "")).strip()]


def _size(tree: ElementTree.Element, path: Path) -> dict[str, int]:
    """Width and height, where the file has them; otherwise they are read from the picture later."""
    given = [(tree.findtext(f"size/{name}") or "0").strip() for name in ("width", "height")]
    try:
        width, height = (int(float(text)) for text in given)
    except (ValueError, OverflowError):
        raise DataError(f"{path}: size: {' x '.join(given)} are no numbers of pixels") from None
    return {"width": width, "height": height} if width and height else {}


def _object(element: ElementTree.Element, where: str, category_ids: dict[str, int]) -> dict:
    """An object as an annotation of COCO."""
    name, corners = element.findtext("name", "").strip(), []
    if not name:
        raise DataError(f"{where}: has no name")
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{corner}")
        try:
            corners.append(float(text or ""))
        except ValueError:
            raise DataError(f"{where} ({name}): bndbox/{corner} is {text!r}, no number of pixels") from None
        if not math.isfinite(corners[-1]):
            raise DataError(f"{where} ({name}): bndbox/{corner} is {text}, no finite number")
    left, top, right, bottom = corners
    crowd = int((element.findtext("difficult") or "0").strip().lower() in ("1", "true"))
    # A box from 0 was not counted from 1: what would lie outside the picture is left away.
    left, top = max(left - 1, 0) if left >= 0 else left, max(top - 1, 0) if top >= 0 else top
    return {"category_id": category_ids[name], "bbox": [left, top, right - left, bottom - top], "iscrowd": crowd}
