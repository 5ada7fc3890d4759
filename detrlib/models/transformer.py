"""Encoder and decoder of DETR, with a choice of attention transform at each of their three sites.

Legend: B images, H heads, K keys (cells of the feature map), Q queries, E channels.
Position encodings are added to queries and keys of every attention, never to values (Carion et al. 2020, Fig. 10).
Every layer returns next to its output, if asked, the weights of its attention and the values that they mix: maps are a
value, not something to be hooked.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrlib.attention import ConditionalCrossAttention, ConditionalSelfAttention, Mixing, MultiheadAttention, Transform
from detrlib.attention.deformable import Samples
from detrlib.attention.dropout import Dropout
from detrlib.models.checkpointing import call
from detrlib.models.outputs import Polled
from detrlib.models.position import sine, sine_of_boxes

MakeTransform = Callable[[str], Transform]  # site -> a transform of its own, freshly initialised


class LayerSettings(NamedTuple):
    """What encoder and decoder layers have in common."""

    dim: int
    num_heads: int
    feedforward_dim: int
    dropout: float
    pre_norm: bool
    transform: MakeTransform
    heads: Callable[[str], dict] = lambda site: {}  # site -> gate and difference of a layer, as of `Heads`

    def attention(self, site: str, kind: type[nn.Module] = MultiheadAttention, **others) -> nn.Module:
        """Attention of the next layer of a site; others: what only this kind takes."""
        return kind(self.dim, self.num_heads, self.transform(site), self.dropout, **self.heads(site), **others)


class Memory(NamedTuple):
    """What the decoder looks at."""

    tokens: Tensor  # [B,K,E]
    position: Tensor  # [B,K,E], or [1,K,E] for all images
    padding: Tensor | None  # [B,K], True = padding; None: there is none
    grid: tuple[int, int] | None  # (h, w) of the feature map whose cells are the keys, h * w == K; None: they are none
    polled: Polled | None = None  # what the tokens stand for, where they are not cells


class Decoded(NamedTuple):
    """What every decoder layer returns, first to last."""

    states: list[Tensor]  # [B,Q,E], normalised
    boxes: list[Tensor]  # [B,Q,4] cxcywh in 0..1
    self_maps: list[Mixing | None]  # weights [B,H,Q,Q]
    cross_maps: list[Mixing | Samples | None]  # weights [B,H,Q,K], or the samples of deformable attention


class EncoderLayer(nn.Module):
    """Self-attention over the feature map, then a feed-forward network."""

    def __init__(self, settings: LayerSettings):
        super().__init__()
        dim, pre_norm = settings.dim, settings.pre_norm
        self.self_attn = settings.attention("encoder_self")
        self.linear1 = nn.Linear(dim, settings.feedforward_dim)
        self.linear2 = nn.Linear(settings.feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = Dropout(settings.dropout)
        self.pre_norm = pre_norm

    def forward(self, memory: Memory, need_attention: bool = False) -> tuple[Tensor, Mixing | None]:
        """Tokens [B,K,E] -> tokens [B,K,E], mixing with weights [B,H,K,K] or None."""
        x = memory.tokens
        y = self.norm1(x) if self.pre_norm else x
        query = key = y + memory.position
        y, weights = self.self_attn(query, key, y, memory.padding, memory.grid, need_attention)
        x = x + self.dropout(y) if self.pre_norm else self.norm1(x + self.dropout(y))
        y = self.norm2(x) if self.pre_norm else x
        y = self.linear2(self.dropout(self.linear1(y).relu()))
        return x + self.dropout(y) if self.pre_norm else self.norm2(x + self.dropout(y)), weights


class Encoder(nn.Module):
    """A stack of encoder layers; pre-norm stacks end with a norm of their own. `poll` makes the tokens fewer first.

    registers: so many learned tokens without a position stand behind those of the image in all layers, and go no
    further (Darcet et al. 2024, "Vision Transformers Need Registers"): a place for what belongs to no cell.
    """

    def __init__(self, num_layers: int, settings: LayerSettings, poll: nn.Module | None = None, registers: int = 0):
        super().__init__()
        self.poll = poll
        self.registers = None
        if registers:
            self.registers = nn.Parameter(nn.init.xavier_uniform_(torch.empty(registers, settings.dim)))
        self.layers = nn.ModuleList(EncoderLayer(settings) for _ in range(num_layers))
        self.norm = nn.LayerNorm(settings.dim) if settings.pre_norm and num_layers else None
        self.recompute = False  # see `checkpoint_activations`

    def forward(self, memory: Memory, need_attention: bool = False) -> tuple[Memory, list[Mixing | None]]:
        """Memory with tokens [B,K,E] -> the same with encoded tokens, weights [B,H,K,K] of every layer.

        With N registers [B,H,K+N,K+N], these last.
        """
        image = memory if self.poll is None else self.poll(memory)
        memory, maps = image if self.registers is None else self._with_registers(image), []
        for layer in self.layers:
            tokens, weights = call(layer, memory, need_attention, again=self.recompute and self.training)
            memory = memory._replace(tokens=tokens)
            maps.append(weights)
        tokens = memory.tokens[:, : image.tokens.shape[1]]
        return image._replace(tokens=tokens if self.norm is None else self.norm(tokens)), maps

    def _with_registers(self, memory: Memory) -> Memory:
        """The same with registers as its last tokens, which are no padding and stand nowhere."""
        count = len(self.registers)
        registers = self.registers.to(memory.tokens.dtype).expand(memory.tokens.shape[0], -1, -1)
        return memory._replace(
            tokens=torch.cat([memory.tokens, registers], 1),
            position=F.pad(memory.position, (0, 0, 0, count)),
            padding=None if memory.padding is None else F.pad(memory.padding, (0, count)),
        )


class DecoderLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the memory, a feed-forward network."""

    def __init__(self, settings: LayerSettings):
        super().__init__()
        dim, dropout = settings.dim, settings.dropout
        self.self_attn = self.build_self_attention(settings)
        self.multihead_attn = self.build_cross_attention(settings)
        self.linear1 = nn.Linear(dim, settings.feedforward_dim)
        self.linear2 = nn.Linear(settings.feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        self.pre_norm = settings.pre_norm

    def build_self_attention(self, settings: LayerSettings) -> nn.Module:
        return settings.attention("decoder_self")

    def compare(self, x: Tensor, position: Tensor, need_attention: bool) -> tuple[Tensor, Mixing | None]:
        """Self-attention of query content `x` [B,Q,E] at `position` [B,Q,E]."""
        query = key = x + position
        return self.self_attn(query, key, x, need_weights=need_attention)

    def build_cross_attention(self, settings: LayerSettings) -> nn.Module:
        return settings.attention("decoder_cross")

    def look(self, x: Tensor, position: Tensor, memory: Memory, need_attention: bool) -> tuple[Tensor, Mixing | None]:
        """Cross-attention of query content `x` [B,Q,E] at `position` [B,Q,E]."""
        key = memory.tokens + memory.position
        return self.multihead_attn(x + position, key, memory.tokens, memory.padding, memory.grid, need_attention)

    def forward(
        self, x: Tensor, position: Tensor, memory: Memory, need_attention: bool = False, **where
    ) -> tuple[Tensor, Mixing | None, Mixing | None]:
        """Query content x and position [B,Q,E] -> content [B,Q,E], mixings of queries and of keys or None."""
        y = self.norm1(x) if self.pre_norm else x
        y, self_map = self.compare(y, position, need_attention)
        x = x + self.dropout(y) if self.pre_norm else self.norm1(x + self.dropout(y))
        y = self.norm2(x) if self.pre_norm else x
        y, cross_map = self.look(y, position, memory, need_attention, **where)
        x = x + self.dropout(y) if self.pre_norm else self.norm2(x + self.dropout(y))
        y = self.norm3(x) if self.pre_norm else x
        y = self.linear2(self.dropout(self.linear1(y).relu()))
        x = x + self.dropout(y) if self.pre_norm else self.norm3(x + self.dropout(y))
        return x, self_map, cross_map


class Decoder(nn.Module):
    """DETR's decoder: content starts at zero, positions are learned, every layer predicts boxes afresh."""

    def __init__(self, num_layers: int, settings: LayerSettings):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(settings) for _ in range(num_layers))
        self.norm = nn.LayerNorm(settings.dim)

    def forward(self, queries: Tensor, memory: Memory, box_head: nn.Module, need_attention: bool = False) -> Decoded:
        """queries [Q,E] -> what each layer returns."""
        position = queries.expand(memory.tokens.shape[0], -1, -1)
        x = torch.zeros_like(position)
        decoded = Decoded([], [], [], [])
        for layer in self.layers:
            x, self_map, cross_map = layer(x, position, memory, need_attention)
            state = self.norm(x)
            boxes = box_head(state).float().sigmoid()  # bfloat16 would round to 1/256 of the image
            for values, value in zip(decoded, (state, boxes, self_map, cross_map), strict=True):
                values.append(value)
        return decoded


