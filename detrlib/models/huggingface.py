"""Detectors of Hugging Face's transformers, called and answering as the models of this library do.

Images come normalised, of any size and padded to the largest of their batch; a model of transformers sees none of the
padding, so that an image alone is predicted as in any batch:

    of one size (RT-DETR, D-FINE)     every image is resized to the square, as in their published training, and put
                                      back to pixels in 0..1. Boxes are relative to the image: nothing else changes
    of any size (DETR and the like)   images of one size run together

Layers are trained by the losses of this library; what transformers hands to its own loss is what `Predictions` holds.
Denoising queries, which RT-DETR and D-FINE add in training, are left out. Batch norms of the backbone are frozen if the
configuration of transformers says so, as in the published fine-tuning; others, those of hybrid encoders, learn their
statistics in training, from the images that are on a device at a time.

Legend: B images, Q queries, H heads, K keys, L levels, P sampling points, h x w cells of a grid, C classes.
"""

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrlib.attention import Mixing
from detrlib.attention.deformable import Samples, Shapes
from detrlib.errors import ConfigError, DetrlibError, in_one_line
from detrlib.models.backbone import image_sizes
from detrlib.models.deformable import NOWHERE
from detrlib.models.huggingface_weights import points_of, way_of
from detrlib.models.outputs import AttentionMaps, Encoded, Predictions, SampledMaps, Site

Size = tuple[int, int]  # height and width
# What transformers calls the maps of each site.
LOOKS = dict(zip(get_args(Site), ("encoder_attentions", "decoder_attentions", "cross_attentions"), strict=True))


class _Group(NamedTuple):
    """Images that run together."""

    size: Size  # in which the model sees them
    outputs: Any  # of transformers


