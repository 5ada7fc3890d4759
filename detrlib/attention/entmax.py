"""Exact entmax of many rows at once, by Newton's method on the threshold, with gradients for scores and alpha.

Legend: R rows, K keys. With z = (alpha - 1) (x - max x) and c = 1 / (alpha - 1), entmax is p = (1 + z - s)_+ ^ c where
s >= 0 solves ||(1 + z - s)_+||_c = 1. As alpha -> 1 this becomes exp(x - max x - s / (alpha - 1)), a softmax.

For c >= 1, that is alpha <= 2, the norm is convex and decreasing in s: Newton's steps from s = 0, where it is at least
1, approach the root from the left and never overshoot. Two more facts make it fast on a CPU:
- A norm shrinks as its power grows. Steps with the next whole power, which needs products only, stay left of the root.
- A key with 1 + z <= s at any s left of the root has weight zero: before real powers are taken, such keys are left out.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**19  # scores worked on at a time on a CPU: what its cache holds, and enough to outweigh the calls
SHORT = 2**15  # neighbouring rows of one alpha with fewer scores than this are first sorted by alpha
MOST_STEPS = 60  # never reached in practice: convergence is quadratic, and finite for sparsemax
COARSE_STEPS = 2  # with a whole power, before keys are left out
MOST_PRODUCTS = 16  # a larger power is taken through logarithms, and few keys could be left out anyway
LEAST_ALPHA = 1 + 1e-6  # nearer to 1, float32 cannot tell it from 1
KERNEL_ALPHA = 1.01  # below it, the kernels' errors of about 1e-7 / (alpha - 1) would show
LOG2_E = math.log2(math.e)


def entmax(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Weights over the last axis (Peters et al. 2019, Eq. 10): [..., K] -> [..., K], rows sum to one.

    alpha from 1 + 1e-6 to 2: a number, or a tensor that broadcasts to [..., 1] and then gets a gradient (Correia et al.
    2019, Prop. 1). Rows should share alphas, as those of a head do: one of its own for each of them is 25 times slower.
    Scores of -inf get weight zero; a row of nothing else is not allowed. Raises ValueError for an alpha out of range,
    for which a GPU is waited for where it holds alpha: a layer whose alpha cannot leave the range calls
    `entmax_unchecked`.
    """
    alphas = alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=torch.float64)
    wrong = alphas[~((alphas >= LEAST_ALPHA) & (alphas <= 2))].tolist()  # not a number is among them
    if wrong:
        raise ValueError(f"alpha {wrong[0]:g} must lie between 1 + 1e-6 and 2; 1 itself is a softmax")
    return entmax_unchecked(scores, alpha)


def entmax_unchecked(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """`entmax` of an alpha that is known to be in its range."""
    if not scores.numel():
        return scores.softmax(-1)
    if not isinstance(alpha, Tensor):
        return _Entmax.apply(scores, float(alpha))
    # At 2 itself keys without weight would count, since 0 ** 0 is 1. The bound must not stop the gradient.
    below_two = alpha + (alpha.clamp(max=2 - 1e-6) - alpha).detach()
    return _Entmax.apply(scores, below_two.expand(*scores.shape[:-1], 1))


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, alpha: float | Tensor) -> Tensor:
        learned = isinstance(alpha, Tensor)
        kernels = _kernels(scores, alpha)
        if kernels is not None:
            rows = scores.reshape(-1, scores.shape[-1])
            weights = kernels.entmax_rows(rows, alpha.reshape(-1) if learned else alpha).view(scores.shape)
        else:
            weights = torch.empty_like(scores, memory_format=torch.contiguous_format)
            _in_blocks(_solve, alpha, [scores], [weights])
        ctx.save_for_backward(weights, alpha if learned else None)
        ctx.alpha = None if learned else alpha
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, learned = ctx.saved_tensors
        alpha, need_alpha = ctx.alpha if learned is None else learned, ctx.needs_input_grad[1]
        kernels = _kernels(weights, alpha)
        if kernels is not None:
            p, g = (x.reshape(-1, x.shape[-1]) for x in (weights, gradient))
            alphas = alpha if learned is None else alpha.reshape(-1)
            to_scores, to_alpha = kernels.entmax_rows_backward(p, g, alphas, need_alpha)
            return to_scores.view(weights.shape), to_alpha.view(alpha.shape) if need_alpha else None
        outputs = [torch.empty_like(weights)]
        if need_alpha:
            outputs.append(torch.empty_like(alpha, memory_format=torch.contiguous_format))
        _in_blocks(_differentiate, alpha, [weights, gradient], outputs)
        return outputs[0], outputs[1] if need_alpha else None


def _kernels(scores: Tensor, alpha: float | Tensor):
    """The Triton kernels where they take such scores and a fixed alpha, else None."""
    if not (scores.is_cuda and has_triton()) or (not isinstance(alpha, Tensor) and alpha < KERNEL_ALPHA):
        return None
    from detrlib.attention.kernels import rows as kernels

    return kernels if kernels.supported(scores) else None


