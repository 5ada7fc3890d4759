"""Where a token is: position encodings of grids and of boxes. Legend: B images, h x w grid, E channels."""

import math

import torch
from torch import Tensor, nn


def sine(coordinates: Tensor, channels: int, temperature: float) -> Tensor:
    """Sines and cosines of coordinates in 0..1, interleaved: [...] -> [..., channels].

    Wavelengths grow geometrically from one unit to `temperature` units (Vaswani et al. 2017, Sec. 3.5),
    with the unit scaled to 2 pi.
    """
    exponent = torch.arange(channels // 2, device=coordinates.device, dtype=torch.float32) * 2 / channels
    angle = coordinates.float()[..., None] * (2 * math.pi) / temperature**exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class SinePosition(nn.Module):
    """Fixed encoding of (y, x), each measured over the valid part of the image (Carion et al. 2020, Appendix A.4).

    `centred`: a cell is where its centre is, as boxes are measured, instead of at its far edge as in DETR.
    """

    def __init__(self, channels: int, temperature: float = 10000.0, centred: bool = False):
        super().__init__()
        self.channels = channels
        self.temperature = temperature
        self.shift = 0.5 if centred else 0.0

    def forward(self, padding: Tensor) -> Tensor:
        """padding [B,h,w] -> [B,E,h,w]."""
        valid = (~padding).float()
        y, x = valid.cumsum(1), valid.cumsum(2)
        y = (y - self.shift) / (y[:, -1:] + 1e-6)
        x = (x - self.shift) / (x[:, :, -1:] + 1e-6)
        half = self.channels // 2
        both = torch.cat([sine(y, half, self.temperature), sine(x, half, self.temperature)], dim=-1)
        return both.permute(0, 3, 1, 2)


class LearnedPosition(nn.Module):
    """One learned vector per row and per column; tables are stretched over images larger than them."""

    def __init__(self, channels: int, cells: int = 50):
        super().__init__()
        self.row_embed = nn.Embedding(cells, channels // 2)
        self.col_embed = nn.Embedding(cells, channels // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, padding: Tensor) -> Tensor:
        """padding [B,h,w] -> [B,E,h,w]."""
        h, w = padding.shape[-2:]
        x = _looked_up(self.col_embed.weight, ~padding[:, 0])[:, None].expand(-1, h, -1, -1)
        y = _looked_up(self.row_embed.weight, ~padding[:, :, 0])[:, :, None].expand(-1, -1, w, -1)
        return torch.cat([x, y], dim=-1).permute(0, 3, 1, 2)


def _looked_up(table: Tensor, valid: Tensor) -> Tensor:
    """Rows of `table` [n,E] for cells of which `valid` [B,k] belong to the image -> [B,k,E].

    Cell i takes row i; where an image has more than n cells, the table is stretched over them by interpolation.
    """
    cells = valid.sum(1, keepdim=True)
    stretch = torch.where(cells > len(table), (len(table) - 1) / (cells - 1).clamp(min=1), 1.0)
    row = (torch.arange(valid.shape[1], device=table.device) * stretch).clamp(max=len(table) - 1)  # [B,k]
    lower, part = row.long(), (row - row.floor())[..., None]
    return torch.lerp(table[lower], table[(lower + 1).clamp(max=len(table) - 1)], part.to(table.dtype))


def sine_of_boxes(boxes: Tensor, channels: int, temperature: float) -> Tensor:
    """Encoding of reference boxes [..., 4] cxcywh -> [..., 4 * channels], in the order y, x, w, h.

    The first half lines up with `SinePosition` over 2 * channels, so that a dot product compares positions.
    """
    cx, cy, w, h = boxes.unbind(-1)
    return torch.cat([sine(value, channels, temperature) for value in (cy, cx, w, h)], dim=-1)
