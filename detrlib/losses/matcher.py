"""One-to-one assignment of queries to ground-truth boxes.

Legend: L layers of one shape, B images, Q queries, C classes, T boxes of an image (padded to the most of the batch).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detrlib.boxes import cxcywh_to_xyxy, pairwise_giou
from detrlib.models.outputs import Predictions

Match = tuple[Tensor, Tensor]  # indices of queries and of the targets they are assigned to, both [T]
Assigned = list[tuple[np.ndarray, np.ndarray]]  # the same on the CPU, of every image of every layer


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
    """Cost [...,B,Q,T] of assigning each query to each box of its image (Carion et al. 2020, Eq. 1 and Sec. 3.1).

    Outputs are of one layer, or of several [L,B,Q,...]; labels [B,T], boxes [B,T,4] cxcywh in 0..1; costs of padded
    boxes mean nothing.
    """
    scores = outputs.class_scores()  # [...,B,Q,C]
    if outputs.any_object:
        labels = torch.zeros_like(labels)
    probability = scores.gather(-1, labels[:, None].expand(*scores.shape[:-1], -1))  # [...,B,Q,T]
    if outputs.classification == "sigmoid":
        class_cost = focal_class_cost(probability, costs.focal_alpha)
    else:
        class_cost = -probability
    predicted = outputs.boxes.float()
    distance = torch.cdist(predicted, boxes, p=1)
    overlap = pairwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes))
    return costs.cost_class * class_cost + costs.cost_bbox * distance - costs.cost_giou * overlap


@torch.no_grad()
def start_matching(
    stacks: Sequence[Predictions], targets: list[dict], costs: MatchingCosts
) -> Callable[[], list[Assigned]]:
    """Send the costs of all layers to the CPU in one copy; what is returned waits for them and assigns, as in `match`.

    Whatever a GPU is given to do between the two, it does while the CPU assigns: this is the one time in a training
    step that the CPU waits for it. `stacks` hold outputs [L,B,Q,...] of layers that have the same shape.
    """
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)
    parts = [matching_cost(outputs, labels, boxes, costs) for outputs in stacks]  # [L,B,Q,T] each
    # Where predictions are not numbers any assignment will do: the loss will not be a number either, and says more.
    sent = torch.cat([part.flatten() for part in parts]).nan_to_num().to("cpu", non_blocking=labels.is_cuda)
    arrival = torch.cuda.current_stream(labels.device).record_event() if labels.is_cuda else None

    def assign() -> list[Assigned]:
        if arrival is not None:
            arrival.synchronize()
        arrived = sent.split([part.numel() for part in parts])
        return [
            _assigned(values.view(part.shape).numpy(), targets) for values, part in zip(arrived, parts, strict=True)
        ]

    return assign


def _assigned(cost: np.ndarray, targets: list[dict]) -> Assigned:
    """The Hungarian algorithm on cost [L,B,Q,T], layer by layer and image by image."""
    counts = [len(target["labels"]) for target in targets]
    return [linear_sum_assignment(own[:, :count]) for layer in cost for own, count in zip(layer, counts, strict=True)]


def on_device(numbers: Sequence | np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the CPU as a tensor that a GPU fetches when it gets there, without anyone waiting for it."""
    tensor = torch.as_tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def match(outputs: Predictions, targets: list[dict], costs: MatchingCosts) -> list[Match]:
    """The cheapest assignment of queries to boxes in each image, by the Hungarian algorithm.

    Args:
        outputs: predictions of one layer, of which these are read:
            logits [B,Q,C], or [B,Q,C+1] with no-object last where `classification` is "softmax";
            boxes [B,Q,4] cxcywh in 0..1 of the image without its padding;
            any_object: all objects count as of class 0.
        targets: one dict for each image, of which these are read, both on the device of the outputs:
            labels [T] int64, from 0 to C - 1;
            boxes [T,4] float32 cxcywh in 0..1 of the image without its padding, of some size.
        costs: the weights of the three parts of the cost.

    Returns:
        For each image the indices of queries and of targets, in pairs, both [min(Q,T)] int64 on the device of the
        outputs: query `indices[0][i]` is to find target `indices[1][i]`. Queries are in ascending order; with more
        boxes than queries, some boxes stay unmatched.
    """
    layer = Predictions(
        outputs.logits[None], outputs.boxes[None], outputs.classification, any_object=outputs.any_object
    )
    (assigned,) = start_matching([layer], targets, costs)()
    counts = [len(queries) for queries, _ in assigned]
    both = on_device(np.concatenate(assigned, axis=1), outputs.boxes.device)  # [2, pairs of all images]
    return list(zip(both[0].split(counts), both[1].split(counts), strict=True))