@functools.cache
def has_triton() -> bool:
    """Whether kernels can be compiled here; not every build of PyTorch brings Triton."""
    return importlib.util.find_spec("triton") is not None


def _in_blocks(work: Callable, alpha: float | Tensor, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Call `work(alpha as a number, *inputs, *outputs)` for rows [R,K] of one alpha, in parts that fit a cache.

    Outputs are contiguous, and written to.
    """
    inputs, outputs = ([x.reshape(-1, x.shape[-1]) for x in tensors] for tensors in (inputs, outputs))  # [R,K]
    rows, keys = inputs[0].shape
    values, counts = [alpha], [rows]
    if isinstance(alpha, Tensor):
        alpha = alpha.reshape(-1)
        runs, counts = torch.unique_consecutive(alpha, return_counts=True)
        values, counts = runs.tolist(), counts.tolist()
        if rows * keys < SHORT * len(values) and len(runs.unique()) < len(values):
            _sorted(work, alpha, inputs, outputs)
            return
    most = max(1, BLOCK // max(1, keys)) if inputs[0].is_cpu else max(1, rows)
    start = 0
    for value, count in zip(values, counts, strict=True):
        size = math.ceil(count / max(1, math.ceil(count / most)))  # parts of about one size
        for first in range(start, start + count, max(1, size)):
            part = slice(first, min(first + size, start + count))
            work(value, *(x[part] for x in inputs + outputs))
        start += count


def _sorted(work: Callable, alpha: Tensor, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """As `_in_blocks`, with rows sorted by alpha, on copies: many small calls would cost more."""
    order = alpha.argsort()
    sorted_outputs = [torch.empty_like(x) for x in outputs]
    _in_blocks(work, alpha[order], [x.index_select(0, order) for x in inputs], sorted_outputs)
    for x, y in zip(outputs, sorted_outputs, strict=True):
        x.index_copy_(0, order, y)


def _solve(alpha: float, x: Tensor, out: Tensor) -> None:
    """entmax of rows x [R,K] into out [R,K]."""
    c = 1 / (alpha - 1)
    z = torch.sub(x, x.amax(-1, keepdim=True)).mul_(alpha - 1)
    s = torch.zeros_like(z[:, :1])
    if c in (1, 2):  # products are cheaper than leaving keys out
        s = _newton(z, s, int(c), MOST_STEPS)
        torch.sub(z, s - 1, out=out).clamp_(min=0)
        if c == 2:
            out.square_()
        out.div_(out.sum(-1, keepdim=True))
        return
    if c <= MOST_PRODUCTS:
        s = _newton(z, s, math.ceil(c), COARSE_STEPS)
    packing = _pack(z > s - 1)
    z = z if packing is None else packing.gather(z, -math.inf)
    s = _newton(z, s, c, MOST_STEPS)
    weights = _power(torch.sub(z, s, out=out if packing is None else z), c)
    weights.div_(weights.sum(-1, keepdim=True))
    if packing is not None:
        packing.scatter(weights, out)


def _newton(z: Tensor, s: Tensor, c: float | int, most: int) -> Tensor:
    """The root s [R,1], approached from `s` on its left. A whole `c` is taken by products."""
    # The error of a quadratically convergent method is about the square of its last step. Below c = 2 the curvature has
    # no bound, and steps shrink to rounding before it is safe to stop.
    resolution = torch.finfo(z.dtype).eps
    tolerance = 4 * resolution if c < 2 else 0.1 * resolution**0.5
    above = torch.empty_like(z)
    for done in range(1, most + 1):
        torch.sub(z, s - 1, out=above).clamp_(min=0)
        if c == 1:
            slope, total = above.sign().sum(-1, keepdim=True), above.sum(-1, keepdim=True)
        else:
            lower = _product(above, c - 1) if isinstance(c, int) else _power(z - s, c - 1)
            slope = lower.sum(-1, keepdim=True)
            total = above.mul_(lower).sum(-1, keepdim=True)
        # Newton on S^(1/c) - 1, whose derivative is -W S^(1/c - 1): S is the sum of u^c (total), W of u^(c-1) (slope).
        step = (total - 1 if c == 1 else total.mul(torch.expm1(total.log() / -c)).neg_()) / slope
        s = s + step
        unfinished = c * step > tolerance
        left = int(unfinished.sum())
        if not left:
            break
        if 4 * left <= len(z):  # the others need not wait
            rows = unfinished.view(-1).nonzero().view(-1)
            rest = _newton(z.index_select(0, rows), s.index_select(0, rows), c, most - done)
            return s.index_copy_(0, rows, rest)
    return s


def _power(v: Tensor, c: float) -> Tensor:
    """(1 + v)_+ ^ c; v is overwritten. Exact for c of any size, and exp2 does not slow down where it underflows."""
    return v.clamp_(min=-1).log1p_().mul_(c * LOG2_E).exp2_()


def _product(u: Tensor, n: int) -> Tensor:
    """u ^ n for whole n >= 1."""
    if n == 1:
        return u
    half = _product(u, n // 2)
    return half * half * u if n % 2 else half * half


def _differentiate(alpha: float, p: Tensor, g: Tensor, out: Tensor, to_alpha: Tensor | None = None) -> None:
    """From weights p and their gradient g [R,K] to that of the scores, into out, and of alpha, into to_alpha [R,1]."""
    products = to_alpha is None and alpha in (1.5, 2)  # cheaper than leaving keys out
    packing = None if products else _pack(p > 0)
    if packing is None:
        _differentiate_all(alpha, p, g, out, to_alpha)
        return
    p, g = packing.gather(p, 0.0), packing.gather(g, 0.0)
    packed = torch.empty_like(p)
    _differentiate_all(alpha, p, g, packed, to_alpha)
    packing.scatter(packed, out)


def _differentiate_all(alpha: float, p: Tensor, g: Tensor, out: Tensor, to_alpha: Tensor | None) -> None:
    """As `_differentiate`, all keys alike.

    Correia et al. 2019, Prop. 1, divides differences that vanish as alpha -> 1 by (alpha - 1)^2. Written in
    E = (p^(1 - alpha) - 1) / (alpha - 1) and F = (E + log p) / (alpha - 1) one division by (alpha - 1) is left:
    dp / dalpha = p (<F> - F + (alpha - 1) (E <F> - <E> F)) / (1 + (alpha - 1) <E>), with < > the mean under p.
    """
    beyond, tiny = alpha - 1, torch.finfo(p.dtype).tiny
    if to_alpha is None:
        s = _support_power(p, alpha, tiny)
    else:
        log_p = p.clamp(min=tiny).log_()
        growth = torch.mul(log_p, -beyond).expm1_()  # p^(1 - alpha) - 1
        s = torch.addcmul(p, p, growth)  # p^(2 - alpha), zero where p is
    torch.mul(g, s, out=out)
    mean = out.sum(-1, keepdim=True) / s.sum(-1, keepdim=True)
    torch.sub(g, mean, out=out).mul_(s)
    if to_alpha is None:
        return
    pe = growth.mul(p).div_(beyond)
    pf = growth.add_(log_p, alpha=beyond).mul_(p).div_(beyond**2)
    centred = g - mean  # dp / dalpha sums to zero: a constant added to g does not matter
    e, f = pe.sum(-1, keepdim=True), pf.sum(-1, keepdim=True)
    gp, ge, gf = (torch.linalg.vecdot(centred, x).unsqueeze(-1) for x in (p, pe, pf))
    torch.div(gp * f - gf + beyond * (ge * f - e * gf), 1 + beyond * e, out=to_alpha)


def _support_power(p: Tensor, alpha: float, tiny: float) -> Tensor:
    """p ^ (2 - alpha) where p is positive, else 0."""
    if alpha == 2:
        return p.sign()
    if alpha == 1.5:
        return p.clamp(min=tiny).rsqrt_().mul_(p)  # sqrt is slow at zero
    return p.clamp(min=tiny).log_().mul_((2 - alpha) * LOG2_E).exp2_().mul_(p.sign())


class _Packing(NamedTuple):
    """Where the W keys of each row that matter stand: in the rows [R,K], and in packed rows [R,W]."""

    index: Tensor  # [N] positions in the flattened rows
    slot: Tensor  # [N] positions in the flattened packed rows
    shape: tuple[int, int]  # (R, W)

    def gather(self, rows: Tensor, fill: float) -> Tensor:
        """[R,K] -> [R,W], `fill` where a row has fewer keys."""
        packed = rows.new_full(self.shape, fill)
        packed.view(-1).index_copy_(0, self.slot, rows.reshape(-1).index_select(0, self.index))
        return packed

    def scatter(self, packed: Tensor, rows: Tensor) -> None:
        """[R,W] into rows [R,K], zero elsewhere."""
        rows.zero_().view(-1).index_copy_(0, self.index, packed.view(-1).index_select(0, self.slot))


def _pack(kept: Tensor) -> _Packing | None:
    """Of keys kept [R,K]; None where packing would not pay, or where a row keeps nothing (not a number)."""
    if not kept.is_cpu:
        return None
    counts = kept.view(torch.uint8).sum(-1, dtype=torch.int64)
    width = int(counts.max())
    if 2 * width > kept.shape[1] or not counts.all():
        return None
    index = kept.reshape(-1).nonzero().view(-1)
    shift = torch.arange(len(counts)) * width - (counts.cumsum(0) - counts)
    slot = torch.arange(len(index)) + shift.repeat_interleave(counts, output_size=len(index))
    return _Packing(index, slot, (len(counts), width))
