"""Weights between zero and one that sum to a budget: p = clip(s - tau, 0, 1), as in entmax 1.3 by bisection.

Let C be the keys that have one. Of the others (s - tau)_+ sum to B - |C|, which is a sparsemax of theirs, scaled:

    p = (B - |C|) sparsemax(s / (B - |C|))

rows.c finds C from below. With C empty, the largest weights may be above one. To take away from them leaves more to the
others, so that tau falls and those weights would only grow: they belong to C. A few rounds, at most B, and no key is
above one. Elsewhere, and in double precision, tau is found by halving. The gradient is that of sparsemax for the keys
between zero and one.

Legend: R rows, K keys, B the budget.
"""

import torch
from torch import Tensor

from detrlib.attention import native

HALVINGS = 60  # of the interval that holds tau: one of 1e4 becomes less than float32 tells


def budget_sparsemax(scores: Tensor, budget: float) -> Tensor:
    """Weights over the last axis: [..., K] -> [..., K], rows sum to the budget, or to their number of keys if less.

    Scores of -inf get weight zero.
    """
    if torch.compiler.is_exporting():
        return _by_halving(scores, budget)
    return _budget(scores, float(budget))


@torch.library.custom_op("detrlib::budget", mutates_args=())
def _budget(scores: Tensor, budget: float) -> Tensor:
    if not native.supported(scores, 2.0):
        return _by_halving(scores, budget)
    return native.budget_rows(scores.reshape(-1, scores.shape[-1]).contiguous(), budget).view(scores.shape)


@_budget.register_fake
def _(scores: Tensor, budget: float) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.custom_op("detrlib::budget_gradient", mutates_args=())
def _gradient(weights: Tensor, gradient: Tensor) -> Tensor:
    between = weights.frac()  # and zero in place of one
    if native.supported(between, 2.0):
        rows = (each.reshape(-1, each.shape[-1]).contiguous() for each in (between, gradient))
        return native.entmax_rows_backward(*rows, 2.0)[0].view(weights.shape)
    out = gradient * between.sign_()
    mean = out.sum(-1, keepdim=True) / between.sum(-1, keepdim=True).clamp(min=1)
    return torch.sub(gradient, mean, out=out).mul_(between)


@_gradient.register_fake
def _(weights: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    return _gradient(*ctx.saved_tensors, gradient), None


_budget.register_autograd(_backward, setup_context=_remember)


def _by_halving(x: Tensor, budget: float) -> Tensor:
    """Weights of x [...,K] in a fixed number of operations, on any device, and for graphs."""
    z = x - x.amax(-1, keepdim=True)
    low, high = z.masked_fill(z.isneginf(), 0.0).amin(-1, keepdim=True) - 1, torch.zeros_like(z[..., :1])
    for _ in range(HALVINGS):
        middle = low / 2 + high / 2  # of scores as low as masks have, the sum would be infinite
        enough = (z - middle).clamp(0, 1).sum(-1, keepdim=True) >= budget
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    # Which keys lie between is known now: tau is what makes their sum exact.
    weights = (z - low).clamp(0, 1)
    between = (weights > 0) & (weights < 1)
    count = between.sum(-1, keepdim=True)
    whole = (weights == 1).sum(-1, keepdim=True)
    tau = (torch.where(between, z, 0.0).sum(-1, keepdim=True) + whole - budget) / count.clamp(min=1)
    feasible = (count > 0) & (z > -torch.inf).sum(-1, keepdim=True).gt(budget)
    return torch.where(feasible, (z - tau).clamp(0, 1), weights)
