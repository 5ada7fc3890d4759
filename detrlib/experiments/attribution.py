"""Where in the image a detection comes from, by attention maps and their gradients.

Methods give every detection, a query with a class, a map over the cells of the feature map:

    raw             cross-attention of the last decoder layer, mean over heads; of weights with signs the magnitudes
    rollout         attention of all layers, multiplied through decoder and encoder (Abnar & Zuidema 2020)
    grad_attention  positive part of cross-attention of the last layer times its gradient, mean over heads
    relevance       such products of all layers, propagated through encoder and decoder (Chefer, Gur & Wolf 2021)
    box             the predicted box, evenly: needs no attention, and is what the others have to beat
    random          noise

Legend: H heads, K = h x w keys, Q queries, n detections of the image.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.errors import ModelError
from detrlib.experiments.propagation import mean_over_heads, relevance, rollout, weighted_by_gradient
from detrlib.models import AttentionMaps, Predictions
from detrlib.models.backbone import image_sizes
from detrlib.models.outputs import cell_side

METHODS = ("raw", "rollout", "grad_attention", "relevance", "box", "random")
BY_GRADIENT = ("grad_attention", "relevance")
OF_ALL_MODELS = ("raw", "box", "random")  # deformable attention has no weights between all tokens


def explain(
    model: nn.Module,
    image: Tensor,
    padding_mask: Tensor | None,
    queries: Tensor,
    labels: Tensor,
    methods: Iterable[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Explain detections in an image by maps over its cells: zero at padding, and the same whatever it is padded to.

    Args:
        model: a detection transformer in evaluation mode.
        image: [1,3,H,W], a batch of one, normalised and padded as for the model.
        padding_mask: [1,H,W], True = padding; None: there is none.
        queries: which queries made the n detections, [n].
        labels: what they were detected as, [n].
        methods: names of `METHODS`; None: all that the model allows.
        seed: of the noise.

    Returns:
        {method: [n,h,w]}, non-negative; only their order within a map has a meaning for all methods.

    Raises:
        ModelError: the model does not allow a method, or has no gradients where one needs them.
    """
    methods = allowed_methods(model, methods)
    gradients = any(method in BY_GRADIENT for method in methods)
    sites = True if gradients or "rollout" in methods else ("decoder_cross",)
    with torch.set_grad_enabled(gradients):
        predictions = model(image, padding_mask, need_attention=sites)
    attention = predictions.attention
    by_key = _explained_by_gradient(predictions, queries, labels) if gradients else {}
    if "raw" in methods:
        by_key["raw"] = attention.decoder_cross[-1].detach().abs().mean(1)[0, queries]
    if "rollout" in methods:
        by_key["rollout"] = rollout(mean_over_heads(attention))[0, queries]
    maps = {name: _on_grid(values, attention) for name, values in by_key.items()}
    if "box" in methods:
        canvas = tuple(image.shape[2:])
        size = canvas if padding_mask is None else image_sizes(padding_mask)[0]
        maps["box"] = _box_maps(predictions.boxes[0, queries].detach(), size, canvas, attention.grid)
    if "random" in methods:
        maps["random"] = _random_maps(len(queries), attention, seed)
    return {method: maps[method].detach() for method in methods}  # of polling, cells have gradients of their own


def allowed_methods(model: nn.Module, methods: Iterable[str] | None = None) -> tuple[str, ...]:
    """`methods`, or all that there are for `model`.

    Raises ModelError for unknown methods, and for those that need weights deformable attention does not have.
    """
    points = getattr(model, "samples_points", False)
    if methods is None:
        return OF_ALL_MODELS if points else METHODS
    methods = tuple(dict.fromkeys(methods))
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ModelError(f"unknown explanation {', '.join(unknown) or '(none)'}; there are {', '.join(METHODS)}")
    refused = [name for name in methods if name not in OF_ALL_MODELS]
    if points and refused:
        raise ModelError(
            f"{', '.join(refused)}: deformable attention samples locations instead of weighing all cells, so that its "
            f"layers cannot be multiplied; for this model there are {', '.join(OF_ALL_MODELS)}"
        )
    return methods


def _explained_by_gradient(predictions: Predictions, queries: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Maps [n,K] of the methods that need gradients."""
    keys = predictions.attention.decoder_cross[-1].shape[-1]
    maps = {name: predictions.logits.new_zeros(len(queries), keys) for name in BY_GRADIENT}
    for number, weighted in enumerate(weighted_by_gradient(predictions, queries, labels)):
        maps["grad_attention"][number] = weighted.decoder_cross[-1][0, queries[number]]
        maps["relevance"][number] = relevance(weighted)[0, queries[number]]
    return maps


def _on_grid(values: Tensor, attention: AttentionMaps) -> Tensor:
    """Maps [n,K] over keys as maps [n,h,w] over cells, zero at padding."""
    if attention.key_padding is not None:
        values = values.masked_fill(attention.key_padding, 0.0)
    if attention.polled is not None:
        values = attention.polled.on_cells(values[None, None])[0, 0]
    return values.unflatten(-1, attention.grid)


def _box_maps(boxes: Tensor, size: tuple[int, int], canvas: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The share of every cell that lies in each box, [n,h,w]; boxes [n,4] cxcywh in 0..1 of the image.

    size, canvas: height and width in pixels of the image, and with its padding; grid: cells of the canvas.
    """
    side = cell_side(canvas, grid)
    x0, y0, x1, y1 = cxcywh_to_xyxy(boxes).clamp(0, 1).unbind(-1)
    rows = _covered(y0 * size[0] / side, y1 * size[0] / side, grid[0])
    columns = _covered(x0 * size[1] / side, x1 * size[1] / side, grid[1])
    return rows[:, :, None] * columns[:, None]


def _covered(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Share of each of `cells` unit intervals that lies between start [n] and end [n] -> [n,cells]."""
    left = torch.arange(cells, device=start.device)
    return (torch.minimum(end[:, None], left + 1) - torch.maximum(start[:, None], left)).clamp(min=0)


def _random_maps(count: int, attention: AttentionMaps, seed: int) -> Tensor:
    """Even noise [n,h,w] over the cells of the image."""
    rows, columns = attention.valid_grid(0)
    noise = torch.rand(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    maps = attention.decoder_cross[-1].new_zeros(count, *attention.grid, dtype=noise.dtype)
    maps[:, :rows, :columns] = noise.to(maps)
    return maps
