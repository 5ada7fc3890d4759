"""Boxes as [..., 4] tensors. `cxcywh`: centre and size; `xyxy`: corners. Plain IoU comes from `torchvision.ops`."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] (cx, cy, w, h) -> [..., 4] (x0, y0, x1, y1), same units."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] (x0, y0, x1, y1) -> [..., 4] (cx, cy, w, h), same units."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def to_pixels(boxes: Tensor, size: Tensor) -> Tensor:
    """Normalised boxes [..., 4] -> pixels of images whose `size` is [..., 2] (height, width)."""
    height, width = size.to(boxes).unbind(-1)
    return boxes * torch.stack([width, height, width, height], dim=-1)


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of boxes (Rezatofighi et al. 2019, Alg. 1), in -1..1: xyxy [..., 4] twice, broadcast -> [...].

    GIoU = IoU - (|C| - |A u B|) / |C| with C the smallest box around both. Nothing is added to the areas, where
    torchvision's loss adds 1e-7: a box has exactly 1 with itself, however small it is. A quotient by an area of 0
    counts as 0 and has no gradient, so that two equal points have 0.
    """
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    inner = _area((high - low).clamp(min=0))
    outer = _area(torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2]))
    union = _area(first[..., 2:] - first[..., :2]) + _area(second[..., 2:] - second[..., :2]) - inner
    return inner / _divisor(union) - (outer - union) / _divisor(outer)


def pairwise_giou(first: Tensor, second: Tensor) -> Tensor:
    """`giou` of every pair: xyxy [..., N, 4] and [..., M, 4] -> [..., N, M]."""
    return giou(first[..., :, None, :], second[..., None, :, :])


def _area(size: Tensor) -> Tensor:
    return size[..., 0] * size[..., 1]


def _divisor(area: Tensor) -> Tensor:
    """Areas, with 1 for those too small to be divided by; what would be divided is then 0 or nearly so."""
    return torch.where(area > torch.finfo(area.dtype).tiny, area, 1.0)
