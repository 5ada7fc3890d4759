"""Where in the image a detection comes from, by attention maps and their gradients.

Methods give every detection, a query with a class, a map over the cells of the feature map:

    raw             cross-attention of the last decoder layer, mean over heads
    rollout         attention of all layers, multiplied through decoder and encoder (Abnar & Zuidema 2020)
    grad_attention  positive part of cross-attention of the last layer times its gradient, mean over heads
    relevance       such products of all layers, propagated through encoder and decoder (Chefer, Gur & Wolf 2021)
    box             the predicted box, evenly: needs no attention, and is what the others have to beat
    random          noise

Legend: B images, H heads, K = h x w keys, Q queries, n detections of an image.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.errors import ModelError
from detrlib.experiments.propagation import mean_over_heads, relevance, rollout, weighted_by_gradient
from detrlib.models import AttentionMaps, Predictions
from detrlib.models.backbone import image_sizes
from detrlib.models.deformable import DeformableDETR

METHODS = ("raw", "rollout", "grad_attention", "relevance", "box", "random")
BY_GRADIENT = ("grad_attention", "relevance")
OF_ALL_MODELS = ("raw", "box", "random")  # deformable attention has no weights between all tokens


def explain(
    model: nn.Module,
    images: Tensor,
    padding_mask: Tensor,
    queries: Sequence[Tensor],
    labels: Sequence[Tensor],
    methods: Iterable[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[str, list[Tensor]]:
    """Explain detections by maps over the cells of the image: zero at padding, and the same in any batch.

    Args:
        model: a detection transformer in evaluation mode.
        images: [B,3,H,W], normalised and padded as for the model.
        padding_mask: [B,H,W], True = padding; None: there is none.
        queries: which queries made the n detections of each image, B tensors [n].
        labels: what they were detected as, B tensors [n].
        methods: names of `METHODS`; None: all that the model allows.
        seeds: of the noise of each image, B numbers; None: all 0.

    Returns:
        {method: B tensors [n,h,w]}, non-negative; only their order within a map has a meaning for all methods.

    Raises:
        ModelError: the model does not allow a method, or has no gradients where one needs them.
    """
    methods = allowed_methods(model, methods)
    gradients = any(method in BY_GRADIENT for method in methods)
    sites = True if gradients or "rollout" in methods else ("decoder_cross",)
    with torch.set_grad_enabled(gradients):
        predictions = model(images, padding_mask, need_attention=sites)
    attention, rows = predictions.attention, pad_sequence(list(queries), batch_first=True)  # filled up with 0
    by_cell = _explained_by_gradient(predictions, queries, labels) if gradients else {}
    if "raw" in methods:
        by_cell["raw"] = _rows(attention.decoder_cross[-1].detach().mean(1), rows)
    if "rollout" in methods:
        by_cell["rollout"] = _rows(rollout(mean_over_heads(attention)), rows)
    maps = {name: _on_grid(values, attention, queries) for name, values in by_cell.items()}
    if "box" in methods:
        boxes = [own[q] for own, q in zip(predictions.boxes.detach(), queries, strict=True)]
        size = tuple(images.shape[2:])
        sizes = [size] * len(images) if padding_mask is None else image_sizes(padding_mask)
        maps["box"] = _box_maps(boxes, sizes, size, attention.grid)
    if "random" in methods:
        counts = [len(q) for q in queries]
        maps["random"] = _random_maps(counts, attention, seeds or [0] * len(counts), images.device)
    return {name: maps[name] for name in methods}


def allowed_methods(model: nn.Module, methods: Iterable[str] | None = None) -> tuple[str, ...]:
    """`methods`, or all that there are for `model`.

    Raises ModelError for unknown methods, and for those that need weights deformable attention does not have.
    """
    deformable = isinstance(model, DeformableDETR)
    if methods is None:
        return OF_ALL_MODELS if deformable else METHODS
    methods = tuple(dict.fromkeys(methods))
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ModelError(f"unknown explanation {', '.join(unknown) or '(none)'}; there are {', '.join(METHODS)}")
    refused = [name for name in methods if name not in OF_ALL_MODELS]
    if deformable and refused:
        raise ModelError(
            f"{', '.join(refused)}: deformable attention samples places instead of weighing all cells, so that its "
            f"layers cannot be multiplied; for this model there are {', '.join(OF_ALL_MODELS)}"
        )
    return methods


def _rows(maps: Tensor, queries: Tensor) -> Tensor:
    """maps [B,Q,K] of queries [B,n] -> [B,n,K]."""
    return maps.gather(1, queries[:, :, None].expand(-1, -1, maps.shape[-1]))


def _explained_by_gradient(
    predictions: Predictions, queries: Sequence[Tensor], labels: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Maps [B,most n,K] of the methods that need gradients; those of images with fewer detections end in zeros."""
    rows, labels = (pad_sequence(list(own), batch_first=True) for own in (queries, labels))  # [B,most n]
    shape = *rows.shape, predictions.attention.decoder_cross[-1].shape[-1]
    maps = {name: predictions.logits.new_zeros(shape) for name in BY_GRADIENT}
    counts = torch.tensor([len(own) for own in queries], device=rows.device)
    for number, weighted in enumerate(weighted_by_gradient(predictions, rows, labels, counts)):
        query = rows[:, number : number + 1]
        maps["grad_attention"][:, number] = _rows(weighted.decoder_cross[-1], query)[:, 0]
        maps["relevance"][:, number] = _rows(relevance(weighted), query)[:, 0]
    return maps


