"""Entmax of rows by Newton's method: a loop that ends when it has converged, for a CPU, and a fixed number of steps.

Legend: R rows, K keys. With z = (alpha - 1) (x - max x) and c = 1 / (alpha - 1), entmax is p = (1 + z - s)_+ ^ c where
s >= 0 solves ||(1 + z - s)_+||_c = 1. As alpha -> 1 this becomes exp(x - max x - s / (alpha - 1)), a softmax.

For c >= 1, that is alpha <= 2, the norm is convex and decreasing in s: Newton's steps from s = 0, where it is at least
1, approach the root from the left and never overshoot. They are few: a step from an excess f0 = norm - 1 with slope -g0
leads to f1 and -g1 with f1 / f0 + g1 / g0 <= 1, so that f g falls to a quarter or less; by Hoelder's inequality g lies
between 1 and K^(1/c); f begins below K^(1/c), and the error of s is at most f.

On a CPU few keys are worked on. Any s left of the root tells which have no weight: those with 1 + z <= s. And the root
for some keys of a row lies left of the root for all. So a row is folded into columns of up to `SEGMENTS` keys, whose
maxima give the largest score, a first s, and the few columns in which a key matters.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**19  # scores worked on at a time where most keys have weight: enough to outweigh the calls
PART = 2**23  # scores looked through at a time: what is looked up takes less memory than the scores
SEGMENTS, LANES = 14, 32  # keys of a column; a row has a multiple of so many columns, for vector instructions
# Keys that matter are looked for in rows of at least so many, and used where they are at most such a share of a row.
# Powers through logarithms are dear; those of alpha = 1.5 and 2 are products, for which it pays less.
SHORT, FEW = 64, 0.2
SHORT_OF_PRODUCTS, FEW_OF_PRODUCTS = 512, 0.05
COARSE_STEPS = 2  # with the maxima of columns
MOST_STEPS = 60  # never reached in practice: convergence is quadratic, and finite for sparsemax
# Steps after which an excess of K^(1/c) <= 2^16 has become less than the resolution of numbers, if nobody looks.
FIXED_STEPS = {torch.float64: 42, torch.float32: 28, torch.bfloat16: 28, torch.float16: 28}
LOG2_E = math.log2(math.e)
Number = float | Tensor  # one for all rows, or [R,1]
Rows = slice | Tensor  # which


class Packed(NamedTuple):
    """Keys of R rows side by side, in the order of rows; what is known of rows has R entries."""

    row: Tensor  # [N] of each key
    counts: Tensor  # [R]

    def sum(self, keys: Tensor) -> Tensor:
        return torch.segment_reduce(keys, "sum", lengths=self.counts, unsafe=True)

    def spread(self, rows: Number) -> Number:
        """What is known of rows, for each of their keys."""
        return rows.index_select(0, self.row) if isinstance(rows, Tensor) else rows


class Whole:
    """Rows [R,K] as they are; what is known of them is [R,1]."""

    @staticmethod
    def sum(keys: Tensor) -> Tensor:
        return keys.sum(-1, keepdim=True)

    @staticmethod
    def spread(rows: Number) -> Number:
        return rows


def newton_step(
    z: Tensor, s: Tensor, c: Number, power: Number, rows: Packed | type[Whole], buffer: Tensor | None = None
) -> Tensor:
    """How far a Newton's step goes from s: f / -f' of the excess f = S^(1/c) - 1, where -f' = W S^(1/c - 1).

    S is the sum of u^c and W that of u^(c-1), with u = (1 + z - s)_+ of each key. Powers that are no products are taken
    through logarithms: power = (c - 1) log2 e of each key, and exp2, which, unlike exp, does not slow down where it
    underflows.
    """
    if not _by_products(c):
        u = _less(z, s, rows, buffer)  # u - 1
        lower = u.log1p().mul_(power).exp2_()  # u^(c-1)
        w, total = rows.sum(lower), rows.sum(lower.mul_(u.add_(1)))
    elif c == 2:
        u = _above(z, s, rows, buffer)
        w, total = rows.sum(u), rows.sum(u.square_())
    else:
        u = _above(z, s, rows, buffer)
        total = rows.sum(u)
        return (total - 1) / rows.sum(u.sign_())
    return -total * torch.expm1(total.log() / -c) / w


def _root(z: Tensor, s: Tensor, c: Number, rows: Packed | type[Whole], most: int, ends: bool = True) -> Tensor:
    """The root s, approached from `s` on its left. Without `ends` the steps are as many as they may be."""
    # The error of a quadratically convergent method is about the square of its last step. Below c = 2 the curvature has
    # no bound, and steps shrink to rounding before it is safe to stop.
    resolution = torch.finfo(z.dtype).eps
    safe, bold = 4 * resolution, 0.1 * resolution**0.5
    tolerance = torch.where(c < 2, safe, bold) if isinstance(c, Tensor) else safe if c < 2 else bold
    power = rows.spread(c - 1) * LOG2_E
    buffer = torch.empty_like(z) if ends else None  # graphs know of none
    for done in range(1, most + 1):
        step = newton_step(z, s, c, power, rows, buffer)
        s = s + step
        if not ends:
            continue
        unfinished = c * step > tolerance
        left = int(unfinished.sum())
        if not left:
            break
        if rows is Whole and 2 * left < len(z):  # the others need not wait
            some = unfinished.view(-1).nonzero().view(-1)
            return s.index_copy_(0, some, _root(*(_take(t, some) for t in (z, s, c)), rows, most - done))
    return s


def _weights(z: Tensor, s: Tensor, c: Number, rows: Packed | type[Whole], out: Tensor | None = None) -> Tensor:
    """(1 + z - s)_+ ^ c, and what rounding has left is put right: rows sum to one."""
    if _by_products(c):
        weights = _above(z, s, rows, out)
        weights = weights if c == 1 else weights.square_()
    else:
        weights = _less(z, s, rows, out).log1p_().mul_(rows.spread(c) * LOG2_E).exp2_()
    return weights.div_(rows.spread(rows.sum(weights)))


def _by_products(c: Number) -> bool:
    """Whether powers are taken by products, for alpha = 1.5 and 2, and not through logarithms."""
    return not isinstance(c, Tensor) and c in (1, 2)


def _less(z: Tensor, s: Tensor, rows: Packed | type[Whole], out: Tensor | None) -> Tensor:
    """u - 1 for u = (1 + z - s)_+: exact for c of any size."""
    return torch.sub(z, rows.spread(s), out=out).clamp_(min=-1)


def _above(z: Tensor, s: Tensor, rows: Packed | type[Whole], out: Tensor | None) -> Tensor:
    """u = (1 + z - s)_+."""
    return torch.sub(z, rows.spread(s - 1), out=out).clamp_(min=0)


def in_fixed_steps(x: Tensor, alpha: Number) -> Tensor:
    """entmax of x [...,K], for a device that should not be waited for, and for graphs: alpha a number or [...,1]."""
    c = 1 / (alpha - 1)
    z, s = (x - x.amax(-1, keepdim=True)) * (alpha - 1), torch.zeros_like(x[..., :1])
    return _weights(z, _root(z, s, c, Whole, FIXED_STEPS[x.dtype], ends=False), c, Whole)


def solve(x: Tensor, alpha: Number) -> tuple[Tensor, Tensor, Tensor]:
    """entmax of rows x [R,K] on a CPU.

    Returns weights [R,K]; positions in them of the few keys of a row that can have weight [N], in order; and how many
    there are in each row [R]: 0 where they are not few, and were not looked for.
    """
    weights, start, found = torch.empty_like(x), 0, []
    for part, out in zip(*(t.split(max(1, PART // x.shape[1])) for t in (x, weights)), strict=True):
        own = alpha[start : start + len(part)] if isinstance(alpha, Tensor) else alpha
        index, counts = _solve(part, own, out)
        found.append((index + start * x.shape[1] if start else index, counts))
        start += len(part)
    return weights, *(torch.cat(each) if len(each) > 1 else each[0] for each in zip(*found, strict=True))


def _solve(x: Tensor, alpha: Number, out: Tensor) -> tuple[Tensor, Tensor]:
    """As `solve`, weights into out."""
    beyond, c, s = alpha - 1, 1 / (alpha - 1), torch.zeros_like(x[:, :1])
    counts = torch.zeros(len(x), dtype=torch.long)
    index = counts[:0]
    if x.shape[1] < SHORT:
        top = x.amax(-1, keepdim=True)
    else:
        columns = _columns(x)
        top = columns.amax(-1, keepdim=True)
        columns.sub_(top).mul_(beyond)
        s = _root(columns, s, c, Whole, COARSE_STEPS, ends=False)
        shortest, most = _limits(c)
        if x.shape[1] >= shortest:
            index, counts, z = _few(x, columns > s - 1, top, beyond, s - 1, most)
    if len(index):
        rows, keys = _packed(counts)
        own_s, own_c = (_flat(_take(t, rows)) for t in (s, c))
        weights = _weights(z, _root(z, own_s, own_c, keys, MOST_STEPS), own_c, keys, z)
        out.zero_().view(-1).index_copy_(0, index, weights)
    for rows in _others(counts, x.shape[1]):
        own_c, buffer = _take(c, rows), _buffer(out, rows)
        z = torch.sub(_take(x, rows), _take(top, rows), out=buffer).mul_(_take(beyond, rows))
        weights = _weights(z, _root(z, _take(s, rows), own_c, Whole, MOST_STEPS), own_c, Whole, z)
        if buffer is None:
            out.index_copy_(0, rows, weights)
    return index, counts


def support(weights: Tensor, alpha: Number) -> tuple[Tensor, Tensor]:
    """What `solve` tells besides weights [R,K], found in them again."""
    shortest, most = _limits(1 / (alpha - 1))
    if weights.shape[1] < shortest:
        return torch.empty(0, dtype=torch.long), torch.zeros(len(weights), dtype=torch.long)
    none = torch.zeros_like(weights[:, :1])
    return _few(weights, _columns(weights) > 0, none, 1.0, none, most)[:2]


def _packed(counts: Tensor) -> tuple[Tensor, Packed]:
    """The rows that were packed, and how."""
    rows = counts.nonzero().view(-1)
    counts = counts.index_select(0, rows)
    return rows, Packed(torch.arange(len(rows)).repeat_interleave(counts), counts)


def _others(counts: Tensor, keys: int) -> list[Rows]:
    """The rows that were not, in parts that fit a cache."""
    others, size = (counts == 0).nonzero().view(-1), max(1, BLOCK // keys)
    if len(others) < len(counts):
        return list(others.split(size))
    return [slice(first, first + size) for first in range(0, len(counts), size)]  # needs no copies


def _take(known: Number, rows: Rows) -> Number:
    """What is known of such rows."""
    if not isinstance(known, Tensor):
        return known
    return known[rows] if isinstance(rows, slice) else known.index_select(0, rows)


def _buffer(results: Tensor, rows: Rows) -> Tensor | None:
    """Where results of such rows can be written without a copy; None: nowhere."""
    return results[rows] if isinstance(rows, slice) else None


def _flat(known: Number) -> Number:
    """[R,1] -> [R]."""
    return known.view(-1) if isinstance(known, Tensor) else known


def _limits(c: Number) -> tuple[int, float]:
    """The shortest rows in which few keys are looked for, and the share of them that is still few."""
    return (SHORT_OF_PRODUCTS, FEW_OF_PRODUCTS) if _by_products(c) else (SHORT, FEW)


def _segments(keys: int) -> tuple[int, int]:
    """How many segments rows of so many keys are folded into, and how many columns wide."""
    width = -(-keys // (SEGMENTS * LANES)) * LANES
    return -(-keys // width), width


def _columns(x: Tensor) -> Tensor:
    """The maximum of each column of the folded rows [R,K]: key k stands in column k % width."""
    segments, width = _segments(x.shape[1])
    whole = (segments - 1) * width
    maxima = x[:, :whole].unflatten(1, (segments - 1, width)).amax(1)
    rest = x.shape[1] - whole  # the last segment may be shorter
    torch.maximum(maxima[:, :rest], x[:, whole:], out=maxima[:, :rest])
    return maxima


def _few(
    x: Tensor, kept: Tensor, top: Tensor, beyond: Number, floor: Tensor, most: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys in columns kept [R,width] whose z = (x - top) beyond is above floor [R,1]: positions, counts, z.

    Without the rows that keep none (not a number), or as many columns as a share `most` of keys would take.
    """
    segments, width = _segments(x.shape[1])
    flat = kept.view(-1).nonzero().view(-1)
    row = flat // width
    many = torch.bincount(row, minlength=len(x)) > (1 - (1 - most) ** segments) * width
    if many.any():
        few = (~many).index_select(0, row).nonzero().view(-1)
        flat, row = flat.index_select(0, few), row.index_select(0, few)
    position = (flat + row * (x.shape[1] - width))[:, None] + torch.arange(0, segments * width, width)
    z = x.view(-1).index_select(0, position.clamp_(max=x.numel() - 1).view(-1)).view_as(position)
    z.sub_(top.index_select(0, row)).mul_(_take(beyond, row))
    beyond_end = flat - row * width >= x.shape[1] - (segments - 1) * width  # there the next row begins
    z[:, -1].masked_fill_(beyond_end, -math.inf)
    which = (z > floor.index_select(0, row)).view(-1).nonzero().view(-1)
    counts = torch.bincount(row.index_select(0, which // segments), minlength=len(x))
    return position.view(-1).index_select(0, which), counts, z.view(-1).index_select(0, which)


def differentiate(
    weights: Tensor, gradient: Tensor, alpha: Number, need_alpha: bool, index: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor | None]:
    """From weights and their gradient [R,K] to that of the scores and of alpha [R,1]; the rest as of `solve`."""
    to_scores = torch.empty_like(weights)
    to_alpha = torch.empty_like(weights[:, :1]) if need_alpha else None
    if len(index):
        rows, keys = _packed(counts)
        p, g = (t.view(-1).index_select(0, index) for t in (weights, gradient))
        found = differentiate_rows(p, g, _flat(_take(alpha, rows)), need_alpha, keys)
        to_scores.zero_().view(-1).index_copy_(0, index, found[0])
        if need_alpha:
            to_alpha.view(-1).index_copy_(0, rows, found[1])
    for rows in _others(counts, weights.shape[1]):
        buffer = _buffer(to_scores, rows)
        p, g = _take(weights, rows), _take(gradient, rows)
        found = differentiate_rows(p, g, _take(alpha, rows), need_alpha, out=buffer)
        if buffer is None:
            to_scores.index_copy_(0, rows, found[0])
        if need_alpha:
            to_alpha[rows] = found[1]
    return to_scores, to_alpha


def differentiate_rows(
    p: Tensor,
    g: Tensor,
    alpha: Number,
    need_alpha: bool,
    rows: Packed | type[Whole] = Whole,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of scores and alpha (Correia et al. 2019, Prop. 1).

    That of the scores is s (g - m) with s = p^(2 - alpha) and the mean m = sum s g / sum s. That of alpha divides
    differences that vanish as alpha -> 1 by (alpha - 1)^2, unless written in q = p^(1 - alpha) - 1: since s = p + p q
    and s (g - m) sums to zero, all that is left is sum p (m - g) (q + (alpha - 1) log p) / (alpha - 1)^2.
    """
    tiny, beyond = torch.finfo(p.dtype).tiny, rows.spread(alpha - 1)
    if need_alpha:
        log_p = p.clamp(min=tiny).log_().mul_(beyond)
        growth = log_p.neg().expm1_()
        s = torch.addcmul(p, p, growth)  # zero where p is
    else:
        s = support_power(p, beyond, tiny)
    mean = rows.sum(torch.mul(g, s, out=out)) / rows.sum(s)
    centred = torch.sub(g, rows.spread(mean), out=out)
    if not need_alpha:
        return centred.mul_(s), None
    to_alpha = rows.sum(growth.add_(log_p).mul_(p).mul_(centred)) / -((alpha - 1) ** 2)
    return centred.mul_(s), to_alpha


def support_power(p: Tensor, beyond: Number, tiny: float) -> Tensor:
    """p ^ (1 - beyond) where p is positive, else 0."""
    if isinstance(beyond, Tensor) or beyond not in (0.5, 1):
        return p.clamp(min=tiny).log_().mul_((1 - beyond) * LOG2_E).exp2_().mul_(p.sign())
    return p.sign() if beyond == 1 else p.clamp(min=tiny).rsqrt_().mul_(p)  # sqrt is slow at zero
