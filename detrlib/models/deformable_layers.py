"""Encoder and decoder of Deformable DETR (Zhu et al. 2021), and what lies between them.

Legend: B images, L levels, S tokens of all levels, k of them kept by a sparse encoder, Q queries, E channels.
Reference points are (x, y), or boxes (x, y, w, h), in 0..1 of the image without its padding, unless levels are named.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrlib.attention import Mixing
from detrlib.attention.deformable import DeformableAttention, Samples
from detrlib.attention.dropout import Dropout
from detrlib.models.checkpointing import call
from detrlib.models.position import sine
from detrlib.models.pyramid import Pyramid, cell_centres, over_levels
from detrlib.models.sparse import Kept, ScoringNetwork
from detrlib.models.transformer import Decoded, LayerSettings


class Queries(NamedTuple):
    """What the decoder starts from."""

    content: Tensor  # [B,Q,E]
    position: Tensor  # [B,Q,E]
    reference_points: Tensor  # [B,Q,2] points or [B,Q,4] boxes


class DeformableEncoderLayer(nn.Module):
    """Tokens look around themselves on all levels, then a feed-forward network; norms follow."""

    def __init__(self, settings: LayerSettings, levels: int, points: int):
        super().__init__()
        dim = settings.dim
        self.self_attn = DeformableAttention(dim, settings.num_heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, settings.feedforward_dim)
        self.linear2 = nn.Linear(settings.feedforward_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = Dropout(settings.dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference_points: Tensor, memory: Pyramid, need_samples: bool = False
    ) -> tuple[Tensor, Samples | None]:
        """Tokens x [B,k,E] at position [B,k,E], reference_points [B,k,L,2], look at the memory -> tokens [B,k,E]."""
        tokens, _, padding, shapes, _ = memory
        y, samples = self.self_attn(x + position, reference_points, tokens, shapes, padding, need_samples)
        x = self.norm1(x + self.dropout(y))
        y = self.linear2(self.dropout(self.linear1(x).relu()))
        return self.norm2(x + self.dropout(y)), samples


class DeformableEncoder(nn.Module):
    """A stack of layers over all tokens, or over the kept ones, which look at all (Roh et al. 2022, Eq. 3)."""

    def __init__(self, num_layers: int, settings: LayerSettings, levels: int, points: int):
        super().__init__()
        self.layers = nn.ModuleList(DeformableEncoderLayer(settings, levels, points) for _ in range(num_layers))
        self.recompute = False  # see `checkpoint_activations`

    def forward(
        self, memory: Pyramid, kept: Kept | None = None, need_samples: bool = False
    ) -> tuple[Pyramid, list[Tensor], list[Samples | None]]:
        """Pyramid -> the same with encoded tokens, the (kept) tokens [B,k,E] and the samples of every layer."""
        position, reference_points = memory.position, over_levels(cell_centres(memory), memory.ratios)
        if kept is not None:
            position, reference_points = kept.gather(position), kept.gather(reference_points)
        x = memory.tokens if kept is None else kept.gather(memory.tokens)
        states, all_samples = [], []
        again = self.recompute and self.training
        for layer in self.layers:
            x, samples = call(layer, x, position, reference_points, memory, need_samples, again=again)
            memory = memory._replace(tokens=x if kept is None else kept.scatter(memory.tokens, x))
            states.append(x)
            all_samples.append(samples)
        return memory, states, all_samples


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention around their reference points, feed-forward network."""

    def __init__(self, settings: LayerSettings, levels: int, points: int):
        super().__init__()
        dim = settings.dim
        self.cross_attn = DeformableAttention(dim, settings.num_heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)  # numbered as in official checkpoints
        self.self_attn = settings.attention("decoder_self")
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, settings.feedforward_dim)
        self.linear2 = nn.Linear(settings.feedforward_dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = Dropout(settings.dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference_points: Tensor, memory: Pyramid, need_map: bool, need_samples: bool
    ) -> tuple[Tensor, Mixing | None, Samples | None]:
        """Query content x and position [B,Q,E], reference_points [B,Q,L,2 or 4] -> content, map [B,H,Q,Q], samples."""
        query = key = x + position
        y, self_map = self.self_attn(query, key, x, need_weights=need_map)
        x = self.norm2(x + self.dropout(y))
        tokens, _, padding, shapes, _ = memory
        y, samples = self.cross_attn(x + position, reference_points, tokens, shapes, padding, need_samples)
        x = self.norm1(x + self.dropout(y))
        y = self.linear2(self.dropout(self.linear1(x).relu()))
        return self.norm3(x + self.dropout(y)), self_map, samples


class DeformableDecoder(nn.Module):
    """Every layer predicts a correction of the reference points; with `refine` the next layer starts from its boxes."""

    def __init__(self, num_layers: int, settings: LayerSettings, levels: int, points: int, refine: bool):
        super().__init__()
        self.layers = nn.ModuleList(DeformableDecoderLayer(settings, levels, points) for _ in range(num_layers))
        self.refine = refine

    def forward(
        self,
        queries: Queries,
        memory: Pyramid,
        box_heads: Sequence[nn.Module],
        need_maps: bool = False,
        need_samples: bool = False,
    ) -> Decoded:
        """Queries -> what each layer returns; cross-attention is returned as samples."""
        x, position, reference_points = queries
        decoded = Decoded([], [], [], [])
        for layer, box_head in zip(self.layers, box_heads, strict=True):
            on_levels = over_levels(reference_points, memory.ratios)  # [B,Q,L,2 or 4]
            x, self_map, samples = layer(x, position, on_levels, memory, need_maps, need_samples)
            boxes = corrected(reference_points, box_head(x))
            for values, value in zip(decoded, (x, boxes, self_map, samples), strict=True):
                values.append(value)
            if self.refine:
                reference_points = boxes.detach()  # each layer learns its own correction
        return decoded


def corrected(reference_points: Tensor, correction: Tensor) -> Tensor:
    """Boxes [B,Q,4] from points [B,Q,2] or boxes [B,Q,4] and a correction [B,Q,4] of their logits."""
    start = torch.logit(reference_points, eps=1e-5)
    return (correction.float() + F.pad(start, (0, 4 - start.shape[-1]))).sigmoid()


class DeformableTransformer(nn.Module):
    """Encoder, decoder, and what lies between them, under the names of official checkpoints.

    two_stage: queries come from the best tokens, and their content too if `content_from_memory`; else they are learned.
    """

    def __init__(
        self,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        dim: int,
        levels: int,
        two_stage: bool = False,
        content_from_memory: bool = False,
        scoring: ScoringNetwork | None = None,
        temperature: float = 10000.0,
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.level_embed = nn.Parameter(torch.randn(levels, dim))
        if two_stage:
            width = dim if content_from_memory else 2 * dim
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.pos_trans = nn.Linear(2 * dim, width)
            self.pos_trans_norm = nn.LayerNorm(width)
        self.reference_points = None if two_stage else nn.Linear(dim, 2)
        self.enc_mask_predictor = scoring
        self.content_from_memory = content_from_memory
        self.temperature = temperature
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name != "level_embed":
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if not two_stage:
            nn.init.zeros_(self.reference_points.bias)

    def judged(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Features [B,S,E] from which tokens are scored; those that are not `valid` [B,S] have all the same."""
        return self.enc_output_norm(self.enc_output(tokens.masked_fill(~valid[..., None], 0.0)))

    def learned_queries(self, embed: Tensor, images: int) -> Queries:
        """embed [Q,2E]: positions, then content; reference_points are a function of the position."""
        position, content = embed.expand(images, -1, -1).chunk(2, -1)
        return Queries(content, position, self.reference_points(position).float().sigmoid())

    def proposed_queries(self, boxes: Tensor, tokens: Tensor) -> Queries:
        """Queries at the proposed boxes [B,Q,4], made from `tokens` [B,Q,E]; no later layer teaches these boxes."""
        reference_points = boxes.detach()
        encoding = sine(reference_points, tokens.shape[-1] // 2, self.temperature).flatten(-2)  # [B,Q,2E]
        encoding = self.pos_trans_norm(self.pos_trans(encoding.to(tokens.dtype)))
        if self.content_from_memory:
            return Queries(tokens, encoding, reference_points)
        position, content = encoding.chunk(2, -1)
        return Queries(content, position, reference_points)
