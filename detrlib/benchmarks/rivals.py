"""What the transforms are measured against: other implementations, and TVMax one map at a time.

TVMax in a loop follows the implementation published with Martins et al. 2021. The proximal step of a map h x w takes
turns between exact steps along its columns and its rows (Condat 2013, "A Direct Algorithm for 1-D Total Variation
Denoising") with Dykstra's corrections (Barbero & Sra 2018, "Modular Proximal Optimization for Multidimensional
Total-Variation Regularization", Sec. 4) until both agree. Its gradient is a mean over each patch of equal neighbouring
values; patches are collected one after another, each growing from cell to cell. numba compiles the inner loops; without
it they run as Python, right but hundreds of times slower.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from detrlib.attention.entmax import entmax as own_entmax

try:
    from numba import njit
except ImportError:

    def njit(function):
        """The function itself."""
        return function


class Candidate(NamedTuple):
    """One implementation of a transform."""

    transform: str
    source: str  # whose
    apply: Callable[[Tensor], Tensor]  # scores [B,H,Q,K] to weights
    alpha: Tensor | None = None  # has a gradient beside the scores


def package_version(name: str) -> str | None:
    """None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def left_out(device: str) -> dict[str, str]:
    """The packages that cannot be measured against here, with the reason."""
    reasons = {name: "not installed" for name in ("entmax", "numba", "adasplash") if package_version(name) is None}
    return reasons | ({} if device == "cuda" else {"adasplash": "needs a GPU"})


def others(name: str, alpha: float, alphas: Tensor) -> list[Candidate]:
    """Other implementations of transform `name`. `alpha` is that of "entmax", `alphas` [H] those of alpha_entmax."""
    if name == "softmax":
        return [Candidate(name, "torch", lambda scores: torch.softmax(scores, -1))]
    missing, candidates = left_out(alphas.device.type), []
    number = {"sparsemax": 2.0, "entmax15": 1.5, "entmax": alpha}.get(name)
    if name != "tvmax" and "entmax" not in missing:
        candidates.append(_of_entmax_library(name, alpha, alphas))
    if number and "adasplash" not in missing:
        candidates.append(Candidate(name, "adasplash", lambda scores: _adasplash().triton_entmax(scores, alpha=number)))
    return candidates


def _adasplash():
    """Imported where it is measured, since one that does not fit this Triton should cost its own rows alone."""
    import adasplash

    return adasplash


def _of_entmax_library(name: str, alpha: float, alphas: Tensor) -> Candidate:
    import entmax

    if name == "alpha_entmax":
        learned = alphas[:, None, None].clone().requires_grad_()  # [H,1,1]
        return Candidate(name, "entmax", lambda scores: entmax.entmax_bisect(scores, learned, dim=-1), learned)
    functions = {
        "sparsemax": lambda scores: entmax.sparsemax(scores, dim=-1),
        "entmax15": lambda scores: entmax.entmax15(scores, dim=-1),
        "entmax": lambda scores: entmax.entmax_bisect(scores, alpha, dim=-1),
    }
    return Candidate(name, "entmax", functions[name])


def attention_rivals(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[str, str, Callable[[], Tensor]]]:
    """Transform, source and computation of other implementations of sparse attention, for [B,H,Q,D] and [B,H,K,D]."""
    if "adasplash" in left_out(query.device.type) or query.shape != key.shape:  # it is self-attention
        return []
    return [("entmax15", "adasplash", lambda: _adasplash().adasplash(query, key, value, alpha=1.5, is_causal=False))]


def by_grid_sample(values: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """`attention.deformable.sample_and_mix` as published code does it without a kernel of its own: level by level."""
    parts = []
    for level, ((height, width), tokens) in enumerate(
        zip(shapes, values.split([h * w for h, w in shapes], 1), strict=True)
    ):
        maps = tokens.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))  # [B*H,D,h,w]
        where = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1).to(values.dtype)  # [B*H,Q,P,2]
        parts.append(F.grid_sample(maps, where, align_corners=False))  # [B*H,D,Q,P]
    shares = weights.transpose(1, 2).flatten(0, 1).flatten(2).unsqueeze(1).to(values.dtype)  # [B*H,1,Q,L*P]
    mixed = (torch.cat(parts, -1) * shares).sum(-1)  # [B*H,D,Q]
    return mixed.unflatten(0, (len(values), -1)).flatten(1, 2).transpose(1, 2)


