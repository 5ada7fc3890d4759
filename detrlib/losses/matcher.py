"""One-to-one assignment of queries to ground-truth boxes.

Legend: B images, Q queries, C classes, T boxes of an image (padded to the most of the batch).
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detrlib.boxes import cxcywh_to_xyxy, pairwise_giou
from detrlib.config import Loss
from detrlib.models.outputs import Predictions

Match = tuple[Tensor, Tensor]  # indices of queries and of the targets they are assigned to, both [T]


def focal_class_cost(probability: Tensor, alpha: float, gamma: float = 2.0) -> Tensor:
    """What calling a query an instance of a class changes in the focal loss (Zhu et al. 2021, Appendix A.4)."""
    p = probability
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()  # added inside: 1 - 1e-8 is 1 in float32
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative


def matching_cost(predictions: Predictions, labels: Tensor, boxes: Tensor, costs: Loss) -> Tensor:
    """Cost [B,Q,T] of assigning each query to each box of its image (Carion et al. 2020, Eq. 1 and Sec. 3.1).

    labels [B,T], boxes [B,T,4] cxcywh in 0..1; costs of padded boxes mean nothing.
    """
    scores = predictions.class_scores()  # [B,Q,C]
    probability = scores.gather(2, labels[:, None].expand(-1, scores.shape[1], -1))  # [B,Q,T]
    if predictions.classification == "sigmoid":
        class_cost = focal_class_cost(probability, costs.focal_alpha)
    else:
        class_cost = -probability
    found = predictions.boxes.float()
    distance = torch.cdist(found, boxes, p=1)
    overlap = pairwise_giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(boxes))
    return costs.cost_class * class_cost + costs.cost_bbox * distance - costs.cost_giou * overlap


@torch.no_grad()
def match(predictions: Predictions, targets: list[dict], costs: Loss) -> list[Match]:
    """The cheapest assignment for each image, by the Hungarian algorithm.

    targets: B dicts with `labels` [T] and `boxes` [T,4] cxcywh in 0..1. Returns B pairs of index tensors on
    the device of the predictions; with more boxes than queries, some boxes stay unmatched.
    """
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    # Padded with boxes of some size: empty ones would divide by zero.
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True, padding_value=0.5)
    # Where predictions are not numbers any assignment will do: the loss will not be a number either, and says more.
    cost = matching_cost(predictions, labels, boxes, costs).nan_to_num().cpu().numpy()
    pairs = []
    for image, target in enumerate(targets):
        rows, columns = linear_sum_assignment(cost[image, :, : len(target["labels"])])
        pairs.append(tuple(torch.as_tensor(i, device=labels.device) for i in (rows, columns)))
    return pairs
