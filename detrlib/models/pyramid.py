"""From feature maps of several resolutions to one sequence of tokens.

Legend: B images, C channels of a map, E embedding, L levels fine to coarse, S = sum of h * w tokens of all levels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrlib.attention.deformable import wide
from detrlib.models.backbone import FeatureMap, nearest_mask


class Pyramid(NamedTuple):
    """The cells of all levels, row by row, fine to coarse."""

    tokens: Tensor  # [B,S,E]
    position: Tensor  # [B,S,E], or [1,S,E] for all images
    padding: Tensor | None  # [B,S], True = padding; None: there is none
    shapes: list[tuple[int, int]]  # (h, w) of each level
    ratios: Tensor  # [B,L,2] shares of the width and of the height of each level that belong to the image


def flattened(maps: list[FeatureMap], position: nn.Module, level_embed: Tensor) -> Pyramid:
    """Projected maps as tokens; `position` places them within their level, `level_embed` [L,E] tells levels apart."""
    positions = [
        position(level.position_mask()) + embed[:, None, None] for level, embed in zip(maps, level_embed, strict=True)
    ]
    tokens = torch.cat([level.features.flatten(2) for level in maps], 2).transpose(1, 2)  # [B,S,E]
    padded = maps[0].padding is not None
    return Pyramid(
        tokens,
        torch.cat([encoding.flatten(2) for encoding in positions], 2).transpose(1, 2),
        torch.cat([level.key_padding for level in maps], 1) if padded else None,
        [level.grid for level in maps],
        torch.stack([_valid_shares(level.padding) for level in maps], 1)
        if padded
        else tokens.new_ones(tokens.shape[0], len(maps), 2, dtype=torch.float32),
    )


def _valid_shares(padding: Tensor) -> Tensor:
    """padding [B,h,w] -> shares of width and height that are image [B,2]."""
    valid = (~padding).float()
    return torch.stack([valid[:, 0].mean(1), valid[:, :, 0].mean(1)], -1)


def cell_centres(pyramid: Pyramid) -> Tensor:
    """(x, y) of every token, 0 to 1 over the valid part of its own level: [B,S,2]."""
    centres = []
    for (h, w), ratio in zip(pyramid.shapes, pyramid.ratios.unbind(1), strict=True):
        x = ((torch.arange(w, device=ratio.device) + 0.5) / w).expand(h, w)
        y = ((torch.arange(h, device=ratio.device) + 0.5) / h)[:, None].expand(h, w)
        centres.append(torch.stack([x, y], -1).flatten(0, 1) / ratio[:, None])  # [B,h*w,2]
    return torch.cat(centres, 1)


def over_levels(reference_points: Tensor, ratios: Tensor) -> Tensor:
    """Points [B,Q,2] or boxes [B,Q,4] in 0..1 of the image -> of every level with its padding, [B,Q,L,2 or 4]."""
    return reference_points[:, :, None] * ratios.repeat(1, 1, reference_points.shape[-1] // 2)[:, None]


class LevelProjections(nn.ModuleList):
    """Feature maps -> `levels` maps of E channels: 1 x 1 convolutions, and 3 x 3 of stride 2 for levels beyond them.

    Each is followed by a group norm, whose statistics are those of the image alone; everything outside it is held at
    zero, so that batches do not matter. official_padding: padding takes part, as in the official code.
    """

    def __init__(self, num_channels: Sequence[int], levels: int, dim: int, official_padding: bool = False):
        convolutions = [nn.Conv2d(channels, dim, kernel_size=1) for channels in num_channels]
        for extra in range(levels - len(num_channels)):
            before = dim if extra else num_channels[-1]
            convolutions.append(nn.Conv2d(before, dim, kernel_size=3, stride=2, padding=1))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        groups = math.gcd(32, dim)
        super().__init__(nn.Sequential(convolution, nn.GroupNorm(groups, dim)) for convolution in convolutions)
        self.official_padding = official_padding

    def forward(self, maps: list[FeatureMap], padding_mask: Tensor | None = None) -> list[FeatureMap]:
        """Maps [B,C,h,w], fine to coarse, of images with padding_mask [B,H,W] -> L maps [B,E,h,w]."""
        projected = []
        for number, (convolution, norm) in enumerate(self):
            if number < len(maps):
                level, padding = maps[number], maps[number].padding
            else:  # the first level beyond looks at the last map itself, later ones at the level before
                level = maps[-1] if number == len(maps) else projected[-1]
                padding = None if level.padding is None else level.padding[:, ::2, ::2]
            x = convolution(level.features)
            if padding is None or self.official_padding:
                x = norm(x)
                padding = None if padding is None else nearest_mask(padding_mask, x.shape[-2:])
            else:
                x = group_norm(norm, x, padding)
            projected.append(FeatureMap(x, padding))
        return projected


def group_norm(norm: nn.GroupNorm, x: Tensor, padding: Tensor) -> Tensor:
    """`norm` of x [B,E,h,w] with the statistics of what is no padding [B,h,w]; padding becomes zero.

    In float32 or wider, as torch's own inside autocast.
    """
    grouped = wide(x).unflatten(1, (norm.num_groups, -1))  # [B,G,E/G,h,w]
    valid = (~padding)[:, None, None].to(grouped.dtype)  # [B,1,1,h,w]
    count = valid.sum((-2, -1), keepdim=True) * grouped.shape[2]
    mean = (grouped * valid).sum((2, 3, 4), keepdim=True) / count
    variance = ((grouped - mean).square() * valid).sum((2, 3, 4), keepdim=True) / count
    grouped = (grouped - mean) * (variance + norm.eps).rsqrt()
    scaled = grouped.flatten(1, 2) * norm.weight[:, None, None] + norm.bias[:, None, None]
    return scaled.masked_fill(padding[:, None], 0.0)
