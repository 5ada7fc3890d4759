"""Random outputs and targets for matching and losses, and matching by brute force.

Legend: B images, Q queries, C classes, T boxes of an image.
"""

import math
from itertools import permutations

import pytest
import torch
from torchvision.ops import generalized_box_iou

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.losses import MatchingCosts
from detrlib.models import Predictions

CLASSES = 4
COSTS = MatchingCosts(cost_class=1.5, cost_bbox=4.0, cost_giou=2.5)


@pytest.fixture(scope="session")
def random_predictions(random_boxes):
    def random_predictions(batch: int, queries: int, classification: str, layers: int = 1) -> Predictions:
        classes = CLASSES + (classification == "softmax")
        made = [
            Predictions(
                torch.randn(batch, queries, classes).requires_grad_(),
                random_boxes(batch, queries).requires_grad_(),
                classification,
            )
            for _ in range(layers)
        ]
        made[-1].auxiliary = made[:-1]
        return made[-1]

    return random_predictions


@pytest.fixture(scope="session")
def random_targets(random_boxes):
    def random_targets(*counts: int) -> list[dict]:
        return [{"labels": torch.randint(CLASSES, (n,)), "boxes": random_boxes(n)} for n in counts]

    return random_targets


@pytest.fixture(scope="session")
def cost_of_pair():
    def cost_of_pair(predictions: Predictions, image: int, query: int, target: dict, index: int) -> float:
        """The matching cost of one query and one box, written out."""
        logits, label = predictions.logits[image, query].detach().double(), int(target["labels"][index])
        box, wanted = predictions.boxes[image, query].detach(), target["boxes"][index]
        if predictions.classification == "softmax":
            class_cost = -(logits.exp() / logits.exp().sum())[label].item()
        else:
            p = 1 / (1 + math.exp(-logits[label]))
            class_cost = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
        distance = sum(abs(a - b) for a, b in zip(box.tolist(), wanted.tolist(), strict=True))
        overlap = generalized_box_iou(cxcywh_to_xyxy(box)[None], cxcywh_to_xyxy(wanted)[None]).item()
        return COSTS.cost_class * class_cost + COSTS.cost_bbox * distance - COSTS.cost_giou * overlap

    return cost_of_pair


@pytest.fixture(scope="session")
def cheapest(cost_of_pair):
    def cheapest(predictions: Predictions, image: int, target: dict) -> set[tuple[int, int]]:
        """All assignments tried, the cheapest returned as pairs of query and box."""
        queries, boxes = predictions.logits.shape[1], len(target["labels"])
        costs = [[cost_of_pair(predictions, image, q, target, t) for t in range(boxes)] for q in range(queries)]
        if boxes <= queries:
            assignments = [list(zip(rows, range(boxes), strict=True)) for rows in permutations(range(queries), boxes)]
        else:
            assignments = [
                list(zip(range(queries), columns, strict=True)) for columns in permutations(range(boxes), queries)
            ]
        return set(min(assignments, key=lambda pairs: sum(costs[q][t] for q, t in pairs)))

    return cheapest
