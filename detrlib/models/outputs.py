"""What a model returns. Legend: B images, Q queries, C classes, H heads, K keys, h x w the key grid."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from detrlib.boxes import cxcywh_to_xyxy, to_pixels

Site = Literal["encoder_self", "decoder_self", "decoder_cross"]


@dataclass
class AttentionMaps:
    """Attention weights by site, one tensor per layer, None where not asked for; rows sum to one over valid keys."""

    encoder_self: list[Tensor]  # [B,H,K,K]
    decoder_self: list[Tensor]  # [B,H,Q,Q]
    decoder_cross: list[Tensor]  # [B,H,Q,K]
    grid: tuple[int, int]  # (h, w), h * w == K
    key_padding: Tensor  # [B,K], True = padding

    def as_images(self, site: Site, layer: int) -> Tensor:
        """[B,H,queries,h,w]: keys laid out as the feature map. Raises ValueError where keys are no grid."""
        if site == "decoder_self":
            raise ValueError("the keys of decoder_self are queries, not cells of a feature map")
        return getattr(self, site)[layer].unflatten(-1, self.grid)

    def valid_grid(self, image: int) -> tuple[int, int]:
        """(rows, columns) of the grid that belong to image number `image`, the rest being padding."""
        valid = ~self.key_padding[image].unflatten(-1, self.grid)
        return int(valid[:, 0].sum()), int(valid[0].sum())


@dataclass
class Detections:
    """Detections of one image, best first."""

    scores: Tensor  # [n]
    labels: Tensor  # [n]
    boxes: Tensor  # [n,4] xyxy, pixels of the original image
    queries: Tensor  # [n] which query found it


@dataclass
class Predictions:
    """Logits and boxes of the last decoder layer; `auxiliary` holds those of the layers before it, first to last."""

    logits: Tensor  # [B,Q,C], or [B,Q,C+1] with no-object last when classification is "softmax"
    boxes: Tensor  # [B,Q,4] cxcywh, 0..1 of the image without its padding
    classification: Literal["softmax", "sigmoid"] = "softmax"
    auxiliary: list["Predictions"] = field(default_factory=list)
    attention: AttentionMaps | None = None

    def class_scores(self) -> Tensor:
        """[B,Q,C] probabilities of the classes, no-object left out."""
        logits = self.logits.float()
        return logits.softmax(-1)[..., :-1] if self.classification == "softmax" else logits.sigmoid()

    def detections(self, original_sizes: Tensor, limit: int = 100) -> list[Detections]:
        """At most `limit` detections per image; original_sizes [B,2] (height, width) in pixels.

        With a softmax a query has one class, its best (DETR); with sigmoids the best pairs of query and
        class are taken, so that a query may appear twice (Deformable DETR).
        """
        scores = self.class_scores()
        boxes = to_pixels(cxcywh_to_xyxy(self.boxes.float()), original_sizes[:, None])  # [B,Q,4]
        if self.classification == "softmax":
            best, label = scores.max(-1)
            top, query = best.topk(min(limit, best.shape[1]))
            label = label.gather(1, query)
        else:
            top, index = scores.flatten(1).topk(min(limit, scores[0].numel()))
            query = torch.div(index, scores.shape[-1], rounding_mode="floor")
            label = index % scores.shape[-1]
        return [Detections(s, c, b[q], q) for s, c, b, q in zip(top, label, boxes, query, strict=True)]