class ConditionalDecoderLayer(DecoderLayer):
    """A decoder layer whose cross-attention compares content with content and position with position."""

    def __init__(self, settings: LayerSettings, first: bool):
        self.first = first
        super().__init__(settings)

    def build_cross_attention(self, settings: LayerSettings) -> nn.Module:
        return settings.attention("decoder_cross", ConditionalCrossAttention, first=self.first)

    def look(
        self, x: Tensor, position: Tensor, memory: Memory, need_attention: bool, spatial: Tensor
    ) -> tuple[Tensor, Mixing | None]:
        """Cross-attention of query content `x` [B,Q,E]; `spatial` [B,Q,E] is compared with positions of keys."""
        return self.multihead_attn(
            x, position, spatial, memory.tokens, memory.position, memory.padding, memory.grid, need_attention
        )


class PointDecoderLayer(ConditionalDecoderLayer):
    """A conditional layer whose self-attention, too, projects content and position apart."""

    def build_self_attention(self, settings: LayerSettings) -> nn.Module:
        return settings.attention("decoder_self", ConditionalSelfAttention)

    def compare(self, x: Tensor, position: Tensor, need_attention: bool) -> tuple[Tensor, Mixing | None]:
        """Self-attention of query content `x` [B,Q,E] at `position` [B,Q,E]."""
        return self.self_attn(x, position, need_attention)


