"""Which annotations are objects, and what their boxes are: one list for what is taught and for what is judged.

And how large they are beside what a cell of the feature map sees, from which sizes of images follow.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from detrlib.data.annotations import Annotation

BEYOND = 0.5  # pixels beyond the image that are worth a word; less is rounding
MOST = 0.9  # of the objects: the share that is to fit an image size
FEWEST_CELLS = 2  # that an object is to be long


class Objects(NamedTuple):
    """The objects of a split, crowds included, and what became of the rest."""

    annotations: list[Annotation]  # in the order of the file
    without_area: list[int]  # ids of those left out because their box has no area inside the image, or is no number
    empty: int  # how many were left out because their box is [], which says that there is no object
    beyond: dict[int, float]  # id: pixels by which its box reaches beyond the image, where more than `BEYOND`


def clean(annotations: Iterable[Annotation], sizes: Mapping[int, tuple[int, int]], clip: bool = True) -> Objects:
    """The objects of images.

    Args:
        annotations: of any images, as `read_annotations` gives them.
        sizes: {image id: (width, height) in pixels} of the images that are meant.
        clip: cut boxes to their image, and areas to what is left of the box; False: leave those that have some area
            inside the image as they stand, as official code judges them.
    """
    objects = Objects([], [], 0, {})
    empty = 0
    for annotation in annotations:
        size = sizes.get(annotation["image_id"])
        if size is None:
            continue
        if not annotation["bbox"]:
            empty += 1
            continue
        x0, y0, x1, y1 = clipped(annotation["bbox"], *size)
        if not (x1 > x0 and y1 > y0 and all(map(math.isfinite, annotation["bbox"]))):
            objects.without_area.append(annotation["id"])
            continue
        x, y, w, h = annotation["bbox"]
        beyond = max(x0 - x, y0 - y, x + w - x1, y + h - y1)
        if beyond > BEYOND:
            objects.beyond[annotation["id"]] = beyond
        if clip and beyond > 0:
            area = min(annotation["area"], (x1 - x0) * (y1 - y0))
            annotation = annotation | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area}
        objects.annotations.append(annotation)
    return objects._replace(empty=empty)


def clipped(box: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """xywh -> xyxy inside the image, all in pixels."""
    x, y, w, h = box
    return max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)


def suggested_image_sizes(sides: Tensor, stride: int, view: int) -> tuple[int, int]:
    """The range of `data.image_size` in which cells see most objects whole and most objects have cells of their own.

    Args:
        sides: longer sides of the objects in parts of the shorter side of their images, as of
            `CocoDataset.object_sides`; one or more.
        stride, view: of a backbone, in pixels, as of `detrlib.models.backbone_view`.

    Returns:
        The smallest size at which nine of ten objects are two cells long or more, and the largest at which nine of ten
        are no longer than what a cell sees; both 32 at least. Where the first is above the second no size does both.
    """
    smallest = FEWEST_CELLS * stride / torch.quantile(sides, 1 - MOST).item()
    largest = view / torch.quantile(sides, MOST).item()
    return max(32, round(smallest)), max(32, round(largest))
