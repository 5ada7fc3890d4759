"""Boxes as [..., 4] tensors. `cxcywh`: centre and size; `xyxy`: corners. IoU comes from `torchvision.ops`."""

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


def pairwise_giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of every pair (Rezatofighi et al. 2019, Alg. 1): [..., N, 4] and [..., M, 4] xyxy -> [..., N, M].

    GIoU = IoU - (|C| - |A u B|) / |C| with C the smallest box around both; in -1..1. As
    `torchvision.ops.generalized_box_iou`, for whole batches at once.
    """
    a, b = first[..., :, None, :], second[..., None, :, :]
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / union - (outer - union) / outer
