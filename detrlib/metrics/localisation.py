"""Where attention lies with respect to a box: its share inside (PAIBB), its maximum, its centre of mass.

Letters: n matched queries, h x w cells of the attention map, a functionals (weights over rows or columns).

A map stands for its bilinear interpolation f: cell centres at half integers, constant beyond the outermost centres of
the image. f is linear in the cells M, hence every integral over a rectangle is a_y^T M a_x, with a_y and a_x the
integrals of the hat functions of rows and columns: exact for any box, however small, and without enlarging the map.
"""

from typing import Literal

import torch
from torch import Tensor

from detrlib.boxes import cxcywh_to_xyxy, to_pixels
from detrlib.errors import ConfigError

SMALL, LARGE = 32**2, 96**2  # COCO's limits between object sizes, square pixels
SIZES = ("small", "medium", "large")
ROUNDING = 1e-5  # of a cell: how far boxes in float32 may miss a centre on their edge
MEASURES = ("paibb", "paibb_normalised", "pointing", "distance", "mass")

Mode = Literal["exact", "thesis"]
Extent = tuple[float, float] | Tensor


def locate(
    maps: Tensor, boxes_cxcywh: Tensor, extent: Extent, mode: Mode = "exact", original_size: Tensor | None = None
) -> dict[str, Tensor]:
    """All MEASURES of maps [n, ..., h, w] against one box for each n -> {name: [n, ...]}; arguments as of `paibb`.

    paibb: see there. paibb_normalised: PAIBB / the box's share of the image's area; 1 for attention spread evenly,
    above 1 for attention drawn to the object, comparable between sizes; 0 for a box without area.

    pointing: 1 if the maximum lies in the box (edges included), 0 if not: the pointing game of Zhang et al. 2018,
    "Top-Down Neural Attention by Excitation Backprop", Sec. 4.2, without their margin of 15 pixels. The maximum of f is
    at the centre of the largest cell; a centre past the edge of the image counts as on the edge. Where several cells
    are largest: the share of them in the box, which is the expectation if one of them is drawn. 0 without attention.

    mass: sum of the weights of the cells of the image: one, or less where a null key or registers take a part, which
    has no place and counts in no other measure. These are of the mass that there is: a row with a thousandth of its
    weight on cells, all of it in the box, has a PAIBB of 1. Of all weight, mass * PAIBB is in the box.

    distance: from the centre of mass of f on the image to the centre of the box, over the diagonal of the box, so that
    1/2 is as far as its corners. NaN for a map without attention, or a box without length, for which there is none.
    """
    extent, corners = _checked(maps, boxes_cxcywh, extent)
    rows, columns = (_functionals(corners, extent, axis, maps.shape[axis - 2]) for axis in (0, 1))
    integrals = _integrals(maps, rows, columns)  # [n, ..., a, a]
    total = integrals[..., 1, 1]
    inside, whole = integrals[..., 0, 0], total
    if mode == "thesis":
        inside, whole = _pixel_sums(maps, boxes_cxcywh, extent, original_size)
    share = _ratio(inside, whole)
    size = corners[:, 1] - corners[:, 0]  # [n, 2] (height, width) of the box
    area = _like(size.prod(-1), share)
    mass = torch.stack([integrals[..., 2, 1], integrals[..., 1, 2]], -1) / total[..., None]  # (y, x) in cells
    centre = corners.mean(1) * extent
    away = (mass - _like(centre, mass)).norm(dim=-1) / _like((size * extent).norm(dim=-1), total)
    return {
        "paibb": share.float(),
        "paibb_normalised": _ratio(share, area).float(),
        "pointing": _pointing(maps, corners * extent[:, None], extent).float(),
        "distance": away.where(away.isfinite(), torch.nan).float(),
        "mass": (maps * _like(_in_image(maps, extent), maps)).sum((-2, -1)).float(),
    }


