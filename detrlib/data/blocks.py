"""A clean COCO file, read in blocks: its polygons are passed over, and what is kept goes to columns at once.

Only what needs no second look is read here. Numbers written as text, fields that are missing, references to nothing:
anything odd, and `read_annotations` reads the file instead, which mends it or names the fault. A test holds that both
give the same.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec
import numpy as np
import torch
from pydantic_core import from_json, to_json

from detrlib.data.annotations import FILE
from detrlib.data.columns import BoxColumns, Columns, ImageColumns, Names, position_in

BLOCK = 2**21  # bytes; the memory that reading takes besides the columns is some times as much
KEY = re.compile(rb'\s*([{,])\s*("(?:[^"\\]|\\.)*")\s*:\s*')
OPENED, CLOSED = re.compile(rb"\s*\[\s*(\]?)"), re.compile(rb"\s*\}\s*")
LAST = re.compile(rb"\}\s*\]")  # of the entries of a list
BETWEEN = re.compile(rb"\}\s*,\s*$")  # before the bracket that opens the next entry
SPACES = 256  # that may lie between two entries
MOST = 8  # blocks that are held while one entry, or one other value, goes on


class OddFile(Exception):
    """Why a file is not read here."""


class Twice(OddFile):
    """A key that is there twice, of which any other reader would take the last and lose the rest in silence."""


class Image(msgspec.Struct, gc=False):
    """An image, strictly."""

    id: int
    file_name: str
    width: int | None = None
    height: int | None = None


class Box(msgspec.Struct, gc=False):
    """An annotation, strictly; what is None is odd but for its area and iscrowd."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool | None = None


DECODERS = {"images": msgspec.json.Decoder(list[Image]), "annotations": msgspec.json.Decoder(list[Box])}


def read_blocks(file: BinaryIO) -> Columns:
    """Read the annotations of a split, checked and complete as `read_annotations` gives them.

    Args:
        file: JSON in COCO's format, at its beginning.

    Raises:
        OddFile: it holds anything that takes a second look.
    """
    images, boxes, rest = [], [], {}
    try:
        for name, value in _sections(_Text(file)):
            if name == "images":
                images += value
            elif name == "annotations":
                boxes.append(_box_columns(value))
            else:
                rest[name] = value
        if not boxes:
            raise OddFile("no list of annotations")
        return _checked(images, BoxColumns(*map(torch.cat, zip(*boxes, strict=True))), rest)
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:  # pydantic's is a ValueError
        raise OddFile(str(error)) from error


class _Text:
    """The part of a file that is being read."""

    def __init__(self, file: BinaryIO):
        self.file, self.text = file, b""

    def read(self) -> bool:
        """Take in the next block, if there is one."""
        if len(self.text) > MOST * BLOCK:
            raise OddFile("a value goes on and on")
        block = self.file.read(BLOCK)
        self.text += block
        return bool(block)

    def need(self) -> None:
        """Take in the next block, which must be there."""
        if not self.read():
            raise OddFile("it ends too soon")

    def skip(self, count: int) -> bytes:
        """Leave so many bytes behind."""
        skipped, self.text = self.text[:count], self.text[count:]
        return skipped


def _sections(source: _Text) -> Iterator[tuple[str, Any]]:
    """The keys of a file with their values; lists of images and annotations come in pieces."""
    seen = set()
    while not CLOSED.fullmatch(source.text) or source.read():
        key = KEY.match(source.text)
        if key is None and len(source.text) < BLOCK:
            source.need()
            continue
        if key is None or (key[1] == b",") != bool(seen):
            raise OddFile("no key where one should be")
        name = from_json(key[2])
        if name in seen:
            raise Twice(f"{name!r} is there twice")
        seen.add(name)
        source.skip(key.end())
        if name in DECODERS:
            yield name, []  # also where the list is empty
            yield from ((name, piece) for piece in _entries(source, DECODERS[name]))
        else:
            yield name, _value(source)


