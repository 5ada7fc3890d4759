"""How concentrated attention weights are, one number per query.

Every function takes weights [..., K] over K keys and returns [...] in float32. Of weights that have signs, as those of
differential attention, the magnitudes are measured, as in the Gini index of signals. `valid` is a boolean
mask broadcastable to the weights, True for real keys; padded keys are left out as if their columns did not
exist. (Padding masks in this library say the opposite: pass `~key_padding`.) A row that has no weight or no
valid key gives 0, never NaN.

Rows need not sum to one. What a row lacks to one, on a null key or on registers, is no key and counts nowhere but in
its mass: Gini index and entropy are of how the mass that it has is spread, whatever there is of it, while zeros and
support are of the weights themselves, which a null key that takes all makes zero.

All measures follow from the weights in ascending order: `sparsity` computes them together from one sorting, the
other functions one at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MEASURES = ("gini", "zeros", "zeros_thresholded", "zeros_relative", "support", "entropy", "mass", "empty")
OF_SHAPE = ("gini", "entropy")  # which a row without weight has not: `sparsity` says 0, means leave such rows out
CHUNK = 2**22  # weights that are sorted at a time: what bounds the memory for maps of an encoder
CPU_CHUNK = 2**19  # on a CPU: what stays in its cache


class Rows(NamedTuple):
    """Rows of weights in ascending order. Invalid keys are zeros, which come first."""

    ascending: Tensor  # [R,K]
    total: Tensor  # [R]
    count: Tensor  # [R] number of valid keys


def sparsity(
    weights: Tensor, valid: Tensor | None = None, threshold: float = 1e-6, share: float = 1e-3
) -> dict[str, Tensor]:
    """All MEASURES in one go: weights [..., K] -> {name: [...]}.

    gini and entropy are the functions below; support is the number of valid keys above zero; mass is the sum of the
    weights, and empty 1 where that is zero, else 0. zeros, zeros_thresholded and zeros_relative are `zeros_ratio` of
    exact zeros, of weights up to `threshold`, and of weights up to share / K of the K valid keys. Weights shrink as
    keys grow in number: what a fixed threshold calls zero depends on the resolution of the feature map, what a share of
    1/K, the mean weight of a row that sums to one, calls zero does not. At 1000 keys the two defaults are the same.
    Either is absolute: in a row of little mass more weights are below. Exact zeros of a softmax are underflow: in
    float32 a weight is zero where its score lies more than 103 below the highest.
    """

    def measure(rows: Rows) -> Tensor:
        limits = [torch.zeros_like(rows.total), torch.full_like(rows.total, threshold), share / rows.count.clamp(min=1)]
        zeros = _at_most(rows, torch.stack(limits, -1))  # [R,3]
        shares = _ratio(zeros, rows.count[:, None])
        support, empty = rows.count - zeros[:, 0], (rows.total == 0).float()
        return torch.stack([_gini(rows), *shares.unbind(-1), support, _entropy(rows), rows.total, empty])

    return dict(zip(MEASURES, _by_rows(measure, weights, valid), strict=True))


def gini(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Gini index: 0 when all keys weigh the same, 1 - 1/K when one key has everything.

    With weights sorted ascending, c_1 <= ... <= c_K:
        G = 1 - 2 * sum_k c_k / |c|_1 * (K - k + 1/2) / K
    Hurley and Rickard, "Comparing Measures of Sparsity", 2009. The other common normalisation, the mean absolute
    difference of pairs of different keys, is G * K / (K - 1).
    """
    return _by_rows(_gini, weights, valid)


def zeros_ratio(weights: Tensor, valid: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    """Share of the valid keys whose weight is at most `threshold`; 0 counts exact zeros only."""

    def measure(rows: Rows) -> Tensor:
        return _ratio(_at_most(rows, torch.full_like(rows.total, threshold)[:, None])[:, 0], rows.count)

    return _by_rows(measure, weights, valid)


def entropy(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Shannon entropy in nats of the weights normalised to sum 1: log K when uniform, 0 when one key has it all."""
    return _by_rows(_entropy, weights, valid)


def _by_rows(measure: Callable[[Rows], Tensor], weights: Tensor, valid: Tensor | None) -> Tensor:
    """measure: R rows -> [..., R]; applied to all rows of weights [..., K], chunk by chunk."""
    keys, shape = weights.shape[-1], weights.shape[:-1]
    size = max(1, (CPU_CHUNK if weights.device.type == "cpu" else CHUNK) // max(1, keys))
    parts = weights.reshape(-1, keys).split(size)
    # Where nothing is padded there is nothing to hide; to ask a GPU would take longer than hiding.
    if valid is None or (not valid.is_cuda and valid.all()):
        masks, counts = [None] * len(parts), [torch.full((), float(keys), device=weights.device)] * len(parts)
    else:
        count = valid.expand(*valid.shape[:-1], keys).sum(-1).float()
        masks = valid.expand(weights.shape).reshape(-1, keys).split(size)
        counts = count.expand(shape).reshape(-1).split(size)
    measured = torch.cat([measure(_sorted(*part)) for part in zip(parts, masks, counts, strict=True)], -1)
    return measured.reshape((*measured.shape[:-1], *shape))


def _sorted(weights: Tensor, mask: Tensor | None, count: Tensor) -> Rows:
    weights = weights.float().abs()
    weights = weights if mask is None else torch.where(mask, weights, 0.0)
    if weights.device.type != "cpu":
        ascending = weights.sort(dim=-1).values
    else:  # numpy sorts with the processor's vector instructions: ten times as fast
        ascending = weights.detach()
        ascending.numpy().sort(axis=-1)
    return Rows(ascending, ascending.sum(-1), count.expand(len(ascending)))


def _gini(rows: Rows) -> Tensor:
    length = rows.ascending.shape[-1]
    # Invalid keys are zeros and sort to the front, so the distance of a weight from the end of the row, which is
    # all that the formula uses, is the same with and without them.
    from_end = torch.arange(length, 0, -1, device=rows.total.device, dtype=rows.total.dtype) - 0.5
    share = _ratio(rows.ascending @ from_end, rows.total)
    return torch.where(rows.total > 0, 1 - 2 * _ratio(share, rows.count), 0.0)


def _at_most(rows: Rows, limits: Tensor) -> Tensor:
    """Number of valid keys whose weight is at most each of the `limits` [R,n], non-negative -> [R,n]."""
    invalid = rows.ascending.shape[-1] - rows.count
    return torch.searchsorted(rows.ascending, limits, right=True) - invalid[:, None]


def _entropy(rows: Rows) -> Tensor:
    # With p = c / |c|_1:  -sum p log p = log |c|_1 - sum c log c / |c|_1
    positive = rows.ascending.clamp_min(torch.finfo(torch.float32).tiny)  # faster than to spare zeros the logarithm
    if positive.device.type == "cpu":
        np.log(positive.numpy(), out=positive.numpy())  # twice as fast as torch here
    else:
        positive.log_()
    spread = -positive.mul_(rows.ascending).sum(-1)
    return torch.where(rows.total > 0, rows.total.log() + _ratio(spread, rows.total), 0.0).clamp(min=0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where whole is 0."""
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