class PointDecoder(nn.Module):
    """Queries are learned positions, each of which stands for a point (Meng et al. 2021, "Conditional DETR", Sec. 3.3).

    Where a query looks is the encoding of its point, transformed by its content; boxes are corrections of the point.
    """

    def __init__(self, num_layers: int, settings: LayerSettings, temperature: float):
        super().__init__()
        dim = settings.dim
        self.layers = nn.ModuleList(PointDecoderLayer(settings, first=i == 0) for i in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.reference_point = MLP(dim, dim, 2, 2)
        self.content_scale = MLP(dim, dim, dim, 2)
        self.temperature = temperature

    def forward(self, queries: Tensor, memory: Memory, box_head: nn.Module, need_attention: bool = False) -> Decoded:
        """queries [Q,E] -> what each layer returns."""
        position = queries.expand(memory.tokens.shape[0], -1, -1)
        point = self.reference_point(position).float().sigmoid()  # [B,Q,2] x, y
        encoding = sine(point.flip(-1), position.shape[-1] // 2, self.temperature).flatten(-2).to(position.dtype)
        start = F.pad(torch.logit(point, eps=1e-5), (0, 2))
        x = torch.zeros_like(position)
        decoded = Decoded([], [], [], [])
        for number, layer in enumerate(self.layers):
            spatial = encoding * self.content_scale(x) if number else encoding  # the first layer has no content yet
            x, self_map, cross_map = layer(x, position, memory, need_attention, spatial=spatial)
            state = self.norm(x)
            boxes = (box_head(state).float() + start).sigmoid()
            for values, value in zip(decoded, (state, boxes, self_map, cross_map), strict=True):
                values.append(value)
        return decoded


class AnchorDecoder(nn.Module):
    """Queries are reference boxes, refined by every layer (Liu et al. 2022, "DAB-DETR", Sec. 4).

    Where a query looks is the encoding of its box centre, transformed by its content (Eq. 3 there)
    and stretched by the ratio of an expected to the present width and height (Eq. 6).
    """

    def __init__(self, num_layers: int, settings: LayerSettings, temperature: float):
        super().__init__()
        dim = settings.dim
        self.layers = nn.ModuleList(ConditionalDecoderLayer(settings, first=i == 0) for i in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.box_position = MLP(2 * dim, dim, dim, 2)
        self.content_scale = MLP(dim, dim, dim, 2) if num_layers > 1 else None  # the first layer has no content yet
        self.expected_size = MLP(dim, dim, 2, 2)
        self.temperature = temperature

    def forward(self, queries: Tensor, memory: Memory, box_head: nn.Module, need_attention: bool = False) -> Decoded:
        """queries [Q,4], reference boxes as logits of cxcywh -> what each layer returns."""
        reference = queries.sigmoid().expand(memory.tokens.shape[0], -1, -1)  # [B,Q,4]
        x = memory.tokens.new_zeros(*reference.shape[:2], memory.tokens.shape[-1])
        decoded = Decoded([], [], [], [])
        for number, layer in enumerate(self.layers):
            encoding = sine_of_boxes(reference, x.shape[-1] // 2, self.temperature)  # [B,Q,2E]
            spatial = self.modulated(encoding[..., : x.shape[-1]], reference, x)
            if number:
                spatial = spatial * self.content_scale(x)
            x, self_map, cross_map = layer(x, self.box_position(encoding), memory, need_attention, spatial=spatial)
            state = self.norm(x)
            boxes = (box_head(state).float() + torch.logit(reference, eps=1e-3)).sigmoid()
            for values, value in zip(decoded, (state, boxes, self_map, cross_map), strict=True):
                values.append(value)
            reference = boxes.detach()  # each layer learns its own correction
        return decoded

    def modulated(self, encoding: Tensor, reference: Tensor, content: Tensor) -> Tensor:
        """Scale the y and the x half of `encoding` [B,Q,E] so that attention spreads as wide and high as the box."""
        expected = self.expected_size(content).sigmoid()  # [B,Q,2] width, height
        ratio = expected / reference[..., 2:].clamp(min=1e-3)
        y, x = encoding.chunk(2, -1)
        return torch.cat([y * ratio[..., 1:], x * ratio[..., :1]], -1)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, before: int, hidden: int, after: int, num_layers: int):
        super().__init__()
        widths = [before, *[hidden] * (num_layers - 1), after]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)
