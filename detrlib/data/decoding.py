"""How the file of a picture is read: the one place that decodes, with a rule for each thing that files differ in."""

import io
import math
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from detrlib.errors import DataError

# What Pillow raises, by file type and fault, for a picture it cannot decode.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError)
MOST_PIXELS = 2**26  # larger pictures of one's own are reduced while they are read,
REDUCED = 2**24  # to about that many
TURNED = (5, 6, 7, 8)  # orientations in EXIF that exchange width and height
END_OF_JPEG = b"\xff\xd9"  # lets Pillow decode what there is of a file cut short
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # modes of Pillow with more than 8 bits
DEPTHS = (8, 12, 16)  # bits of a pixel that cameras and scanners write


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


def as_pixels(image: Image.Image) -> Tensor:
    """A picture in RGB as uint8 [3,H,W], which lies in memory as [H,W,3]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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
        turned = file.getexif().get(ExifTags.Base.Orientation) in TURNED
        return image, (width, height) if turned else (height, width)


def picture_size(path: Path, upright: bool = False) -> tuple[int, int]:
    """Width and height of a file's picture, of which only the header is read. Raises DataError naming the file."""
    try:
        with open_picture(path) as file:
            return file.size[::-1] if upright and orientation_of(file) in TURNED else file.size
    except UNREADABLE as error:
        raise DataError(f"{path}: {why_unreadable(error)}; replace it or remove its entry") from error


def orientation_of(file: Image.Image) -> int:
    """What EXIF says of a picture that is open: 1 as it is stored, 2 to 8 mirrored or turned; of TIFF, which Pillow
    turns itself, 1. PNG without tags at its beginning would be decoded to look for some at its end."""
    if file.format == "TIFF" or (file.format == "PNG" and "exif" not in file.info):
        return 1
    return file.getexif().get(ExifTags.Base.Orientation, 1)


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


def why_unreadable(error: Exception) -> str:
    """In words, why a file is no picture that can be read."""
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels for its format; save it smaller, or as JPEG, of which any size is read"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture, or of a kind that Pillow does not read"
    return f"not readable as a picture ({getattr(error, 'strerror', None) or error})"