def _entries(source: _Text, decoder: msgspec.json.Decoder) -> Iterator[list]:
    """The entries of a list, some at a time.

    Where a list is cut is guessed by the brackets, and the decoder proves it: what is cut anywhere but between two
    entries is no list when it is closed.
    """
    while (opened := OPENED.match(source.text)) is None or opened.end() == len(source.text):
        if opened is None and source.text.strip():
            raise OddFile("no list where one should be")
        source.need()
    source.skip(opened.end())
    closed = bool(opened[1])
    while not closed:
        last = LAST.search(source.text)
        cut = last.start() + 1 if last else _between(source.text)
        if not cut:
            source.need()
            continue
        piece, closed = source.skip(cut), last is not None
        if not piece.isascii():
            piece.decode()  # the decoder does not look at texts that it passes over
        yield decoder.decode(b"[" + piece + b"]")
        source.skip(last.end() - cut if last else source.text.index(b",") + 1)


def _between(text: bytes) -> int:
    """Where the last entry ends that another one follows; 0: nowhere."""
    opening = text.rfind(b"{")
    while opening > 0:
        if found := BETWEEN.search(text, max(0, opening - SPACES), opening):
            return found.start() + 1
        opening = text.rfind(b"{", 0, opening)
    return 0


def _value(source: _Text) -> Any:
    """Any other value, whole."""
    while True:
        text, _ = codecs.utf_8_decode(source.text, "strict", False)  # a letter may lie in two blocks
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError:
            end = len(text)
        if end < len(text):  # otherwise it may go on in the next block
            return from_json(source.skip(len(text[:end].encode())))
        source.need()


def _box_columns(boxes: list[Box]) -> BoxColumns:
    """As they are in the file; an area that is missing is 0."""
    flags = np.array([box.iscrowd or 0 for box in boxes], np.int64)
    if not np.isin(flags, (0, 1)).all():
        raise OddFile("iscrowd is neither 0 nor 1")
    columns = (
        np.array([box.id for box in boxes], np.int64),
        np.array([box.image_id for box in boxes], np.int64),
        np.array([box.category_id for box in boxes], np.int64),
        np.array([box.bbox for box in boxes], np.float64).reshape(-1, 4),
        np.array([box.area or 0.0 for box in boxes], np.float64),
        flags.astype(bool),
        np.zeros(len(boxes), bool),
    )
    return BoxColumns(*map(torch.from_numpy, columns))


def _checked(images: list[Image], boxes: BoxColumns, rest: dict[str, Any]) -> Columns:
    """Whole columns, of which is checked what `annotations` checks of entries."""
    if not (images and all(image.file_name for image in images)):
        raise OddFile("no images, or one without a name")
    known = FILE.validate_json(to_json({"images": [{"id": 0, "file_name": "-"}], "annotations": []} | rest))
    rest = {name: value for name, value in known.items() if name not in DECODERS}
    ids = torch.tensor([image.id for image in images], dtype=torch.int64)
    sizes = torch.tensor([(image.width or 0, image.height or 0) for image in images], dtype=torch.int64)
    if ids.min() < 0 or sizes.min() < 0:
        raise OddFile("an id or a size is negative")
    for section, own, used in (
        ("images", ids, boxes.image_ids),
        ("categories", torch.tensor([one["id"] for one in rest["categories"]]), boxes.category_ids),
    ):
        known = own.sort().values
        if (known.diff() == 0).any() or (position_in(known, used) < 0).any():
            raise OddFile(f"ids of {section} are there twice, or are unknown")
    sides = boxes.boxes[:, 2] * boxes.boxes[:, 3]
    areas = torch.where((boxes.areas > 0) & (boxes.areas < math.inf), boxes.areas, sides)
    named = ImageColumns(ids, Names.of(image.file_name for image in images), sizes)
    return Columns(named, boxes._replace(areas=areas), rest)
