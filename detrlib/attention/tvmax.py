"""TVMax: sparse attention whose weights form patches of the image (Martins et al. 2021, "Sparse and Structured Visual
Attention", Sec. 3): sparsemax of the scores after the total-variation proximal step

    prox(y) = argmin_x  1/2 ||x - y||^2 + lam * sum over edges (i, j) of |x_i - x_j|,

where the edges join horizontally and vertically neighbouring valid cells of the key grid. The published code steps by
half of its alpha, as for ||x - y||^2 + alpha ...: its alpha of 0.1, the thesis's, is a lam of 0.05 here.

Legend: M maps, one per query; h, w the key grid; N = h w cells; E edges. D [E,N] takes differences along edges.

The dual problem is to find a flow u along the edges, |u_e| <= lam, that makes x = y - D^T u as short as possible; then
prox(y) = x. Edges that share no cell can be updated at once, each exactly, so four updates (upright and level, even and
odd) make a sweep of Gauss-Seidel; Nesterov's momentum makes the sweeps fast where patches are large; a map starts it
afresh whenever it would make u worse. Cells joined by edges with |u_e| < lam are equal in the solution: their mean,
which no flow between them changes, is exact as soon as the patches are right, long before u has converged. The duality
gap of these means proves it: half the squared error is at most the gap. The patches are also all that the gradient
needs. On a CPU, in float32, loops in C find the same flows (kernels/patches.c, by `native`), if there is a C compiler.
"""

import torch
from torch import Tensor

from detrlib.attention import native
from detrlib.attention.entmax import entmax

BLOCK, GPU_BLOCK = 2**17, 2**23  # cells worked on at a time: what a CPU's cache holds; about a gigabyte
# Sweeps between looks at the gap. Maps that fall short of the tolerance go on; those that still do after the last
# round, at 3072 sweeps, are taken as they are.
ROUNDS = (24, 24, 48, 96, 192, 384, 768, 1536)
RESOLUTION = {torch.float32: 4e-6, torch.float64: 1e-11}  # bound on the error of a map relative to the map, 2-norms


def tvmax(scores: Tensor, grid: tuple[int, int], lam: float) -> Tensor:
    """Weights over the last axis: [..., K] -> [..., K], rows sum to one.

    The first h w keys are the grid. Others behind them, such as a null key, are neighbours of none: their scores are
    not smoothed, and sparsemax is of them all. Smoothing leaves the mean of joined cells as it is, so the two kinds of
    scores stay comparable. Scores of -inf mark padding and get weight zero; a row of nothing else is not allowed.
    """
    cells = grid[0] * grid[1]
    smooth = tv_prox(scores[..., :cells].unflatten(-1, grid), lam).flatten(-2)
    if scores.shape[-1] > cells:
        smooth = torch.cat([smooth, scores[..., cells:]], -1)
    return entmax(smooth, 2.0)


def tv_prox(scores: Tensor, lam: float, valid: Tensor | None = None) -> Tensor:
    """[..., h, w] -> [..., h, w]. Cells that are -inf, or not `valid` (bool, broadcastable), stay as they are, take
    no part and pass no gradient."""
    return solve(scores, lam, valid)[0]


