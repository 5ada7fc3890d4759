"""Where in the image a detection comes from.

Methods give every detection, a query with a class, a map over the cells of the feature map:

    raw             cross-attention of the last decoder layer, mean over heads; of weights with signs the magnitudes
    rollout         attention of all layers, multiplied through decoder and encoder (Abnar & Zuidema 2020)
    grad_attention  positive part of cross-attention of the last layer times its gradient, mean over heads
    relevance       such products of all layers, propagated through encoder and decoder (Chefer, Gur & Wolf 2021)
    gradient        how much the score changes with each pixel (Simonyan, Vedaldi & Zisserman 2014)
    odam            what the decoder looks at, times its gradient of the score (Zhao & Chan 2023)
    odam_box        the same of the score and of the four edges of the box, together
    drise           random masks, and what is predicted behind them (Petsiuk et al. 2021): any detector, slow
    box             the predicted box, evenly: needs no attention, and is what the others have to beat
    random          noise

Legend: H heads, K = h x w keys, Q queries, n detections of the image.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from detrlib.errors import ModelError
from detrlib.experiments.cells import box_maps, noise_maps, on_grid
from detrlib.experiments.drise import MASKS, drise
from detrlib.experiments.gradients import box_targets, odam, saliency, score_targets
from detrlib.experiments.propagation import mean_over_heads, relevance, rollout, weighted_by_gradient
from detrlib.models import Predictions
from detrlib.models.backbone import image_sizes

METHODS = (
    *("raw", "rollout", "grad_attention", "relevance"),
    *("gradient", "odam", "odam_box", "drise"),
    *("box", "random"),
)
BY_PROPAGATION = ("rollout", "grad_attention", "relevance")  # need weights between all tokens
BY_RELEVANCE = ("grad_attention", "relevance")  # need their gradients too
BACKWARD = dict.fromkeys((*BY_RELEVANCE, "gradient", "odam"), 1) | {"odam_box": 5}  # passes for a detection
ON_REQUEST = ("odam_box", "drise")  # cost several passes


def explain(
    model: nn.Module,
    image: Tensor,
    padding_mask: Tensor | None,
    queries: Tensor,
    labels: Tensor,
    methods: Iterable[str] | None = None,
    seed: int = 0,
    masks: int = MASKS,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Explain detections in an image by maps over its cells: zero at padding, and the same whatever it is padded to.

    Args:
        model: a detection transformer in evaluation mode.
        image: [1,3,H,W], a batch of one, normalised and padded as for the model.
        padding_mask: [1,H,W], True = padding; None: there is none.
        queries: which queries made the n detections, [n].
        labels: what they were detected as, [n].
        methods: names of `METHODS`; None: those that the model allows at a pass or two.
        seed: of the noise, and of the masks of D-RISE.
        masks: how many of these; published with 5,000.
        batch_size: masked images that the model sees at a time.

    Returns:
        {method: [n,h,w]}, non-negative; only their order within a map has a meaning for all methods.

    Raises:
        ModelError: the model does not allow a method, or has no gradients where relevance needs them.
        ConfigError: there are no masks.
    """
    methods, canvas = allowed_methods(model, methods), tuple(image.shape[2:])
    size = canvas if padding_mask is None else image_sizes(padding_mask)[0]
    sites = True if set(methods) & set(BY_PROPAGATION) else ("decoder_cross",)
    gradients = bool(set(methods) & set(BACKWARD))
    image = image.detach().requires_grad_(gradients)  # also of models with frozen parameters
    with torch.set_grad_enabled(gradients):
        predictions = model(image, padding_mask, need_attention=sites)
        maps = _by_gradient(predictions, image, queries, labels, size, methods)
    attention = predictions.attention
    maps |= {name: on_grid(values, attention) for name, values in _by_key(predictions, queries, labels, methods)}
    if "drise" in methods:
        options = {"masks": masks, "seed": seed, "batch_size": batch_size}
        given = image.detach(), padding_mask, predictions, queries, size, attention.grid
        maps["drise"] = drise(model, *given, **options)
    if "box" in methods:
        maps["box"] = box_maps(predictions.boxes[0, queries].detach(), size, canvas, attention.grid)
    if "random" in methods:
        maps["random"] = noise_maps(len(queries), attention, seed)
    return {method: maps[method].detach() for method in methods}  # of polling, cells have gradients of their own


def allowed_methods(model: nn.Module, methods: Iterable[str] | None = None) -> tuple[str, ...]:
    """`methods`, or all that `model` allows at a pass or two.

    Raises ModelError for unknown methods, and for those that need weights deformable attention does not have.
    """
    points = getattr(model, "samples_points", False)
    possible = [name for name in METHODS if not (points and name in BY_PROPAGATION)]
    if methods is None:
        return tuple(name for name in possible if name not in ON_REQUEST)
    methods = tuple(dict.fromkeys(methods))
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ModelError(f"unknown explanation {', '.join(unknown) or '(none)'}; there are {', '.join(METHODS)}")
    refused = [name for name in methods if name not in possible]
    if refused:
        raise ModelError(
            f"{', '.join(refused)}: deformable attention samples locations instead of weighing all cells, so that its "
            f"layers cannot be multiplied; for this model there are {', '.join(possible)}"
        )
    return methods


def passes(methods: Iterable[str], images: int, detections: int, masks: int = MASKS) -> dict[str, dict[str, int]]:
    """What explaining so many detections costs: {method: forward and backward passes, of one image each}.

    What several methods share is counted for each; the detections themselves are there before.
    """
    forward = dict.fromkeys(METHODS, 1) | {"box": 0, "random": 0, "drise": masks}
    return {
        name: {"forward": forward[name] * images, "backward": BACKWARD.get(name, 0) * detections} for name in methods
    }


def _by_key(
    predictions: Predictions, queries: Tensor, labels: Tensor, methods: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Names and maps [n,K] over keys, of the methods that are made of attention."""
    attention = predictions.attention
    if "raw" in methods:
        yield "raw", attention.decoder_cross[-1].detach().abs().mean(1)[0, queries]
    if "rollout" in methods:
        yield "rollout", rollout(mean_over_heads(attention))[0, queries]
    if set(methods) & set(BY_RELEVANCE):
        keys = attention.decoder_cross[-1].shape[-1]
        direct, propagated = predictions.logits.detach().new_zeros(2, len(queries), keys)
        for number, weighted in enumerate(weighted_by_gradient(predictions, queries, labels)):
            direct[number] = weighted.decoder_cross[-1][0, queries[number]]
            propagated[number] = relevance(weighted)[0, queries[number]]
        yield from (("grad_attention", direct), ("relevance", propagated))


def _by_gradient(
    predictions: Predictions,
    image: Tensor,
    queries: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    methods: tuple[str, ...],
) -> dict[str, Tensor]:
    """Maps [n,h,w] of the methods that need gradients of more than attention."""
    attention, maps = predictions.attention, {}
    scores = score_targets(predictions, queries, labels)
    if "gradient" in methods:
        maps["gradient"] = saliency(scores, image, size, attention.grid)
    if "odam" in methods:
        maps["odam"] = odam(scores, attention)
    if "odam_box" in methods:
        maps["odam_box"] = odam(torch.cat([scores, box_targets(predictions, queries)], 1), attention)
    return maps
