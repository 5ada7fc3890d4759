"""What a model returns.

Legend: B images, Q queries, C classes, H heads, K keys, h x w the key grid; in models with deformable attention
L levels, P points, S tokens of all levels.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from detrlib.attention import Mixing
from detrlib.attention.deformable import Samples, splat
from detrlib.boxes import cxcywh_to_xyxy, to_pixels
from detrlib.errors import ModelError
from detrlib.models.sparse import Kept

Site = Literal["encoder_self", "decoder_self", "decoder_cross"]

# Attention stands in the layers of an encoder or a decoder, here and in transformers, whose hybrid encoders hold
# several encoders and which wraps some attention once more. Backbones and text have encoders of their own.
ADDRESS = re.compile(
    r"(?!.*(?:backbone|text))(?:.*\.)?(encoder|decoder)(?:\.(?:aifi|encoder)\.\d+)?\.layers?\.\d+\."
    r"(self_attn|attention|multihead_attn|encoder_attn|cross_attn)(?:\.\2)?"
)


def site_of(path: str) -> Site | None:
    """The site of the attention module at a dotted path of a model; None where there is no attention."""
    match = ADDRESS.fullmatch(path)
    if match is None:
        return None
    part, name = match.groups()
    return f"{part}_self" if name in ("self_attn", "attention") else f"{part}_cross" if part == "decoder" else None


def cell_side(canvas: Sequence[int], grid: Sequence[int]) -> int:
    """Pixels along the sides of the cells of a grid (h, w) over a batch (H, W): the stride, a power of two.

    The last row and column may reach beyond the batch, so that H / h is less where the stride does not divide H.
    """
    side = 1
    while any(-(-pixels // side) > cells for pixels, cells in zip(canvas, grid, strict=True)):
        side *= 2
    return side


class SampledMaps(Sequence):
    """Deformable attention as maps over the cells of the finest level, one [B,H,Q,K] per layer, made when asked for.

    Samples of all levels are spread over the four cells around them; what lies outside the image is
    left out, so that rows sum to one or less.
    """

    def __init__(self, samples: list[Samples | None], ratios: Tensor, grid: tuple[int, int]):
        self.samples = samples  # of each layer; None where not asked for
        self.ratios = ratios  # [B,L,2] shares of width and height of each level that are image
        self.grid = grid

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, layer: int) -> Tensor:
        weights = self.samples[layer].weights.flatten(3)[:, :, :, None]  # [B,Q,H,1,L*P]
        locations = (self.sampling_locations(layer) * self.ratios[:, None, None, :1, None]).flatten(3, 4)[:, :, :, None]
        finest = Samples(locations, weights)
        return splat(finest, [self.grid], keep_queries=True, keep_heads=True).transpose(1, 2)

    def sampling_locations(self, layer: int) -> Tensor:
        """(x, y) of the samples of a layer in 0..1 of the image without its padding, [B,Q,H,L,P,2]."""
        return self.samples[layer].locations / self.ratios[:, None, None, :, None]


@dataclass
class Polled:
    """What the tokens of a model that polls and pools stand for: n kept cells, then M mixtures of all others."""

    kept: Kept  # index and surplus [B,n]
    share: Tensor  # [B,M,K] of every cell in every pooled token: rows sum to one, or are zero where no cell is left
    scores: Tensor  # [B,K], 0..1; those of padding mean nothing
    cell_padding: Tensor  # [B,K], True = padding

    def key_padding(self) -> Tensor:
        """[B,n+M], True = no token: surplus, and pooled ones of an image whose cells are all kept."""
        return torch.cat([self.kept.surplus, ~self.share.any(-1)], 1)

    def on_cells(self, weights: Tensor) -> Tensor:
        """Attention to tokens [B,H,Q,n+M] -> to cells [B,H,Q,K], exactly: a mixture's part is shared as it is mixed."""
        fine, coarse = weights.tensor_split([self.kept.index.shape[1]], -1)
        spread = (coarse @ self.share[:, None].to(coarse.dtype)).to(fine.dtype)  # autocast would change it
        return spread.scatter_add(-1, self.kept.index[:, None, None].expand_as(fine), fine)

    def mean_score(self) -> Tensor:
        """[B], mean score of the kept cells."""
        kept = self.kept.mask(self.scores.shape[1])
        return (self.scores.float() * kept).sum(1) / kept.sum(1)


