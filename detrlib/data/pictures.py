"""Pictures as people have them: files, folders, patterns, lists in COCO's format, arrays; and how a file is read.

Data sets take pixels as they are stored, because COCO's annotations refer to them, unless data.orientation: exif says
that theirs refer to what programs show. Pictures of one's own are turned upright always; boxes in them refer to that.
"""

import glob
import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms.v2 import functional

from detrlib.data.annotations import read_image_list
from detrlib.errors import DataError, listed

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2"),
)
# What Pillow raises, by file type and fault, for a picture it cannot decode.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError)
MOST_PIXELS = 2**26  # larger pictures of one's own are reduced while they are read,
REDUCED = 2**24  # to about that many
TURNED = (5, 6, 7, 8)  # orientations in EXIF that exchange width and height
END_OF_JPEG = b"\xff\xd9"  # lets Pillow decode what there is of a file cut short
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # modes of Pillow with more than 8 bits
DEPTHS = (8, 12, 16)  # bits of a pixel that cameras and scanners write


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


def read_picture(
    path: Path, upright: bool = False, reduce: bool = False, truncated: bool = False
) -> tuple[Image.Image, tuple[int, int]]:
    """A file's picture in RGB, and its height and width.

    Args:
        path: any file that Pillow reads.
        upright: turned as its orientation in EXIF says, size included.
        reduce: pictures of more than `MOST_PIXELS` become smaller, JPEG while it is decoded; the size that is returned
            stays that of the file.
        truncated: a JPEG that is cut short is read, grey where nothing is left.

    Raises:
        One of `UNREADABLE`: it is no picture, or cut short, or too large for its format.
    """
    try:
        return _decode(path, upright, reduce)
    except OSError:
        if not (truncated and path.is_file() and is_jpeg(path)):
            raise
        return _decode(io.BytesIO(path.read_bytes() + END_OF_JPEG), upright, reduce)


def _decode(source: Path | io.BytesIO, upright: bool, reduce: bool) -> tuple[Image.Image, tuple[int, int]]:
    with open_picture(source) as file:
        width, height = file.size
        if reduce and width * height > MOST_PIXELS:
            by = math.sqrt(REDUCED / (width * height))
            wanted = math.ceil(width * by), math.ceil(height * by)
            file.thumbnail(wanted, Image.Resampling.BOX, reducing_gap=1)
        if not upright:
            return to_rgb(file), (height, width)
        image = to_rgb(ImageOps.exif_transpose(file))
        return image, (width, height) if orientation_of(file) in TURNED else (height, width)


def picture_size(path: Path, upright: bool = False) -> tuple[int, int]:
    """Width and height of a file's picture, of which only the header is read. Raises as `read_picture`."""
    with open_picture(path) as file:
        return file.size[::-1] if upright and orientation_of(file) in TURNED else file.size


def orientation_of(file: Image.Image) -> int:
    """What EXIF says of a picture that is open: 1 as it is stored, 2 to 8 mirrored or turned; of TIFF, which Pillow
    turns itself, 1."""
    return 1 if file.format == "TIFF" else file.getexif().get(ExifTags.Base.Orientation, 1)


def is_jpeg(path: Path) -> bool:
    """Whether a file begins as a JPEG does."""
    with path.open("rb") as content:
        return content.read(3) == b"\xff\xd8\xff"


@contextmanager
def open_picture(source: Path | io.BytesIO):
    """The Pillow image of a file, its header read. A JPEG is opened however large it is: it can be read reduced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            file = Image.open(source)
        except Image.DecompressionBombError:
            if not (isinstance(source, Path) and is_jpeg(source)):
                raise
            file = JpegImageFile(source)
        with file:
            yield file


def to_rgb(image: Image.Image) -> Image.Image:
    """Greyscale, palette, CMYK and images with transparency as RGB; transparency itself is discarded.

    Greyscale of more than 8 bits is scaled by the least range, of 8, 12 and 16 bits, that holds its brightest pixel;
    floating point numbers of 0..1 by theirs.
    """
    if image.mode in DEEP:
        pixels, bits = np.asarray(image), depth_of(image)
        scaled = pixels // 2 ** (bits - 8) if bits > 1 else (pixels * 255).round()
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def depth_of(image: Image.Image) -> int:
    """How many bits the brightest pixel takes, 8, 12 or 16; 1 for floating point numbers of 0..1.

    Raises ValueError for numbers that are no picture's.
    """
    if image.mode not in DEEP:
        return 8
    low, high = image.getextrema()
    if image.mode == "F" and low >= 0 and high <= 1:
        return 1
    bits = next((bits for bits in DEPTHS if low >= 0 and high < 2**bits), None)
    if bits is None:
        raise ValueError(f"its pixels go from {low:g} to {high:g}, which no picture's do; save it with 8 or 16 bits")
    return bits


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


def are_pictures(text: str) -> bool:
    """Whether a text names pictures that exist: a file of a known kind or content, a folder, a list, or a pattern."""
    path = Path(text)
    if path.is_file():
        return path.suffix.lower() in (*SUFFIXES, ".json") or _fault(path) is None
    return path.is_dir() or bool(_matches(text))


def readable(pictures: Sequence[Picture]) -> tuple[list[Picture], dict[str, str]]:
    """The pictures whose header can be read, and {name: why} of the others; files are not decoded for it.

    Raises DataError naming the files where none is left.
    """
    faults = {one.name: _fault(one.source) for one in pictures if isinstance(one.source, Path)}
    faults = {name: why for name, why in faults.items() if why}
    if len(faults) == len(pictures):
        raise DataError(unreadable(faults))
    return [one for one in pictures if one.name not in faults], faults


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

    It is `images`; if that is None, the COCO layout's folder of the same split, a folder "images" beside the file, or
    the file's own, whichever holds the first picture. Raises DataError naming those tried, and the remedy.
    """
    split = annotations.stem.removeprefix("instances_").removeprefix("image_info_")
    near = annotations.parent
    tried = [images] if images else [near.parent / split, near / "images", near]
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
    elif path.exists():
        files = [path]
    elif not (files := _matches(str(path))):
        kind = "no picture matches it" if glob.has_magic(str(path)) else "there is no such file or folder"
        raise DataError(f"{path}: {kind}")
    return [Picture(str(file), int(file.stem) if _is_number(file.stem) else -1, file) for file in files]


def _from_list(path: Path) -> list[Picture]:
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
    files = sorted(path for path in folder.iterdir() if _is_picture(path))
    if not files:
        within = sorted({path.parent.name for path in folder.glob("*/*") if _is_picture(path)})
        hint = f"there are some in {listed(within)}; name those" if within else f"known are {' '.join(SUFFIXES)}"
        raise DataError(f"{folder}: no pictures in this folder; {hint}")
    return files


def _matches(pattern: str) -> list[Path]:
    return sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if _is_picture(path))


def _is_picture(path: Path) -> bool:
    """Whether a path looks like a picture; those that begin with a dot are for programs."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 15  # what JSON keeps exactly everywhere


def _as_image(source: Any, name: str) -> Image.Image:
    """A picture in memory as RGB, not turned. Raises DataError naming it for what is none."""
    if isinstance(source, Image.Image):
        return to_rgb(source)
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


def why_unreadable(error: Exception) -> str:
    """In words, why a file is no picture that can be read."""
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels for its format; save it smaller, or as JPEG, of which any size is read"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture, or of a kind that Pillow does not read"
    return f"not readable as a picture ({getattr(error, 'strerror', None) or error})"
