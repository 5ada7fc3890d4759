"""Normmax, argmax_p <p, s> - ||p||_alpha over the simplex, by the root of an entmax (Santos et al. 2024, "Sparse and
Structured Hopfield Networks", Sec. 3.2).

At the maximum, q = p / ||p||_alpha is (s - tau)_+ ^ c with c = 1 / (alpha - 1), and tau such that the sum of q^alpha is
one. So q^alpha is an entmax: of alpha / (alpha - 1) s, with 2 - 1 / alpha in place of alpha. As tau moves by <p, ds>,

    dq = c q^(2 - alpha) (ds - <p, ds>),    p = q / sum q

and backwards, from the gradient g of p, with h = c q^(2 - alpha) (g - <g, p>) / sum q:  h - p sum h.
"""

import torch
from torch import Tensor

from detrlib.attention import native
from detrlib.attention.entmax import entmax_unchecked
from detrlib.attention.newton import support_power


def normmax(scores: Tensor, alpha: float) -> Tensor:
    """Weights over the last axis: [..., K] -> [..., K], rows sum to one; alpha > 1. Scores of -inf get weight zero, and
    a row of nothing else is not allowed."""
    return (_weights if torch.compiler.is_exporting() else _normmax)(scores, float(alpha))


def _weights(scores: Tensor, alpha: float) -> Tensor:
    powers = entmax_unchecked(scores * (alpha / (alpha - 1)), 2 - 1 / alpha)
    roots = support_power(powers, 1 - 1 / alpha, torch.finfo(powers.dtype).tiny)
    return roots.div_(roots.sum(-1, keepdim=True))


@torch.library.custom_op("detrlib::normmax", mutates_args=())
def _normmax(scores: Tensor, alpha: float) -> Tensor:
    if native.supported(scores, 2 - 1 / alpha):
        return native.normmax_rows(scores.reshape(-1, scores.shape[-1]).contiguous(), alpha).view(scores.shape)
    return _weights(scores, alpha)


@_normmax.register_fake
def _(scores: Tensor, alpha: float) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.alpha = inputs[1]


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    (p,), alpha = ctx.saved_tensors, ctx.alpha
    top = p.amax(-1, keepdim=True)
    q = p / top  # so that no power of it is too small: with many keys that of p would be
    norm = torch.linalg.vector_norm(q, alpha, -1, keepdim=True)  # its product with top is 1 / sum q
    least = torch.finfo(p.dtype).tiny ** (1 / max(1.0, alpha - 1))  # of a key that is hardly above tau
    slope = support_power(q.div_(norm), alpha - 1, least)  # q^(2 - alpha)
    h = gradient * p
    h = torch.sub(gradient, h.sum(-1, keepdim=True), out=h).mul_(slope)
    h = h.addcmul_(p, h.sum(-1, keepdim=True), value=-1)
    return h.mul_(norm * top / (alpha - 1)), None


_normmax.register_autograd(_backward, setup_context=_remember)
