"""Deformable DETR (Zhu et al. 2021) with the options of Efficient DETR (Yao et al. 2021) and Sparse DETR.

Legend: B images, S tokens of all levels, k of them kept by a sparse encoder, Q queries, E channels, C classes.
Boxes are (x, y, w, h) in 0..1 of the image without its padding.
"""

import math
from collections.abc import Collection
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from detrlib.attention.deformable import Samples
from detrlib.errors import ModelError
from detrlib.models.backbone import Backbone, FeatureMap
from detrlib.models.deformable_layers import DeformableTransformer, Queries
from detrlib.models.outputs import AttentionMaps, Encoded, Predictions, SampledMaps, Site, Tokens
from detrlib.models.pyramid import LevelProjections, Pyramid, cell_centres, flattened
from detrlib.models.sparse import Kept, keep_best
from detrlib.models.transformer import MLP, Decoded

NOWHERE = -100.0  # logit of tokens that can be no object: no probability, no loss, no gradient
SMALLEST_BOX = 0.05  # of the image: side of the proposals of the finest level, doubled from level to level
BORDER = 0.01  # proposals nearer to 0 or 1 than this in any coordinate are none


class Cells(NamedTuple):
    """The boxes that tokens stand for before any of them has been predicted (Zhu et al. 2021, Appendix A.4)."""

    logits: Tensor  # [B,S,4]
    valid: Tensor  # [B,S], False for padding and next to the border


def proposal_cells(pyramid: Pyramid) -> Cells:
    """A box around the centre of every token, the larger the coarser its level."""
    centres = cell_centres(pyramid)
    sides = [centres.new_full((h * w,), SMALLEST_BOX * 2**level) for level, (h, w) in enumerate(pyramid.shapes)]
    sides = torch.cat(sides)[None, :, None].expand(centres.shape[0], -1, 2)
    boxes = torch.cat([centres, sides], -1)  # [B,S,4]
    valid = ((boxes > BORDER) & (boxes < 1 - BORDER)).all(-1)
    if pyramid.padding is not None:
        valid = valid & ~pyramid.padding
    return Cells(torch.logit(boxes, eps=BORDER), valid)