def _on_grid(values: Tensor, attention: AttentionMaps, queries: Sequence[Tensor]) -> list[Tensor]:
    """Maps [B,most n,K] as those of each image's n detections, [n,h,w], zero at padding."""
    if attention.key_padding is not None:
        values = values.masked_fill(attention.key_padding[:, None], 0.0)
    if attention.polled is not None:
        values = attention.polled.on_cells(values[:, None])[:, 0]
    return [own[: len(q)] for own, q in zip(values.unflatten(-1, attention.grid), queries, strict=True)]


def _box_maps(
    boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], batch_size: tuple[int, int], grid: tuple[int, int]
) -> list[Tensor]:
    """The share of every cell that lies in each box, [n,h,w]; boxes [n,4] cxcywh in 0..1 of the image.

    sizes: (height, width) of every image in pixels; batch_size: of the batch, with padding; grid: its cells.
    """
    stride = [pixels / cells for pixels, cells in zip(batch_size, grid, strict=True)]
    maps = []
    for own, (height, width) in zip(boxes, sizes, strict=True):
        x0, y0, x1, y1 = cxcywh_to_xyxy(own).clamp(0, 1).unbind(-1)
        rows = _covered(y0 * height / stride[0], y1 * height / stride[0], grid[0])
        columns = _covered(x0 * width / stride[1], x1 * width / stride[1], grid[1])
        maps.append(rows[:, :, None] * columns[:, None])
    return maps


def _covered(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Share of each of `cells` unit intervals that lies between start [n] and end [n] -> [n,cells]."""
    left = torch.arange(cells, device=start.device)
    return (torch.minimum(end[:, None], left + 1) - torch.maximum(start[:, None], left)).clamp(min=0)


def _random_maps(
    counts: Sequence[int], attention: AttentionMaps, seeds: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Even noise [n,h,w] over the cells of each image."""
    maps = []
    for image, (count, seed) in enumerate(zip(counts, seeds, strict=True)):
        rows, columns = attention.valid_grid(image)
        noise = torch.rand(count, rows, columns, generator=torch.Generator().manual_seed(seed))
        own = torch.zeros(count, *attention.grid, device=device)
        own[:, :rows, :columns] = noise.to(own)
        maps.append(own)
    return maps
