"""Entmax of rows by Newton's method: a loop that ends when it has converged, for a CPU, and a fixed number of steps.

Legend: R rows, K keys. With z = (alpha - 1) (x - max x) and c = 1 / (alpha - 1), entmax is p = (1 + z - s)_+ ^ c where
s >= 0 solves ||(1 + z - s)_+||_c = 1. As alpha -> 1 this becomes exp(x - max x - s / (alpha - 1)), a softmax.

For c >= 1, that is alpha <= 2, the norm is convex and decreasing in s: Newton's steps from s = 0, where it is at least
1, approach the root from the left and never overshoot. They are few: a step from an excess f0 = norm - 1 with slope -g0
leads to f1 and -g1 with f1 / f0 + g1 / g0 <= 1, so that f g falls to a quarter or less; by Hoelder's inequality g lies
between 1 and K^(1/c); f begins below K^(1/c), and the error of s is at most f.
"""

import math

import torch
from torch import Tensor

BLOCK = 2**17  # scores worked on at a time on a CPU: what stays in its cache, and outweighs the calls
MOST_STEPS = 60  # never reached in practice: convergence is quadratic, and finite for sparsemax
# Steps after which an excess of K^(1/c) <= 2^16 has become less than the resolution of numbers, if nobody looks.
FIXED_STEPS = {torch.float64: 42, torch.float32: 28, torch.bfloat16: 28, torch.float16: 28}
LOG2_E = math.log2(math.e)
Number = float | Tensor  # one for all rows, or [...,1]


def newton_step(z: Tensor, s: Tensor, c: Number, buffer: Tensor | None = None) -> Tensor:
    """How far a Newton's step goes from s: f / -f' of the excess f = S^(1/c) - 1, where -f' = W S^(1/c - 1).

    S is the sum of u^c and W that of u^(c-1), with u = (1 + z - s)_+ of each key. Powers that are no products are taken
    through logarithms: u^(c-1) = exp2((c - 1) log2 e log u), and exp2, unlike exp, does not slow down where it
    underflows.
    """
    if not _by_products(c):
        u = _less(z, s, buffer)  # u - 1
        lower = u.log1p().mul_((c - 1) * LOG2_E).exp2_()  # u^(c-1)
        w, total = _sum(lower), _sum(lower.mul_(u.add_(1)))
    elif c == 2:
        u = _above(z, s, buffer)
        w, total = _sum(u), _sum(u.square_())
    else:
        u = _above(z, s, buffer)
        total = _sum(u)
        return (total - 1) / _sum(u.sign_())
    return -total * torch.expm1(total.log() / -c) / w


def _root(z: Tensor, c: Number) -> Tensor:
    """The root s, approached from 0, until no step matters."""
    # The error of a quadratically convergent method is about the square of its last step. Below c = 2 the curvature has
    # no bound, and steps shrink to rounding before it is safe to stop.
    resolution = torch.finfo(z.dtype).eps
    safe, bold = 4 * resolution, 0.1 * resolution**0.5
    tolerance = torch.where(c < 2, safe, bold) if isinstance(c, Tensor) else safe if c < 2 else bold
    s, buffer = torch.zeros_like(z[..., :1]), torch.empty_like(z)
    for _ in range(MOST_STEPS):
        step = newton_step(z, s, c, buffer)
        s = s + step
        if not (c * step > tolerance).any():
            break
    return s


def _weights(z: Tensor, s: Tensor, c: Number) -> Tensor:
    """(1 + z - s)_+ ^ c, and what rounding has left is put right: rows sum to one."""
    if _by_products(c):
        weights = _above(z, s)
        weights = weights if c == 1 else weights.square_()
    else:
        weights = _less(z, s).log1p_().mul_(c * LOG2_E).exp2_()
    return weights.div_(_sum(weights))


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(-1, keepdim=True)


def _by_products(c: Number) -> bool:
    """Whether powers are taken by products, for alpha = 1.5 and 2, and not through logarithms."""
    return not isinstance(c, Tensor) and c in (1, 2)


def _less(z: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor:
    """u - 1 for u = (1 + z - s)_+: exact for c of any size."""
    return torch.sub(z, s, out=out).clamp_(min=-1)


def _above(z: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor:
    """u = (1 + z - s)_+."""
    return torch.sub(z, s - 1, out=out).clamp_(min=0)


def _scaled(x: Tensor, alpha: Number) -> Tensor:
    """z of scores x [...,K]."""
    return (x - x.amax(-1, keepdim=True)) * (alpha - 1)


def solve(x: Tensor, alpha: Number) -> Tensor:
    """entmax of rows x [R,K] -> [R,K], in as many steps as they need: on a CPU, where asking costs nothing.

    alpha: a number or [R,1].
    """
    size, parts = max(1, BLOCK // x.shape[1]), []
    alphas = alpha.split(size) if isinstance(alpha, Tensor) else [alpha] * -(-len(x) // size)
    for rows, own in zip(x.split(size), alphas, strict=True):
        z, c = _scaled(rows, own), 1 / (own - 1)
        parts.append(_weights(z, _root(z, c), c))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def in_fixed_steps(x: Tensor, alpha: Number) -> Tensor:
    """entmax of x [...,K], for a device that should not be waited for, and for graphs: alpha a number or [...,1]."""
    z, c, s = _scaled(x, alpha), 1 / (alpha - 1), torch.zeros_like(x[..., :1])
    for _ in range(FIXED_STEPS[x.dtype]):
        s = s + newton_step(z, s, c)
    return _weights(z, s, c)


def differentiate(p: Tensor, g: Tensor, alpha: Number, need_alpha: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of scores [R,K] and of alpha [R,1], from weights p and their gradient g (Correia et al. 2019, Prop. 1).

    That of the scores is s (g - m) with s = p^(2 - alpha) and the mean m = sum s g / sum s. That of alpha divides
    differences that vanish as alpha -> 1 by (alpha - 1)^2, unless written in q = p^(1 - alpha) - 1: since s = p + p q
    and s (g - m) sums to zero, all that is left is sum p (m - g) (q + (alpha - 1) log p) / (alpha - 1)^2.
    """
    tiny, beyond = torch.finfo(p.dtype).tiny, alpha - 1
    if need_alpha:
        log_p = p.clamp(min=tiny).log_().mul_(beyond)
        growth = log_p.neg().expm1_()
        s = torch.addcmul(p, p, growth)  # zero where p is
    else:
        s = support_power(p, beyond, tiny)
    centred = g - _sum(g * s) / _sum(s)
    if not need_alpha:
        return centred.mul_(s), None
    to_alpha = _sum(growth.add_(log_p).mul_(p).mul_(centred)) / -(beyond**2)
    return centred.mul_(s), to_alpha


def support_power(p: Tensor, beyond: Number, tiny: float) -> Tensor:
    """p ^ (1 - beyond) where p is positive, else 0."""
    if isinstance(beyond, Tensor) or beyond not in (0.5, 1):
        return p.clamp(min=tiny).log_().mul_((1 - beyond) * LOG2_E).exp2_().mul_(p.sign())
    return p.sign() if beyond == 1 else p.clamp(min=tiny).rsqrt_().mul_(p)  # sqrt is slow at zero