class DeformableDETR(nn.Module):
    """Images to boxes with classes, by sigmoids.

    Heads are those of the decoder layers (one for all without refinement), of the proposals, and of the encoder layers
    but the last, in this order. keep_ratio: share of the tokens that the encoder updates, if there is a scoring
    network. class_specific: proposals are judged by their best class, not by the one that stands for any object.
    official_padding: padding, and what lies next to the border, is proposed and learned from like any token, as the
    whole image, as in the official code.
    """

    samples_points = True  # in attention to the image, which weighs no cells

    def __init__(
        self,
        backbone: Backbone,
        position: nn.Module,
        input_proj: LevelProjections,
        transformer: DeformableTransformer,
        dim: int,
        num_queries: int,
        num_classes: int,
        *,
        two_stage: bool = False,
        class_specific: bool = False,
        encoder_auxiliary: bool = False,
        keep_ratio: float = 1.0,
        official_padding: bool = False,
        map_shift: float = 0.5,
    ):
        super().__init__()
        self.backbone, self.position, self.input_proj = backbone, position, input_proj
        self.transformer = transformer
        self.query_embed = None if two_stage else nn.Embedding(num_queries, 2 * dim)
        refine, layers = transformer.decoder.refine, len(transformer.decoder.layers)
        encoder_heads = len(transformer.encoder.layers) - 1 if encoder_auxiliary else 0
        heads = layers + two_stage + encoder_heads if refine else 1
        self.class_embed = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(heads))
        self.bbox_embed = nn.ModuleList(MLP(dim, dim, 4, num_layers=3) for _ in range(heads))
        self.num_queries, self.two_stage, self.class_specific = num_queries, two_stage, class_specific
        self.encoder_auxiliary, self.keep_ratio, self.map_shift = encoder_auxiliary, keep_ratio, map_shift
        self.official_padding = official_padding
        self.ranks: list[int] | None = None  # of the proposals that become queries, the best is 0; None: of all of them
        self._start_at_references()

    def _start_at_references(self) -> None:
        """First corrections are zero, one-stage boxes an eighth of the image wide, class probabilities 1 %."""
        for class_head, box_head in zip(self.class_embed, self.bbox_embed, strict=True):
            nn.init.constant_(class_head.bias, -math.log(99.0))
            nn.init.zeros_(box_head.layers[-1].weight)
            nn.init.zeros_(box_head.layers[-1].bias)
        if not self.two_stage:
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None, need_attention: bool | Collection[Site] = False
    ) -> Predictions:
        """Predictions of every decoder layer, those of the layers before the last in `auxiliary`.

        Args:
            images: [B,3,H,W], normalised.
            padding_mask: [B,H,W], True = padding; None: no padding anywhere.
            need_attention: return the attention maps, of all sites or of those named.

        Raises:
            ModelError: images are too small to propose as many queries as the model has.
        """
        sites = get_args(Site) if need_attention is True else need_attention or ()
        maps = self.input_proj(self.backbone(images, padding_mask), padding_mask)
        pyramid = flattened(maps, self.position, self.transformer.level_embed)
        cells = proposal_cells(pyramid) if self.two_stage else None
        if cells is not None and self.official_padding:
            cells = cells._replace(logits=cells.logits.masked_fill(~cells.valid[..., None], torch.inf))
        scores, kept = self._keep(pyramid, cells)
        memory, states, encoder_samples = self.transformer.encoder(pyramid, kept, "encoder_self" in sites)
        proposals = None
        if self.two_stage:
            queries, proposals = self._propose(memory, cells)
        else:
            queries = self.transformer.learned_queries(self.query_embed.weight, images.shape[0])
        box_heads = self._decoder_heads(self.bbox_embed)
        look = kept is not None or "decoder_cross" in sites
        decoded = self.transformer.decoder(queries, memory, box_heads, "decoder_self" in sites, look)
        predictions = self._predict(decoded)
        predictions.proposals = proposals
        if self.encoder_auxiliary:
            predictions.encoder_auxiliary = self._encoder_predictions(states[:-1], cells, kept)
        if kept is not None:
            mask, most = kept.mask(scores.shape[1]), kept.index.shape[1]
            if (
                self.official_padding
            ):  # `topk` breaks ties of tokens by the number asked for, so by that of official code
                most = int(mask.sum(1).max())
            how = most, self.map_shift, self.official_padding
            predictions.tokens = Tokens(scores, mask, memory.padding, memory.shapes, decoded.cross_maps, *how)
        if sites:
            predictions.attention = attention_maps(maps[0], memory, encoder_samples, decoded)
        return predictions

    def _decoder_heads(self, heads: nn.ModuleList) -> list[nn.Module]:
        """One head for each decoder layer."""
        layers = len(self.transformer.decoder.layers)
        return list(heads[:layers]) if self.transformer.decoder.refine else [heads[0]] * layers

    def _keep(self, pyramid: Pyramid, cells: Cells | None) -> tuple[Tensor | None, Kept | None]:
        """Scores [B,S] of the tokens and the kept ones; None where the encoder is dense."""
        if self.transformer.enc_mask_predictor is None:
            return None, None
        features = self.transformer.judged(pyramid.tokens + pyramid.position, cells.valid)
        scores = self.transformer.enc_mask_predictor(features, pyramid.padding)
        return scores, keep_best(scores, pyramid.padding, self.keep_ratio)

    def _propose(self, memory: Pyramid, cells: Cells) -> tuple[Queries, Predictions]:
        """The best tokens as queries, and what all tokens predict."""
        if memory.tokens.shape[1] < self.num_queries:
            raise ModelError(
                f"{self.num_queries} queries cannot be proposed by the {memory.tokens.shape[1]} tokens of "
                f"{len(memory.shapes)} levels {memory.shapes}; lower model.num_queries or use larger images"
            )
        number = len(self.transformer.decoder.layers)
        hidden = None if self.official_padding else ~cells.valid
        features = self.transformer.judged(memory.tokens, cells.valid)
        proposals = self._token_predictions(features, cells.logits, hidden, number)
        proposals.any_object = not self.class_specific
        score = proposals.logits.amax(-1) if self.class_specific else proposals.logits[..., 0]
        best = score.topk(self.num_queries, dim=1).indices  # [B,Q]
        best = best if self.ranks is None else best[:, self.ranks]
        boxes, tokens = (
            values.gather(1, best[..., None].expand(-1, -1, values.shape[-1]))
            for values in (proposals.boxes, memory.tokens)
        )
        return self.transformer.proposed_queries(boxes, tokens), proposals

    def _token_predictions(self, features: Tensor, starts: Tensor, hidden: Tensor | None, number: int) -> Predictions:
        """What tokens with `features` [B,S,E] predict by head `number`, as corrections of boxes of logits `starts`."""
        logits = self.class_embed[number](features)
        if hidden is not None:
            logits = logits.masked_fill(hidden[..., None], NOWHERE)
        return Predictions(logits, (self.bbox_embed[number](features).float() + starts).sigmoid(), "sigmoid")

    def _encoder_predictions(self, states: list[Tensor], cells: Cells, kept: Kept | None) -> list[Predictions]:
        """What the (kept) tokens [B,k,E] predict after each encoder layer but the last."""
        starts, hidden = cells.logits, None if self.official_padding else ~cells.valid
        if kept is not None:
            starts = kept.gather(starts)
            hidden = kept.spare if self.official_padding else kept.gather(hidden) | kept.surplus
        first = len(self.transformer.decoder.layers) + 1
        return [self._token_predictions(state, starts, hidden, first + layer) for layer, state in enumerate(states)]

    def _predict(self, decoded: Decoded) -> Predictions:
        class_heads = self._decoder_heads(self.class_embed)
        layers = [
            Predictions(class_head(state), boxes, "sigmoid")
            for class_head, state, boxes in zip(class_heads, decoded.states, decoded.boxes, strict=True)
        ]
        last = layers.pop()
        last.auxiliary = layers
        return last


def attention_maps(
    finest: FeatureMap, memory: Pyramid, encoder_samples: list[Samples | None], decoded: Decoded
) -> AttentionMaps:
    """Samples as maps over the cells of the finest level."""
    grid, samples = finest.grid, (encoder_samples, decoded.cross_maps)
    encoder, cross = (SampledMaps(layers, memory.ratios, grid) for layers in samples)
    layers = dict(zip(get_args(Site), (encoder, decoded.self_maps, cross), strict=True))
    encoded = Encoded.of_tokens(memory.tokens, memory.shapes)
    return AttentionMaps.of_layers(layers, grid=grid, key_padding=finest.key_padding, encoded=encoded)
