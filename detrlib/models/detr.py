"""DETR (Carion et al. 2020): backbone, encoder, decoder, and one head each for class and box.

Legend: B images, Q queries, K = h x w cells of the feature map, E channels, C classes.
"""

import math
from collections.abc import Collection
from typing import get_args

import torch
from torch import Tensor, nn

from detrlib.models.backbone import Backbone
from detrlib.models.outputs import AttentionMaps, Encoded, Predictions, Site
from detrlib.models.transformer import MLP, AnchorDecoder, Decoded, Decoder, Encoder, Memory, PointDecoder


class Transformer(nn.Module):
    """Encoder and decoder under one name, as official checkpoints have them."""

    def __init__(self, encoder: Encoder, decoder: Decoder | PointDecoder | AnchorDecoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        for parameter in encoder.parameters():
            _xavier(parameter)
        for parameter in decoder.parameters():
            _xavier(parameter)


def _xavier(parameter: Tensor) -> None:
    if parameter.dim() > 1:
        nn.init.xavier_uniform_(parameter)


class DETR(nn.Module):
    """Images to a fixed set of boxes with classes.

    queries: "learned" or "conditional" positions [Q,E], or "anchor" reference boxes [Q,4].
    classification: "softmax" over C classes and no-object, or "sigmoid" per class.
    """

    def __init__(
        self,
        backbone: Backbone,
        position: nn.Module,
        transformer: Transformer,
        dim: int,
        num_queries: int,
        num_classes: int,
        classification: str = "softmax",
    ):
        super().__init__()
        self.backbone = backbone
        self.position = position
        self.input_proj = nn.Conv2d(backbone.num_channels[-1], dim, kernel_size=1)
        self.transformer = transformer
        anchors = isinstance(transformer.decoder, AnchorDecoder)
        self.query_embed = nn.Embedding(num_queries, 4 if anchors else dim)
        self.class_embed = nn.Linear(dim, num_classes + (classification == "softmax"))
        self.bbox_embed = MLP(dim, dim, 4, num_layers=3)
        self.classification = classification
        if anchors:
            self._start_at_anchors()
        if not isinstance(transformer.decoder, Decoder):  # the first corrections of boxes are zero
            nn.init.zeros_(self.bbox_embed.layers[-1].weight)
            nn.init.zeros_(self.bbox_embed.layers[-1].bias)
        if classification == "sigmoid":
            # A prior probability of 1 % for every class keeps the first focal losses small (Lin et al. 2017, Sec. 4.1).
            nn.init.constant_(self.class_embed.bias, -math.log(99.0))

    def _start_at_anchors(self) -> None:
        """Reference boxes spread evenly over the image, a quarter of it wide."""
        centres = torch.quasirandom.SobolEngine(2).draw(len(self.query_embed.weight)).clamp(0.05, 0.95)
        boxes = torch.cat([centres, torch.full_like(centres, 0.25)], dim=1)
        with torch.no_grad():
            self.query_embed.weight.copy_(torch.logit(boxes))

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None, need_attention: bool | Collection[Site] = False
    ) -> Predictions:
        """Predictions of every decoder layer, those of the layers before the last in `auxiliary`.

        Args:
            images: [B,3,H,W], normalised.
            padding_mask: [B,H,W], True = padding; None: no padding anywhere.
            need_attention: return the attention maps, of all sites or of those named; encoder maps are K x K per head.
        """
        sites = get_args(Site) if need_attention is True else need_attention or ()
        level = self.backbone(images, padding_mask)[-1]
        memory = Memory(
            tokens=self.input_proj(level.features).flatten(2).transpose(1, 2),  # [B,K,E]
            position=self.position(level.position_mask()).flatten(2).transpose(1, 2),  # [B,K,E] or [1,K,E]
            padding=level.key_padding,
            grid=level.grid,
        )
        memory, encoder_maps = self.transformer.encoder(memory, "encoder_self" in sites)
        look = "decoder_self" in sites or "decoder_cross" in sites
        decoded = self.transformer.decoder(self.query_embed.weight, memory, self.bbox_embed, look)
        predictions = self._predict(decoded)
        predictions.polled = polled = memory.polled
        if sites:
            hidden = memory.padding if polled is None else polled.key_padding()
            layers = dict(zip(get_args(Site), (encoder_maps, decoded.self_maps, decoded.cross_maps), strict=True))
            where = {"key_padding": hidden, "polled": polled, "encoded": Encoded.of_tokens(memory.tokens, [level.grid])}
            maps = AttentionMaps.of_layers(layers, grid=level.grid, **where)
            registers = self.transformer.encoder.registers
            predictions.attention = maps if registers is None else maps.without_registers(len(registers))
        return predictions

    def _predict(self, decoded: Decoded) -> Predictions:
        layers = [
            Predictions(self.class_embed(state), boxes, self.classification)
            for state, boxes in zip(decoded.states, decoded.boxes, strict=True)
        ]
        last = layers.pop()
        last.auxiliary = layers
        return last
