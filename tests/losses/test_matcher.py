"""Matching against brute force and torchvision."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from detrlib.losses import MatchingCosts
from detrlib.losses.matcher import focal_class_cost, match, matching_cost, start_matching
from detrlib.models import Predictions

COSTS = MatchingCosts(cost_class=1.5, cost_bbox=4.0, cost_giou=2.5)  # of `cost_of_pair`


heads = pytest.mark.parametrize("classification", ["softmax", "sigmoid"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def as_pairs(matched: tuple[torch.Tensor, torch.Tensor]) -> set[tuple[int, int]]:
    queries, boxes = matched
    return set(zip(queries.tolist(), boxes.tolist(), strict=True))


@heads
@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_cheapest_of_all_assignments(
    classification, seed, cheapest, random_predictions, random_targets
):
    torch.manual_seed(seed)
    predictions, targets = random_predictions(4, 5, classification), random_targets(3, 0, 5, 1)
    indices = match(predictions, targets, COSTS)
    assert [as_pairs(both) for both in indices] == [cheapest(predictions, i, t) for i, t in enumerate(targets)]
    assert all(side.dtype == torch.int64 for both in indices for side in both)


@heads
def test_more_boxes_than_queries(classification, cheapest, random_predictions, random_targets):
    predictions, targets = random_predictions(2, 3, classification), random_targets(6, 2)
    indices = match(predictions, targets, COSTS)
    assert [as_pairs(both) for both in indices] == [cheapest(predictions, i, t) for i, t in enumerate(targets)]
    assert [len(queries) for queries, _ in indices] == [3, 2]


@heads
def test_costs_of_an_image_do_not_depend_on_its_batch(classification, cost_of_pair, random_predictions, random_targets):
    predictions, targets = random_predictions(3, 5, classification), random_targets(2, 4, 1)
    together = match(predictions, targets, COSTS)
    for image, target in enumerate(targets):
        rows = slice(image, image + 1)
        alone = Predictions(predictions.logits[rows], predictions.boxes[rows], classification)
        assert as_pairs(match(alone, [target], COSTS)[0]) == as_pairs(together[image])
        cost = matching_cost(alone, target["labels"][None], target["boxes"][None], COSTS)[0]
        expected = [[cost_of_pair(alone, 0, q, target, t) for t in range(len(target["labels"]))] for q in range(5)]
        torch.testing.assert_close(cost, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@heads
def test_layers_are_matched_together_as_one_by_one(classification, random_predictions, random_targets):
    """Stacks of different numbers of queries too, and one whose class 0 stands for all."""
    targets = random_targets(2, 0, 9)
    stacks = [random_predictions(2 * 3, queries, classification) for queries in (5, 7)]
    for stack in stacks:
        stack.logits, stack.boxes = (values.unflatten(0, (2, 3)) for values in (stack.logits, stack.boxes))
    stacks[1].any_object = True
    for stack, assigned in zip(stacks, start_matching(stacks, targets, COSTS)(), strict=True):
        assert len(assigned) == 6
        for number in range(2):
            layer = Predictions(stack.logits[number], stack.boxes[number], classification, any_object=stack.any_object)
            together = [set(zip(*map(list, pairs), strict=True)) for pairs in assigned[3 * number : 3 * number + 3]]
            assert together == [as_pairs(pairs) for pairs in match(layer, targets, COSTS)]


def test_focal_cost_is_the_change_of_the_focal_loss():
    logits = torch.linspace(-6, 6, 25)
    positive, negative = (
        sigmoid_focal_loss(logits, torch.full_like(logits, wanted), alpha=0.3, gamma=2.0) for wanted in (1.0, 0.0)
    )
    torch.testing.assert_close(focal_class_cost(logits.sigmoid(), 0.3), positive - negative, rtol=1e-4, atol=1e-5)


def test_focal_cost_is_finite_at_certainty():
    assert torch.isfinite(focal_class_cost(torch.tensor([0.0, 1.0]), 0.25)).all()
