"""Mixing values by transformed scores: attention without its projections.

`mix` is how it is written in the papers. `attend` computes the same in one of four ways, by what is known before any
number is:

    written down    `mix` itself, if the weights are asked for, or if there are no more than `MOST_SCORES` scores
    PyTorch's       `scaled_dot_product_attention`, for softmax: no score is written down, but on a CPU with dropout,
                    for which `_mix_softmax` writes them down in fewer passes, or with values of another width than
                    keys, for which PyTorch's kernel is none but its formula in more passes than here
    one kernel      kernels/flash.py, for the entmax family on a GPU, from `FUSED_KEYS` keys on: likewise
    in parts        of the queries, for what is left: no more than `MOST_SCORES` scores exist at a time

A null key, where the transform has one, and what it scales scores by are part of the transform in the first way and the
last; the others get a key more and scaled queries (`_plain`).

Legend: B images, H heads, Q queries, K keys, D channels of queries and keys, V of values. Batch first;
padding [B,K] is True where a key is padding; grid (h, w) where keys are the cells of a feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from detrlib.attention.dropout import drawn_by_bits, thinned
from detrlib.attention.dropout import dropout as drop
from detrlib.attention.entmax import KERNEL_ALPHA, has_triton
from detrlib.attention.transforms import AlphaEntmax, Entmax, Grid, Softmax, Transform

MOST_SCORES = 2**27  # kept at a time when maps are not asked for: half a GiB of float32
NULL_CHANNELS = 8  # of queries and keys, that hold the learned score of a null key
FUSED_KEYS = 2048  # from here on the scores of a row are worth not writing down


def mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    transform: Transform,
    padding: Tensor | None = None,
    grid: Grid | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention as it is written in the papers, every score and every weight in memory; arguments as of `attend`."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [B,H,Q,K]
    weights = transform(scores, None if padding is None else padding[:, None, None, :], grid)
    return drop(weights, dropout).to(value.dtype) @ value, weights


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    transform: Transform,
    padding: Tensor | None = None,
    grid: Grid | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Mix values by transformed scores (Vaswani et al. 2017, Eq. 1, with `transform` in place of softmax).

    Args:
        query: [B,H,Q,D].
        key: [B,H,K,D].
        value: [B,H,K,V].
        transform: from scores [B,H,Q,K] to weights.
        padding: [B,K] bool, True = padding; None: there is none.
        grid: (h, w) of the feature map whose cells are the keys, where they are such.
        dropout: share of the weights that are set to zero, 0 to 1.
        need_weights: return the weights as well; then none of the faster ways is taken.

    Returns:
        Mixed values [B,H,Q,V], and weights [B,H,Q,K] if asked for: before dropout, where the layer looks.

    Raises:
        ValueError: the transform needs a grid, as tvmax does, and there is none.
    """
    if need_weights:
        return mix(query, key, value, transform, padding, grid, dropout)
    row = max(1, query.shape[0] * query.shape[1] * key.shape[2])  # scores of one query in every image and head
    few = row * query.shape[2] <= MOST_SCORES
    if isinstance(transform, Softmax) and not transform.padding_adds_one:
        by_bits, channels, width = 0 < dropout < 1 and drawn_by_bits(query), query.shape[-1], value.shape[-1]
        if few and query.is_cpu and channels != width and not by_bits:
            return mix(query, key, value, transform, padding, grid, dropout)[0], None
        query, key, value, padding = _plain(query, key, value, padding, transform)
        if few and by_bits:
            return _mix_softmax(query, key, value, padding, dropout), None
        value = F.pad(value, (0, query.shape[-1] - channels))  # as wide as keys still
        keep = None if padding is None else ~padding[:, None, None, :]  # [B,1,1,K]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout)
        return mixed[..., :width], None
    if _fused(query, key, value, transform):
        query, key, value, padding = _plain(query, key, value, padding, transform)
        return _flash().sparse_attention(query, key, value, transform.alpha, padding, dropout), None
    if few or not transform.by_row:
        return mix(query, key, value, transform, padding, grid, dropout)[0], None
    parts = [  # the backward pass computes each part's scores again
        checkpoint(mix, part, key, value, transform, padding, grid, dropout, use_reentrant=False)[0]
        for part in query.split(max(1, MOST_SCORES // row), 2)
    ]
    return torch.cat(parts, 2), None


def _plain(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, transform: Transform
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and padding of which plain softmax or entmax makes what the transform makes of these."""
    keys, mask = key.shape[2], None if padding is None else padding[:, None, None]
    query, key, value, padding = _with_null_key(query, key, value, padding, transform.null_score)
    return transform.scaled(query, mask, keys), key, value, padding


def _with_null_key(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, null_score: float | Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The null key of a transform as one key more, whose value is zero, for ways that know of none.

    A key of zeros has the score 0. For a learned one [H] queries and keys get a channel more, 1 for queries and 0 for
    all other keys: eight such channels, since kernels like multiples of eight.
    """
    if null_score is None:
        return query, key, value, padding
    value = F.pad(value, (0, 0, 0, 1))  # [B,H,K+1,V]
    padding = None if padding is None else F.pad(padding, (0, 1))
    if not isinstance(null_score, Tensor):
        return query, F.pad(key, (0, 0, 0, 1)), value, padding
    (images, heads, _, before), more = query.shape, query.shape[-1] + NULL_CHANNELS
    query = F.pad(query * (more / before) ** 0.5, (0, NULL_CHANNELS), value=1.0)  # scores will be divided by more^0.5
    share = null_score.to(key.dtype) * (more**0.5 / NULL_CHANNELS)  # [H]
    null = F.pad(share[:, None, None].expand(images, heads, 1, NULL_CHANNELS), (before, 0))
    return query, torch.cat([F.pad(key, (0, NULL_CHANNELS)), null], 2), value, padding


def _mix_softmax(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, dropout: float) -> Tensor:
    """As `mix` with softmax, passing over the scores as few times as can be."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [B,H,Q,K]
    empty = None
    if padding is not None:
        empty = padding.all(-1, keepdim=True)  # [B,1]; such rows stay finite, and mix nothing in the end
        hidden = torch.zeros_like(padding, dtype=scores.dtype).masked_fill_(padding & ~empty, -torch.inf)
        scores = scores.add_(hidden[:, None, None])
    mixed = thinned(scores.softmax(-1), dropout) @ (value / (1 - dropout))
    return mixed if empty is None else mixed.masked_fill(empty[:, None, None], 0.0)


def _fused(query: Tensor, key: Tensor, value: Tensor, transform: Transform) -> bool:
    """Whether scores, transform and mixing can be one kernel, and are long enough for it to pay."""
    entmax = isinstance(transform, Entmax | AlphaEntmax) and not transform.padding_adds_one
    if not (entmax and query.is_cuda and key.shape[2] >= FUSED_KEYS and has_triton()):
        return False
    if isinstance(transform, Entmax) and transform.alpha < KERNEL_ALPHA:
        return False
    return _flash().attention_supported(*_with_null_key(query, key, value, None, transform.null_score)[:3])


def _flash():
    """The module of the fused kernels, which imports Triton."""
    from detrlib.attention.kernels import flash

    return flash
