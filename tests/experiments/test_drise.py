"""D-RISE on a detector whose every number can be said beforehand: it finds BOX as far as a planted region is seen.

Legend: b images, H x W pixels, h x w cells.
"""

import numpy as np
import pytest
import torch
from torch import nn

from detrlib.errors import ConfigError
from detrlib.experiments.drise import drise, random_masks, similarity
from detrlib.models import Predictions

BOX = torch.tensor([0.3, 0.6, 0.4, 0.4])
SIZE, GRID = (48, 64), (6, 8)


class Planted(nn.Module):
    """Finds BOX with a score that is the sum of `evidence` [H,W] times the first channel, and elsewhere nothing."""

    def __init__(self, evidence):
        super().__init__()
        self.evidence, self.seen = evidence, []

    def forward(self, images, padding_mask=None):
        self.seen.append(len(images))
        height, width = images.shape[2:]
        evidence = torch.zeros(height, width)
        evidence[: SIZE[0], : SIZE[1]] = self.evidence
        score = (images[:, 0] * evidence).sum((1, 2)).clamp(1e-4, 0.999)
        scores = torch.stack([torch.stack([score, 0.1 * score], 1), torch.full((len(images), 2), 1e-3)], 1)
        boxes = torch.stack([BOX, torch.tensor([0.9, 0.1, 0.1, 0.1])]).expand(len(images), -1, -1)
        return Predictions(torch.logit(scores), boxes, "sigmoid")


def planted(rows=slice(24, 40), columns=slice(8, 24)):
    evidence = torch.zeros(SIZE)
    evidence[rows, columns] = 0.9 / evidence[rows, columns].numel()
    return Planted(evidence)


def explained(model, canvas=SIZE, **options):
    image, padding = torch.zeros(1, 3, *canvas), torch.ones(1, *canvas, dtype=torch.bool)
    image[:, :, : SIZE[0], : SIZE[1]], padding[:, : SIZE[0], : SIZE[1]] = 1.0, False
    padding = padding if padding.any() else None
    grid = tuple(-(-pixels // 8) for pixels in canvas)
    return drise(model, image, padding, model(image, padding), torch.tensor([0]), SIZE, grid, **options)[0]


def test_a_planted_region_is_recovered():
    found = explained(planted(), masks=300, cells=8)
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[3:5, 1:3] = True
    assert found[inside].min() > found[~inside].max()
    assert found.min() == 0 and found.max() > 0


def test_the_map_is_the_sum_of_the_masks_by_weight():
    """As published, but for a constant: the weights here are exact, and all masks were kept."""
    model, (count, cells) = planted(), (2000, 8)
    found = explained(model, masks=count, cells=cells, seed=3)
    masks = torch.cat(list(random_masks(count, SIZE, cells, 0.5, 3, 64)))
    weights = (masks * model.evidence).sum((1, 2)).clamp(1e-4, 0.999)
    means = masks.unflatten(2, (8, 8)).unflatten(1, (6, 8)).mean((2, 4))
    centred = torch.einsum("n,nhw->hw", weights - weights.mean(), means)
    torch.testing.assert_close(found.float(), centred - centred.min(), rtol=1e-3, atol=1e-3)
    published = torch.einsum("n,nhw->hw", weights, means)
    assert np.corrcoef(found.flatten(), published.flatten())[0, 1] > 0.95


def test_padding_batches_and_seeds():
    model = planted()
    alone = explained(model, masks=100, seed=5)
    padded = explained(model, canvas=(64, 80), masks=100, seed=5)
    torch.testing.assert_close(padded[:6, :8], alone, rtol=1e-4, atol=1e-5)
    assert (padded[6:] == 0).all() and (padded[:, 8:] == 0).all()
    torch.testing.assert_close(explained(model, masks=100, seed=5, batch_size=7), alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(explained(model, masks=100, seed=6), alone)


def test_cost_is_one_pass_for_each_mask():
    model = planted()
    explained(model, masks=70, batch_size=32)
    assert model.seen == [1, 32, 32, 6]


@pytest.mark.parametrize("size", [(48, 64), (50, 33), (7, 9)])
def test_masks_are_smooth_and_as_visible_as_asked(size):
    masks = torch.cat(list(random_masks(600, size, 4, 0.3, 0, 100)))
    assert masks.shape == (600, *size) and masks.min() >= 0 and masks.max() <= 1 + 1e-5
    assert masks.mean() == pytest.approx(0.3, abs=0.03)
    assert (masks.mean(0) - 0.3).abs().max() < 0.1  # no place is favoured; the standard error is about 0.02
    torch.testing.assert_close(torch.cat(list(random_masks(600, size, 4, 0.3, 0, 600))), masks, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classification", ["softmax", "sigmoid"])
def test_similarity_against_a_loop(classification):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4 + (classification == "softmax"), generator=generator)
    predictions = Predictions(logits, 0.3 + 0.3 * torch.rand(3, 5, 4, generator=generator), classification)
    boxes, scores = 0.3 + 0.3 * torch.rand(2, 4, generator=generator), torch.rand(2, 4, generator=generator)
    found = similarity(predictions, boxes, scores)
    for (b, n), value in np.ndenumerate(found.numpy()):
        best = 0.0
        for box, own in zip(predictions.boxes[b], predictions.class_scores()[b], strict=True):
            edges = [(c - s / 2, c + s / 2) for one in (box, boxes[n]) for c, s in zip(one[:2], one[2:], strict=True)]
            sides = [max(0, min(edges[i][1], edges[i + 2][1]) - max(edges[i][0], edges[i + 2][0])) for i in (0, 1)]
            iou = sides[0] * sides[1] / (box[2:].prod() + boxes[n][2:].prod() - sides[0] * sides[1])
            cosine = own @ scores[n] / own.norm() / scores[n].norm()
            best = max(best, (iou * cosine * (own.sum() if classification == "softmax" else own.max())).item())
        assert value == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("options", [{"masks": 0}, {"cells": 0}, {"visible": 1.0}])
def test_masks_that_cannot_be_drawn_are_refused(options):
    with pytest.raises(ConfigError, match="masks"):
        explained(planted(), **options)
