"""The definition of alpha-entmax and the plainest way to compute it. Slow: to be read first, then a second opinion.

Weights over K keys are points of the simplex: p >= 0, sum p = 1. Given scores s, alpha-entmax is the point that agrees
with the scores and yet is spread out (Peters, Niculae & Martins 2019, Eq. 10):

    entmax(s) = argmax_p  <p, s> + H(p),    H(p) = sum_j (p_j - p_j^alpha) / (alpha (alpha - 1))

H is Tsallis' entropy; as alpha -> 1 it becomes Shannon's, - sum_j p_j log p_j, and entmax becomes softmax. At the
maximum, of all keys that have weight the derivatives s_j - (p_j^(alpha-1) - 1 / alpha) / (alpha - 1) are the same
number; solved for p, with what does not depend on j collected in tau:

    p_j = ((alpha - 1) s_j - tau)_+ ^ (1 / (alpha - 1)),    with tau such that sum p = 1

A key whose score is below tau / (alpha - 1) has weight zero, exactly: that is the sparsity. The sum falls as tau rises,
so tau is found by halving an interval. With the largest score at 0 it lies between -1, where the key of that score
alone has weight one, and 0, where no key has any.
"""

import torch
from torch import Tensor

HALVINGS = 64  # of an interval of length one: more than float64 can tell


def entmax(scores: Tensor, alpha: float | Tensor, padding: Tensor | None = None) -> Tensor:
    """Weights over the last axis, in the precision of the scores: [..., K] -> [..., K].

    alpha: 1, which is softmax, or above; a tensor, above 1, broadcasts to [..., 1]. padding bool, broadcastable to the
    scores, True = padding: as if these columns were not there; with a number for alpha only.
    """
    if padding is not None:
        return _without_columns(scores, alpha, padding)
    scores = scores - scores.amax(-1, keepdim=True)
    if not isinstance(alpha, Tensor) and alpha == 1:
        return scores.exp() / scores.exp().sum(-1, keepdim=True)
    z, power = (alpha - 1) * scores, 1 / (alpha - 1)
    tau = torch.full_like(z[..., :1], -1.0)
    for halving in range(1, HALVINGS + 1):
        middle = tau + 0.5**halving
        total = ((z - middle).clamp(min=0) ** power).sum(-1, keepdim=True)
        tau = torch.where(total >= 1, middle, tau)
    return (z - tau).clamp(min=0) ** power


def _without_columns(scores: Tensor, alpha: float, padding: Tensor) -> Tensor:
    """Row by row: entmax of the columns that are left; padding, and rows of nothing else, are zero."""
    rows, valid = scores.flatten(0, -2), ~padding.expand_as(scores).flatten(0, -2)
    weights = torch.zeros_like(rows)
    for row, own, kept in zip(weights, rows, valid, strict=True):
        if kept.any():
            row[kept] = entmax(own[kept], alpha)
    return weights.view(scores.shape)