def solve(scores: Tensor, lam: float, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The proximal step [..., h, w] and the duality gap reached [...], an upper bound on half its squared error."""
    if not lam >= 0:
        raise ValueError(f"lam {lam} must not be negative")
    hidden = scores.isneginf() if valid is None else scores.isneginf() | ~valid
    return _prox(scores, float(lam), hidden)[:2]


@torch.library.custom_op("detrlib::tv_prox", mutates_args=())
def _prox(scores: Tensor, lam: float, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The proximal step, its gap, and the patches [M,N] that the gradient needs: one operator in a compiled graph."""
    maps, away = scores.reshape(-1, *scores.shape[-2:]), hidden.reshape(-1, *scores.shape[-2:])
    if native.supported(scores, 2.0):
        prox, patches, gap = native.tv_prox_maps(maps.contiguous(), away.contiguous(), lam)
        return prox.view(scores.shape), gap.view(scores.shape[:-2]), patches
    y = maps.masked_fill(away, 0)
    centre = y.sum((1, 2), keepdim=True) / (~away).sum((1, 2), keepdim=True).clamp(min=1)
    y = (y - centre).masked_fill_(away, 0)  # keeps rounding relative to the differences
    x, patches, gap = _solve(y, lam, away if away.any() else None)  # its rounds wait for a GPU in any case
    prox = torch.where(away, maps, x + centre).reshape(scores.shape)
    return prox, gap.view(scores.shape[:-2]), patches.int()


@torch.library.custom_op("detrlib::tv_prox_gradient", mutates_args=())
def _prox_gradient(gradient: Tensor, patches: Tensor, hidden: Tensor) -> Tensor:
    if native.supported(gradient, 2.0):
        rows, away = gradient.reshape(patches.shape).contiguous(), hidden.reshape(patches.shape).contiguous()
        return native.tv_prox_gradient(rows, away, patches).view(gradient.shape)
    rows = gradient.masked_fill(hidden, 0).reshape(len(patches), -1)
    return _mean(rows, patches.long(), 1).view(gradient.shape)


@_prox.register_fake
def _(scores: Tensor, lam: float, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    prox, gap = torch.empty_like(scores, memory_format=torch.contiguous_format), scores.new_empty(scores.shape[:-2])
    return prox, gap, scores.new_empty(gap.numel(), prox.shape[-2] * prox.shape[-1], dtype=torch.int32)


@_prox_gradient.register_fake
def _(gradient: Tensor, patches: Tensor, hidden: Tensor) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def _remember(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[2], inputs[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    return _prox_gradient(gradient, *ctx.saved_tensors), None, None


_prox.register_autograd(_backward, setup_context=_remember)


def _solve(y: Tensor, lam: float, away: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y [M,h,w] -> solution [M,h,w], patch labels [M,N], gap [M]. Cells that are `away` must be zero."""
    (h, w), device = y.shape[1:], y.device
    bound = None if away is None else lam * _joined(~away).to(y.dtype)  # [M,E]
    flow = y.new_zeros(len(y), 2 * h * w - h - w)  # [M,E]
    solution, gap = torch.empty_like(y), y.new_empty(len(y))
    patches = torch.empty(len(y), h * w, dtype=torch.long, device=device)
    tolerance = RESOLUTION[y.dtype] * y.flatten(1).norm(dim=1)
    size = max(1, (BLOCK if y.is_cpu else GPU_BLOCK) // (h * w))
    left = torch.arange(len(y), device=device)
    for sweeps in ROUNDS:
        for part in left.split(size):
            # Maps go last: every step of a sweep then runs along contiguous memory.
            limit = lam if bound is None else bound[part].t().contiguous()
            start = y[part].permute(1, 2, 0).contiguous()
            u = _relax(start, flow[part].t().contiguous(), limit, sweeps)
            x = _less_flow(start, u)
            # Tied neighbours are one patch even where the flow is full: else their order would be rounding's.
            tied = _differences(x).abs() <= tolerance[part] / (h * w) ** 0.5
            labels = _label((limit > 0) & (tied | (u.abs() < limit)), (h, w))
            means = _mean(x.flatten(0, 1), labels, 0).view_as(x)
            flow[part], patches[part], solution[part] = u.t(), labels.t(), means.permute(2, 0, 1)
            gap[part] = _gap(x, means, u, limit)
        left = left[gap[left] > tolerance[left] ** 2 / 2]  # false for NaN
        if not len(left):
            break
    return solution, patches, gap


def _ends(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two ends of the edges of a grid x [h,w,...], as views: upright even, odd, level even, odd."""
    upright = [(x[s:-1:2], x[s + 1 :: 2]) for s in (0, 1)]
    return upright + [(x[:, s:-1:2], x[:, s + 1 :: 2]) for s in (0, 1)]


def _along(edges: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The ends of the edges in x [h,w,M], and what `edges` [E,M] holds for them."""
    ends = _ends(x)
    parts = edges.split([a.shape[0] * a.shape[1] for a, _ in ends])
    return [(a, b, part.view_as(a)) for (a, b), part in zip(ends, parts, strict=True)]


def _joined(valid: Tensor) -> Tensor:
    """valid [M,h,w] -> whether both ends of an edge are, [M,E]."""
    return torch.cat([(a & b).flatten(0, 1) for a, b in _ends(valid.permute(1, 2, 0))]).t()


def _differences(x: Tensor) -> Tensor:
    """D x: [h,w,M] -> [E,M]."""
    return torch.cat([(a - b).flatten(0, 1) for a, b in _ends(x)])


def _less_flow(y: Tensor, u: Tensor) -> Tensor:
    """y - D^T u."""
    x = y.clone()
    for a, b, flow in _along(u, x):
        a -= flow
        b += flow
    return x


def _relax(y: Tensor, u: Tensor, bound: float | Tensor, sweeps: int) -> Tensor:
    """Better flows [E,M] for maps y [h,w,M], from flows u."""
    x, ahead = _less_flow(y, u), u
    for k in range(sweeps):
        before_x, before = x, u
        ahead_x = _less_flow(y, ahead)  # afresh each time: rounding would build up
        x, u = _sweep(ahead_x, ahead, bound)
        downhill = ((ahead_x - x) * (x - before_x)).sum((0, 1)) <= 0
        ahead = before.lerp(u, 1 + downhill.to(u.dtype) * (k / (k + 3)))
    return u


def _sweep(x: Tensor, u: Tensor, bound: float | Tensor) -> tuple[Tensor, Tensor]:
    """x = y - D^T u and u after the flow along each edge, four sets in turn, became the best one given the others."""
    x, new = x.clone(), torch.empty_like(u)
    bounds = [bound] * 4 if isinstance(bound, float) else [part for _, _, part in _along(bound, x)]
    for (a, b, old), (_, _, out), most in zip(_along(u, x), _along(new, x), bounds, strict=True):
        step = a - b
        torch.add(old, step, alpha=0.5, out=out)
        out.clamp_(-most, most)
        torch.sub(out, old, out=step)
        a -= step
        b += step
    return x, new


def _label(joined: Tensor, grid: tuple[int, int]) -> Tensor:
    """joined [E,M] -> [N,M]: the least index of the cells that a cell is connected to along joined edges."""
    count, maps = grid[0] * grid[1], joined.shape[1]
    labels = torch.arange(count, device=joined.device)[:, None].expand(count, maps).contiguous()
    while True:
        least = labels.clone()
        now, new = labels.view(*grid, maps), least.view(*grid, maps)
        for (a, b, join), (to_a, to_b) in zip(_along(joined, now), _ends(new), strict=True):
            lower = torch.where(join, torch.minimum(a, b), count)
            to_a.copy_(torch.minimum(to_a, lower))
            to_b.copy_(torch.minimum(to_b, lower))
        if torch.equal(least, labels):
            return labels
        # What a cell has learnt goes to the cell it pointed at, and from there to all that point at that one.
        least = least.scatter_reduce(0, labels, least, "amin")
        least = least.gather(0, least)
        labels = least.gather(0, least)


def _mean(values: Tensor, labels: Tensor, axis: int) -> Tensor:
    """Each value replaced by the mean of those along `axis` with its label."""
    first = values.gather(axis, labels)  # summing what lies beyond it keeps long sums exact
    beyond = torch.zeros_like(values).scatter_add_(axis, labels, values - first)
    members = torch.zeros_like(values).scatter_add_(axis, labels, torch.ones_like(values))
    return first + (beyond / members).gather(axis, labels)


def _gap(x: Tensor, means: Tensor, u: Tensor, bound: float | Tensor) -> Tensor:
    """Primal less dual objective [M], of `means` and of u with x = y - D^T u; written so that every term is >= 0."""
    difference = _differences(means)
    return (x - means).square().sum((0, 1)) / 2 + (bound * difference.abs() - u * difference).sum(0)