class HuggingFaceDetector(nn.Module):
    """A detector of transformers as a model of this library.

    Args:
        model: of transformers, for object detection.
        classification: "softmax", with a no-object class, or "sigmoid".
        stride: of the finest level, pixels, where points are sampled; None: cells of one level are attended to.
        square: the side of the images that the model takes; None: any size.
        mean, std: of the normalisation of images, which models of one size want undone.
    """

    def __init__(
        self,
        model: nn.Module,
        classification: str,
        stride: int | None = None,
        square: int | None = None,
        mean: Sequence[float] = (0.0,) * 3,
        std: Sequence[float] = (1.0,) * 3,
    ):
        super().__init__()
        self.model = model
        self.classification, self.stride, self.square, self.mean, self.std = classification, stride, square, mean, std
        self.samples_points = stride is not None
        self.silent = model.config.model_type == "dab-detr"  # about what its encoder returns, unless told to tell all
        model.loss_function = _all_layers
        for module in list(model.modules()):
            if hasattr(module, "sampling_offsets"):
                module.__class__ = _returning_samples(type(module))
            elif way_of(module) is not None:
                module.returns_values = True  # once a transform of ours is in use, which hands them on

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None, need_attention: bool | Collection[Site] = False
    ) -> Predictions:
        """Predictions of every decoder layer, those of the layers before the last in `auxiliary`.

        Args:
            images: [B,3,H,W], normalised.
            padding_mask: [B,H,W], True = padding; None: no padding anywhere.
            need_attention: return the attention maps, of all sites or of those named. Where points are sampled, maps
                are over cells of `stride` pixels of the batch, those of an encoder that sees squares over its own.
        """
        sites = get_args(Site) if need_attention is True else tuple(need_attention or ())
        canvas = tuple(images.shape[-2:])
        sizes = [canvas] * len(images) if padding_mask is None else image_sizes(padding_mask)
        groups, order = [], []
        for size in dict.fromkeys(sizes if self.square is None else [(self.square, self.square)]):
            chosen = [image for image, own in enumerate(sizes) if self.square or own == size]
            # With labels, though there are none, all layers are handed to the loss.
            pixels = self._pixels(images, sizes, chosen)
            self._refuse_few_cells(size)
            asked = {"output_attentions": bool(sites), "output_hidden_states": bool(sites) and self.silent}
            groups.append(_Group(size, self.model(pixel_values=pixels, labels=[], **asked)))
            order += chosen
        order = torch.tensor(order, device=images.device).argsort()
        predictions = _joined([self._predictions(group.outputs) for group in groups], order)
        if sites:
            predictions.attention = self._maps(groups, order, sizes, canvas, sites)
            if padding_mask is None:
                predictions.attention.key_padding = None
        return predictions

    def train(self, mode: bool = True) -> "HuggingFaceDetector":
        """As of every module; batch norms whose parameters are not trained keep their statistics too."""
        super().train(mode)
        for norm in _batch_norms(self):
            norm.train(mode and norm.weight.requires_grad)
        return self

    def learns_statistics(self) -> bool:
        """Whether batch norms estimate means and variances in training, from all images that run together."""
        return any(norm.weight.requires_grad for norm in _batch_norms(self))

    @torch.no_grad()
    def try_out(self) -> None:
        """See one image of nothing. Raises ConfigError naming model.options, some of which contradict each other."""
        training, side = self.training, self.square or 256
        with blaming_options():
            self.eval()(torch.zeros(1, 3, side, side, device=next(self.parameters()).device), need_attention=True)
        self.train(training)

    def _refuse_few_cells(self, size: Size) -> None:
        """Raise ConfigError for images with fewer cells than RT-DETR and its successors choose as queries."""
        config = self.model.config
        queries, strides = config.num_queries, getattr(config, "feat_strides", ())
        cells = sum(math.ceil(size[0] / stride) * math.ceil(size[1] / stride) for stride in strides)
        if strides and len(strides) == config.num_feature_levels and cells < queries:
            raise ConfigError(
                f"{size[0]} x {size[1]} pixels have {cells} cells, of which the model chooses {queries} as queries: "
                "use larger images (model.square, data.image_size, --size) or a lower num_queries in model.options"
            )

    def _pixels(self, images: Tensor, sizes: list[Size], chosen: list[int]) -> Tensor:
        """What the model sees of the chosen images: of a size, [b,3,h,w], or all of them as squares."""
        if self.square is None:
            height, width = sizes[chosen[0]]
            return (images if len(chosen) == len(images) else images[chosen])[..., :height, :width]
        if set(sizes) == {tuple(images.shape[-2:])}:
            squares = self._square(images)
        else:
            squares = torch.cat([self._square(images[i : i + 1, :, :h, :w]) for i, (h, w) in enumerate(sizes)])
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return squares * std + mean

    def _square(self, images: Tensor) -> Tensor:
        side = (self.square, self.square)
        if images.shape[-2:] == side:
            return images
        return F.interpolate(images, side, mode="bilinear", antialias=True)

    def _predictions(self, outputs: Any) -> Predictions:
        layers = zip(outputs.loss_dict["logits"][:-1], outputs.loss_dict["boxes"][:-1], strict=True)
        auxiliary = [Predictions(logits, boxes, self.classification) for logits, boxes in layers]
        predictions = Predictions(outputs.logits, outputs.pred_boxes, self.classification, auxiliary)
        if outputs.get("enc_topk_logits") is not None:  # of the tokens that become queries
            predictions.proposals = Predictions(outputs.enc_topk_logits, outputs.enc_topk_bboxes, "sigmoid")
        elif outputs.get("enc_outputs_class") is not None:  # of all tokens
            boxes = outputs.enc_outputs_coord_logits.sigmoid()
            predictions.proposals = Predictions(outputs.enc_outputs_class, boxes, "sigmoid", any_object=True)
        return predictions

    def _maps(
        self, groups: list[_Group], order: Tensor, sizes: list[Size], canvas: Size, sites: Collection[Site]
    ) -> AttentionMaps:
        """Maps of all groups over one grid, that of the batch."""
        looks = {site: _by_layer(groups, name) for site, name in LOOKS.items()}
        side = self.stride or _side(groups[0].size, looks["decoder_cross"][0][0].weights.shape[-1])
        grid, cells = _cells(canvas, side), torch.tensor([_cells(size, side) for size in sizes], device=order.device)
        extents = torch.tensor(sizes, device=order.device) / side if self.square else cells  # as the model sees them
        own = [_cells(group.size, side) for group in groups]
        maps, encoder_grid = {}, None
        for site, layers in looks.items():
            if site not in sites:
                maps[site] = [None] * len(layers)
            elif layers and isinstance(layers[0][0], Samples):
                maps[site] = _sampled(layers, order, extents, grid)
            else:
                if site == "decoder_cross" or (site == "encoder_self" and not self.square):
                    layers = [map(_laid, layer, own, repeat(grid), repeat(site)) for layer in layers]
                maps[site] = [_together(layer, order) for layer in layers]
        if self.square and looks["encoder_self"]:
            encoder_grid = (round(looks["encoder_self"][0][0].weights.shape[-1] ** 0.5),) * 2
        rows, columns = (torch.arange(n, device=order.device) >= cells[:, i, None] for i, n in enumerate(grid))
        key_padding = (rows[:, :, None] | columns[:, None]).flatten(1)
        encoded = self._encoded(groups[0], extents[0].tolist(), side) if len(sizes) == 1 else None
        where = {"key_padding": key_padding, "encoder_grid": encoder_grid, "encoded": encoded}
        return AttentionMaps.of_layers(maps, grid=grid, **where)

    def _encoded(self, group: _Group, extent: Sequence[float], side: int) -> Encoded:
        """What the decoder looks at in an image of `extent` cells of `side` pixels; each level halves that before."""
        states = group.outputs.encoder_last_hidden_state
        if self.square:
            return Encoded.of_levels(states, extent)
        levels = range(self.model.config.num_feature_levels if self.stride else 1)
        return Encoded.of_tokens(states, [_cells(group.size, side << level) for level in levels])


