"""Multi-scale deformable attention on a GPU: Triton kernels that never write a sampled value to memory.

Legend: B images, Q queries, H heads, D channels per head, L levels, P points, S tokens, N = B * Q * H bags: all that a
head does for a query. A program has a few bags and all their channels, which stay in registers while it goes through
the L * P locations of each. What comes out is that of `attention.deformable`, where the method is written down.
"""

import functools
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of values; all arithmetic is in float32
TILE = 512  # values per program and corner: 4 per thread, which is one load of 16 bytes in float32


def supported(values: Tensor) -> bool:
    """Whether the kernels take such values: on a GPU with bfloat16 (Ampere or newer), of at most float32."""
    return values.is_cuda and values.dtype in DTYPES and torch.cuda.get_device_capability(values.device) >= (8, 0)


def sample_and_mix(values: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """values [B,S,H,D], locations [B,Q,H,L,P,2], weights [B,Q,H,L,P] -> [B,Q,H*D] of the dtype of values.

    Gradients of values are sums in an order that changes from run to run.
    """
    if values.dtype not in DTYPES:
        raise TypeError(f"the kernels compute in float32 and do not take {values.dtype}")
    return _Mix.apply(values, locations.float(), weights.float(), tuple(map(tuple, shapes)))


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, locations, weights, shapes):
        values, locations, weights = values.contiguous(), locations.contiguous(), weights.contiguous()
        ctx.save_for_backward(values, locations, weights)
        ctx.shapes = shapes
        mixed = values.new_empty(*locations.shape[:2], values.shape[2] * values.shape[3])
        if mixed.numel():
            grid, sizes, settings = _launch(values, locations)
            levels = _levels(shapes, values.device)
            with torch.cuda.device_of(values):
                _forward_kernel[grid](values, locations, weights, levels, mixed, *sizes, **settings)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        values, locations, weights = ctx.saved_tensors
        need_values = ctx.needs_input_grad[0]
        # Many queries add to one value: in half precision the sum would lose most of them.
        to_values = torch.zeros(values.shape if need_values else 1, dtype=torch.float32, device=values.device)
        to_locations, to_weights = torch.empty_like(locations), torch.empty_like(weights)
        if gradient.numel():
            grid, sizes, settings = _launch(values, locations)
            inputs = (values, locations, weights, _levels(ctx.shapes, values.device), gradient.contiguous())
            outputs = (to_values, to_locations, to_weights)
            with torch.cuda.device_of(values):
                _backward_kernel[grid](*inputs, *outputs, *sizes, NEED_VALUES=need_values, **settings)
        return to_values.to(values.dtype) if need_values else None, to_locations, to_weights, None


