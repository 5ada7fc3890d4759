"""Multi-scale deformable attention: every query looks at a few points of every level (Zhu et al. 2021).

Legend: B images, Q queries, H heads, D channels per head, E = H * D embedding, L levels, P points per level and head,
S = sum of h * w tokens, the cells of all levels row by row, fine to coarse. Locations are (x, y), from 0 to 1 over a
level with its padding, so that the centre of cell i of n is at (i + 0.5) / n.
"""

import importlib.util
import math
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Shapes = list[tuple[int, int]]  # (h, w) of each level, fine to coarse


class Samples(NamedTuple):
    """Where the queries look, and how much each location counts; weights sum to one over levels and points."""

    locations: Tensor  # [B,Q,H,L,P,2]
    weights: Tensor  # [B,Q,H,L,P]


def sample_and_mix(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of values interpolated at the locations (Zhu et al. 2021, Eq. 3).

    values [B,S,H,D], locations [B,Q,H,L,P,2], weights [B,Q,H,L,P] -> [B,Q,H*D], of the dtype of values. Interpolation
    is bilinear between the centres of cells, with zeros outside the level.
    """
    _check(shapes, locations.shape[3], values.shape[1])
    if torch.compiler.is_compiling():  # what is below asks for numbers, and other programs have no such kernels
        return sample_and_mix_written_out(values, shapes, locations, weights)
    if (kernels := _kernels(values)) is not None:
        return kernels.sample_and_mix(values, shapes, locations, weights)
    with torch.autocast(values.device.type, enabled=False):
        table = wide(values)
        mixed = _Mix.apply(table, locations.to(table.dtype), weights.to(table.dtype), shapes)
        return mixed.flatten(2).to(values.dtype)


def sample_and_mix_written_out(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The same by torch's own interpolation, level by level: for graphs that are compiled or exported, and to read."""
    maps = wide(values).transpose(1, 2).flatten(0, 1).transpose(1, 2)  # [B*H,D,S]
    grids = (2 * locations - 1).to(maps.dtype).transpose(1, 2).flatten(0, 1)  # [B*H,Q,L,P,2], -1 to 1
    shares = weights.to(maps.dtype).transpose(1, 2).flatten(0, 1)[:, None]  # [B*H,1,Q,L,P]
    mixed = 0
    with torch.autocast(values.device.type, enabled=False):
        for level, part in enumerate(maps.split([h * w for h, w in shapes], 2)):
            sampled = F.grid_sample(part.unflatten(2, shapes[level]), grids[:, :, level], align_corners=False)
            mixed = mixed + (sampled * shares[..., level, :]).sum(-1)  # [B*H,D,Q]
    return mixed.unflatten(0, (values.shape[0], -1)).permute(0, 3, 1, 2).flatten(2).to(values.dtype)


def splat(
    samples: Samples, shapes: Shapes, shift: float = 0.5, keep_queries: bool = False, keep_heads: bool = False
) -> Tensor:
    """Attention that each token receives: weights spread over the cells around their locations -> [B,S].

    Summed over queries and heads, or with either axis kept: [B,Q,S], [B,H,S], [B,Q,H,S]. This is how far the output of
    `sample_and_mix` moves with a token's value. Attention to locations outside a level is lost.

    `shift`: where in a cell its token is; 0 takes the corner for the centre, half a cell off, which is how the decoder
    attention maps of Sparse DETR (Roh et al. 2022, Sec. 3.2) were computed.
    """
    locations, weights = wide(samples.locations), wide(samples.weights)
    _check(shapes, locations.shape[3])
    images, queries, heads = locations.shape[:3]
    tokens = sum(h * w for h, w in shapes)
    kept = (images, queries if keep_queries else 1, heads if keep_heads else 1)
    first = (torch.arange(math.prod(kept), device=weights.device) * tokens).view(*kept, 1, 1)
    received = weights.new_zeros(math.prod(kept) * tokens)
    for token, share in _corners(locations, weights, shapes, shift):
        received = received.index_add(0, (token + first).flatten(), share.flatten())
    dropped = [axis for axis, keep in ((1, keep_queries), (2, keep_heads)) if not keep]
    return received.view(*kept, tokens).squeeze(dropped)


Corners = Iterable[
    tuple[Tensor, Tensor]
]  # of the cells around locations, one after the other: token and share of weight


def _corners(locations: Tensor, weights: Tensor, shapes: Shapes, shift: float = 0.5) -> Corners:
    """Four pairs of tensors [B,Q,H,L,P]. A cell outside the level has no share; some token stands in for it.

    `shift`: from the corner of a cell to its token.
    """

    def per_level(numbers: Iterable[int]) -> Tensor:
        """[H,L,P], written out: with the last axis alone to repeat, inner loops would be short."""
        heads, points = locations.shape[2], locations.shape[4]
        return torch.cat([torch.full((heads, 1, points), n, device=locations.device) for n in numbers], 1)

    def line(axis: int, size: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Along one axis: the cell before each location and its share, the cell after and its share."""
        position = (locations[..., axis] * size - shift).clamp(min=-1).minimum(size)  # beyond, nothing changes
        low = position.detach().floor().long().clamp(min=-1).minimum(size - 1)  # even for what is no number
        high, rest = low + 1, position - low
        return [(low.clamp(min=0), (1 - rest) * (low >= 0)), (high.minimum(size - 1), rest * (high < size))]

    width = per_level(w for _, w in shapes)
    first = per_level(accumulate((h * w for h, w in shapes[:-1]), initial=0))
    columns = line(0, width)
    for row, row_share in line(1, per_level(h for h, _ in shapes)):
        start, part = row * width + first, row_share * weights
        for column, column_share in columns:
            yield start + column, part * column_share


class _Mix(torch.autograd.Function):
    """values [B,S,H,D], locations, weights -> [B,Q,H,D]. Keeps its inputs only: the rest is quickly computed again."""

    @staticmethod
    def forward(ctx, values: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        ctx.save_for_backward(values, locations, weights)
        ctx.shapes = shapes
        return _gather(values, _rows(values, _corners(locations, weights, shapes)))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        values, locations, weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        with torch.enable_grad():
            locations, weights = locations.detach().requires_grad_(), weights.detach().requires_grad_()
            corners = list(_rows(values, _corners(locations, weights, ctx.shapes)))
            mixed = _gather(values.detach(), corners)
        to_locations, to_weights = torch.autograd.grad(mixed, (locations, weights), gradient)
        to_values = _scatter(gradient, corners, values) if ctx.needs_input_grad[0] else None
        return to_values, to_locations, to_weights, None


def _rows(values: Tensor, corners: Corners) -> Corners:
    """Rows of all values [B*S*H,D] in place of tokens."""
    images, tokens, heads, _ = values.shape
    image, head = (torch.arange(n, device=values.device) for n in (images, heads))
    first = (image[:, None] * (tokens * heads) + head)[:, None, :, None, None]  # [B,1,H,1,1]
    for token, share in corners:
        yield token * heads + first, share


def _gather(values: Tensor, corners: Corners) -> Tensor:
    """[B,Q,H,D]: for each query and head the weighted sum of a bag of L * P rows, four times over."""
    table, mixed = values.flatten(0, 2), 0
    for rows, share in corners:
        bags, shares = (x.flatten(3).flatten(0, 2) for x in (rows, share))  # [B*Q*H,L*P]
        mixed = mixed + F.embedding_bag(bags, table, mode="sum", per_sample_weights=shares)
    return mixed.view(*rows.shape[:3], table.shape[1])


@torch.no_grad()
def _scatter(gradient: Tensor, corners: list[tuple[Tensor, Tensor]], values: Tensor) -> Tensor:
    """Gradient of values: a bag of queries for all locations between the same cells, four times over.

    That locations are sorted once for all four corners is what makes this fast.
    """
    (start, _), (right, _), (below, _), _ = corners
    square = (4 * start + 2 * (right > start) + (below > start)).flatten()  # equal squares have equal corners
    order = square.argsort()
    counts = square.index_select(0, order).unique_consecutive(return_counts=True)[1]
    offsets = counts.cumsum(0) - counts
    example = order.index_select(0, offsets)  # a location in each square
    query = order // math.prod(start.shape[3:])  # and head
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    for rows, share in corners:
        shares = share.flatten().index_select(0, order)
        parts = F.embedding_bag(query, gradient.flatten(0, 2), offsets, mode="sum", per_sample_weights=shares)
        out.view(-1, out.shape[3]).index_add_(0, rows.flatten().index_select(0, example), parts)
    return out


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider: bfloat16 has not the digits to place a sample."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check(shapes: Shapes, levels: int, tokens: int | None = None) -> None:
    if len(shapes) != levels or tokens not in (None, sum(h * w for h, w in shapes)):
        raise ValueError(f"levels of shapes {shapes} do not fit {tokens} tokens and samples of {levels} levels")


def _kernels(values: Tensor):
    """The Triton kernels where they take such values, else None."""
    if not values.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    from detrlib.attention.kernels import deformable as deformable_kernels

    return deformable_kernels if deformable_kernels.supported(values) else None


class DeformableAttention(nn.Module):
    """Attention to `points` sampling locations in each of `levels` levels, per head (Zhu et al. 2021, Eq. 3).

    Locations and weights are linear in the query alone: no key is compared with it. Parameters have the names, shapes
    and initialisation of the official code. Raises ValueError if `embed_dim` is not a multiple of `num_heads`.
    """

    def __init__(self, embed_dim: int, num_heads: int, levels: int, points: int):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.levels, self.points = num_heads, levels, points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * levels * points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * levels * points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each head looks in a direction of its own, its points at 1, 2, ... cells; all count the same."""
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction /= direction.abs().amax(-1, keepdim=True)  # onto a square around the reference
        ring = direction[:, None, None] * torch.arange(1, self.points + 1)[:, None]  # [H,1,P,2]
        self.sampling_offsets.bias.copy_(ring.expand(-1, self.levels, -1, -1).flatten())

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
        need_samples: bool = False,
    ) -> tuple[Tensor, Samples | None]:
        """Output [B,Q,E], and where it came from if asked for.

        Args:
            query: [B,Q,E], with position encodings added.
            reference_points: points [B,Q,L,2] or boxes [B,Q,L,4], cxcywh, 0 to 1 over each level with its padding.
            tokens: [B,S,E], whose values are mixed.
            shapes: (h, w) of each level.
            padding: [B,S], True = padding, whose values count as zero; None: there is none.
            need_samples: return the samples as well.
        """
        values = self.value_proj(tokens)
        if padding is not None:
            values = values.masked_fill(padding.unsqueeze(-1), 0.0)
        samples = self.samples(query, reference_points, shapes)
        mixed = sample_and_mix(values.unflatten(-1, (self.num_heads, -1)), shapes, *samples)
        return self.output_proj(mixed), samples if need_samples else None

    def samples(self, query: Tensor, reference_points: Tensor, shapes: Shapes) -> Samples:
        """Where queries [B,Q,E] look around their reference points, and how much each location counts.

        In float32 or wider. Offsets are in cells of a level around points, and in units of half a box, over points,
        around boxes.
        """
        if reference_points.shape[-1] not in (2, 4):
            raise ValueError(
                f"reference_points are points [B,Q,L,2] or boxes [B,Q,L,4], not {list(reference_points.shape)}"
            )
        scores = self.attention_weights(query)
        with torch.autocast(query.device.type, enabled=False):
            weights = wide(scores).unflatten(-1, (self.num_heads, -1)).softmax(-1).unflatten(-1, (self.levels, -1))
            offsets = self.sampling_offsets(query.to(self.sampling_offsets.weight.dtype))
            offsets = wide(offsets).unflatten(-1, (self.num_heads, self.levels, self.points, 2))
            reference_points = wide(reference_points)[:, :, None, :, None]  # [B,Q,1,L,1,2 or 4]
            if reference_points.shape[-1] == 2:
                sides = torch.stack([offsets.new_full((), n) for h, w in shapes for n in (w, h)])
                unit = sides.reciprocal().view(-1, 1, 2)  # [L,1,2]
            else:
                unit = reference_points[..., 2:] * (0.5 / self.points)
            return Samples(reference_points[..., :2] + offsets * unit, weights)