@contextmanager
def blaming_options() -> Iterator[None]:
    """While transformers builds or runs a model for the first time: it fails where options contradict each other."""
    try:
        yield
    except (DetrlibError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any layer, which tells of its own sizes only
        raise ConfigError(
            "model.options: some contradict each other, or model.square: transformers fails on "
            f"{in_one_line(error)[:300]}"
        ) from None


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.affine]


def _all_layers(*given: Any, **others: Any) -> tuple[None, dict[str, Tensor], None]:
    """In place of transformers' loss: logits [L,B,Q,C] and boxes [L,B,Q,4] of all layers, to be put into its output."""
    all_logits, all_boxes = given[5:7]  # after logits, labels, device, boxes and config
    if "enc_topk_logits" in others:  # RT-DETR and its successors put images before layers
        all_logits, all_boxes = all_logits.transpose(0, 1), all_boxes.transpose(0, 1)
    return None, {"logits": all_logits, "boxes": all_boxes}, None


# --- groups of images put together ---------------------------------------------------------------------------------


def _stacked(parts: Sequence[Tensor], order: Tensor, fill: float = 0.0) -> Tensor:
    """Tensors [b,n,...] of groups as one [B,n,...] in order of images, the second axis filled up to the longest."""
    if len(parts) == 1:
        return parts[0]  # itself: explanations ask for gradients of maps
    longest = max(part.shape[1] for part in parts)
    parts = [torch.cat([x, x.new_full((len(x), longest - x.shape[1], *x.shape[2:]), fill)], 1) for x in parts]
    return torch.cat(parts)[order]


def _by_layer(groups: list[_Group], name: str) -> list[tuple[Samples | Mixing, ...]]:
    """What the layers of a site return, each of all groups; values are None where attention is transformers' own."""
    layers = zip(*(group.outputs.get(name) or () for group in groups), strict=True)
    return [tuple(Mixing(look, None) if isinstance(look, Tensor) else look for look in layer) for layer in layers]


def _together(layer: Iterable[Mixing], order: Tensor) -> Mixing:
    """Weights and values of all images from those of the groups; of one group they are not copied."""
    weights, values = zip(*layer, strict=True)
    return Mixing(_stacked(weights, order), None if values[0] is None else _stacked(values, order))


def _laid(look: Mixing, own: Size, grid: Size, site: Site) -> Mixing:
    """What cells of an image are given over a grid of which they are the upper left corner."""
    weights = (_lay_cells if site == "encoder_self" else _lay)(look.weights, own, grid)
    return Mixing(weights, None if look.values is None else _lay(look.values.mT, own, grid).mT)