def _launch(values: Tensor, locations: Tensor) -> tuple[tuple[int], tuple[int, int, int], dict]:
    """Grid of programs, the kernels' sizes (N, Q, S), and what they are compiled for."""
    images, tokens, heads, channels = values.shape
    queries, levels, points = (locations.shape[axis] for axis in (1, 3, 4))
    width = triton.next_power_of_2(channels)
    settings = {"H": heads, "L": levels, "P": points, "D": channels, "BLOCK_N": max(1, TILE // width), "BLOCK_D": width}
    bags = images * queries * heads
    return (triton.cdiv(bags, settings["BLOCK_N"]),), (bags, queries, tokens), settings


@functools.lru_cache(maxsize=1024)
def _levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Width, height and first token of each level [L,3]. Filled in there: sending them would make a GPU wait."""
    first = accumulate((h * w for h, w in shapes[:-1]), initial=0)
    numbers = [n for (h, w), start in zip(shapes, first, strict=True) for n in (w, h, start)]
    return torch.stack([torch.full((), n, device=device) for n in numbers]).view(-1, 3)


@triton.jit
def _bags(N, Q, S, H: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a program: its bags, which of them exist, and the row of each one's first value among all [B*S*H]."""
    bags = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return bags, bags < N, bags // (Q * H) * S * H + bags % H


@triton.jit
def _line(position_ptr, size, mask):
    """Along one axis: the cell before each location, from -2, and the share of the cell after it. NaN stays NaN."""
    position = tl.load(position_ptr, mask=mask, other=0.0) * size - 0.5
    position = tl.where(position < -2, -2.0, position)  # nothing changes beyond, and integers have an end
    position = tl.where(position > size, size.to(tl.float32), position)
    low = tl.floor(position)
    return low.to(tl.int64), position - low


@triton.jit
def _cell(first, row, column, width, height, channels, mask, H: tl.constexpr, D: tl.constexpr):
    """Where the values of a cell are, and which of them exist [BLOCK_N,BLOCK_D]."""
    inside = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    where = (first + (row * width + column) * H)[:, None] * D + channels
    return where, inside[:, None] & (channels < D)


@triton.jit
def _forward_kernel(
    values_ptr,
    locations_ptr,
    weights_ptr,
    levels_ptr,
    mixed_ptr,
    N,
    Q,
    S,
    H: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bags, mask, head = _bags(N, Q, S, H, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)[None, :]
    mixed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for level in range(L):
        width = tl.load(levels_ptr + 3 * level)
        height = tl.load(levels_ptr + 3 * level + 1)
        first = head + tl.load(levels_ptr + 3 * level + 2) * H
        for point in range(P):
            sample = (bags * L + level) * P + point
            weight = tl.load(weights_ptr + sample, mask=mask, other=0.0)
            column, right = _line(locations_ptr + 2 * sample, width, mask)
            row, down = _line(locations_ptr + 2 * sample + 1, height, mask)
            for dy in tl.static_range(2):
                part = weight * (down if dy else 1 - down)
                for dx in tl.static_range(2):
                    share = part * (right if dx else 1 - right)
                    where, inside = _cell(first, row + dy, column + dx, width, height, channels, mask, H, D)
                    mixed += share[:, None] * tl.load(values_ptr + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(mixed_ptr + bags[:, None] * D + channels, mixed, mask=mask[:, None] & (channels < D))


@triton.jit
def _backward_kernel(
    values_ptr,
    locations_ptr,
    weights_ptr,
    levels_ptr,
    gradient_ptr,
    to_values_ptr,
    to_locations_ptr,
    to_weights_ptr,
    N,
    Q,
    S,
    NEED_VALUES: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bags, mask, head = _bags(N, Q, S, H, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)[None, :]
    live = mask[:, None] & (channels < D)
    gradient = tl.load(gradient_ptr + bags[:, None] * D + channels, mask=live, other=0.0).to(tl.float32)
    for level in range(L):
        width = tl.load(levels_ptr + 3 * level)
        height = tl.load(levels_ptr + 3 * level + 1)
        first = head + tl.load(levels_ptr + 3 * level + 2) * H
        for point in range(P):
            sample = (bags * L + level) * P + point
            weight = tl.load(weights_ptr + sample, mask=mask, other=0.0)
            column, right = _line(locations_ptr + 2 * sample, width, mask)
            row, down = _line(locations_ptr + 2 * sample + 1, height, mask)
            to_weight = tl.zeros([BLOCK_N], tl.float32)
            to_x = tl.zeros([BLOCK_N], tl.float32)
            to_y = tl.zeros([BLOCK_N], tl.float32)
            for dy in tl.static_range(2):
                row_share = down if dy else 1 - down
                for dx in tl.static_range(2):
                    column_share = right if dx else 1 - right
                    where, inside = _cell(first, row + dy, column + dx, width, height, channels, mask, H, D)
                    value = tl.load(values_ptr + where, mask=inside, other=0.0).to(tl.float32)
                    pull = tl.sum(value * gradient, 1)
                    to_weight += row_share * column_share * pull
                    to_x += row_share * (pull if dx else -pull)
                    to_y += column_share * (pull if dy else -pull)
                    if NEED_VALUES:
                        share = (weight * row_share * column_share)[:, None]
                        tl.atomic_add(to_values_ptr + where, share * gradient, mask=inside, sem="relaxed")
            tl.store(to_weights_ptr + sample, to_weight, mask=mask)
            tl.store(to_locations_ptr + 2 * sample, weight * width * to_x, mask=mask)
            tl.store(to_locations_ptr + 2 * sample + 1, weight * height * to_y, mask=mask)
