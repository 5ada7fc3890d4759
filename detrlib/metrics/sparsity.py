"""How concentrated attention weights are, one number per query.

Every function takes non-negative weights [..., K] over K keys and returns [...] in float32. `valid` is a boolean
mask broadcastable to the weights, True for real keys; padded keys are left out as if their columns did not
exist. (Padding masks in this library say the opposite: pass `~key_padding`.) A row that has no weight or no
valid key gives 0, never NaN.
"""

import torch
from torch import Tensor


def gini(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Gini index: 0 when all keys weigh the same, 1 - 1/K when one key has everything.

    With weights sorted ascending, c_1 <= ... <= c_K:
        G = 1 - 2 * sum_k c_k / |c|_1 * (K - k + 1/2) / K
    Hurley and Rickard, "Comparing Measures of Sparsity", 2009. The other common normalisation, the mean absolute
    difference of pairs of different keys, is G * K / (K - 1).
    """
    weights, valid = _masked(weights, valid)
    ascending = weights.sort(dim=-1).values
    length = weights.shape[-1]
    # Invalid keys are zeros and sort to the front, so the distance of a weight from the end of the row, which is
    # all that the formula uses, is the same with and without them.
    from_end = torch.arange(length, 0, -1, device=weights.device, dtype=weights.dtype) - 0.5
    share = _ratio((ascending * from_end).sum(-1), weights.sum(-1))
    return torch.where(weights.sum(-1) > 0, 1 - 2 * _ratio(share, valid.sum(-1)), 0.0)


def zeros_ratio(weights: Tensor, valid: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    """Share of the valid keys whose weight is at most `threshold`; 0 counts exact zeros only."""
    weights, valid = _masked(weights, valid)
    return _ratio(((weights <= threshold) & valid).sum(-1), valid.sum(-1))


def support_size(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Number of valid keys with a weight above zero."""
    weights, _ = _masked(weights, valid)
    return (weights > 0).sum(-1).float()


def entropy(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Shannon entropy in nats of the weights normalised to sum 1: log K when uniform, 0 when one key has it all."""
    weights, _ = _masked(weights, valid)
    return torch.special.entr(_ratio(weights, weights.sum(-1, keepdim=True))).sum(-1)


def _masked(weights: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 weights with zeros at invalid keys, and the mask in full shape."""
    if valid is None:
        valid = torch.ones((), dtype=torch.bool, device=weights.device)
    valid = valid.expand_as(weights)
    return weights.float().masked_fill(~valid, 0.0), valid


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where whole is 0."""
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