def _joined(parts: list[Predictions], order: Tensor) -> Predictions:
    """Predictions of all images of a batch from those of its groups."""
    first = parts[0]
    logits, boxes = _stacked([p.logits for p in parts], order, NOWHERE), _stacked([p.boxes for p in parts], order, 0.5)
    joined = Predictions(logits, boxes, first.classification, any_object=first.any_object)
    joined.auxiliary = [_joined(list(layers), order) for layers in zip(*(p.auxiliary for p in parts), strict=True)]
    if first.proposals is not None:
        joined.proposals = _joined([p.proposals for p in parts], order)
    return joined


def _sampled(layers: list[tuple[Samples, ...]], order: Tensor, extents: Tensor, grid: Size) -> SampledMaps:
    """Points of all groups in 0..1 of their image, whose `extents` [B,2] are height and width in cells of the grid."""
    shares = (extents / extents.new_tensor(grid)).flip(1).float()  # [B,2], of width and height
    samples = []
    for layer in layers:
        locations = _stacked([each.locations for each in layer], order, 0.5)
        weights = _stacked([each.weights for each in layer], order)
        samples.append(Samples(locations * shares[:, None, None, None, None], weights))
    levels = samples[0].weights.shape[3]
    return SampledMaps(samples, shares[:, None].expand(-1, levels, -1), grid)


def _cells(size: Size, side: int) -> Size:
    """Rows and columns of cells of `side` pixels that cover an image."""
    return tuple(-(-pixels // side) for pixels in size)


def _side(size: Size, keys: int) -> int:
    """The pixels along a cell, a power of two, of which `keys` cover an image."""
    side = 1
    while (cells := _cells(size, side))[0] * cells[1] > keys:
        side *= 2
    return side


def _lay(weights: Tensor, own: Size, grid: Size) -> Tensor:
    """Weights [...,k] over the cells of an image as [...,K] over a grid of which they are the upper left corner."""
    if own == grid:
        return weights
    return F.pad(weights.unflatten(-1, own), (0, grid[1] - own[1], 0, grid[0] - own[0])).flatten(-2)


def _lay_cells(weights: Tensor, own: Size, grid: Size) -> Tensor:
    """The same for weights [...,k,k], where cells also ask."""
    return _lay(_lay(weights, own, grid).transpose(-1, -2), own, grid).transpose(-1, -2)


# --- what deformable attention looks at ----------------------------------------------------------------------------


@functools.cache
def _returning_samples(original: type[nn.Module]) -> type[nn.Module]:
    """A class of deformable attention that returns, beside its weights, where the points are: `Samples`."""

    @functools.wraps(original.forward)
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | Samples]:
        output, weights = original.forward(self, hidden_states, *args, **kwargs)
        if not kwargs.get("output_attentions", True):  # some are not told
            return output, weights
        position = kwargs.get("position_embeddings")
        query = hidden_states if position is None else hidden_states + position
        return output, _samples(self, query, kwargs["reference_points"], kwargs["spatial_shapes_list"], weights)

    return type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})


def _samples(module: nn.Module, query: Tensor, reference_points: Tensor, shapes: Shapes, weights: Tensor) -> Samples:
    """Where queries [B,Q,E] look around reference_points [B,Q,1 or L,2 or 4], with the weights that they were given.

    Levels with fewer points than others are filled up with points without weight.
    """
    weights = weights.flatten(3)  # [B,Q,H,N], N points of all levels
    counts = points_of(module, len(shapes))
    level = torch.arange(len(shapes), device=query.device).repeat_interleave(torch.tensor(counts, device=query.device))
    offsets = module.sampling_offsets(query).view(*weights.shape, 2)
    reference_points = reference_points.expand(-1, -1, len(shapes), -1)[:, :, None, level]  # [B,Q,1,N,2 or 4]
    if reference_points.shape[-1] == 2:
        unit = offsets.new_tensor([(1 / w, 1 / h) for h, w in shapes])[level]
    else:
        share = offsets.new_tensor([getattr(module, "offset_scale", 0.5) / count for count in counts])[level]
        unit = reference_points[..., 2:] * share[:, None]
    locations = reference_points[..., :2] + offsets * unit
    most = max(counts)
    return Samples(
        torch.stack([F.pad(x, (0, 0, 0, most - x.shape[3]), value=0.5) for x in locations.split(counts, 3)], 3),
        torch.stack([F.pad(x, (0, most - x.shape[3])) for x in weights.split(counts, 3)], 3),
    )