def tvmax_by_map(
    scores: Tensor,
    grid: tuple[int, int],
    lam: float,
    iterations: int = 35,
    tolerance: float = 1e-2,
    digits: int = 1,
    search: bool = True,
) -> Tensor:
    """TVMax of [..., K], K = h w, in a loop over maps; its defaults are those of the published implementation.

    iterations, tolerance: of the proximal step, until rows and columns agree. digits: values that agree when rounded
    to them are equal in the gradient. search: find out by searching a list whether a patch has a cell already, and
    look for the next patch from the first cell on, which takes a time quadratic in the number of cells for every
    patch, as published; otherwise keep a mark for every cell, which takes a time linear in their number.
    Sparsemax, which makes no difference here, is taken of all maps at once.
    """
    maps = scores.reshape(-1, *grid)
    smooth = torch.stack([_Prox.apply(y, lam, iterations, tolerance, digits, search) for y in maps])
    return own_entmax(smooth.view(scores.shape), 2.0)


class _Prox(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, lam: float, iterations: int, tolerance: float, digits: int, search: bool) -> Tensor:
        x = prox(y.detach().cpu().double().numpy(), lam, iterations, tolerance)
        ctx.rounded, ctx.search = x.round(digits), search
        return torch.as_tensor(x, dtype=y.dtype, device=y.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        means = _patch_means(ctx.rounded, gradient.cpu().double().numpy(), ctx.search)
        return torch.as_tensor(means, dtype=gradient.dtype, device=gradient.device), *[None] * 5


def prox(y: np.ndarray, lam: float, iterations: int, tolerance: float) -> np.ndarray:
    """argmin_x 1/2 ||x - y||^2 + lam TV(x) of one map [h,w], float64."""
    x, p, q = y.copy(), np.zeros_like(y), np.zeros_like(y)
    for _ in range(iterations):
        by_column = _prox_rows((x + p).T.copy(), lam).T
        p += x - by_column
        x = _prox_rows(by_column + q, lam)
        q += by_column - x
        if np.abs(by_column - x).max() < tolerance:
            break
    return x


@njit
def _prox_rows(y, lam):
    x = np.empty_like(y)
    for i in range(y.shape[0]):
        _prox_line(y[i], lam, x[i])
    return x


@njit
def _prox_line(y, lam, x):
    """Condat's algorithm, from y [n] to x [n]. From `start` on x is constant, between `low` and `high`; `slack_low` and
    `slack_high` are the dual variable that these would give, `end_low` and `end_high` where it last met its bound."""
    last = len(y) - 1
    k = start = end_low = end_high = 0
    low, high, slack_low, slack_high = y[0] - lam, y[0] + lam, lam, -lam
    while True:
        at_end = k == last
        if (at_end and slack_low < 0) or (not at_end and y[k + 1] + slack_low < low - lam):  # x steps down
            x[start : end_low + 1] = low
            start = k = end_low = end_low + 1
            slack_high = y[k] + lam - high if at_end else -lam
            low, slack_low = y[k], lam
            if not at_end:
                high, end_high = y[k] + 2 * lam, k
        elif (at_end and slack_high > 0) or (not at_end and y[k + 1] + slack_high > high + lam):  # x steps up
            x[start : end_high + 1] = high
            start = k = end_high = end_high + 1
            slack_low = y[k] - lam - low if at_end else lam
            high, slack_high = y[k], -lam
            if not at_end:
                low, end_low = y[k] - 2 * lam, k
        elif at_end:
            x[start:] = low + slack_low / (k - start + 1)
            return
        else:
            k += 1
            slack_low += y[k] - low
            slack_high += y[k] - high
            if slack_low >= lam:
                low += (slack_low - lam) / (k - start + 1)
                slack_low, end_low = lam, k
            if slack_high <= -lam:
                high += (slack_high + lam) / (k - start + 1)
                slack_high, end_high = -lam, k


@njit
def _is_taken(cell, taken, count, marks, search):
    if not search:
        return marks[cell]
    for k in range(count):  # noqa: SIM110, numba has no generators
        if taken[k] == cell:
            return True
    return False


@njit
def _patch_means(values, gradient, search):
    """Means of `gradient` [h,w] over patches of equal neighbouring `values` [h,w]."""
    h, w = values.shape
    taken, marks, count = np.empty(h * w, np.int64), np.zeros(h * w, np.bool_), 0
    means, seed = np.empty_like(gradient), 0
    while count < h * w:
        seed = 0 if search else seed
        while _is_taken(seed, taken, count, marks, search):
            seed += 1
        first, total = count, 0.0
        taken[count], marks[seed] = seed, True
        count, done = count + 1, count
        while done < count:
            i, j = taken[done] // w, taken[done] % w
            done += 1
            total += gradient[i, j]
            for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                same = 0 <= a < h and 0 <= b < w and values[a, b] == values[i, j]
                if same and not _is_taken(a * w + b, taken, count, marks, search):
                    taken[count], marks[a * w + b] = a * w + b, True
                    count += 1
        for k in range(first, count):
            means[taken[k] // w, taken[k] % w] = total / (count - first)
    return means