def paibb(
    maps: Tensor, boxes_cxcywh: Tensor, extent: Extent, mode: Mode = "exact", original_size: Tensor | None = None
) -> Tensor:
    """Percentage of attention inside the bounding box, as a share from 0 to 1 -> [n, ...]; 0 without attention.

    maps [n, ..., h, w]: attention of the matched queries, non-negative, further axes such as layers and heads at will.
    boxes_cxcywh [n, 4]: their ground-truth boxes, normalised to the image; parts outside the image are cut off.
    extent: (height, width) of the image measured in cells, image pixels / stride, for all or [n, 2]. It may be
    fractional and at most (h, w), since the last row and column of cells reach past the image whenever the stride does
    not divide its size; cells beyond those are padding and do not count. Raises ConfigError otherwise.

    mode "exact": integral of f over the box / integral of f over the image.
    mode "thesis": the procedure behind the published PAIBB of DETR with sparse cross-attention on COCO (softmax .371,
    sparsemax .416). The map is enlarged to `original_size` [n, 2], (height, width) of the image file, as if the last
    cells ended with the image; pixels are summed in the box cut down to whole pixels and divided by the sum of all.
    A box without a whole pixel gives 0. Computed in closed form as well.
    """
    return locate(maps, boxes_cxcywh, extent, mode, original_size)["paibb"]


def object_size(area: float) -> str:
    """'small', 'medium' or 'large' for an area in square pixels; both limits belong to 'medium'."""
    if area < SMALL:
        return "small"
    return "medium" if area <= LARGE else "large"


def _checked(maps: Tensor, boxes_cxcywh: Tensor, extent: Extent) -> tuple[Tensor, Tensor]:
    """Extents [n, 2] (height, width); corners [n, 2, 2], first and last, (y, x) in 0..1, inside the image."""
    height, width = maps.shape[-2:]
    given = torch.as_tensor(extent, dtype=torch.float64, device=maps.device)
    if not ((given > 0) & (given <= given.new_tensor([height, width]))).all():
        wrong = tuple(given.tolist())
        raise ConfigError(f"an image of {wrong} cells (height, width) does not fit a map of {height} x {width}")
    corners = cxcywh_to_xyxy(boxes_cxcywh.double()).clamp(0, 1)
    return given.expand(len(maps), 2), corners.unflatten(1, (2, 2)).flip(2)


