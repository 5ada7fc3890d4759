"""Which annotations are objects, and what their boxes are: one list for what is taught and for what is judged."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from detrlib.data.annotations import Annotation

BEYOND = 0.5  # pixels beyond the image that are worth a word; less is rounding


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
