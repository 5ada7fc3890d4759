"""One-to-one assignment of queries to ground-truth boxes.

Legend: B images, Q queries, C classes, T boxes of an image (padded to the most of the batch).
"""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detrlib.boxes import cxcywh_to_xyxy, pairwise_giou
from detrlib.models.outputs import Predictions

Match = tuple[Tensor, Tensor]  # indices of queries and of the targets they are assigned to, both [T]


class MatchingCosts(NamedTuple):
    """What counts how much when a query is assigned to a box; the defaults are DETR's."""

    cost_class: float = 1.0  # of the probability of the box's class, or of its focal cost
    cost_bbox: float = 5.0  # of the L1 distance of the boxes, in parts of the image
    cost_giou: float = 2.0  # of their generalised IoU
    focal_alpha: float = 0.25  # of the focal cost, where classes have sigmoids


def focal_class_cost(probability: Tensor, alpha: float, gamma: float = 2.0) -> Tensor:
    """What calling a query an instance of a class changes in the focal loss (Zhu et al. 2021, Appendix A.4)."""
    p = probability
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()  # added inside: 1 - 1e-8 is 1 in float32
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative


def matching_cost(outputs: Predictions, labels: Tensor, boxes: Tensor, costs: MatchingCosts) -> Tensor:
    """Cost [B,Q,T] of assigning each query to each box of its image (Carion et al. 2020, Eq. 1 and Sec. 3.1).

    labels [B,T], boxes [B,T,4] cxcywh in 0..1; costs of padded boxes mean nothing.
    """
    scores = outputs.class_scores()  # [B,Q,C]
    probability = scores.gather(2, labels[:, None].expand(-1, scores.shape[1], -1))  # [B,Q,T]
    if outputs.classification == "sigmoid":
        class_cost = focal_class_cost(probability, costs.focal_alpha)
    else:
        class_cost = -probability
    predicted = outputs.boxes.float()
    distance = torch.cdist(predicted, boxes, p=1)
    overlap = pairwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes))
    return costs.cost_class * class_cost + costs.cost_bbox * distance - costs.cost_giou * overlap


@torch.no_grad()
def match(outputs: Predictions, targets: list[dict], costs: MatchingCosts) -> list[Match]:
    """The cheapest assignment of queries to boxes in each image, by the Hungarian algorithm.

    Args:
        outputs: predictions of one layer, of which these are read:
            logits [B,Q,C], or [B,Q,C+1] with no-object last where `classification` is "softmax";
            boxes [B,Q,4] cxcywh in 0..1 of the image without its padding.
        targets: one dict for each image, of which these are read, both on the device of the outputs:
            labels [T] int64, from 0 to C - 1;
            boxes [T,4] float32 cxcywh in 0..1 of the image without its padding, of some size.
        costs: the weights of the three parts of the cost.

    Returns:
        For each image the indices of queries and of targets, in pairs, both [min(Q,T)] int64 on the device of the
        outputs: query `indices[0][i]` is to find target `indices[1][i]`. Queries are in ascending order; with more
        boxes than queries, some boxes stay unmatched.
    """
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)
    # Where predictions are not numbers any assignment will do: the loss will not be a number either, and says more.
    cost = matching_cost(outputs, labels, boxes, costs).nan_to_num().cpu().numpy()
    indices = []
    for image, target in enumerate(targets):
        queries, objects = linear_sum_assignment(cost[image, :, : len(target["labels"])])
        indices.append(tuple(torch.as_tensor(i, device=labels.device) for i in (queries, objects)))
    return indices