def _integrals(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """maps [n, ..., h, w], rows [n, a, h], columns [n, a, w] -> a_y^T M a_x of every pair, [n, ..., a, a]."""
    h, a = rows.shape[2], rows.shape[1]
    half = maps.flatten(1, -2).double() @ columns.mT  # [n, ... * h, a]
    return (rows[:, None] @ half.view(len(maps), half.shape[1] // h, h, a)).view(*maps.shape[:-2], a, a)


def _functionals(corners: Tensor, extent: Tensor, axis: int, cells: int) -> Tensor:
    """[n, 3, cells]: integrals of each cell's hat over the box and the image, and of the position times the hat."""
    end = extent[:, axis, None]
    start, stop = corners[:, 0, axis, None] * end, corners[:, 1, axis, None] * end
    # One cell more at either side holds the value of its neighbour: that is what "constant beyond" means.
    centres = torch.arange(-1, cells + 1, dtype=end.dtype, device=end.device) + 0.5
    box = _hat_up_to(stop - centres) - _hat_up_to(start - centres)
    image = _hat_up_to(end - centres) - _hat_up_to(-centres)
    moment = centres * image + _moment_up_to(end - centres) - _moment_up_to(-centres)
    hats = torch.stack([box, image, moment], 1)  # [n, 3, cells + 2]
    cell = torch.arange(-1, cells + 1, device=end.device).clamp(min=0).minimum(end.ceil().long() - 1)  # [n, cells + 2]
    return hats.new_zeros(len(hats), 3, cells).scatter_add_(2, cell[:, None].expand_as(hats), hats)


def _hat_up_to(position: Tensor) -> Tensor:
    """Integral of max(0, 1 - |t|) for t from minus infinity to `position`."""
    t = position.clamp(-1, 1)
    return 0.5 + t - 0.5 * t * t.abs()


def _moment_up_to(position: Tensor) -> Tensor:
    """Integral of t max(0, 1 - |t|) for t from minus infinity to `position`."""
    t = position.clamp(-1, 1)
    return t * t / 2 - t.abs() ** 3 / 3 - 1 / 6


def _pointing(maps: Tensor, corners: Tensor, extent: Tensor) -> Tensor:
    """Share of the largest cells [n, ...] whose centre is in the box; corners [n, 2, 2] and extent in cells."""
    in_box = []
    for axis, cells in enumerate(maps.shape[-2:]):
        end = extent[:, axis, None]
        centre = (torch.arange(cells, dtype=end.dtype, device=end.device) + 0.5).minimum(end)
        first, last = corners[:, 0, axis, None] - ROUNDING, corners[:, 1, axis, None] + ROUNDING
        in_box.append((centre >= first) & (centre <= last))
    box = _like(in_box[0][:, :, None] & in_box[1][:, None], maps)  # [n, 1..., h, w]
    values = maps.masked_fill(~_like(_in_image(maps, extent), maps), 0.0)
    highest = values.amax((-2, -1), keepdim=True)
    largest = (values == highest) & (highest > 0)
    return _ratio((largest & box).sum((-2, -1)).float(), largest.sum((-2, -1)).float())


def _in_image(maps: Tensor, extent: Tensor) -> Tensor:
    """[n, h, w], True for cells that belong to the image, part of them at least."""
    ends = zip(extent.T, maps.shape[-2:], strict=True)
    rows, columns = (torch.arange(cells, device=end.device) < end[:, None].ceil() for end, cells in ends)
    return rows[:, :, None] & columns[:, None]


def _pixel_sums(
    maps: Tensor, boxes_cxcywh: Tensor, extent: Tensor, original_size: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums [n, ...] of the pixels of enlarged maps in the truncated box, and of all."""
    if original_size is None:
        raise ConfigError("PAIBB in mode 'thesis' is counted in pixels of the image file: original_size is needed")
    original_size = original_size.expand(len(maps), 2)
    # In float32 and truncated, as the published numbers: which pixels are in the box depends on it.
    pixels = to_pixels(cxcywh_to_xyxy(boxes_cxcywh.float()), original_size).int().unflatten(1, (2, 2)).flip(2)
    functionals = []
    for axis, cells in enumerate(maps.shape[-2:]):
        size, used = original_size[:, axis, None], extent[:, axis, None].ceil()
        pixel = torch.arange(max(original_size[:, axis].tolist(), default=0), device=maps.device)
        position = ((pixel + 0.5) * used / size - 0.5).clamp(min=0)  # [n, pixels] in cells from the first centre
        low = position.long().minimum(used.long() - 1)
        high, part = (low + 1).minimum(used.long() - 1), position - low
        in_box = (pixel >= pixels[:, 0, axis, None]) & (pixel < pixels[:, 1, axis, None])
        counted = torch.stack([in_box & (pixel < size), (pixel < size).expand_as(in_box)], 1).double()  # [n, 2, pixels]
        sums = counted.new_zeros(len(maps), 2, cells)
        for cell, weight in ((low, 1 - part), (high, part)):
            sums.scatter_add_(2, cell[:, None].expand_as(counted), counted * weight[:, None])
        functionals.append(sums)
    integrals = _integrals(maps, *functionals)
    return integrals[..., 0, 0], integrals[..., 1, 1]


def _like(values: Tensor, other: Tensor) -> Tensor:
    """values [n, ...] with axes of length 1 after the first, as many as `other` [n, ..., ...] has more."""
    return values.reshape(len(values), *[1] * (other.dim() - values.dim()), *values.shape[1:])


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where whole is 0."""
    return torch.where(whole > 0, part / whole.where(whole > 0, 1.0), 0.0)
