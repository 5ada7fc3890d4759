"""Multi-head attention with any transform from scores to weights.

All of it is four lines (`mixing.mix`, and the projection in `MultiheadAttention`), for every head

    scores  = query key^T / sqrt(D)
    weights = transform(scores)
    mixed   = weights value
    output  = all heads' mixed, side by side, projected

Legend: B images, H heads, Q queries, K keys, E embedding, D = E / H channels per head. Batch first;
padding [B,K] is True where a key is padding; grid (h, w) where keys are the cells of a feature map.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrlib.attention.gates import Difference, Gate
from detrlib.attention.mixing import attend
from detrlib.attention.transforms import Grid, Transform


class Mixing(NamedTuple):
    """What every head of a layer mixed, and by which weights: a layer returns it, if asked, beside its output."""

    weights: Tensor  # [B,H,Q,K], before dropout
    values: Tensor  # [B,H,K,D], a view of what the layer has projected, not a copy


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B,N,E] -> [B,H,N,E/H]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B,H,N,D] -> [B,N,H*D]."""
    return x.transpose(1, 2).flatten(-2)


class Heads(nn.Module):
    """What every attention with several heads has in common: how they look, and what becomes of what they have mixed.

    Args:
        num_heads: H, each with E / H channels.
        transform: from scores to weights; a learnable one belongs to this layer.
        dropout: share of the weights that are set to zero in training, 0 to 1.
        gate: lets through a share of what heads have mixed; None: all of it.
        difference: each head has two maps, one less a share of the other; None: one map.
    """

    def __init__(
        self,
        num_heads: int,
        transform: Transform,
        dropout: float = 0.0,
        gate: Gate | None = None,
        difference: Difference | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.transform = transform
        self.gate = gate
        self.difference = difference

    def _look(
        self,
        x: Tensor,
        query: list[Tensor],
        key: list[Tensor],
        value: Tensor,
        padding: Tensor | None = None,
        grid: Grid | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Mixing | None]:
        """Of what is projected, to the output: scores are the sum of the dot products of each query [B,Q,E] with its
        key [B,K,E]; value [B,K,E]; x [B,Q,E] is what queries are projected from.
        """
        value, dropout = split_heads(value, self.num_heads), self.dropout if self.training else 0.0
        looks = [
            attend(q, k, value, self.transform, padding, grid, dropout, need_weights)
            for q, k in zip(self._compared(query), self._compared(key), strict=True)
        ]
        mixed, weights = looks[0] if self.difference is None else self.difference(*looks, value, dropout > 0)
        mixed = mixed if self.gate is None else self.gate(x) * mixed
        return self.out_proj(merge_heads(mixed)), Mixing(weights, value) if need_weights else None

    def _compared(self, parts: list[Tensor]) -> list[Tensor]:
        """What the map of every head, or each of its two, compares: of all parts [B,N,E] side by side, [B,H,N,...]."""
        parts = [split_heads(part, self.num_heads) for part in parts]
        maps = [parts] if self.difference is None else zip(*(part.chunk(2, -1) for part in parts), strict=True)
        return [own[0] if len(own) == 1 else torch.cat(own, -1) for own in maps]


class MultiheadAttention(Heads):
    """`torch.nn.MultiheadAttention` with a choice of transform: same parameters, names and initialisation.

    Args:
        embed_dim: E, channels of queries, keys, values and output.
        num_heads, transform, dropout, gate, difference: as of `Heads`.

    Raises:
        ValueError: `embed_dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        transform: Transform,
        dropout: float = 0.0,
        gate: Gate | None = None,
        difference: Difference | None = None,
    ):
        super().__init__(num_heads, transform, dropout, gate, difference)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
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
    ) -> tuple[Tensor, Mixing | None]:
        """Attend from every query to all keys, with every head.

        Args:
            query: [B,Q,E], with position encodings added.
            key: [B,K,E], likewise.
            value: [B,K,E], without.
            padding: [B,K] bool, True = padding; None: there is none.
            grid: (h, w) of the feature map whose cells are the keys, where they are such.
            need_weights: return weights and values as well; then none of the faster ways is taken.

        Returns:
            Output [B,Q,E], and weights [B,H,Q,K] with the values [B,H,K,D] they mix if asked for, else None.

        Raises:
            ValueError: the transform needs a grid, as tvmax does, and there is none.
        """
        weight, bias = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weight, bias, strict=True))
        return self._look(query, [q], [k], v, padding, grid, need_weights)


class ConditionalCrossAttention(Heads):
    """Cross-attention whose scores are the sum of a content and a spatial dot product.

    Content and position are concatenated per head, so that the head compares each with its own kind
    (Meng et al. 2021, "Conditional DETR", Eq. 2). The spatial query is given by the caller.

    `first`: in the first layer, where the content is still empty, the query position joins the content.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        transform: Transform,
        dropout: float = 0.0,
        first: bool = False,
        gate: Gate | None = None,
        difference: Difference | None = None,
    ):
        super().__init__(num_heads, transform, dropout, gate, difference)
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
    ) -> tuple[Tensor, Mixing | None]:
        """content, position, spatial [B,Q,E]; memory [B,K,E], memory_position [B or 1,K,E]
        -> output [B,Q,E], weights [B,H,Q,K] and values or None.
        """
        query, key = self.query_content(content), self.key_content(memory)
        key_position = self.key_position(memory_position.to(memory.dtype))
        if self.query_position is not None:
            query, key = query + self.query_position(position), key + key_position
        query, key = [query, self.query_spatial(spatial)], [key, key_position.expand_as(key)]
        return self._look(content + position, query, key, self.value(memory), padding, grid, need_weights)


class ConditionalSelfAttention(Heads):
    """Self-attention that projects content and position by matrices of their own (Conditional DETR's decoder)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        transform: Transform,
        dropout: float = 0.0,
        gate: Gate | None = None,
        difference: Difference | None = None,
    ):
        super().__init__(num_heads, transform, dropout, gate, difference)
        self.query_content = nn.Linear(embed_dim, embed_dim)
        self.query_position = nn.Linear(embed_dim, embed_dim)
        self.key_content = nn.Linear(embed_dim, embed_dim)
        self.key_position = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, content: Tensor, position: Tensor, need_weights: bool = False) -> tuple[Tensor, Mixing | None]:
        """content, position [B,Q,E] -> output [B,Q,E], weights [B,H,Q,Q] and values or None."""
        query = self.query_content(content) + self.query_position(position)
        key = self.key_content(content) + self.key_position(position)
        return self._look(content + position, [query], [key], self.value(content), need_weights=need_weights)
