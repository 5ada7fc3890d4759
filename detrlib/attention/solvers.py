"""Exact entmax of many rows at once, by Newton's method on the threshold, with gradients for scores and alpha.

Legend: R rows, K keys. With z = (alpha - 1) (x - max x) and c = 1 / (alpha - 1), entmax is p = (z - tau)_+ ^ c where
tau solves ||(z - tau)_+||_c = 1. For c >= 1, that is alpha <= 2, this norm is convex and decreasing in tau, so Newton's
steps from tau = -1, where it is at least 1, approach the root from the left and never overshoot. Each step reads the
rows once; sorting, or 26 bisections, would read them many times more.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**18  # scores worked on at a time on a CPU: what its cache holds
MOST_STEPS = 60  # never reached in practice: convergence is quadratic, and finite for sparsemax


def entmax(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Weights over the last axis (Peters et al. 2019, Eq. 10): [..., K] -> [..., K], rows sum to one.

    alpha in (1, 2]: a number, or a tensor that broadcasts to [..., 1] and then gets a gradient (Correia et al. 2019,
    Prop. 1). Scores of -inf get weight zero; a row of nothing else is not allowed.
    """
    if not isinstance(alpha, Tensor):
        return _Entmax.apply(scores, alpha)
    below_two = alpha.clamp(max=2 - 1e-6)  # at 2 itself keys without weight would count: 0 ** 0 is 1
    return _Entmax.apply(scores, below_two.expand(*scores.shape[:-1], 1))


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, alpha: float | Tensor) -> Tensor:
        rows = scores.reshape(-1, scores.shape[-1])  # [R,K]
        learned = isinstance(alpha, Tensor)
        alphas = alpha.reshape(-1, 1) if learned else alpha
        if rows.is_cpu:
            size = max(1, BLOCK // max(1, rows.shape[1]))
            parts = alphas.split(size) if learned else [alphas] * (1 + len(rows) // size)
            weights = torch.empty_like(rows)
            for x, a, out in zip(rows.split(size), parts, weights.split(size), strict=False):
                out.copy_(_solve(x, a))
        else:
            weights = _solve(rows, alphas)
        weights = weights.view(scores.shape)
        ctx.save_for_backward(weights, alpha if learned else None)
        ctx.alpha = None if learned else alpha
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        p, alpha = ctx.saved_tensors
        support = p > 0
        if ctx.alpha == 2:
            s = support.to(p.dtype)
        elif ctx.alpha == 1.5:
            s = p.sqrt()
        else:
            s = torch.where(support, p ** (2 - (ctx.alpha if alpha is None else alpha)), 0.0)
        skewed = s / s.sum(-1, keepdim=True)  # "p tilde" of the paper
        to_scores = gradient * s
        to_scores -= skewed * to_scores.sum(-1, keepdim=True)
        if alpha is None or not ctx.needs_input_grad[1]:
            return to_scores, None
        h = -torch.xlogy(p, p)
        beyond = alpha - 1
        slope = (p - skewed) / beyond**2 + (h - skewed * h.sum(-1, keepdim=True)) / beyond
        return to_scores, (gradient * slope).sum(-1, keepdim=True)


def _solve(x: Tensor, alpha: float | Tensor) -> Tensor:
    """entmax of rows x [R,K]; alpha a number or [R,1]."""
    c = 1 / (alpha - 1)
    z = (x - x.amax(-1, keepdim=True)) * (alpha - 1)
    tau = torch.full_like(z[:, :1], -1.0)
    # The error of a quadratically convergent method is about the square of its last step; sparsemax ends exactly.
    resolution = torch.finfo(z.dtype).eps
    tolerance = resolution if _is(c, 1) else 0.1 * resolution**0.5
    for _ in range(MOST_STEPS):
        above = (z - tau).clamp_(min=0)
        slope, total = _powers(above, c)
        # Newton on S^(1/c) - 1, whose derivative is -W S^(1/c - 1): S is the sum of u^c (total), W of u^(c-1) (slope).
        step = (total - total ** (1 - 1 / c)) / slope
        tau += step
        if not (step > tolerance).any():
            break
    weights = _raised((z - tau).clamp_(min=0), c)
    return weights / weights.sum(-1, keepdim=True)


def _powers(above: Tensor, c: float | Tensor) -> tuple[Tensor, Tensor]:
    """Row sums of u^(c-1) and u^c, [R,1] each, with no more than one power."""
    if _is(c, 1):
        return above.sign().sum(-1, keepdim=True), above.sum(-1, keepdim=True)
    if _is(c, 2):
        return above.sum(-1, keepdim=True), above.square().sum(-1, keepdim=True)
    lower = _raised(above, c - 1)
    return lower.sum(-1, keepdim=True), lower.mul_(above).sum(-1, keepdim=True)


def _raised(above: Tensor, exponent: float | Tensor) -> Tensor:
    """above ** exponent, without a power where a product will do."""
    if isinstance(exponent, float) and exponent in (1, 2):
        return above if exponent == 1 else above.square()
    return above**exponent


def _is(c: float | Tensor, value: float) -> bool:
    return isinstance(c, float) and c == value
