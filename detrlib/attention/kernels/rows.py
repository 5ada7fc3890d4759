"""Entmax of many rows on a GPU: Triton kernels that read each row once and write its weights once.

Legend: R rows, K keys. The method is that of `attention.entmax`: with z = (alpha - 1) (x - max x), c = 1 / (alpha - 1)
and u = (z - tau)_+, Newton's steps from tau = -1 on ||u||_c = 1. What differs is where the work is done: a row stays in
registers from its first step to its last, where plain PyTorch would send it to memory and back for every operation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from detrlib.attention.kernels.newton import (
    MOST_STEPS,
    bend,
    check,
    describe,
    lower_power,
    newton_step,
    supported,
    tolerance,
)

__all__ = ["entmax_rows", "entmax_rows_backward", "supported"]

# A row of 16384 keys over 16 warps is 32 numbers per thread, all that fits beside temporaries in the 128 registers that
# each of so many threads may have. Longer rows are read again for every step, block by block, from the L2 cache.
LONGEST, BLOCK = 16384, 4096
TILE = 1024  # scores per program, at least: short rows share one


def entmax_rows(x: Tensor, alpha: float | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of scores x [R,K] -> [R,K] of `dtype`, rows sum to one; alpha in (1, 2], a number or a tensor [R].

    Scores of -inf get weight zero; a row of nothing else gets zeros.
    """
    check(x)
    x = x.contiguous()
    weights = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not x.numel():
        return weights
    kind, alphas, stride = describe(alpha, x.device)
    held = x.shape[1] <= LONGEST
    kernel = _held_kernel if held else _streamed_kernel
    block, rows, warps = _layout(x.shape[1], LONGEST if held else BLOCK)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(len(x), rows),)
        kernel[grid](x, weights, alphas, stride, *x.shape, kind, rows, block, num_warps=warps)
    return weights


