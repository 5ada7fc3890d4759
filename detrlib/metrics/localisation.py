"""Where attention lies: the percentage of attention inside the bounding box (PAIBB), as a share from 0 to 1.

Letters: n matched queries, h x w cells of the attention map.
"""

import torch
from torch import Tensor

from detrlib.boxes import cxcywh_to_xyxy

SMALL, LARGE = 32**2, 96**2  # COCO's limits between object sizes, square pixels


def paibb(maps: Tensor, boxes_cxcywh: Tensor, extent: tuple[float, float]) -> Tensor:
    """Share of each query's attention that lies inside its box -> [n], 0 for a map without attention.

    maps [n, h, w]: attention of the matched queries, non-negative. boxes_cxcywh [n, 4]: their ground-truth boxes,
    normalised to the image; parts outside the image are cut off. extent: (height, width) of the image measured in
    cells, image pixels / stride. It may be fractional and at most (h, w), since the last row and column of cells
    reach past the image whenever the stride does not divide its size. Raises ValueError otherwise.

    The map stands for its bilinear interpolation (cell centres at half integers, constant beyond the outermost
    centres), a function f on [0, extent_h] x [0, extent_w], and
        PAIBB = integral of f over the box / integral of f over the image.
    f is linear in the cells, hence each integral is a_y^T M a_x, with a_y and a_x the integrals of the hat functions
    of the rows and the columns: exact for any box, however small, and without enlarging the map.
    """
    height, width = maps.shape[-2:]
    if not (0 < extent[0] <= height and 0 < extent[1] <= width):
        raise ValueError(f"an image of {tuple(extent)} cells (height, width) does not fit a map of {height} x {width}")
    corners = cxcywh_to_xyxy(boxes_cxcywh.double()).clamp(0, 1)
    x_start, y_start, x_end, y_end = corners.unbind(-1)
    inside = _integral(
        maps,
        _hat_integrals(y_start * extent[0], y_end * extent[0], height),
        _hat_integrals(x_start * extent[1], x_end * extent[1], width),
    )
    zero = torch.zeros_like(x_start)
    total = _integral(
        maps,
        _hat_integrals(zero, zero + extent[0], height),
        _hat_integrals(zero, zero + extent[1], width),
    )
    return torch.where(total > 0, inside / total.where(total > 0, 1.0), 0.0).float()


def object_size(area: float) -> str:
    """'small', 'medium' or 'large' for an area in square pixels; both limits belong to 'medium'."""
    if area < SMALL:
        return "small"
    return "medium" if area <= LARGE else "large"


def _integral(maps: Tensor, row_weights: Tensor, column_weights: Tensor) -> Tensor:
    return torch.einsum("nh,nhw,nw->n", row_weights, maps.double(), column_weights)


def _hat_integrals(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Integral over [start, end] of each cell's interpolation weight: [n], [n] -> [n, cells]."""
    # One cell more at either side holds the value of its neighbour: that is what "constant beyond" means.
    centres = torch.arange(-1, cells + 1, dtype=start.dtype, device=start.device) + 0.5
    hats = _hat_up_to(end[:, None] - centres) - _hat_up_to(start[:, None] - centres)  # [n, cells + 2]
    weights = hats[:, 1:-1].clone()
    weights[:, 0] += hats[:, 0]
    weights[:, -1] += hats[:, -1]
    return weights


def _hat_up_to(position: Tensor) -> Tensor:
    """Integral of max(0, 1 - |t|) for t from minus infinity to `position`."""
    t = position.clamp(-1, 1)
    return 0.5 + t - 0.5 * t * t.abs()
