"""Pictures as people have them: files, folders, patterns, lists in COCO's format, arrays; and how a file is read.

Data sets take pixels as they are stored, because COCO's annotations refer to them, unless data.orientation: exif says
that theirs refer to what programs show. Pictures of one's own are turned upright always; boxes in them refer to that.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from detrlib.data.decoding import UNREADABLE, open_picture, picture_size, read_picture, to_rgb, why_unreadable
from detrlib.errors import DataError, listed

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2"),
)


@dataclass
class Picture:
    """A picture to predict on, which is read when it is asked for."""

    name: str  # its path as given, or "picture 3"
    image_id: int
    source: Any  # Path, PIL image, array or tensor
    stored: tuple[int, int] | None = None  # (width, height) that a list of images says; it refers to stored pixels

    @property
    def title(self) -> str:
        """The name of its file."""
        return self.source.name if isinstance(self.source, Path) else self.name

    def read(self) -> tuple[Image.Image, tuple[int, int]]:
        """The picture in RGB, reduced where it is huge, and the height and width that it has without reduction.

        Raises DataError naming the file that cannot be read.
        """
        if not isinstance(self.source, Path):
            image = _as_image(self.source, self.name)
            return image, (image.height, image.width)
        try:
            image, size = read_picture(self.source, upright=self.stored is None, reduce=True)
        except UNREADABLE as error:
            raise DataError(f"{self.name}: {why_unreadable(error)}") from error
        if self.stored not in (None, size[::-1]) and picture_size(self.source, upright=True) == self.stored:
            image, size = read_picture(self.source, upright=True, reduce=True)  # the list was made of what is shown
        if self.stored not in (None, size[::-1]):
            told = "{} x {}".format(*self.stored)
            raise DataError(f"{self.name}: {size[1]} x {size[0]} pixels, its list says {told}; correct it there")
        return image, size

    def pixels(self, longest: int) -> np.ndarray:
        """The picture as [H,W,3] uint8, reduced where its longer side has more than `longest` pixels."""
        image, _ = self.read()
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return np.asarray(image)


def find_pictures(pictures: Any, limit: int | None = None) -> list[Picture]:
    """The pictures that are meant, none of them read yet.

    Args:
        pictures: one or several of: path of a picture; folder, whose own pictures are taken by name; pattern such as
            "photos/**/*.jpg"; JSON file in COCO's format, with or without annotations, whose images are near it; PIL
            image; array [H,W,3] or [H,W] uint8; tensor [3,H,W], uint8 or 0..1. Strings are paths.
        limit: the first ones only.

    Returns:
        Every file once. Their image ids are those of the JSON file, or the numbers that all files are named by, as
        COCO's are (000000000139.jpg: 139); otherwise 1, 2, 3, ...

    Raises:
        DataError: there is no such file, or no picture in it.
    """
    alone = isinstance(pictures, str | Path | Image.Image) or getattr(pictures, "ndim", 0) in (2, 3)
    alone = alone or not isinstance(pictures, Iterable)  # and then no picture, which is said below
    chosen = {}
    for number, given in enumerate([pictures] if alone else pictures, 1):
        if isinstance(given, str | Path):
            chosen |= {one.source.absolute(): one for one in _from_path(Path(given))}
        else:
            _as_image(given, f"picture {number}")  # raises what is no picture before anything else is done
            chosen[number] = Picture(f"picture {number}", -1, given)
    chosen = list(chosen.values())[:limit]
    if not chosen:
        raise DataError("no pictures are given: name files, folders, patterns, or give images or arrays")
    ids = [one.image_id for one in chosen]
    if min(ids) < 0 or len(set(ids)) < len(ids):
        for number, one in enumerate(chosen, 1):
            one.image_id = number
    return chosen


def find_files(folder: Path, names: list[str]) -> tuple[list[str], int, list[int]]:
    """The files of a data set in a folder, of which each listing is read once: fast for 118,000 of them.

    Names written on Windows, or on another machine with folders that are not here, are found by their last part.

    Returns:
        Names as they are there; how many of them were found so; and the numbers of those that are not there, or that
        were found so but mean the file of another.
    """
    listings, missing, moved, found = {}, [], set(), list(names)

    def is_there(name: str) -> bool:
        within, last = os.path.split(os.path.join(folder, name))
        if within not in listings:
            entries = os.scandir(within) if os.path.isdir(within) else ()
            listings[within] = {entry.name for entry in entries if entry.is_file()}  # no link to nowhere
        return last in listings[within]

    for index, name in enumerate(names):
        if not is_there(name):
            slashes = name.replace("\\", "/")
            there = next(filter(is_there, (slashes, PurePosixPath(slashes).name)), None)
            if there is None:
                missing.append(index)
            else:
                found[index] = there
                moved.add(there)
    if moved:
        used = Counter(found)
        missing += [index for index, name in enumerate(found) if name in moved and used[name] > 1]
    return found, len(moved), missing


def are_pictures(text: str) -> bool:
    """Whether a text names pictures that exist: a file of a known kind or content, a folder, a list, or a pattern."""
    path = Path(text)
    if os.path.isfile(path):  # which a name that is too long, or of a folder that is closed, does not break
        return path.suffix.lower() in (*SUFFIXES, ".json") or _fault(path) is None
    return os.path.isdir(path) or bool(_matches(text))


def readable(pictures: Sequence[Picture]) -> tuple[list[Picture], dict[str, str]]:
    """The pictures whose header can be read, and {name: why} of the others; files are not decoded for it.

    Raises DataError naming the files where none is left.
    """
    faults = {one.name: _fault(one.source) for one in pictures if isinstance(one.source, Path)}
    faults = {name: why for name, why in faults.items() if why}
    if len(faults) == len(pictures):
        raise DataError(unreadable(faults))
    return [one for one in pictures if one.name not in faults], faults


def sizes_in_files(files: Iterable[Path], upright: bool) -> list[tuple[int, int]]:
    """Width and height of pictures, of which only headers are read. Raises DataError naming all that have none."""
    sizes, faults = [], {}
    for file in files:
        try:
            sizes.append(picture_size(file, upright))
        except UNREADABLE as error:
            faults[str(file)] = why_unreadable(error)
    if faults:
        raise DataError(f"{len(faults)} pictures cannot be used: {unreadable(faults)}; replace or remove them")
    return sizes


def unreadable(faults: Mapping[str, str]) -> str:
    """In one line, which files cannot be read and why."""
    return listed((f"{name}: {why}" for name, why in faults.items()), between="; ")


def _fault(path: Path) -> str | None:
    """Why the header of a file is none of a picture that can be read; None: it is."""
    try:
        with open_picture(path):
            return None
    except UNREADABLE as error:
        return why_unreadable(error)


def pictures_folder(
    annotations: Path, first: str, images: Path | None = None, remedy: str = "move the file near them"
) -> Path:
    """The folder of an annotation file's pictures, the first of which is named `first`.

    It is `images`; if that is None, the COCO layout's folder of the same split, a folder "images" near the file, or the
    file's own, whichever holds the first picture. Raises DataError naming those tried, and the remedy.
    """
    split = annotations.stem.removeprefix("instances_").removeprefix("image_info_")
    near = annotations.parent
    of_all = near.parent / "images"
    tried = [images] if images else [near.parent / split, of_all / split, of_all, near / "images", near]
    for folder in tried:
        if (folder / first).is_file():
            return folder
    places = ", ".join(map(str, tried))
    raise DataError(f"{annotations}: its first picture, {first}, is not in {places}; {remedy}")


def _from_path(path: Path) -> list[Picture]:
    """The pictures of a file, a folder, a pattern, or a list of images."""
    if path.suffix.lower() == ".json" and path.is_file():
        return _from_list(path)
    if path.is_dir():
        files = _pictures_in(path)
    elif path.is_file():
        files = [path]
    elif path.exists():  # to read from a pipe would be to wait for ever
        raise DataError(f"{path}: neither a file nor a folder")
    elif not (files := _matches(str(path))):
        kind = "no picture matches it" if glob.has_magic(str(path)) else "there is no such file or folder"
        raise DataError(f"{path}: {kind}")
    return [Picture(str(file), int(file.stem) if _is_number(file.stem) else -1, file) for file in files]


def _from_list(path: Path) -> list[Picture]:
    from detrlib.data.annotations import read_image_list  # which reads layouts, for which pictures are looked for here

    records = read_image_list(path)
    folder = pictures_folder(path, records[0]["file_name"])
    sizes = [(record.get("width"), record.get("height")) for record in records]
    files = [folder / record["file_name"] for record in records]
    # Without sizes there is nothing that could refer to the stored pixels.
    return [
        Picture(str(file), record["id"], file, size if all(size) else None)
        for file, record, size in zip(files, records, sizes, strict=True)
    ]


def _pictures_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if is_picture(path))
    if not files:
        within = sorted({path.parent.name for path in folder.glob("*/*") if is_picture(path)})
        hint = f"there are some in {listed(within)}; name those" if within else f"known are {' '.join(SUFFIXES)}"
        raise DataError(f"{folder}: no pictures in this folder; {hint}")
    return files


def _matches(pattern: str) -> list[Path]:
    return sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if is_picture(path))


def is_picture(path: Path) -> bool:
    """Whether a path looks like a picture; those that begin with a dot are for programs."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def numbered(stems: Sequence[str]) -> list[int]:
    """Ids of images: the numbers that all files are named by, as COCO's and VOC's are, otherwise 1, 2, 3, ..."""
    ids = [int(stem) if _is_number(stem) else -1 for stem in stems]
    return ids if min(ids, default=0) >= 0 and len(set(ids)) == len(ids) else list(range(1, len(ids) + 1))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 15  # what JSON keeps exactly everywhere


def _as_image(source: Any, name: str) -> Image.Image:
    """A picture in memory as RGB, not turned. Raises DataError naming it for what is none."""
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source)
        except ValueError as error:
            raise DataError(f"{name}: {error}") from None
    pixels = _channels_last(source, name) if isinstance(source, Tensor) else source
    shape = getattr(pixels, "shape", ())
    if getattr(pixels, "dtype", None) != np.uint8 or 0 in shape or not (len(shape) == 2 or shape[2:] in ((3,), (4,))):
        kind = f"{source.dtype} {list(source.shape)}" if hasattr(source, "shape") else f"a {type(source).__name__}"
        raise DataError(f"{name}: {kind}; a picture is a path, a PIL image, an array [H,W,3] uint8 or a tensor [3,H,W]")
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _channels_last(pixels: Tensor, name: str) -> np.ndarray:
    """[3,H,W] or [1,H,W], uint8 or 0..1 -> [H,W,3] or [H,W] uint8."""
    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise DataError(f"{name}: a tensor with values outside 0..1; give pixels before they are normalised")
        pixels = functional.to_dtype(pixels, torch.uint8, scale=True)
    pixels = pixels.detach().cpu().numpy()
    return pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
