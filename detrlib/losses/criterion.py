"""The set losses of DETR, with softmax or sigmoid classification, and those of models that choose their tokens.

A loss is a method or function that takes the outputs of a layer and returns a dict of terms; `Criterion.forward` adds
up the terms that have a weight and passes all of them on to be logged.

Legend: B images, Q queries, C classes, T boxes of an image, N matched pairs of the batch, S tokens of all levels.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detrlib.boxes import cxcywh_to_xyxy, giou
from detrlib.losses.matcher import Match, MatchingCosts, match
from detrlib.models.outputs import Polled, Predictions, Tokens

Terms = dict[str, Tensor]  # by name, as they are logged


class Pairs(NamedTuple):
    """The N matched pairs of a batch: where the query is, and what it is to predict."""

    image: Tensor  # [N]
    query: Tensor  # [N]
    labels: Tensor  # [N]
    boxes: Tensor  # [N,4] cxcywh in 0..1


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
        self.weight_mask, self.weight_poll = weight_mask, weight_poll
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
        pairs, terms = self._layer_losses(outputs, targets, divisors)
        total = self._weighted(terms)
        terms |= class_error(outputs, pairs, divisors.pairs)
        part = len(targets) / divisors.images  # what a mean over images counts in that over the batch
        terms |= {name: part * value for name, value in cardinality_error(outputs, targets).items()}
        for suffix, layer in self._other_layers(outputs):
            _, losses = self._layer_losses(layer, targets, divisors)
            total = total + self._weighted(losses)
            terms |= {f"{name}_{suffix}": value for name, value in losses.items()}
        if outputs.tokens is not None:
            terms |= {name: part * value for name, value in token_losses(outputs.tokens).items()}
            total = total + self.weight_mask * terms["loss_mask"]
        if outputs.polled is not None:
            terms |= {name: part * value for name, value in loss_poll(outputs.polled).items()}
            total = total + self.weight_poll * terms["loss_poll"]
        return total, terms

    def counts(self, outputs: Predictions, targets: list[dict]) -> dict[str, float]:
        """What each loss of `forward` was divided by, to put batches of different content together."""
        divisors = self._divisors(outputs, targets)
        boxes = divisors.boxes.item()
        classes = divisors.class_weight.item() if outputs.classification == "softmax" else boxes
        return {"loss_class": classes, "loss_bbox": boxes, "loss_giou": boxes, "class_error": boxes}

    def loss_labels(self, outputs: Predictions, pairs: Pairs, divisors: Divisors) -> Terms:
        """`loss_class`: cross-entropy where classes have a softmax, focal loss where they have sigmoids."""
        logits = outputs.logits.float()  # [B,Q,C] or [B,Q,C+1]
        if outputs.classification == "sigmoid":  # Lin et al. 2017, Eq. 5, over all queries and classes
            wanted = torch.zeros_like(logits)
            wanted[pairs.image, pairs.query, pairs.labels] = 1.0
            total = sigmoid_focal_loss(logits, wanted, alpha=self.focal_alpha, reduction="sum")
            return {"loss_class": total / divisors.boxes}
        no_object = logits.shape[-1] - 1  # what unmatched queries are to say, at a weight of its own
        wanted = torch.full(logits.shape[:2], no_object, device=logits.device)  # [B,Q]
        wanted[pairs.image, pairs.query] = pairs.labels
        weight = torch.ones(no_object + 1, device=logits.device)
        weight[no_object] = self.no_object
        total = F.cross_entropy(logits.transpose(1, 2), wanted, weight, reduction="sum")
        return {"loss_class": total / divisors.class_weight}

    def loss_boxes(self, outputs: Predictions, pairs: Pairs, divisors: Divisors) -> Terms:
        """`loss_bbox`, the L1 distance of matched boxes, and `loss_giou`, 1 - GIoU (Carion et al. 2020, Eq. 2)."""
        boxes = outputs.boxes.float()[pairs.image, pairs.query]  # [N,4]
        overlap = giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(pairs.boxes))  # [N]
        return {
            "loss_bbox": F.l1_loss(boxes, pairs.boxes, reduction="sum") / divisors.boxes,
            "loss_giou": (1 - overlap).sum() / divisors.boxes,
        }

    def _layer_losses(self, outputs: Predictions, targets: list[dict], divisors: Divisors) -> tuple[Pairs, Terms]:
        if outputs.any_object:
            targets = [target | {"labels": torch.zeros_like(target["labels"])} for target in targets]
        pairs = matched(match(outputs, targets, self.costs), targets)
        return pairs, self.loss_labels(outputs, pairs, divisors) | self.loss_boxes(outputs, pairs, divisors)

    def _weighted(self, losses: Terms) -> Tensor:
        return sum(weight * losses[name] for name, weight in self.weights.items())

    def _other_layers(self, outputs: Predictions) -> Iterator[tuple[str, Predictions]]:
        """All but the last decoder layer that learns from the same targets, with the suffix of its losses' names."""
        if self.auxiliary:
            yield from ((str(number), layer) for number, layer in enumerate(outputs.auxiliary))
        if outputs.proposals is not None:
            yield "enc", outputs.proposals
        yield from ((f"enc_{number}", layer) for number, layer in enumerate(outputs.encoder_auxiliary))

    def _divisors(self, outputs: Predictions, batch: list[dict]) -> Divisors:
        """They follow from the number of boxes of every image alone, before any of them is matched."""
        queries = outputs.logits.shape[1]
        boxes = sum(len(target["labels"]) for target in batch)
        pairs = sum(min(len(target["labels"]), queries) for target in batch)
        class_weight = pairs + self.no_object * (len(batch) * queries - pairs)
        both = outputs.logits.new_tensor([float(boxes), class_weight], dtype=torch.float32)
        boxes, class_weight = self.mean_over_processes(both).unbind()
        return Divisors(torch.where(boxes > 0, boxes, 1.0), class_weight, max(1, pairs), len(batch))


def matched(indices: list[Match], targets: list[dict]) -> Pairs:
    """The pairs of all images, one image after the other; indices as `match` returns them."""
    return Pairs(
        torch.cat([torch.full_like(query, image) for image, (query, _) in enumerate(indices)]),
        torch.cat([query for query, _ in indices]),
        *(
            torch.cat([target[name][index] for target, (_, index) in zip(targets, indices, strict=True)])
            for name in ("labels", "boxes")
        ),
    )


@torch.no_grad()
def class_error(outputs: Predictions, pairs: Pairs, number: int) -> Terms:
    """`class_error`, logged only: wrong classes among the matched queries, `number` in the whole batch, in percent."""
    wrong = outputs.logits.float()[pairs.image, pairs.query].argmax(-1) != pairs.labels
    return {"class_error": 100 * (wrong.sum() / number)}


@torch.no_grad()
def cardinality_error(outputs: Predictions, targets: list[dict]) -> Terms:
    """`cardinality_error`, logged only: by how many the objects of an image are miscounted, in the mean."""
    if outputs.classification == "softmax":
        counted = (outputs.logits.argmax(-1) != outputs.logits.shape[-1] - 1).sum(1)
    else:
        counted = (outputs.class_scores().amax(-1) > 0.5).sum(1)
    actual = torch.tensor([len(target["labels"]) for target in targets], device=counted.device)
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