@dataclass
class Encoded:
    """What the decoder looks at, as it stands in the graph, so that gradients with respect to it can be asked for."""

    tensors: list[Tensor]  # [B,E,h,w] of each level, fine to coarse, or one [B,S,E] of the tokens of all levels
    shapes: list[tuple[int, int]]  # (h, w) of each level; tokens that a model polled and pooled have another number
    sides: list[tuple[float, float]]  # height and width of the cells of each level in cells of the maps' grid

    @classmethod
    def of_tokens(cls, tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> "Encoded":
        """Of the tokens [B,S,E] of levels whose first has the cells of the grid."""
        return cls([tokens], list(shapes), [(cell_side(shapes[0], shape),) * 2 for shape in shapes])

    @classmethod
    def of_levels(cls, levels: Sequence[Tensor], extent: Sequence[float]) -> "Encoded":
        """Of levels [B,E,h,w] that cover an image evenly whose height and width are `extent` in cells of the grid."""
        shapes = [tuple(level.shape[-2:]) for level in levels]
        return cls(list(levels), shapes, [(extent[0] / h, extent[1] / w) for h, w in shapes])


@dataclass
class AttentionMaps:
    """Attention weights by site, one tensor per layer, None where not asked for, and the values that they mix.

    Rows sum to one over valid keys, or to less: what they lack lies on a null key, on registers, on padding that a
    model has learned to look at, or beyond the image. Where a transform divides by no sum they may sum to more.

    Deformable sites hold `SampledMaps`, whose keys are the cells of the finest level. In models that poll and pool,
    the K keys, and the queries of the encoder, are kept cells and pooled tokens: `as_images` spreads them over the
    grid, while measures of sparsity are about the keys that there were to choose from.

    Of an encoder with registers, maps are those of tokens of the image to such tokens. `encoder_whole` has these too,
    for what follows weights from layer to layer.

    Weights of differential attention are signed, a map less a share of another (`attention.gates.Difference`). Of a
    weight below zero the value is taken away instead of added, by as much: measures and pictures take magnitudes.
    """

    encoder_self: Sequence[Tensor]  # [B,H,K,K]; of a sparse encoder [B,H,kept tokens,K]
    decoder_self: Sequence[Tensor]  # [B,H,Q,Q]
    decoder_cross: Sequence[Tensor]  # [B,H,Q,K]
    grid: tuple[int, int]  # (h, w), h * w == K but for models that poll and pool
    key_padding: Tensor | None  # [B,K], True = padding; None: there is none
    polled: Polled | None = None  # what the keys stand for, where they are not cells
    encoder_grid: tuple[int, int] | None = None  # of encoder_self, where it is not `grid`: over the image, no padding
    encoded: Encoded | None = None  # None: a detector of transformers that saw several images
    encoder_whole: Sequence[Tensor] | None = None  # [B,H,K+N,K+N] with N registers last; None: there are none
    # By site, one tensor [B,H,K,D] per layer, its keys those of the weights: views of what the layers have projected.
    # Of deformable sites there is none: their samples are interpolated from cells of several levels.
    values: Mapping[Site, Sequence[Tensor | None]] = field(default_factory=dict)
    register_values: Sequence[Tensor] | None = None  # [B,H,N,D], where the encoder has registers

    @classmethod
    def of_layers(cls, layers: Mapping[Site, Sequence[Mixing | None] | SampledMaps], **where: Any) -> "AttentionMaps":
        """From what the layers of each site return; where: the other fields."""
        maps, values = {}, {}
        for site, own in layers.items():
            if not isinstance(own, SampledMaps):
                values[site] = [None if layer is None else layer.values for layer in own]
                own = [None if layer is None else layer.weights for layer in own]
            maps[site] = own
        return cls(**maps, **where, values=values)

    def without_registers(self, count: int) -> "AttentionMaps":
        """The same, given maps of an encoder whose last tokens are so many registers."""
        cells = [whole if whole is None else whole[..., :-count, :-count] for whole in self.encoder_self]
        values, registers = (
            [whole if whole is None else whole[..., part, :] for whole in self.values["encoder_self"]]
            for part in (slice(-count), slice(-count, None))
        )
        values = {**self.values, "encoder_self": values}
        whole = {"encoder_whole": self.encoder_self, "register_values": registers}
        return replace(self, encoder_self=cells, values=values, **whole)

    def mixed(self, site: Site, layer: int) -> Tensor | None:
        """[B,H,Q,D] what the heads of a layer put out, before what follows: gates, norms, the projection of all heads.

        None at deformable sites.
        """
        values = self.values[site][layer] if site in self.values else None
        if values is None:
            return None
        mixed = getattr(self, site)[layer].to(values.dtype) @ values
        if site == "encoder_self" and self.register_values is not None:
            registers = self.register_values[layer]
            mixed += self.encoder_whole[layer][..., : mixed.shape[2], -registers.shape[2] :].to(mixed.dtype) @ registers
        return mixed

    def grid_at(self, site: Site) -> tuple[int, int]:
        """(h, w) of the keys of a site."""
        return self.encoder_grid if site == "encoder_self" and self.encoder_grid else self.grid

    def padding_at(self, site: Site) -> Tensor | None:
        """[B,K], True = padding, of the keys of a site; None: there is none."""
        return None if site == "encoder_self" and self.encoder_grid else self.key_padding

    def as_images(self, site: Site, layer: int) -> Tensor:
        """[B,H,queries,h,w]: keys laid out as the feature map. Raises ModelError where keys are no grid."""
        if site == "decoder_self":
            raise ModelError("the keys of decoder_self are queries, not cells of a feature map")
        weights = getattr(self, site)[layer]
        return (weights if self.polled is None else self.polled.on_cells(weights)).unflatten(-1, self.grid_at(site))

    def valid_grid(self, image: int, site: Site = "decoder_cross") -> tuple[int, int]:
        """(rows, columns) of the grid of a site that belong to image number `image`, the rest being padding."""
        padding = self.padding_at(site) if self.polled is None else self.polled.cell_padding
        if padding is None:
            return self.grid_at(site)
        valid = ~padding[image].unflatten(-1, self.grid)
        return int(valid[:, 0].sum()), int(valid[0].sum())


@dataclass
class Detections:
    """Detections of one image, best first."""

    scores: Tensor  # [n]
    labels: Tensor  # [n]
    boxes: Tensor  # [n,4] xyxy, pixels of the original image
    queries: Tensor  # [n] whose they are


@dataclass
class Tokens:
    """Which tokens a sparse encoder updates, and which the decoder then looks at (Roh et al. 2022, Sec. 3)."""

    logits: Tensor  # [B,S] scores of the scoring network; those of padding mean nothing
    kept: Tensor  # [B,S], True = updated by the encoder
    padding: Tensor | None  # [B,S], True = padding
    shapes: list[tuple[int, int]]  # (h, w) of each level
    samples: list[Samples]  # of every decoder layer
    most: int  # tokens that an image of the batch keeps, as a number that no GPU needs to be asked for
    shift: float = 0.5  # see `splat`
    official_padding: bool = False  # the scoring network learns from padding too, see `token_losses`

    @torch.no_grad()
    def decoder_map(self) -> Tensor:
        """[B,S] decoder attention map (DAM, Sec. 3.2 there): what each token gives to queries, heads, layers in sum."""
        received = sum(splat(samples, self.shapes, self.shift) for samples in self.samples)
        return received if self.padding is None else received.masked_fill(self.padding, 0.0)


@dataclass
class Predictions:
    """Logits and boxes of the last decoder layer; `auxiliary` holds those of the layers before it, first to last.

    Models with two stages also predict from the tokens of the encoder: `proposals` after its last layer, of Q = S
    tokens, and `encoder_auxiliary` after the layers before it, of Q kept tokens.
    """

    logits: Tensor  # [B,Q,C], or [B,Q,C+1] with no-object last when classification is "softmax"
    boxes: Tensor  # [B,Q,4] cxcywh, 0..1 of the image without its padding
    classification: Literal["softmax", "sigmoid"] = "softmax"
    auxiliary: list["Predictions"] = field(default_factory=list)
    attention: AttentionMaps | None = None
    any_object: bool = False  # class 0 stands for objects of all classes; the others mean nothing
    proposals: "Predictions | None" = None
    encoder_auxiliary: list["Predictions"] = field(default_factory=list)
    tokens: Tokens | None = None
    polled: Polled | None = None

    def class_scores(self) -> Tensor:
        """[B,Q,C] probabilities of the classes, no-object left out."""
        logits = self.logits.float()
        return logits.softmax(-1)[..., :-1] if self.classification == "softmax" else logits.sigmoid()

    def detections(self, original_sizes: Tensor, limit: int = 100) -> list[Detections]:
        """At most `limit` detections per image, none of score 0; original_sizes [B,2] (height, width) in pixels.

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
        counts = (top > 0).sum(1).tolist()  # they come first
        return [
            Detections(s[:n], c[:n], b[q[:n]], q[:n])
            for s, c, b, q, n in zip(top, label, boxes, query, counts, strict=True)
        ]