def entmax_rows_backward(
    p: Tensor, g: Tensor, alpha: float | Tensor, need_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradients of scores [R,K] and, if asked for, of each row's alpha [R], from weights p and their gradient g [R,K].

    Rows without any weight get zeros.
    """
    check(p, g)
    p, g = p.contiguous(), g.contiguous()
    to_scores = torch.empty_like(g)
    to_alpha = torch.zeros(len(p) if need_alpha else 0, dtype=torch.float32, device=p.device)
    if p.numel():
        kind, alphas, stride = describe(alpha, p.device)
        block, rows, warps = _layout(p.shape[1], BLOCK)
        with torch.cuda.device_of(p):
            grid = (triton.cdiv(len(p), rows),)
            arguments = (p, g, to_scores, to_alpha, alphas, stride, *p.shape)
            _backward_kernel[grid](*arguments, kind, need_alpha, rows, block, num_warps=warps)
    return to_scores, to_alpha if need_alpha else None


# Kernels


def _layout(keys: int, most: int) -> tuple[int, int, int]:
    """Keys per block, at most so many, rows per program and warps for rows of so many keys."""
    block = min(triton.next_power_of_2(keys), most)
    rows = max(1, TILE // block) if keys <= block else 1
    return block, rows, min(16, max(4, block // 1024))


@triton.jit
def _beyond(alpha_ptr, alpha_stride, rows, R):
    """alpha - 1 of some rows; beyond the last one, a value that does no harm."""
    return tl.load(alpha_ptr + rows * alpha_stride, mask=rows < R, other=1.5) - 1


@triton.jit
def _positive(z):
    """max(z, 0) that keeps NaN."""
    return tl.where(z < 0, 0.0, z)


@triton.jit
def _finite(top):
    """The largest score of a row, and 0 for a row of -inf, whose differences would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _held_kernel(
    x_ptr, p_ptr, alpha_ptr, alpha_stride, R, K, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Entmax of ROWS rows of at most BLOCK keys, held in registers."""
    first_row = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    keys = tl.arange(0, BLOCK)[None, :]
    inside = (first_row + rows < R) & (keys < K)
    offsets = rows * K + keys  # from the first row, so that only its own offset takes 64 bits
    x_ptr += first_row.to(tl.int64) * K
    p_ptr += first_row.to(tl.int64) * K
    beyond = _beyond(alpha_ptr, alpha_stride, first_row + rows, R)
    x = tl.load(x_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    z = (x - _finite(tl.max(x, 1, keep_dims=True))) * beyond
    tau = tl.full([ROWS, 1], -1.0, tl.float32)
    largest = 1.0
    steps = 0
    while (largest > 0) & (steps < MOST_STEPS):
        above = _positive(z - tau)
        lower = lower_power(above, beyond, KIND)
        total = tl.sum(lower * above, 1, keep_dims=True)
        step = newton_step(total, tl.sum(lower, 1, keep_dims=True), beyond, KIND)
        tau += step
        largest = tl.max(step - tolerance(beyond, KIND))
        steps += 1
    above = _positive(z - tau)
    weights = lower_power(above, beyond, KIND) * above
    total = tl.sum(weights, 1, keep_dims=True)
    tl.store(p_ptr + offsets, weights / tl.where(total == 0, 1.0, total), mask=inside)


@triton.jit
def _streamed_kernel(
    x_ptr, p_ptr, alpha_ptr, alpha_stride, R, K, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Entmax of one row of any length, read again block by block for every step; ROWS is 1."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    p_ptr += row * K
    beyond = tl.load(alpha_ptr + row * alpha_stride) - 1
    top = float("-inf")
    for first in range(0, K, BLOCK):
        top = tl.maximum(top, tl.max(_scores(x_ptr, first, K, BLOCK)))
    top = _finite(top)
    tau = -1.0
    largest = 1.0
    steps = 0
    while (largest > 0) & (steps < MOST_STEPS):
        total = 0.0
        slope = 0.0
        for first in range(0, K, BLOCK):
            above = _positive((_scores(x_ptr, first, K, BLOCK) - top) * beyond - tau)
            lower = lower_power(above, beyond, KIND)
            total += tl.sum(lower * above)
            slope += tl.sum(lower)
        step = newton_step(total, slope, beyond, KIND)
        tau += step
        largest = step - tolerance(beyond, KIND)
        steps += 1
    total = 0.0
    for first in range(0, K, BLOCK):
        above = _positive((_scores(x_ptr, first, K, BLOCK) - top) * beyond - tau)
        total += tl.sum(lower_power(above, beyond, KIND) * above)
    share = 1 / tl.where(total == 0, 1.0, total)
    for first in range(0, K, BLOCK):
        above = _positive((_scores(x_ptr, first, K, BLOCK) - top) * beyond - tau)
        keys = first + tl.arange(0, BLOCK)
        tl.store(p_ptr + keys, lower_power(above, beyond, KIND) * above * share, mask=keys < K)


@triton.jit
def _scores(x_ptr, first, K, BLOCK: tl.constexpr):
    keys = first + tl.arange(0, BLOCK)
    return tl.load(x_ptr + keys, mask=keys < K, other=float("-inf")).to(tl.float32)


@triton.jit
def _backward_kernel(
    p_ptr,
    g_ptr,
    to_scores_ptr,
    to_alpha_ptr,
    alpha_ptr,
    alpha_stride,
    R,
    K,
    KIND: tl.constexpr,
    NEED_ALPHA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """s (g - sum s g / sum s) with s = p^(2-alpha), and the slope in alpha (Correia et al. 2019, Prop. 1).

    Weights and gradients are read twice, the second time from a cache.
    """
    first_row = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    start = first_row.to(tl.int64) * K
    p_ptr += start
    g_ptr += start
    to_scores_ptr += start
    beyond = _beyond(alpha_ptr, alpha_stride, first_row + rows, R)
    pull = tl.zeros([ROWS, 1], tl.float32)
    slope = tl.zeros([ROWS, 1], tl.float32)
    for first in range(0, K, BLOCK):
        keys = first + tl.arange(0, BLOCK)[None, :]
        inside = (first_row + rows < R) & (keys < K)
        s = _skew(tl.load(p_ptr + rows * K + keys, mask=inside, other=0.0).to(tl.float32), beyond, KIND)
        g = tl.load(g_ptr + rows * K + keys, mask=inside, other=0.0).to(tl.float32)
        pull += tl.sum(s * g, 1, keep_dims=True)
        slope += tl.sum(s, 1, keep_dims=True)
    centre = pull / tl.where(slope == 0, 1.0, slope)
    tilt = tl.zeros([ROWS, 1], tl.float32)
    for first in range(0, K, BLOCK):
        keys = first + tl.arange(0, BLOCK)[None, :]
        inside = (first_row + rows < R) & (keys < K)
        p = tl.load(p_ptr + rows * K + keys, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + rows * K + keys, mask=inside, other=0.0).to(tl.float32) - centre
        tl.store(to_scores_ptr + rows * K + keys, _skew(p, beyond, KIND) * g, mask=inside)
        if NEED_ALPHA:
            above = tl.exp2(beyond * tl.log2(tl.where(p > 0, p, 1.0)))
            tilt += tl.sum(_skew(p, beyond, KIND) * g * bend(above), 1, keep_dims=True)
    if NEED_ALPHA:
        tl.store(to_alpha_ptr + first_row + rows, tilt / (beyond * beyond), mask=first_row + rows < R)


@triton.jit
def _skew(p, beyond, KIND: tl.constexpr):
    """p^(2-alpha) on the support, 0 elsewhere."""
    if KIND == "sparsemax":
        return (p > 0).to(tl.float32)
    elif KIND == "entmax15":
        return tl.sqrt(p)
    else:
        inside = p > 0
        return tl.where(inside, tl.exp2((1 - beyond) * tl.log2(tl.where(inside, p, 1.0))), 0.0)
