"""What is said of settings and results: only where there is something to say, and with what would do instead."""

import pytest

from detrlib.config import Data
from detrlib.data import build_dataset
from detrlib.engine import advice
from detrlib.engine.advice import (
    FEW_UPDATES,
    few_updates,
    floor_and_collapse,
    idle_settings,
    much_padding,
    unfit_for_crops,
    where_attention_rests,
)
from detrlib.metrics.detection import UNDEFINED


def test_a_small_budget_is_warned_of_unless_weights_are_given(tiny_config):
    (line,) = few_updates(tiny_config(), FEW_UPDATES - 1)
    assert str(FEW_UPDATES - 1) in line and "train.epoch_updates" in line
    assert few_updates(tiny_config(), FEW_UPDATES) == []
    assert few_updates(tiny_config({"train.start": "other"}), 1) == []


@pytest.mark.parametrize(
    "attention, named",
    [
        ({}, []),
        ({"topk": 8}, ["model.attention.topk"]),
        ({"topk": 8, "decoder_self": "topk"}, []),
        (
            {"alpha": 1.3, "alpha_init": 1.2, "decoder_cross": "entmax15"},
            ["attention.alpha 1.3", "attention.alpha_init"],
        ),
        ({"null_key": "zero", "decoder_cross": "softpick"}, ["null_key zero at decoder_cross"]),
        ({"null_key": "learned", "decoder_cross": "softpick"}, []),
        ({"null_key": "learned", "decoder_cross": "relu", "null_key_sites": ["decoder_self"]}, []),
    ],
)
def test_settings_of_attention_that_change_nothing_are_named(attention, named, tiny_config):
    lines = idle_settings(tiny_config({f"model.attention.{name}": value for name, value in attention.items()}))
    assert len(lines) == len(named) and all(name in line for name, line in zip(named, lines, strict=True))


def test_sites_that_are_not_measured_are_named(tiny_config):
    asked = {"evaluate.sites": ["encoder_self"]}
    for other, count in (({}, 0), ({"model.encoder_layers": 0}, 1), ({"model.architecture": "deformable"}, 1)):
        assert len(idle_settings(tiny_config(asked | other))) == count


@pytest.mark.parametrize(
    "few, size, named",
    [(10, 64, []), (10, 480, ["data.image_size"]), (10_000, 480, ["train.start", "data.image_size"])],
)
def test_objects_too_few_or_too_large_for_crops_are_pointed_out(few, size, named, tiny_config, monkeypatch):
    """Half of the shapes are longer than 0.3 of the image."""
    monkeypatch.setattr(advice, "FEW_OBJECTS", few)
    cfg = tiny_config({"data.image_size": size, "model.backbone.weights": "crops"})
    lines = unfit_for_crops(cfg, build_dataset(cfg.data, "train"))
    assert len(lines) == len(named) and all(name in line for name, line in zip(named, lines, strict=True))


def test_a_model_that_begins_with_other_weights_does_not_learn_from_crops(tiny_config):
    cfg = tiny_config({"data.image_size": 480, "model.backbone.weights": "crops", "train.start": "other"})
    assert unfit_for_crops(cfg, build_dataset(cfg.data, "train")) == []


def test_much_padding_is_told_with_a_remedy_that_helps():
    assert much_padding(0.5, Data()) == []
    (line,) = much_padding(0.6, Data())
    assert line.startswith("60% of the pixels") and "data.scales" in line
    for settings in (Data(scales="batch"), Data(augment="flip")):
        assert "train.batch_size" in much_padding(0.6, settings)[0]


def test_the_floor_and_signs_of_collapse_in_words():
    numbers = {"AP": 0.25, "AP50": 0.5, "images": 40}
    first, second = floor_and_collapse({"floor": numbers, "detection": {"AP": 0.2}})
    assert "0.250" in first and "40 images" in first and second.startswith("warning: AP 0.200")
    assert len(floor_and_collapse({"floor": numbers, "detection": {"AP": 0.3}})) == 1
    undefined = {"AP": UNDEFINED, "AP50": UNDEFINED, "images": 40}  # a split without objects
    assert floor_and_collapse({"floor": undefined, "detection": {"AP": UNDEFINED}}) == floor_and_collapse({}) == []


def test_where_attention_rests_is_told_of_the_head_that_does_so_most():
    found = {
        "weight": {"heads": [[0.1, 0.4], [0.35, 0.6]]},
        "sink": {"heads": [[0.0, 1.0], [0.7, 0.9]]},
        "agreement": {"heads": [[0.9, 0.2], [0.5, 0.82]]},
        "value_norm": {"heads": [[1.0, 1.0], [1.0, 0.12]]},
        "place": [[[0.5, 0.5]] * 2, [[0.5, 0.5], [0.97, 0.99]]],
        "does": [[None, "broadcast"], ["broadcast", "nothing"]],
    }
    results = {"evaluate": {"sink_threshold": 0.3}, "sinks": {"decoder_cross": found}}
    (line,) = where_attention_rests(results)
    for words in ("3 of 4 heads of decoder_cross", "0.3", "2 of them on the same", "layer 2, head 2: 0.60", "82%"):
        assert words in line
    assert "lower right" in line and "0.12 times" in line and line.endswith("does nothing")
    queries = found | {"value_norm": {"heads": [[None] * 2] * 2}}
    (line,) = where_attention_rests(results | {"sinks": {"decoder_self": queries}})
    assert "one query" in line and "of the image" not in line and "value" not in line
    found["sink"] = {"heads": [[0.4, 0.4]] * 2}
    assert where_attention_rests(results) == where_attention_rests({}) == []
