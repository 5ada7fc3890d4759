"""Maps of explanations over the cells of the feature map, made of boxes, of pixels, of tokens and of noise.

All are zero at padding, and those of an image are the same whatever it is padded to.
Legend: n maps, h x w cells of the grid, H x W pixels of the padded image; sizes are (height, width).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.models import AttentionMaps
from detrlib.models.outputs import cell_side


def on_grid(values: Tensor, attention: AttentionMaps) -> Tensor:
    """Maps [n,K] over the keys of an image as maps [n,h,w] over cells."""
    if attention.key_padding is not None:
        values = values.masked_fill(attention.key_padding, 0.0)
    if attention.polled is not None:
        values = attention.polled.on_cells(values[None, None])[0, 0]
    return values.unflatten(-1, attention.grid)


def box_maps(boxes: Tensor, size: tuple[int, int], canvas: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The share of every cell that lies in each box, [n,h,w]; boxes [n,4] cxcywh in 0..1 of the image.

    size, canvas: of the image, and with its padding, in pixels; grid: cells of the canvas.
    """
    side = cell_side(canvas, grid)
    x0, y0, x1, y1 = cxcywh_to_xyxy(boxes).clamp(0, 1).unbind(-1)
    rows = covered(y0 * size[0] / side, y1 * size[0] / side, grid[0])
    columns = covered(x0 * size[1] / side, x1 * size[1] / side, grid[1])
    return rows[:, :, None] * columns[:, None]


def covered(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Share of each of `cells` unit intervals that lies between start [n] and end [n] -> [n,cells]."""
    left = torch.arange(cells, device=start.device)
    return (torch.minimum(end[:, None], left + 1) - torch.maximum(start[:, None], left)).clamp(min=0)


def noise_maps(count: int, attention: AttentionMaps, seed: int) -> Tensor:
    """Even noise [n,h,w] over the cells of the image."""
    rows, columns = attention.valid_grid(0)
    noise = torch.rand(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    maps = attention.decoder_cross[-1].new_zeros(count, *attention.grid, dtype=noise.dtype)
    maps[:, :rows, :columns] = noise.to(maps)
    return maps


def cell_means(values: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Means over the pixels of every cell that belong to the image: values [n,H,W] -> [n,h,w]; size: of the image."""
    side = cell_side(values.shape[1:], grid)
    means = F.avg_pool2d(values[:, None, : size[0], : size[1]], side, ceil_mode=True, count_include_pad=False)[:, 0]
    return F.pad(means, (0, grid[1] - means.shape[2], 0, grid[0] - means.shape[1]))


def spread(values: Tensor, sides: tuple[float, float], inside: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """What the cells of a level have, values [a,b], shared evenly among the cells of the grid that lie in each: [h,w].

    sides: height and width of the level's cells in cells of the grid; inside: rows and columns of the grid that belong
    to the image. Sums stay: a cell that reaches beyond the image gives all that it has to what lies inside.
    """
    shares = []
    for count, side, end, cells in zip(values.shape, sides, inside, grid, strict=True):
        edges = (torch.arange(count + 1, device=values.device) * side).clamp(max=end).to(values.dtype)
        overlap = covered(edges[:-1], edges[1:], cells)
        total = overlap.sum(1, keepdim=True)
        shares.append(overlap / total.where(total > 0, 1.0))  # cells of padding alone have nothing to give
    return shares[0].mT @ values @ shares[1]
