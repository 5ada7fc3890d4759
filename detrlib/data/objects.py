"""Which annotations are objects, and what their boxes are: one list for what is taught and for what is judged.

And how large they are beside what a cell of the feature map sees, from which sizes of images follow.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from detrlib.data.columns import BoxColumns, position_in

BEYOND = 0.5  # pixels beyond the image that are worth a word; less is rounding
MOST = 0.9  # of the objects: the share that is to fit an image size
FEWEST_CELLS = 2  # that an object is to be long
AT_ONCE = 2**16  # annotations, so that what is computed on the way stays small beside them


class Objects(NamedTuple):
    """The objects of a split, crowds included, in the order of the file, and what became of the rest."""

    rows: Tensor  # [n] their numbers among the annotations
    images: Tensor  # [n] position of each one's image among those that are meant
    boxes: Tensor  # [n,4] float64 x, y, width, height in pixels, as they are judged
    areas: Tensor  # [n] float64, square pixels
    without_area: list[int]  # ids of those left out because their box has no area inside the image, or is no number
    empty: int  # how many were left out because their box is [], which says that there is no object
    beyond: dict[int, float]  # id: pixels by which its box reaches beyond the image, where more than `BEYOND`

    def among(self, annotations: BoxColumns) -> BoxColumns:
        """The objects as columns, of the annotations that they were cleaned from."""
        return annotations.take(self.rows)._replace(boxes=self.boxes, areas=self.areas)


def clean(annotations: BoxColumns, image_ids: Tensor, sizes: Tensor, clip: bool = True) -> Objects:
    """The objects of images.

    Args:
        annotations: of any images, as `read_columns` gives them.
        image_ids: [N] of the images that are meant, rising.
        sizes: [N,2] of those, width and height in pixels.
        clip: cut boxes to their image, and areas to what is left of the box; False: leave those that have some area
            inside the image as they stand, as official code judges them.
    """
    most, count = len(annotations.ids), 0
    columns = [torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=torch.int64)]
    columns += [torch.empty(most, 4, dtype=torch.float64), torch.empty(most, dtype=torch.float64)]
    without_area, empty, beyond = [], 0, {}
    for start in range(0, most, AT_ONCE):
        part = _clean(annotations.take(slice(start, start + AT_ONCE)), image_ids, sizes, clip)
        first, count = count, count + len(part.rows)
        for column, values in zip(columns, (part.rows + start, *part[1:4]), strict=True):
            column[first:count] = values
        without_area += part.without_area
        empty, beyond = empty + part.empty, beyond | part.beyond
    return Objects(*(column[:count] for column in columns), without_area, empty, beyond)


def _clean(annotations: BoxColumns, image_ids: Tensor, sizes: Tensor, clip: bool) -> Objects:
    ids, boxes, empty = annotations.ids, annotations.boxes, annotations.empty
    images = position_in(image_ids, annotations.image_ids)
    meant = images >= 0
    first, last = clipped(boxes, sizes[images])
    usable = meant & (last > first).all(1) & boxes.isfinite().all(1)  # an empty box has no numbers
    without_area = ids[meant & ~usable & ~empty].tolist()
    beyond = torch.maximum(first - boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - last).amax(1)
    far = usable & (beyond > BEYOND)
    reaching = dict(zip(ids[far].tolist(), beyond[far].tolist(), strict=True))
    areas, cut = annotations.areas, beyond > 0
    if clip:
        areas = torch.where(cut, areas.minimum((last - first).prod(1)), areas)
        boxes = torch.where(cut[:, None], torch.cat([first, last - first], 1), boxes)
    rows = usable.nonzero()[:, 0]
    return Objects(rows, images[rows], boxes[rows], areas[rows], without_area, int((meant & empty).sum()), reaching)


def clipped(boxes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [n,4] xywh -> their first and last corners [n,2] inside images of `sizes` [n,2], all in pixels."""
    first, last = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    # Not clamp, which need not keep the sign of a zero, of which digests are made.
    return torch.where(first < 0, 0.0, first), torch.where(last > sizes, sizes.to(boxes.dtype), last)


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
