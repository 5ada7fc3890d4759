"""The set losses of DETR, with softmax or sigmoid classification, and what a scoring network of tokens learns from.

Legend: B images, Q queries, C classes, T boxes of an image, N boxes of the batch, S tokens of all levels.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.config import Loss
from detrlib.losses.matcher import match
from detrlib.models.outputs import Predictions, Tokens

LOSSES = ("loss_class", "loss_bbox", "loss_giou")


class Criterion(nn.Module):
    """Match every decoder layer's predictions to the targets and sum three weighted losses over the layers.

    So too the predictions of the encoder, where there are any, and the loss of its scoring network.

    mean_over_processes: averages a tensor over the processes of a distributed run. Losses are divided by
    averages over processes because DDP averages gradients: together the gradient is that of one big batch.
    """

    def __init__(self, settings: Loss, mean_over_processes: Callable[[Tensor], Tensor] = lambda x: x):
        super().__init__()
        self.settings = settings
        self.mean_over_processes = mean_over_processes
        self.weights = dict(
            zip(LOSSES, (settings.weight_class, settings.weight_bbox, settings.weight_giou), strict=True)
        )

    def forward(self, predictions: Predictions, targets: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss and everything worth logging, unweighted.

        targets: B dicts with `labels` [T] and `boxes` [T,4] cxcywh in 0..1. Names of auxiliary losses end
        in the number of their decoder layer, those of the last layer have no suffix; losses of the proposals end in
        `_enc`, those of encoder layers before the last in `_enc_` and their number.
        """
        divisors = self._divisors(predictions, targets)
        terms = self._layer_losses(predictions, targets, divisors, log=True)
        total = sum(weight * terms[name] for name, weight in self.weights.items())
        for place, layer in self._other_layers(predictions):
            losses = self._layer_losses(layer, targets, divisors, log=False)
            total = total + sum(weight * losses[name] for name, weight in self.weights.items())
            terms |= {f"{name}_{place}": value for name, value in losses.items()}
        if predictions.tokens is not None:
            terms |= token_losses(predictions.tokens)
            total = total + self.settings.weight_mask * terms["loss_mask"]
        if predictions.polled is not None:  # keeps scores low but of cells that need one (Wang et al. 2021)
            terms["loss_poll"] = predictions.polled.mean_score().mean()
            total = total + self.settings.weight_poll * terms["loss_poll"]
        return total, terms

    def _other_layers(self, predictions: Predictions) -> Iterator[tuple[str, Predictions]]:
        """All but the last decoder layer that learns from the same targets, with the end of its losses' names."""
        if self.settings.auxiliary:
            yield from ((str(number), layer) for number, layer in enumerate(predictions.auxiliary))
        if predictions.proposals is not None:
            yield "enc", predictions.proposals
        yield from ((f"enc_{number}", layer) for number, layer in enumerate(predictions.encoder_auxiliary))

    def counts(self, predictions: Predictions, targets: list[dict]) -> dict[str, float]:
        """What each loss of `forward` was divided by, to put batches of different content together."""
        boxes, class_weight = (value.item() for value in self._divisors(predictions, targets))
        classes = class_weight if predictions.classification == "softmax" else boxes
        return {"loss_class": classes, "loss_bbox": boxes, "loss_giou": boxes, "class_error": boxes}

    def _divisors(self, predictions: Predictions, targets: list[dict]) -> tuple[Tensor, Tensor]:
        """Mean number of boxes, and mean sum of class weights, per process."""
        batch, queries, _ = predictions.logits.shape
        boxes = sum(len(target["labels"]) for target in targets)
        matched = sum(min(len(target["labels"]), queries) for target in targets)
        class_weight = matched + self.settings.no_object * (batch * queries - matched)
        both = predictions.logits.new_tensor([float(boxes), class_weight], dtype=torch.float32)
        boxes, class_weight = self.mean_over_processes(both).unbind()
        return torch.where(boxes > 0, boxes, 1.0), class_weight

    def _layer_losses(
        self, predictions: Predictions, targets: list[dict], divisors: tuple[Tensor, Tensor], log: bool
    ) -> dict[str, Tensor]:
        num_boxes, class_weight = divisors
        if predictions.any_object:
            targets = [target | {"labels": torch.zeros_like(target["labels"])} for target in targets]
        pairs = match(predictions, targets, self.settings)
        logits = predictions.logits.float()  # [B,Q,C] or [B,Q,C+1]
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)])  # [N]
        query = torch.cat([query for query, _ in pairs])
        labels = torch.cat([target["labels"][index] for target, (_, index) in zip(targets, pairs, strict=True)])
        wanted = torch.cat([target["boxes"][index] for target, (_, index) in zip(targets, pairs, strict=True)])
        if predictions.classification == "softmax":
            loss_class = self._cross_entropy(logits, image, query, labels) / class_weight
        else:
            loss_class = self._focal(logits, image, query, labels) / num_boxes
        boxes = predictions.boxes.float()[image, query]  # [N,4]
        giou = generalized_box_iou_loss(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted), reduction="sum")
        losses = {
            "loss_class": loss_class,
            "loss_bbox": F.l1_loss(boxes, wanted, reduction="sum") / num_boxes,
            "loss_giou": giou / num_boxes,
        }
        if log:
            losses |= _logged_only(predictions, logits[image, query], labels, targets)
        return losses

    def _cross_entropy(self, logits: Tensor, image: Tensor, query: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy over all B x Q queries; unmatched ones are no-object, at their own weight."""
        no_object = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:2], no_object, device=logits.device)  # [B,Q]
        wanted[image, query] = labels
        weight = torch.ones(no_object + 1, device=logits.device)
        weight[no_object] = self.settings.no_object
        return F.cross_entropy(logits.transpose(1, 2), wanted, weight, reduction="sum")

    def _focal(self, logits: Tensor, image: Tensor, query: Tensor, labels: Tensor) -> Tensor:
        """Summed focal loss over all queries and classes (Lin et al. 2017, Eq. 5)."""
        wanted = torch.zeros_like(logits)
        wanted[image, query, labels] = 1.0
        return sigmoid_focal_loss(logits, wanted, alpha=self.settings.focal_alpha, reduction="sum")


@torch.no_grad()
def _logged_only(
    predictions: Predictions, matched_logits: Tensor, labels: Tensor, targets: list[dict]
) -> dict[str, Tensor]:
    """`class_error`: wrong classes among matched queries, percent. `cardinality_error`: mean miscount of objects."""
    wrong = (matched_logits.argmax(-1) != labels).float()
    if predictions.classification == "softmax":
        found = (predictions.logits.argmax(-1) != predictions.logits.shape[-1] - 1).sum(1)
    else:
        found = (predictions.class_scores().amax(-1) > 0.5).sum(1)
    actual = torch.tensor([len(target["labels"]) for target in targets], device=found.device)
    return {
        "class_error": 100 * wrong.mean() if len(wrong) else wrong.sum(),
        "cardinality_error": (found - actual).abs().float().mean(),
    }


def token_losses(tokens: Tokens) -> dict[str, Tensor]:
    """`loss_mask`: does the scoring network find the tokens the decoder looks at most (Roh et al. 2022, Eq. 5)?

    Binary cross-entropy against the best tokens of the decoder attention map, as many as the image keeps: mean over
    its valid tokens, then over images. (The official code takes the mean over the padding of the batch as well.)
    Logged only: `dam_correlation`, share of the decoder attention map on kept tokens, and that of every level.
    """
    attended = tokens.decoder_map()  # [B,S]
    valid = torch.ones_like(tokens.kept) if tokens.padding is None else ~tokens.padding
    number = tokens.kept.sum(1, keepdim=True)  # [B,1]
    best = attended.masked_fill(~valid, -1.0).topk(int(number.max()), dim=1).indices
    among_best = (torch.arange(best.shape[1], device=best.device) < number).to(tokens.logits.dtype)
    wanted = torch.zeros_like(tokens.logits).scatter(1, best, among_best)
    entropy = F.binary_cross_entropy_with_logits(tokens.logits, wanted, reduction="none")
    losses = {"loss_mask": ((entropy * valid).sum(1) / valid.sum(1)).mean()}
    sizes = [h * w for h, w in tokens.shapes]
    parts = [(attended, tokens.kept), *zip(attended.split(sizes, 1), tokens.kept.split(sizes, 1), strict=True)]
    shares = [((amount * kept).sum(1) / amount.sum(1).clamp(min=1e-8)).mean() for amount, kept in parts]
    names = ["dam_correlation", *(f"dam_correlation_level_{level}" for level in range(len(sizes)))]
    return losses | dict(zip(names, shares, strict=True))
