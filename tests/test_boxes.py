"""Boxes against torchvision, and by hand."""

import pytest
import torch
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss

from detrlib.boxes import cxcywh_to_xyxy, giou, pairwise_giou, xyxy_to_cxcywh


def test_giou_is_that_of_torchvision(random_boxes):
    first, second = cxcywh_to_xyxy(random_boxes(2, 30)), cxcywh_to_xyxy(random_boxes(2, 20))
    overlap = pairwise_giou(first, second)
    assert overlap.min() < 0 < overlap.max()
    for image in range(2):
        torch.testing.assert_close(overlap[image], generalized_box_iou(first[image], second[image]))


def test_loss_of_boxes_of_normal_size_is_that_of_torchvision():
    """Whose 1e-7 is small beside the area of such boxes."""
    torch.manual_seed(0)
    first, second = (cxcywh_to_xyxy(torch.cat([torch.rand(200, 2), 0.2 + 0.5 * torch.rand(200, 2)], 1)) for _ in "ab")
    torch.testing.assert_close(1 - giou(first, second), generalized_box_iou_loss(first, second), rtol=0, atol=1e-5)


def test_giou_by_hand():
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    apart = torch.tensor([[2.0, 0.0, 3.0, 1.0]])  # union 2, enclosing 3
    inside = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    overlap = pairwise_giou(unit, torch.cat([unit, apart, inside]))
    torch.testing.assert_close(overlap, torch.tensor([[1.0, -1 / 3, 0.25]]))


@pytest.mark.parametrize("side", [0.5, 0.02, 0.005, 0.002, 1e-6])
def test_a_box_has_giou_one_with_itself_however_small(side):
    torch.manual_seed(0)
    boxes = cxcywh_to_xyxy(torch.cat([torch.rand(100, 2), side * (0.5 + torch.rand(100, 2))], 1))
    assert torch.equal(giou(boxes, boxes), torch.ones(100))


@pytest.mark.parametrize("side", [0.5, 0.02, 0.005, 0.002, 1e-6])
def test_gradient_is_that_of_finite_differences(side):
    """In float64. Boxes overlap, are apart, or one within the other; at a scale s the gradient is 1 / s as large."""
    torch.manual_seed(0)
    sizes = 0.5 + torch.rand(40, 4, dtype=torch.float64)
    first = torch.cat([torch.rand(40, 2, dtype=torch.float64), sizes[:, :2]], 1)
    second = torch.cat([first[:, :2] + torch.randn(40, 2, dtype=torch.float64), sizes[:, 2:]], 1)

    def loss(predicted: torch.Tensor) -> torch.Tensor:
        return 1 - giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(side * second))

    predicted = (side * first).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(predicted).sum(), predicted)
    for coordinate in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[coordinate] = 1e-6 * side
        expected = (loss(predicted + step) - loss(predicted - step)) / (2e-6 * side)
        torch.testing.assert_close(side * gradient[:, coordinate], side * expected, rtol=0, atol=1e-6)


def test_boxes_without_area_have_a_giou_and_a_gradient():
    point, other, line = [0.25, 0.5, 0.25, 0.5], [0.75, 0.5, 0.75, 0.5], [0.25, 0.5, 0.5, 0.5]
    box, tiny = [0.2, 0.3, 0.6, 0.7], [0.25, 0.5, 0.25 + 1e-30, 0.5 + 1e-30]
    boxes = torch.tensor([point, other, line, box, tiny], requires_grad=True)
    overlap = pairwise_giou(boxes, boxes)
    overlap.sum().backward()
    assert torch.isfinite(overlap).all() and torch.isfinite(boxes.grad).all()
    assert overlap[0].tolist() == pytest.approx(
        [0, 0, 0, 0, 0]
    )  # nothing around them has an area, nor do they share any
    diagonal = pairwise_giou(boxes[:1], torch.tensor([[0.75, 0.75, 0.75, 0.75]]))
    assert diagonal.item() == pytest.approx(-1)  # the smallest box around two points is empty


def test_box_formats_invert_each_other(random_boxes):
    boxes = random_boxes(5)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)
    corners = cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6]))
    torch.testing.assert_close(corners, torch.tensor([0.4, 0.1, 0.6, 0.7]))
