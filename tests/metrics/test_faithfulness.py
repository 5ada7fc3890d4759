"""Deletion and insertion curves: against a detector whose every number can be said beforehand.

Legend: n explanations, h x w cells, H x W pixels, P pixels of the image, S steps.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.errors import ConfigError
from detrlib.metrics.faithfulness import (
    Curves,
    best_match,
    faithfulness_curves,
    gains,
    image_means,
    mean_curves,
    mean_interval,
    pixel_ranks,
    replacement_image,
)
from detrlib.models import Predictions

BOX = torch.tensor([0.5, 0.5, 0.4, 0.4])


class Additive(nn.Module):
    """Finds BOX with a score that is the sum of `evidence` [H,W] times the first channel, and elsewhere nothing."""

    def __init__(self, evidence: torch.Tensor):
        super().__init__()
        self.evidence, self.seen = evidence, []

    def forward(self, images, padding_mask):
        self.seen.append(len(images))
        seen = images[:, 0] * self.evidence
        if padding_mask is not None:
            assert images.shape[0] == padding_mask.shape[0]
            seen = seen.masked_fill(padding_mask, 0.0)
        score = seen.sum((1, 2))
        scores = torch.stack([score, 0.5 * score], 1)[:, :, None].expand(-1, -1, 3).double()  # [B,2,3]
        boxes = torch.stack([BOX, torch.tensor([0.2, 0.2, 0.1, 0.1])]).expand(len(images), -1, -1)
        return Predictions(torch.logit(scores), boxes, "sigmoid")


def case(height=12, width=16, canvas=(16, 16), seed=0):
    """An image whose replacement is black, evidence by cells of 4 pixels that sums to 0.9, and padding."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.ones(canvas, dtype=torch.bool)
    padding[:height, :width] = False
    cells = torch.rand(canvas[0] // 4, canvas[1] // 4, generator=generator, dtype=torch.float64)
    evidence = cells.repeat_interleave(4, 0).repeat_interleave(4, 1).masked_fill(padding, 0.0)
    scale = 0.9 / evidence.sum()
    image = torch.zeros(3, *canvas, dtype=torch.float64)
    image[0, :height, :width] = 1.0
    return image, padding, cells * scale, evidence * scale


def curves_of(maps, image, padding, evidence, steps=8, replacement="mean", **settings):
    model = Additive(evidence)
    ranks = pixel_ranks(maps, padding, **settings)
    boxes, labels = BOX.expand(len(maps), 4), torch.full((len(maps),), 1)
    return faithfulness_curves(model, image, padding, boxes, labels, ranks, steps, replacement, batch_size=5), model


@pytest.fixture
def black(monkeypatch):
    """Deleted pixels are black: the additive detector's score of a picture is the evidence left in it."""
    monkeypatch.setattr("detrlib.metrics.faithfulness.replacement_image", lambda image, *_: torch.zeros_like(image))


# Orders


@pytest.mark.parametrize("unit", ["cell", "pixel"])
def test_ranks_are_an_order_of_the_pixels_of_the_image(unit):
    _, padding, cells, _ = case(height=10, width=13)
    ranks = pixel_ranks(torch.stack([cells, cells.flip(0)]), padding, unit)
    for own in ranks:
        assert own[~padding].sort().values.tolist() == list(range(130))
        assert (own[padding] == 130).all()


def test_cells_go_one_after_another_and_whole():
    _, padding, cells, _ = case(canvas=(16, 16), height=16)
    (ranks,) = pixel_ranks(cells[None], padding)
    by_cell = ranks.view(4, 4, 4, 4).transpose(1, 2).flatten(2)  # [4,4,16]
    first = by_cell.amin(-1)
    assert torch.equal(by_cell.amax(-1), first + 15)
    assert torch.equal((first // 16).flatten().argsort(), cells.flatten().argsort(descending=True))


def test_pixels_follow_the_interpolated_map():
    _, padding, cells, _ = case(canvas=(16, 16), height=16)
    (ranks,) = pixel_ranks(cells[None], padding, "pixel")
    places = (np.arange(16) + 0.5) / 4 - 0.5
    expected = np.array(
        [
            [np.interp(x, range(4), [np.interp(y, range(4), cells[:, j]) for j in range(4)]) for x in places]
            for y in places
        ]
    )
    sorted_values = expected.ravel()[ranks.flatten().argsort().numpy()]
    assert (np.diff(sorted_values) <= 1e-6).all() and np.diff(sorted_values).min() < -1e-4


@pytest.mark.parametrize("unit", ["cell", "pixel"])
def test_padding_and_batches_do_not_change_the_order(unit):
    _, alone, cells, _ = case(height=12, width=12, canvas=(12, 12))
    together = torch.ones(20, 16, dtype=torch.bool)
    together[:12, :12] = False
    larger = torch.full((5, 4), 9.0, dtype=torch.float64)
    larger[:3, :3] = cells
    own = pixel_ranks(cells[None], alone, unit, seed=3)
    assert torch.equal(pixel_ranks(larger[None], together, unit, seed=3)[:, :12, :12], own)


def test_only_the_order_of_weights_matters():
    _, padding, cells, _ = case()
    for changed in (cells**3, cells.exp() * 100, cells * 1e-3):
        assert torch.equal(pixel_ranks(changed[None], padding), pixel_ranks(cells[None], padding))


@pytest.mark.parametrize("unit", ["cell", "pixel"])
def test_equal_weights_come_in_a_drawn_order(unit):
    padding = torch.zeros(32, 32, dtype=torch.bool)
    maps = torch.zeros(400, 8, 8)
    maps[:, 2, 3] = 0.5
    ranks = pixel_ranks(maps, padding, unit, seed=1).double()
    assert torch.equal(pixel_ranks(maps, padding, unit, seed=1).double(), ranks)
    assert not torch.equal(pixel_ranks(maps, padding, unit, seed=2).double(), ranks)
    centre = ranks[:, 8:12, 12:16]
    assert (centre < (16 if unit == "cell" else 200)).all()
    corners = torch.stack([ranks[:, :4, :4], ranks[:, -4:, -4:], ranks[:, :4, -4:]]).mean((1, 2, 3))
    assert (corners - 520).abs().max() < 60  # no corner is favoured; the standard error is about 15


def test_wrong_units_and_replacements_are_refused():
    image, padding, cells, evidence = case()
    with pytest.raises(ConfigError, match="unit 'patch' must be one of cell, pixel"):
        pixel_ranks(cells[None], padding, "patch")
    with pytest.raises(ConfigError, match="replacement 'noise' must be one of mean, blur"):
        replacement_image(image, padding, "noise")
    with pytest.raises(ConfigError, match="steps 0"):
        curves_of(cells[None], image, padding, evidence, steps=0)


# Replacements


@pytest.mark.parametrize("kind", ["mean", "blur"])
def test_replacements_keep_padding_and_lose_detail(kind):
    generator = torch.Generator().manual_seed(0)
    padding = torch.ones(40, 64, dtype=torch.bool)
    padding[:37, :50] = False
    image = torch.randn(3, 40, 64, generator=generator).masked_fill(padding, 0.0)
    found = replacement_image(image, padding, kind)
    assert torch.equal(found[:, padding], image[:, padding])
    inside = found[:, :37, :50]
    assert inside.std((1, 2)).max() < 0.15  # of noise with 1
    torch.testing.assert_close(inside.mean((1, 2)), image[:, :37, :50].mean((1, 2)), atol=0.03, rtol=0)
    alone = replacement_image(image[:, :37, :50], padding[:37, :50], kind)
    torch.testing.assert_close(alone, inside)


# The best match


def test_best_match_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    boxes = 0.2 + 0.5 * torch.rand(6, 9, 4, generator=generator)
    wanted, labels = 0.2 + 0.5 * torch.rand(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])
    for classification, classes in (("sigmoid", 4), ("softmax", 5)):
        predictions = Predictions(torch.randn(6, 9, classes, generator=generator), boxes, classification)
        found = best_match(predictions, wanted, labels)
        for i in range(6):
            best = (-1.0, 0.0, 0.0)
            for q in range(9):
                one = [cxcywh_to_xyxy(box)[None] for box in (boxes[i, q], wanted[i])]
                iou = box_iou(*one).item()
                score = predictions.class_scores()[i, q, labels[i]].item()
                best = max(best, (score * iou, score, iou))
            assert found[i].tolist() == pytest.approx([best[1], best[2], best[0]], abs=1e-6)


# Curves


@pytest.mark.parametrize("height", [16, 12])
@pytest.mark.parametrize("steps", [2, 8, 9])
def test_curves_against_sums_of_the_evidence(black, height, steps):
    image, padding, cells, evidence = case(height=height)
    maps = torch.stack([cells, cells.flip(0), torch.rand(4, 4)])
    found, _ = curves_of(maps, image, padding, evidence, steps, seed=4)
    ranks = pixel_ranks(maps, padding, seed=4)
    assert torch.equal(found.fractions, torch.linspace(0, 1, steps + 1) ** 2)
    for own, deletion, insertion in zip(ranks, found.deletion, found.insertion, strict=True):
        order = own.flatten().argsort()[: height * 16]
        for step in range(steps + 1):
            gone = order[: round(height * 16 * (step / steps) ** 2)]
            inside = evidence.flatten()[gone].sum().item()
            for curve, expected in ((deletion, 0.9 - inside), (insertion, inside)):
                assert curve[step].tolist() == pytest.approx([expected, 1.0, expected], abs=1e-6)


def test_curves_begin_and_end_at_the_image_and_its_replacement():
    image, padding, cells, evidence = case()
    image[0, :4, :8] = 0.2  # evidence is uneven: the mean colour gives another score
    found, model = curves_of(torch.stack([cells, -cells]), image, padding, evidence, steps=7)
    other = replacement_image(image, padding)
    full, empty = model(torch.stack([image, other]), padding.expand(2, -1, -1)).class_scores()[:, 0, 1].tolist()
    assert full != pytest.approx(empty, abs=1e-4)
    for curve, ends in ((found.deletion, (full, empty)), (found.insertion, (empty, full))):
        for own in curve[..., 0]:
            assert (own[0].item(), own[-1].item()) == pytest.approx(ends, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 64])
def test_cost_is_what_the_model_saw_whatever_the_batch(black, batch):
    image, padding, cells, evidence = case()
    maps, boxes, labels = cells.expand(3, -1, -1), BOX.expand(3, 4), torch.tensor([0, 1, 2])
    ranks = pixel_ranks(maps, padding)
    model = Additive(evidence)
    found = faithfulness_curves(model, image, padding, boxes, labels, ranks, 6, batch_size=batch)
    assert found.passes == sum(model.seen) == 2 + 2 * 3 * 5
    assert max(model.seen) <= max(batch, 2)
    torch.testing.assert_close(found.deletion, curves_of(maps, image, padding, evidence, 6)[0].deletion)


def test_the_ideal_order_beats_every_other(black):
    image, padding, cells, evidence = case(height=16)
    generator = torch.Generator().manual_seed(5)
    others = torch.rand(40, 4, 4, generator=generator, dtype=torch.float64)
    found, _ = curves_of(torch.cat([cells[None], others, -cells[None]]), image, padding, evidence)
    deletion, insertion = (area[:, 2] for area in found.areas())
    assert (deletion[0] < deletion[1:] - 1e-3).all() and (insertion[0] > insertion[1:] + 1e-3).all()
    assert (deletion[-1] > deletion[:-1] + 1e-3).all() and (insertion[-1] < insertion[:-1] - 1e-3).all()
    # What is deleted and what is inserted make up the whole, at every step.
    torch.testing.assert_close(found.deletion[..., 0] + found.insertion[..., 0], torch.full((42, 9), 0.9))


def test_areas_of_constants_and_of_lines():
    fractions = torch.tensor([0.0, 0.1, 0.15, 0.6, 1.0])
    constant = torch.full((2, 5, 3), 0.7)
    line = fractions[None, :, None].expand(2, -1, 3)
    deletion, insertion = Curves(fractions, constant, line, 0).areas()
    torch.testing.assert_close(deletion, torch.full((2, 3), 0.7))
    torch.testing.assert_close(insertion, torch.full((2, 3), 0.5))


# Means


def test_mean_curves_are_means_over_images_with_their_errors():
    values = torch.rand(5, 2, 3, 4, 3, generator=torch.Generator().manual_seed(0))
    fractions = torch.linspace(0, 1, 4) ** 2
    frame = mean_curves(values, ["raw", "box", "random"], fractions)
    assert len(frame) == 2 * 3 * 4 * 3 and (frame["images"] == 5).all()
    row = frame[
        (frame["method"] == "box")
        & (frame["direction"] == "insertion")
        & (frame["measure"] == "iou")
        & np.isclose(frame["fraction"], 4 / 9)
    ]
    own = values[:, 1, 1, 2, 1].numpy()
    assert row["mean"].item() == pytest.approx(own.mean())
    assert row["standard_error"].item() == pytest.approx(own.std(ddof=1) / 5**0.5)
    assert mean_curves(values[:1], ["raw", "box", "random"], fractions)["standard_error"].isna().all()


def areas(shift=0.0):
    rows = [
        {"image_id": i, "method": m, "deletion_similarity": d + shift, "insertion_similarity": 1 - d}
        for m, step in (("raw", 0.1), ("box", 0.2))
        for i, d in ((1, step), (1, 3 * step), (2, 2 * step), (3, step))
    ]
    return pd.DataFrame(rows)


def test_image_means_count_an_image_once():
    found = image_means(areas()[lambda frame: frame["method"] == "raw"])
    assert found["deletion"].tolist() == pytest.approx([0.2, 0.2, 0.1])
    assert found["insertion"].tolist() == pytest.approx([0.8, 0.8, 0.9])


def test_gains_are_over_references_on_the_same_images():
    frame = areas()
    table = gains(frame).set_index("metric")
    assert list(table.index) == ["deletion gain", "insertion gain"]
    one = table.loc["deletion gain"]
    assert (one["first"], one["second"], one["images"]) == ("raw", "box", 3)
    assert one["difference"] == pytest.approx(0.5 / 3)  # raw has 0.2, 0.2, 0.1 and the box twice that: lower is better
    assert one["low"] < one["difference"] < one["high"] and one["p"] > 0.05
    other = gains(frame, references=("raw", "box")).set_index("metric").loc["insertion gain"]
    assert (other["first"], other["second"]) == ("box", "raw")
    assert other["difference"] == pytest.approx(-0.5 / 3) and other["verdict"] == "not established"
    assert gains(frame, references=("relevance",)).empty
    assert gains(frame[frame["image_id"] == 1]).empty


def test_two_references_are_one_test_of_holms():
    third = areas(0.05)[lambda frame: frame["method"] == "raw"].assign(method="odam")
    table = gains(pd.concat([areas(), third]))
    for _, rows in table.groupby("metric"):
        assert [*zip(rows["first"], rows["second"], strict=True)] == [("raw", "box"), ("odam", "box"), ("odam", "raw")]
        assert rows["p_adjusted"].min() == pytest.approx(min(1, 3 * rows["p"].min()))


def test_intervals_of_means_are_those_of_resampled_images():
    values = pd.Series(np.random.default_rng(0).normal(0.5, 0.1, 40))
    low, high = mean_interval(values)
    error = values.sem()
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.3 * error)
    assert np.isnan(mean_interval(values[:1])).all()
