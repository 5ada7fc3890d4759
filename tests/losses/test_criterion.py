"""Losses against plain loops and torch, what is logged, and several processes.

Legend: B images, Q queries, C classes, T boxes of an image.
"""

import inspect
import math

import pytest
import torch
from torchvision.ops import generalized_box_iou

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.config import Loss
from detrlib.losses import Criterion, MatchingCosts, match
from detrlib.models import Predictions

CLASSES = 4  # of random predictions and targets
COSTS = MatchingCosts(cost_class=1.5, cost_bbox=4.0, cost_giou=2.5)  # of `cost_of_pair`


SETTINGS = {"weight_class": 0.7, "weight_bbox": 3.0, "weight_giou": 1.3, "no_object": 0.2} | COSTS._asdict()
heads = pytest.mark.parametrize("classification", ["softmax", "sigmoid"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Losses


@pytest.fixture(scope="session")
def losses_in_loops(cheapest):
    def losses_in_loops(predictions: Predictions, targets: list[dict]) -> dict[str, float]:
        """The three losses of one decoder layer, one query at a time."""
        num_boxes = max(1, sum(len(target["labels"]) for target in targets))
        sums = {"loss_class": 0.0, "loss_bbox": 0.0, "loss_giou": 0.0}
        class_weights = 0.0
        for image, target in enumerate(targets):
            box_of = dict(cheapest(predictions, image, target))
            for query, logits in enumerate(predictions.logits[image].detach().double()):
                box = box_of.get(query)
                if predictions.classification == "softmax":
                    label = CLASSES if box is None else int(target["labels"][box])
                    weight = SETTINGS["no_object"] if box is None else 1.0
                    sums["loss_class"] += weight * -math.log(logits.exp()[label] / logits.exp().sum())
                    class_weights += weight
                else:
                    for label, p in enumerate(logits.sigmoid().tolist()):
                        if box is not None and label == target["labels"][box]:
                            sums["loss_class"] += 0.25 * (1 - p) ** 2 * -math.log(p)
                        else:
                            sums["loss_class"] += 0.75 * p**2 * -math.log(1 - p)
                if box is not None:
                    predicted, wanted = predictions.boxes[image, query], target["boxes"][box]
                    sums["loss_bbox"] += (predicted - wanted).abs().sum().item()
                    corners = cxcywh_to_xyxy(predicted)[None], cxcywh_to_xyxy(wanted)[None]
                    sums["loss_giou"] += 1 - generalized_box_iou(*corners).item()
        divisor = {"loss_class": class_weights if predictions.classification == "softmax" else num_boxes}
        return {name: value / divisor.get(name, num_boxes) for name, value in sums.items()}

    return losses_in_loops


@heads
@pytest.mark.parametrize("counts", [(3, 0, 2), (1, 4, 0), (0, 0, 0)])
def test_loss_is_that_of_plain_loops(classification, counts, losses_in_loops, random_predictions, random_targets):
    predictions, targets = random_predictions(3, 5, classification, layers=3), random_targets(*counts)
    total, terms = Criterion(**SETTINGS)(predictions, targets)
    expected = losses_in_loops(predictions, targets)
    for number, layer in enumerate(predictions.auxiliary):
        expected |= {f"{name}_{number}": value for name, value in losses_in_loops(layer, targets).items()}
    assert {name: value.item() for name, value in terms.items() if name.startswith("loss")} == pytest.approx(
        expected, rel=1e-4, abs=1e-6
    )
    weights = {"loss_class": 0.7, "loss_bbox": 3.0, "loss_giou": 1.3}
    weighted = sum(value * weights["_".join(name.split("_")[:2])] for name, value in expected.items())
    assert total.item() == pytest.approx(weighted, rel=1e-4)


@heads
def test_boxes_without_a_query_cost_nothing(classification, losses_in_loops, random_predictions, random_targets):
    predictions, targets = random_predictions(2, 3, classification), random_targets(6, 2)
    _, terms = Criterion(**SETTINGS)(predictions, targets)
    expected = losses_in_loops(predictions, targets)
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)


def test_arguments_are_the_settings_and_so_are_their_defaults():
    """`Criterion(**dict(cfg.loss))` is how settings become losses."""
    arguments = inspect.signature(Criterion).parameters
    defaults = {name: own.default for name, own in arguments.items() if own.kind is own.KEYWORD_ONLY}
    assert defaults == dict(Loss())


def test_softmax_loss_is_the_weighted_mean_of_torch(random_predictions, random_targets):
    predictions = random_predictions(1, 5, "softmax")
    targets = random_targets(2)
    queries, boxes = match(predictions, targets, COSTS)[0]
    wanted = torch.full((5,), CLASSES)
    wanted[queries] = targets[0]["labels"][boxes]
    weight = torch.tensor([1.0] * CLASSES + [SETTINGS["no_object"]])
    expected = torch.nn.functional.cross_entropy(predictions.logits[0], wanted, weight)
    torch.testing.assert_close(Criterion(**SETTINGS)(predictions, targets)[1]["loss_class"], expected)


@heads
def test_auxiliary_losses_can_be_left_out(classification, random_predictions, random_targets):
    predictions, targets = random_predictions(2, 5, classification, layers=3), random_targets(2, 1)
    without = Criterion(**SETTINGS | {"auxiliary": False})
    total, terms = without(predictions, targets)
    assert {"loss_class", "loss_bbox", "loss_giou", "class_error", "cardinality_error"} == set(terms)
    total.backward()
    assert predictions.auxiliary[0].logits.grad is None
    assert predictions.logits.grad is not None


@heads
def test_every_layer_is_matched_anew(classification, random_predictions, random_targets):
    """Layers that found the same boxes in another order have the same losses."""
    last, targets = random_predictions(2, 5, classification), random_targets(3, 2)
    last.auxiliary = [Predictions(last.logits.flip(1), last.boxes.flip(1), classification)]
    _, terms = Criterion(**SETTINGS)(last, targets)
    for name in ("loss_class", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(terms[f"{name}_0"], terms[name])


@heads
def test_no_objects_at_all(classification, random_predictions, random_targets):
    predictions, targets = random_predictions(2, 5, classification), random_targets(0, 0)
    total, terms = Criterion(**SETTINGS)(predictions, targets)
    total.backward()
    assert terms["loss_bbox"] == terms["loss_giou"] == terms["class_error"] == 0
    assert torch.isfinite(predictions.logits.grad).all()
    assert predictions.logits.grad.abs().sum() > 0
    assert predictions.boxes.grad.abs().sum() == 0


@heads
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_perfect_predictions_have_no_box_loss(scale, classification, random_predictions, random_targets):
    """Exactly none, however small the boxes are."""
    targets = random_targets(3, 1)
    for target in targets:
        target["boxes"][:, 2:] *= scale
    predictions = random_predictions(2, 5, classification)
    logits, boxes = torch.full_like(predictions.logits, -20.0), predictions.boxes.detach().clone()
    if classification == "softmax":
        logits[..., -1] = 0.0
    for image, target in enumerate(targets):
        for index, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
            logits[image, 4 - index, label] = 20.0
            boxes[image, 4 - index] = box
    _, terms = Criterion(**SETTINGS)(Predictions(logits, boxes, classification), targets)
    assert terms["loss_bbox"] == terms["loss_giou"] == terms["class_error"] == terms["cardinality_error"] == 0
    assert terms["loss_class"].item() == pytest.approx(0, abs=1e-5)


def test_predictions_that_are_not_numbers_reach_the_loss(random_predictions, random_targets):
    predictions, targets = random_predictions(2, 5, "softmax"), random_targets(2, 1)
    with torch.no_grad():
        predictions.logits[0, 0] = float("nan")
    assert torch.isnan(Criterion(**SETTINGS)(predictions, targets)[0])


def test_losses_are_float32_for_bfloat16_predictions(random_predictions, random_targets):
    exact, targets = random_predictions(2, 5, "softmax"), random_targets(2, 1)
    coarse = Predictions(exact.logits.bfloat16(), exact.boxes.bfloat16())
    total, terms = Criterion(**SETTINGS)(coarse, targets)
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert total.item() == pytest.approx(Criterion(**SETTINGS)(exact, targets)[0].item(), rel=0.05)


# Several processes


@heads
def test_averaged_gradient_of_two_processes_is_that_of_the_whole_batch(
    classification, random_predictions, random_targets
):
    """Shares of unequal numbers of boxes; one process sees an image without any."""
    whole, targets = random_predictions(4, 6, classification, layers=2), random_targets(5, 1, 0, 3)
    Criterion(**SETTINGS)(whole, targets)[0].backward()
    shares = [slice(0, 2), slice(2, 4)]

    def of_process(rows: slice) -> Predictions:
        layers = [
            Predictions(
                layer.logits[rows].detach().clone().requires_grad_(),
                layer.boxes[rows].detach().clone().requires_grad_(),
                classification,
            )
            for layer in (*whole.auxiliary, whole)
        ]
        layers[-1].auxiliary = layers[:-1]
        return layers[-1]

    parts = [of_process(rows) for rows in shares]
    counted = []
    for part, rows in zip(parts, shares, strict=True):  # what each process would contribute to the average
        Criterion(lambda x: counted.append(x) or x, **SETTINGS)(part, targets[rows])
    mean = torch.stack(counted).mean(0)
    assert not torch.equal(counted[0], counted[1])
    for part, rows in zip(parts, shares, strict=True):
        Criterion(lambda _: mean, **SETTINGS)(part, targets[rows])[0].backward()
        for ours, theirs in zip((*part.auxiliary, part), (*whole.auxiliary, whole), strict=True):
            torch.testing.assert_close(ours.logits.grad / 2, theirs.logits.grad[rows])
            torch.testing.assert_close(ours.boxes.grad / 2, theirs.boxes.grad[rows])


# Parts of a batch


@heads
@pytest.mark.parametrize("counts", [(5, 1, 0, 9, 2), (0, 0, 3, 0, 0), (0, 0, 0, 0, 0)])
def test_losses_and_terms_of_the_parts_of_a_batch_add_up(classification, counts, random_predictions, random_targets):
    """Unequal parts, an image without boxes, and one with more of them than queries."""
    whole, targets = random_predictions(5, 6, classification, layers=2), random_targets(*counts)
    criterion = Criterion(**SETTINGS)
    total, terms = criterion(whole, targets)
    total.backward()
    layers = [*whole.auxiliary, whole]
    expected = [(layer.logits.grad, layer.boxes.grad) for layer in layers]
    for layer in layers:
        layer.logits.grad = layer.boxes.grad = None
    sums = dict.fromkeys(terms, 0.0) | {"total": 0.0}
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        last, auxiliary = (Predictions(p.logits[rows], p.boxes[rows], classification) for p in reversed(layers))
        last.auxiliary = [auxiliary]
        part, own = criterion(last, targets[rows], targets)
        part.backward()
        for name, value in ({"total": part} | own).items():
            sums[name] += value.item()
    assert sums == pytest.approx({name: value.item() for name, value in ({"total": total} | terms).items()}, rel=1e-5)
    for layer, gradients in zip(layers, expected, strict=True):
        torch.testing.assert_close((layer.logits.grad, layer.boxes.grad), gradients)


# What is logged


def test_class_error_and_cardinality_error_with_softmax(random_boxes, random_predictions):
    targets = [
        {"labels": torch.tensor([0, 1, 2]), "boxes": random_boxes(3)},
        {"labels": torch.tensor([3]), "boxes": random_boxes(1)},
    ]
    predictions = random_predictions(2, 5, "softmax")
    logits, boxes = torch.zeros(2, 5, CLASSES + 1), predictions.boxes.detach().clone()
    boxes[0, :3], boxes[1, 0] = targets[0]["boxes"], targets[1]["boxes"]
    calls = {(0, 0): 0, (0, 1): 3, (1, 0): 3, (1, 1): 2}  # the second is wrong, the last too many; (0, 2) none
    for image in range(2):
        for query in range(5):
            logits[image, query, calls.get((image, query), CLASSES)] = 1.0
    only_boxes = SETTINGS | {"cost_class": 0.0}
    _, terms = Criterion(**only_boxes)(Predictions(logits, boxes), targets)
    assert terms["class_error"].item() == pytest.approx(100 * 2 / 4)  # query (0, 2) says no-object
    assert terms["cardinality_error"].item() == pytest.approx((1 + 1) / 2)


def test_class_error_and_cardinality_error_with_sigmoid(random_boxes):
    targets = [{"labels": torch.tensor([0, 1]), "boxes": random_boxes(2)}]
    logits, boxes = torch.full((1, 4, CLASSES), -3.0), random_boxes(1, 4)
    boxes[0, :2] = targets[0]["boxes"]
    logits[0, 0, 0] = logits[0, 1, 2] = logits[0, 2, 3] = logits[0, 3, 3] = 2.0
    logits[0, 3, 1] = 1.0  # a second class above one half is no second object
    only_boxes = SETTINGS | {"cost_class": 0.0}
    _, terms = Criterion(**only_boxes)(Predictions(logits, boxes, "sigmoid"), targets)
    assert terms["class_error"].item() == pytest.approx(50)
    assert terms["cardinality_error"].item() == pytest.approx(2)
