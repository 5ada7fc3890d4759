"""Boxes against torchvision, and by hand."""

import torch
from torchvision.ops import generalized_box_iou

from detrlib.boxes import cxcywh_to_xyxy, pairwise_giou, xyxy_to_cxcywh


def test_giou_is_that_of_torchvision(random_boxes):
    first, second = cxcywh_to_xyxy(random_boxes(2, 30)), cxcywh_to_xyxy(random_boxes(2, 20))
    found = pairwise_giou(first, second)
    assert found.min() < 0 < found.max()
    for image in range(2):
        torch.testing.assert_close(found[image], generalized_box_iou(first[image], second[image]))


def test_giou_by_hand():
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    apart = torch.tensor([[2.0, 0.0, 3.0, 1.0]])  # union 2, enclosing 3
    inside = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    found = pairwise_giou(unit, torch.cat([unit, apart, inside]))
    torch.testing.assert_close(found, torch.tensor([[1.0, -1 / 3, 0.25]]))


def test_box_formats_invert_each_other(random_boxes):
    boxes = random_boxes(5)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)
    corners = cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6]))
    torch.testing.assert_close(corners, torch.tensor([0.4, 0.1, 0.6, 0.7]))
