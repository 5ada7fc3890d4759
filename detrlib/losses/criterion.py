"""The set losses of DETR, with softmax or sigmoid classification, and those of models that choose their tokens.

A loss is a method or function that takes the outputs of a layer and returns a dict of terms; `Criterion.forward` adds
up the terms that have a weight and passes all of them on to be logged.

Layers of one shape are computed together, as one tensor [L,B,Q,...].

Legend: L layers, B images, Q queries, C classes, T boxes of an image, N matched pairs of the batch, S tokens of all
levels.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detrlib.boxes import cxcywh_to_xyxy, giou
from detrlib.losses.matcher import Assigned, MatchingCosts, on_device, start_matching
from detrlib.models.outputs import Polled, Predictions, Tokens

Terms = dict[str, Tensor]  # by name, as they are logged


class Stack(NamedTuple):
    """Layers of one shape that learn from the same targets."""

    suffixes: list[str]  # of the names of their losses
    outputs: Predictions  # logits [L,B,Q,C] and boxes [L,B,Q,4] of all of them


class Pairs(NamedTuple):
    """The N matched pairs of a batch, once for each of L layers: where the query is, and what it is to predict."""

    image: Tensor  # [L*N], counted from layer to layer: layer * B + image
    query: Tensor  # [L*N]
    labels: Tensor  # [L*N]
    boxes: Tensor  # [L*N,4] cxcywh in 0..1

    def predicted(self, values: Tensor) -> Tensor:
        """Of values [L,B,Q,n] of all queries those of the matched ones, [L,N,n]."""
        return values.flatten(0, 1)[self.image, self.query].unflatten(0, (len(values), -1))


class Divisors(NamedTuple):
    """What sums over the queries and images of a whole batch are divided by."""

    boxes: Tensor  # number of boxes, 1 at least; in the mean over processes
    class_weight: Tensor  # sum of the weights of all queries in the cross-entropy; likewise
    pairs: int  # number of matched pairs, 1 at least
    images: int


class Criterion(nn.Module):
    """Match every layer's outputs to the targets and sum the weighted losses over the layers.

    Args:
        mean_over_processes: averages a tensor over the processes of a distributed run. Losses are divided by averages
            over processes because DDP averages gradients: together the gradient is that of one big batch.
        cost_class, cost_bbox, cost_giou: see `MatchingCosts`.
        weight_class, weight_bbox, weight_giou: of `loss_class`, `loss_bbox` and `loss_giou` of every layer.
        weight_mask: of the loss of the scoring network of a sparse encoder, `token_losses`.
        weight_poll: of the mean score of kept cells, `loss_poll`.
        no_object: weight of the class no-object in the cross-entropy.
        focal_alpha: weight of the right class in the focal loss and cost, that of the others being one less it.
        auxiliary: whether decoder layers before the last have losses.
    """

    def __init__(
        self,
        mean_over_processes: Callable[[Tensor], Tensor] = lambda x: x,
        *,
        cost_class: float = 1.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        weight_class: float = 1.0,
        weight_bbox: float = 5.0,
        weight_giou: float = 2.0,
        weight_mask: float = 1.0,
        weight_poll: float = 1e-4,
        no_object: float = 0.1,
        focal_alpha: float = 0.25,
        auxiliary: bool = True,
    ):
        super().__init__()
        self.mean_over_processes = mean_over_processes
        self.costs = MatchingCosts(cost_class, cost_bbox, cost_giou, focal_alpha)
        self.weights = {"loss_class": weight_class, "loss_bbox": weight_bbox, "loss_giou": weight_giou}
        self.other_weights = {"loss_mask": weight_mask, "loss_poll": weight_poll}
        self.no_object, self.focal_alpha, self.auxiliary = no_object, focal_alpha, auxiliary

    def forward(
        self, outputs: Predictions, targets: list[dict], batch: list[dict] | None = None
    ) -> tuple[Tensor, Terms]:
        """The total loss and everything worth logging.

        Args:
            outputs: what a model returns for B images.
            targets: B dicts with `labels` [T] and `boxes` [T,4] as `match` reads them.
            batch: the targets of the whole batch of which these images are a part; None: they are all of it. Losses and
                terms of the parts of a batch, added up, are those of the batch.

        Returns:
            The weighted sum, and the unweighted terms by name. Names of the last decoder layer have no suffix, those of
            auxiliary losses end in the number of their decoder layer, those of the proposals in `_enc`, those of
            encoder layers before the last in `_enc_` and their number.
        """
        divisors = self._divisors(outputs, targets if batch is None else batch)
        stacks = self._stacks(outputs)
        assign = start_matching([stack.outputs for stack in stacks], targets, self.costs)
        part = len(targets) / divisors.images  # what a mean over images counts in that over the batch
        others = cardinality_error(outputs, targets)
        others |= {} if outputs.tokens is None else token_losses(outputs.tokens)
        others |= {} if outputs.polled is None else loss_poll(outputs.polled)
        others = {name: part * value for name, value in others.items()}
        total = sum(weight * others[name] for name, weight in self.other_weights.items() if name in others)
        terms = {}
        for stack, pairs in zip(stacks, all_pairs(assign(), targets), strict=True):
            if stack.outputs.any_object:
                pairs = pairs._replace(labels=torch.zeros_like(pairs.labels))
            losses = self.loss_labels(stack.outputs, pairs, divisors) | self.loss_boxes(stack.outputs, pairs, divisors)
            total = total + sum(weight * losses[name].sum() for name, weight in self.weights.items())
            if not terms:  # the last decoder layer is the first of the first stack
                terms = class_error(stack.outputs, pairs, divisors.pairs) | others
            for name, values in losses.items():
                terms |= {f"{name}{suffix}": value for suffix, value in zip(stack.suffixes, values, strict=True)}
        return total, terms

    def counts(self, outputs: Predictions, targets: list[dict]) -> dict[str, float]:
        """What each loss of `forward` was divided by, to put batches of different content together."""
        divisors = self._divisors(outputs, targets)
        boxes = divisors.boxes.item()
        classes = divisors.class_weight.item() if outputs.classification == "softmax" else boxes
        return {"loss_class": classes, "loss_bbox": boxes, "loss_giou": boxes, "class_error": boxes}

    def loss_labels(self, outputs: Predictions, pairs: Pairs, divisors: Divisors) -> Terms:
        """`loss_class` [L]: cross-entropy where classes have a softmax, focal loss where they have sigmoids."""
        logits = outputs.logits.float()  # [L,B,Q,C] or [L,B,Q,C+1]
        layers, images = logits.shape[:2]
        if outputs.classification == "sigmoid":  # Lin et al. 2017, Eq. 5, over all queries and classes
            wanted = torch.zeros_like(logits).flatten(0, 1)
            wanted[pairs.image, pairs.query, pairs.labels] = logits.new_ones(())
            each = sigmoid_focal_loss(logits, wanted.view_as(logits), alpha=self.focal_alpha)
            return {"loss_class": each.flatten(1).sum(1) / divisors.boxes}
        no_object = logits.shape[-1] - 1  # what unmatched queries are to say, at a weight of its own
        wanted = torch.full((layers * images, logits.shape[2]), no_object, device=logits.device)
        wanted[pairs.image, pairs.query] = pairs.labels
        weight = torch.ones(no_object + 1, device=logits.device)
        weight[no_object] = self.no_object
        each = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")
        return {"loss_class": each.view(layers, -1).sum(1) / divisors.class_weight}

    def loss_boxes(self, outputs: Predictions, pairs: Pairs, divisors: Divisors) -> Terms:
        """`loss_bbox` [L], L1 distance of matched boxes, and `loss_giou` [L], 1 - GIoU (Carion et al. 2020, Eq. 2)."""
        boxes = pairs.predicted(outputs.boxes.float())  # [L,N,4]
        wanted = pairs.boxes.view_as(boxes)
        overlap = giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))  # [L,N]
        return {
            "loss_bbox": (boxes - wanted).abs().sum((1, 2)) / divisors.boxes,
            "loss_giou": (1 - overlap).sum(1) / divisors.boxes,
        }

    def _stacks(self, outputs: Predictions) -> list[Stack]:
        """All layers that learn from the targets, those of one shape together, the last decoder layer first."""
        decoder = {"": outputs}
        if self.auxiliary:
            decoder |= {f"_{number}": layer for number, layer in enumerate(outputs.auxiliary)}
        proposals = {} if outputs.proposals is None else {"_enc": outputs.proposals}
        encoder = {f"_enc_{number}": layer for number, layer in enumerate(outputs.encoder_auxiliary)}
        return [stacked(layers) for layers in (decoder, proposals, encoder) if layers]

    def _divisors(self, outputs: Predictions, batch: list[dict]) -> Divisors:
        """They follow from the number of boxes of every image alone, before any of them is matched."""
        queries = outputs.logits.shape[1]
        boxes = sum(len(target["labels"]) for target in batch)
        pairs = sum(min(len(target["labels"]), queries) for target in batch)
        class_weight = pairs + self.no_object * (len(batch) * queries - pairs)
        both = on_device(np.float32([boxes, class_weight]), outputs.logits.device)
        boxes, class_weight = self.mean_over_processes(both).unbind()
        return Divisors(torch.where(boxes > 0, boxes, 1.0), class_weight, max(1, pairs), len(batch))


def stacked(layers: dict[str, Predictions]) -> Stack:
    """Layers of one shape and kind, by the suffix of their losses, as one."""
    every = list(layers.values())
    logits, boxes = (torch.stack([getattr(layer, name) for layer in every]) for name in ("logits", "boxes"))
    return Stack(list(layers), Predictions(logits, boxes, every[0].classification, any_object=every[0].any_object))


def all_pairs(stacks: list[Assigned], targets: list[dict]) -> list[Pairs]:
    """The pairs of all stacks of layers: their indices go to the device in one copy."""
    first = [0, *accumulate(len(target["labels"]) for target in targets)]  # object of each image, of those of all
    indices, counts = [], []
    for stack in stacks:
        for number, (queries, objects) in enumerate(stack):
            indices.append(np.stack([np.full_like(queries, number), queries, objects + first[number % len(targets)]]))
        counts.append(sum(len(queries) for queries, _ in stack))
    labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
    rows = on_device(np.concatenate(indices, axis=1), labels.device).split(counts, 1)
    return [Pairs(image, query, labels[chosen], boxes[chosen]) for image, query, chosen in rows]


@torch.no_grad()
def class_error(outputs: Predictions, pairs: Pairs, number: int) -> Terms:
    """`class_error`, logged only: wrong classes among the matched queries, `number` in the whole batch, in percent.

    Of the first of the layers [L,B,Q,C].
    """
    right = pairs.labels.unflatten(0, (len(outputs.logits), -1))
    wrong = pairs.predicted(outputs.logits)[0].argmax(-1) != right[0]
    return {"class_error": 100 * (wrong.sum() / number)}


@torch.no_grad()
def cardinality_error(outputs: Predictions, targets: list[dict]) -> Terms:
    """`cardinality_error`, logged only: by how many the objects of an image are miscounted, in the mean."""
    if outputs.classification == "softmax":
        counted = (outputs.logits.argmax(-1) != outputs.logits.shape[-1] - 1).sum(1)
    else:
        counted = (outputs.class_scores().amax(-1) > 0.5).sum(1)
    actual = on_device([len(target["labels"]) for target in targets], counted.device)
    return {"cardinality_error": (counted - actual).abs().float().mean()}


def loss_poll(polled: Polled) -> Terms:
    """`loss_poll`: mean score of kept cells, which keeps scores low but of cells that need one (Wang et al. 2021)."""
    return {"loss_poll": polled.mean_score().mean()}


def token_losses(tokens: Tokens) -> Terms:
    """`loss_mask`: does the scoring network find the tokens the decoder looks at most (Roh et al. 2022, Eq. 5)?

    Binary cross-entropy against the best tokens of the decoder attention map, as many as the image keeps: mean over
    its valid tokens, then over images; with `official_padding` over the padding of the batch as well.
    Logged only: `dam_correlation`, share of the decoder attention map on kept tokens, and that of every level.
    """
    attended = tokens.decoder_map()  # [B,S]
    valid = torch.ones_like(tokens.kept) if tokens.padding is None else ~tokens.padding
    number = tokens.kept.sum(1, keepdim=True)  # [B,1]
    best = attended.masked_fill(~valid, -1.0).topk(tokens.most, dim=1).indices
    among_best = (torch.arange(best.shape[1], device=best.device) < number).to(tokens.logits.dtype)
    wanted = torch.zeros_like(tokens.logits).scatter(1, best, among_best)
    entropy = F.binary_cross_entropy_with_logits(tokens.logits, wanted, reduction="none")
    counted = torch.ones_like(valid) if tokens.official_padding else valid
    losses = {"loss_mask": ((entropy * counted).sum(1) / counted.sum(1)).mean()}
    sizes = [h * w for h, w in tokens.shapes]
    parts = [(attended, tokens.kept), *zip(attended.split(sizes, 1), tokens.kept.split(sizes, 1), strict=True)]
    shares = [((amount * kept).sum(1) / amount.sum(1).clamp(min=1e-8)).mean() for amount, kept in parts]
    names = ["dam_correlation", *(f"dam_correlation_level_{level}" for level in range(len(sizes)))]
    return losses | dict(zip(names, shares, strict=True))
