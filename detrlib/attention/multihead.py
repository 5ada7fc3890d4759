"""Multi-head attention with any transform from scores to weights.

All of it is four lines (`mix`, and the projection in `MultiheadAttention`), for every head

    scores  = query key^T / sqrt(D)
    weights = transform(scores)
    mixed   = weights value
    output  = all heads' mixed, side by side, projected

and `attend` computes them in one of four ways, by what is known before any number is:

    written down    the lines above, if the weights are asked for, or if there are no more than `MOST_SCORES` scores
    PyTorch's       `scaled_dot_product_attention`, for softmax: no score is written down, but on a CPU with dropout,
                    for which `_mix_softmax` writes them down in fewer passes, or with values of another width than
                    keys, for which PyTorch's kernel is none but its formula in more passes than here
    one kernel      kernels/flash.py, for the entmax family on a GPU, from `FUSED_KEYS` keys on: likewise
    in parts        of the queries, for what is left: no more than `MOST_SCORES` scores exist at a time

Legend: B images, H heads, Q queries, K keys, E embedding, D = E / H channels per head. Batch first;
padding [B,K] is True where a key is padding; grid (h, w) where keys are the cells of a feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detrlib.attention.dropout import drawn_by_bits, thinned
from detrlib.attention.dropout import dropout as drop
from detrlib.attention.entmax import KERNEL_ALPHA, has_triton
from detrlib.attention.transforms import AlphaEntmax, Entmax, Grid, Softmax, Transform

MOST_SCORES = 2**27  # kept at a time when maps are not asked for: half a GiB of float32
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
        if 0 < dropout < 1 and few and drawn_by_bits(query):
            return _mix_softmax(query, key, value, padding, dropout), None
        if few and query.is_cpu and query.shape[-1] != value.shape[-1]:
            return mix(query, key, value, transform, padding, grid, dropout)[0], None
        keep = None if padding is None else ~padding[:, None, None, :]  # [B,1,1,K]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout), None
    if _fused(query, key, value, transform):
        return _flash().sparse_attention(query, key, value, transform.alpha, padding, dropout), None
    if few:
        return mix(query, key, value, transform, padding, grid, dropout)[0], None
    parts = [  # the backward pass computes each part's scores again
        checkpoint(mix, part, key, value, transform, padding, grid, dropout, use_reentrant=False)[0]
        for part in query.split(max(1, MOST_SCORES // row), 2)
    ]
    return torch.cat(parts, 2), None


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
    return _flash().attention_supported(query, key, value)


def _flash():
    """The module of the fused kernels, which imports Triton."""
    from detrlib.attention.kernels import flash

    return flash


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B,N,E] -> [B,H,N,E/H]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B,H,N,D] -> [B,N,H*D]."""
    return x.transpose(1, 2).flatten(-2)


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with a choice of transform: same parameters, names and initialisation.

    Args:
        embed_dim: E, channels of queries, keys, values and output.
        num_heads: H, each with E / H channels.
        transform: from scores to weights; a learnable one belongs to this layer.
        dropout: share of the weights that are set to zero in training, 0 to 1.

    Raises:
        ValueError: `embed_dim` is not a multiple of `num_heads`.
    """

    def __init__(self, embed_dim: int, num_heads: int, transform: Transform, dropout: float = 0.0):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.transform = transform
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None = None,
        grid: Grid | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to all keys, with every head.

        Args:
            query: [B,Q,E], with position encodings added.
            key: [B,K,E], likewise.
            value: [B,K,E], without.
            padding: [B,K] bool, True = padding; None: there is none.
            grid: (h, w) of the feature map whose cells are the keys, where they are such.
            need_weights: return the weights as well; then none of the faster ways is taken.

        Returns:
            Output [B,Q,E], and weights [B,H,Q,K] if asked for, else None.

        Raises:
            ValueError: the transform needs a grid, as tvmax does, and there is none.
        """
        weight, bias = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        projected = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weight, bias, strict=True))
        q, k, v = (split_heads(x, self.num_heads) for x in projected)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(q, k, v, self.transform, padding, grid, dropout, need_weights)
        return self.out_proj(merge_heads(mixed)), weights


class ConditionalCrossAttention(nn.Module):
    """Cross-attention whose scores are the sum of a content and a spatial dot product.

    Content and position are concatenated per head, so that the head compares each with its own kind
    (Meng et al. 2021, "Conditional DETR", Eq. 2). The spatial query is given by the caller.

    `first`: in the first layer, where the content is still empty, the query position joins the content.
    """

    def __init__(self, embed_dim: int, num_heads: int, transform: Transform, dropout: float = 0.0, first: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.transform = transform
        self.query_content = nn.Linear(embed_dim, embed_dim)
        self.query_position = nn.Linear(embed_dim, embed_dim) if first else None
        self.query_spatial = nn.Linear(embed_dim, embed_dim)
        self.key_content = nn.Linear(embed_dim, embed_dim)
        self.key_position = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        spatial: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        padding: Tensor | None = None,
        grid: Grid | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """content, position, spatial [B,Q,E]; memory [B,K,E], memory_position [B or 1,K,E]
        -> output [B,Q,E], weights [B,H,Q,K] or None.
        """
        query, key = self.query_content(content), self.key_content(memory)
        key_position = self.key_position(memory_position.to(memory.dtype))
        if self.query_position is not None:
            query, key = query + self.query_position(position), key + key_position
        heads = (query, self.query_spatial(spatial), key, key_position, self.value(memory))
        query, spatial, key, key_position, value = (split_heads(x, self.num_heads) for x in heads)
        key = torch.cat([key, key_position.expand_as(key)], -1)  # [B,H,K,2D]
        query = torch.cat([query, spatial], -1)  # [B,H,Q,2D]
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(query, key, value, self.transform, padding, grid, dropout, need_weights)
        return self.out_proj(merge_heads(mixed)), weights


class ConditionalSelfAttention(nn.Module):
    """Self-attention that projects content and position by matrices of their own (Conditional DETR's decoder)."""

    def __init__(self, embed_dim: int, num_heads: int, transform: Transform, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.transform = transform
        self.query_content = nn.Linear(embed_dim, embed_dim)
        self.query_position = nn.Linear(embed_dim, embed_dim)
        self.key_content = nn.Linear(embed_dim, embed_dim)
        self.key_position = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, content: Tensor, position: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """content, position [B,Q,E] -> output [B,Q,E], weights [B,H,Q,Q] or None."""
        query = self.query_content(content) + self.query_position(position)
        key = self.key_content(content) + self.key_position(position)
        query, key, value = (split_heads(x, self.num_heads) for x in (query, key, self.value(content)))
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(query, key, value, self.transform, dropout=dropout, need_weights=need_weights)
        return self.out_proj(merge_heads(mixed)), weights
