"""Signs of a collapse: they show where a model gives the same boxes everywhere, and not where it finds objects."""

import pytest
import torch
from accelerate import Accelerator

from detrlib.data import build_dataset
from detrlib.engine.evaluate import evaluate
from detrlib.engine.start import initial_model
from detrlib.metrics.collapse import FEWEST, BestDetections, signs_of_collapse, symptoms
from detrlib.models import Predictions


def results(ap=0.4, floor=0.2, detections=0.3, images=40, attention=(2.0, 5.0), pairs=40):
    """As results.json holds them."""
    located = {"all": {"pairs": pairs, "paibb_normalised": {"mean": list(attention)}}}
    entropy = {"decoder_cross": {"matched": {"entropy": {"mean": [0.5] * len(attention)}}}}
    spread = {"images": images, "detections": detections, "objects": 0.3}
    return {"detection": {"AP": ap}, "floor": {"AP": floor, "images": images}} | {
        "spread": spread,
        "localisation": located,
        "sparsity": entropy,
    }


@pytest.fixture
def spread_of(random_boxes):
    def spread_of(follow, images=30, queries=4):
        """The summary of detections of which the best is the second object of each image to the share `follow`."""
        torch.manual_seed(0)
        objects, best = random_boxes(images, 3), BestDetections()
        boxes = torch.rand(queries, 4).expand(images, queries, 4).clone()
        boxes[:, 1] = follow * objects[:, 1] + (1 - follow) * torch.tensor([0.5, 0.5, 0.3, 0.3])
        logits = torch.full((images, queries, 2), -2.0)
        logits[:, 1, 0] = 1.0
        for part in (slice(0, 20), slice(20, images)):
            targets = [{"boxes": of_image} for of_image in objects[part]]
            best.add(Predictions(logits[part], boxes[part], "sigmoid"), targets)
        return best.summary(), objects[:, 1]

    return spread_of


def test_spread_of_the_best_detection_and_of_the_object_below(spread_of):
    summary, objects = spread_of(follow=1.0)
    expected = objects.var(0).sum().sqrt().item()
    assert summary == {"images": 30, "detections": pytest.approx(expected), "objects": pytest.approx(expected)}
    assert not signs_of_collapse({"spread": summary})
    fixed, _ = spread_of(follow=0.0)
    assert fixed["detections"] == pytest.approx(0, abs=1e-6) and fixed["objects"] > 0.1
    assert list(signs_of_collapse({"spread": fixed})) == ["box"]
    assert list(signs_of_collapse({"spread": spread_of(follow=0.1)[0]})) == ["box"]


def test_images_without_objects_do_not_count():
    best = BestDetections()
    empty = {"boxes": torch.zeros(0, 4)}
    best.add(Predictions(torch.zeros(2, 3, 2), torch.rand(2, 3, 4)), [empty, empty])
    assert best.summary() == {"images": 0, "detections": 0.0, "objects": 0.0}
    best.add(Predictions(torch.zeros(2, 3, 2), torch.rand(2, 3, 4)), [empty, {"boxes": torch.rand(2, 4)}])
    assert best.summary()["images"] == 1
    assert not signs_of_collapse({"spread": best.summary()})


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"ap": 0.2}, ["AP"]),
        ({"detections": 0.07}, ["box"]),
        ({"detections": 0.08}, []),
        ({"attention": (0.9, 1.0)}, ["attention"]),
        ({"attention": (0.9, 1.1)}, []),  # one layer that looks is enough
        ({"ap": 0.1, "detections": 0.0, "attention": (0.3,)}, ["AP", "box", "attention"]),
        ({"ap": -1}, []),  # nothing to be detected
        ({"ap": 0.1, "detections": 0.0, "images": FEWEST - 1}, []),
        ({"attention": (0.3,), "pairs": FEWEST - 1}, []),
    ],
)
def test_each_sign_has_its_number_and_its_remedy(changed, expected):
    signs = signs_of_collapse(results(**changed))
    assert list(signs) == expected
    for line in signs.values():
        assert "\n" not in line and "train.start" in line
    table = symptoms(results(**changed))
    assert table.index[table["collapsed"].astype(bool)].tolist() == expected


def test_results_of_older_runs_are_not_judged():
    old = results()
    assert symptoms({}).empty and not signs_of_collapse({})
    assert symptoms({"detection": old["detection"]}).empty
    assert list(symptoms(old | {"floor": {}, "spread": {"images": 0}}).index) == ["attention"]


def test_a_model_whose_heads_ignore_the_image_is_told_from_one_that_sees(tiny_config):
    """Its class head is blind, so that one query always wins, and its boxes come from a bias."""
    cfg = tiny_config({"model.num_classes": 7})
    dataset = build_dataset(cfg.data, "val")
    model = initial_model(cfg)
    with torch.no_grad():
        model.class_embed.weight.zero_()
        for layer in model.bbox_embed.layers:
            layer.weight.zero_()
    measured, _ = evaluate(model, dataset, cfg, Accelerator(cpu=True), looked_at=8)
    assert measured["spread"]["images"] == 13
    assert measured["spread"]["detections"] == pytest.approx(0, abs=1e-6)
    assert "box" in signs_of_collapse(measured)
    assert 0 < measured["paibb"]["pairs"] < len(dataset.frame())  # attention of the first batch alone
