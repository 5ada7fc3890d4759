"""Swin Transformer (Liu et al. 2021) as a backbone: torchvision's modules, and attention that knows where images end.

Windows are laid from the upper left corner of an image, and what is missing to whole windows is filled with zeros, as
in torchvision and in the official code. Here the zeros of an image are the same whatever the batch: tokens outside an
image are zero when attention looks at them, and beyond the whole windows that the image would have alone no token is
seen from inside. An axis that one window covers is not shifted; this, too, is decided by the image and not by the
batch. (The official code for detection shifts there as well, in images of at most 224 pixels, which `always_shift`
asks for; torchvision does not.)

Legend: B images, C channels, H heads, M side of a window, T = M * M tokens of a window, N windows; h x w tokens, in
whole windows; R = B, or 1 if all images fill the batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, SwinTransformerBlock

from detrlib.models.checkpointing import call

PATCH = 4  # pixels, the side of a patch
WINDOW = 7  # tokens, the side of a window
DEPTHS = (2, 2, 6, 2)  # blocks of the stages of Swin-T
WIDTHS = (96, 192, 384, 768)


def swin_body(stages: Sequence[int]) -> SwinTransformer:
    """Swin-T without its classifier, with a norm for each of `stages` (1 to 4), named as in official detectors.

    A residual branch of block i of 12 is left out in training with probability 0.2 * i / 11.
    """
    body = torchvision.models.swin_t(weights=None)
    del body.norm, body.permute, body.avgpool, body.flatten, body.head
    for stage in stages:
        body.add_module(f"norm{stage - 1}", nn.LayerNorm(WIDTHS[stage - 1]))
    return body


def swin_stages(
    body: SwinTransformer,
    images: Tensor,
    padding: Tensor | None = None,
    sizes: Tensor | None = None,
    always_shift: bool = False,
    again: bool = False,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images [B,3,H,W] -> maps of the four stages [B,C,h,w], strides 4 to 32, normalised where the body has a norm.

    Each comes with the padding of its tokens [B,h,w], which is not made zero.

    padding: [B,H,W], True = outside an image, whose height and width in pixels are `sizes` [B,2]; None: all fill it.
    again: of every block, keep the input only.
    """

    def encoded(block: SwinTransformerBlock, x: Tensor, outside: Tensor | None, grids: Tensor | None) -> Tensor:
        attended = window_attention(block.attn, _within(block.norm1(x), outside), grids, always_shift)
        x = x + block.stochastic_depth(attended)
        return x + block.stochastic_depth(block.mlp(block.norm2(x)))

    pixels = _within(images.permute(0, 2, 3, 1), padding)
    x = body.features[0](_whole(pixels, PATCH).permute(0, 3, 1, 2))  # [B,h,w,C]
    outside = None if padding is None else padding[:, ::PATCH, ::PATCH]
    grids = None if sizes is None else _parts(sizes, PATCH)
    for number in range(len(DEPTHS)):
        for block in body.features[2 * number + 1]:
            x = call(encoded, block, x, outside, grids, again=again)
        norm = getattr(body, f"norm{number}", None)
        yield (norm(x) if norm else x).permute(0, 3, 1, 2), outside
        if number + 1 < len(DEPTHS):
            x = body.features[2 * number + 2](_within(x, outside))
            outside = None if outside is None else outside[:, ::2, ::2]
            grids = None if grids is None else _parts(grids, 2)


def _within(tokens: Tensor, outside: Tensor | None) -> Tensor:
    """Tokens [B,h,w,C], zero outside the images."""
    return tokens if outside is None else tokens.masked_fill(outside[..., None], 0.0)


class _Axis(NamedTuple):
    """Where windows begin along one axis."""

    step: int  # tokens that the first window is shifted by
    shifted: bool | Tensor  # whether it is: of all images, or [B] of each
    reach: int | Tensor  # tokens in whole windows of the images, likewise


def window_attention(
    attention: ShiftedWindowAttention, x: Tensor, grids: Tensor | None = None, always_shift: bool = False
) -> Tensor:
    """Attention among the tokens [B,h,w,C] of every window, with the parameters of `attention`.

    grids: rows and columns of tokens of every image [B,2], the rest of `x` being zero; None: all of it, as in
    torchvision. Images differ in where their windows begin without being asked for their sizes as numbers, which would
    make a GPU wait. always_shift: axes of one window too.
    """
    height, width = x.shape[1:3]
    side = attention.window_size[0]
    x = _whole(x, side)
    axes, owns = [], (None, None) if grids is None else grids.unbind(1)
    for step, size, own in zip(attention.shift_size, x.shape[1:3], owns, strict=True):
        reach = size if own is None else side * _parts(own, side)
        axes.append(_Axis(step, True if always_shift else reach > side, reach))
    return _attend(attention, x, axes)[:, :height, :width]


def _attend(attention: ShiftedWindowAttention, x: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Attention within shifted windows; those at the end take in, but keep apart, what is before the first."""
    side, heads = attention.window_size[0], attention.num_heads
    grid = x.shape[1:3]
    x = _windows(_rolled(x, axes, -1), side)  # [B,N,T,C]
    query, key, value = attention.qkv(x).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)  # each [B,N,H,T,C/H]
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [B,N,H,T,T]
    scores = scores + attention.get_relative_position_bias()
    if any(axis.step for axis in axes):  # other windows are never of two regions
        rows, columns = (_regions(size, axis, x.device) for size, axis in zip(grid, axes, strict=True))
        regions = _rolled((3 * rows[:, :, None] + columns[:, None])[..., None], axes, -1)  # [R,h,w,1]
        regions = _windows(regions, side)  # [R,N,T,1]
        apart = regions != regions.transpose(-2, -1)
        scores = scores.masked_fill(apart[:, :, None], -torch.inf)
    x = attention.proj((scores.softmax(-1) @ value).transpose(2, 3).flatten(3))  # [B,N,T,C]
    rows, columns = grid[0] // side, grid[1] // side
    x = x.unflatten(2, (side, side)).unflatten(1, (rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return _rolled(x, axes, 1)


def _rolled(x: Tensor, axes: Sequence[_Axis], sign: int) -> Tensor:
    """[B,h,w,C] moved along both axes by what each image is shifted by."""
    for number, (step, shifted, _) in enumerate(axes, start=1):
        if isinstance(shifted, Tensor) and step:
            x = torch.where(shifted[:, None, None, None], x.roll(sign * step, number), x)
        elif step and shifted:
            x = x.roll(sign * step, number)
    return x


def _regions(size: int, axis: _Axis, device: torch.device) -> Tensor:
    """Numbers [R,size]: 0 before the first window, 1 in windows of the image, 2 beyond them.

    Tokens of a window see each other if they have the same along both axes.
    """
    first, end = axis.step * axis.shifted, axis.reach
    first, end = (edge[:, None] if isinstance(edge, Tensor) else edge for edge in (first, end))
    cells = torch.arange(size, device=device)[None]
    return (cells >= first).long() + (cells >= end)


def _windows(x: Tensor, side: int) -> Tensor:
    """[B,h,w,C] -> [B,N,T,C]."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B,h/M,M,w/M,M,C]
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _parts(size: int | Tensor, of: int) -> int | Tensor:
    """How many parts of the size `of` cover `size`."""
    return -(-size // of)


def _whole(x: Tensor, of: int) -> Tensor:
    """Tokens [B,h,w,C] with zeros added below and to the right, up to multiples of `of`."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % of, 0, -x.shape[1] % of))
