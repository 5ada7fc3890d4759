"""The annotations of a split as columns: 860,000 boxes take 62 MB, which processes can share, and checks are vectors.

N images, M annotations, in the order of the file. Dictionaries are made of them only for who judges detections.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from detrlib.data.annotations import Annotation, Annotations, ImageRecord


class Names(NamedTuple):
    """Texts in two tensors, because a worker that only looks at a Python object makes a copy of its page."""

    letters: Tensor  # uint8, UTF-8 of all of them
    ends: Tensor  # [N] int64, where each one ends in it

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Names":
        """Texts as tensors."""
        encoded = [text.encode() for text in texts]
        letters = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        return cls(letters, torch.tensor([len(text) for text in encoded], dtype=torch.int64).cumsum(0))

    def __getitem__(self, index: int) -> str:
        """One text; `index` counts from 0."""
        first = int(self.ends[index - 1]) if index else 0
        return self.letters[first : int(self.ends[index])].numpy().tobytes().decode()

    def tolist(self) -> list[str]:
        """All of them."""
        letters, ends = self.letters.numpy().tobytes(), self.ends.tolist()
        return [letters[first:last].decode() for first, last in pairwise([0, *ends])]


class ImageColumns(NamedTuple):
    """What `ImageRecord` has of each image."""

    ids: Tensor  # [N] int64
    names: Names
    sizes: Tensor  # [N,2] int64, width and height in pixels; 0: not in the file

    @classmethod
    def of(cls, records: Iterable[ImageRecord]) -> "ImageColumns":
        """Records as columns."""
        records = list(records)
        sizes = [(record.get("width") or 0, record.get("height") or 0) for record in records]
        ids = torch.tensor([record["id"] for record in records], dtype=torch.int64)
        return cls(ids, Names.of(record["file_name"] for record in records), torch.tensor(sizes).reshape(-1, 2))

    def records(self) -> list[ImageRecord]:
        """Columns as records."""
        columns = self.ids.tolist(), self.names.tolist(), self.sizes.tolist()
        return [
            {"id": id, "file_name": name} | ({"width": width} if width else {}) | ({"height": height} if height else {})
            for id, name, (width, height) in zip(*columns, strict=True)
        ]


class BoxColumns(NamedTuple):
    """What `Annotation` has of each object, complete."""

    ids: Tensor  # [M] int64
    image_ids: Tensor  # [M] int64
    category_ids: Tensor  # [M] int64
    boxes: Tensor  # [M,4] float64: x, y, width, height in pixels; without a number where it is empty
    areas: Tensor  # [M] float64, square pixels
    crowd: Tensor  # [M] bool
    empty: Tensor  # [M] bool: bbox is [], which says that there is no object

    @classmethod
    def of(cls, annotations: Iterable[Annotation]) -> "BoxColumns":
        """Annotations as columns."""
        annotations = list(annotations)
        numbers = {name: [one[name] for one in annotations] for name in ("id", "image_id", "category_id")}
        boxes = torch.tensor([one["bbox"] or (math.nan,) * 4 for one in annotations], dtype=torch.float64)
        return cls(
            *(torch.tensor(column, dtype=torch.int64) for column in numbers.values()),
            boxes.reshape(-1, 4),
            torch.tensor([one["area"] for one in annotations], dtype=torch.float64),
            torch.tensor([bool(one["iscrowd"]) for one in annotations], dtype=torch.bool),
            torch.tensor([not one["bbox"] for one in annotations], dtype=torch.bool),
        )

    def take(self, rows: Tensor) -> "BoxColumns":
        """The annotations that numbers, a slice or a mask choose."""
        return BoxColumns(*(column[rows] for column in self))

    def annotations(self) -> list[Annotation]:
        """Columns as annotations."""
        columns = self._replace(crowd=self.crowd.long())
        return [
            {
                **{"id": id, "image_id": image_id, "category_id": category_id},
                **{"bbox": [] if empty else box, "area": area, "iscrowd": is_crowd},
            }
            for id, image_id, category_id, box, area, is_crowd, empty in zip(
                *(c.tolist() for c in columns), strict=True
            )
        ]


class Columns(NamedTuple):
    """A whole file, checked and complete."""

    images: ImageColumns
    boxes: BoxColumns
    rest: dict  # what else it holds: categories, info, licenses

    @classmethod
    def of(cls, content: Annotations) -> "Columns":
        """Of what `read_annotations` gives."""
        rest = {name: value for name, value in content.items() if name not in ("images", "annotations")}
        return cls(ImageColumns.of(content["images"]), BoxColumns.of(content["annotations"]), rest)

    def content(self) -> Annotations:
        """As dictionaries, as `read_annotations` gives them; sizes that the file does not have are left out."""
        return {"images": self.images.records(), "annotations": self.boxes.annotations()} | self.rest


def position_in(ascending: Tensor, values: Tensor) -> Tensor:
    """Where each of the values stands in a column that rises, -1 where it does not."""
    if not len(ascending):
        return torch.full_like(values, -1)
    position = torch.searchsorted(ascending, values).clamp_(max=len(ascending) - 1)
    return position.masked_fill_(ascending[position] != values, -1)
