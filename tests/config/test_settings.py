"""Sections of the settings: defaults that fit each other, refused where they contradict each other."""

import pytest

from detrlib.config import load_config
from detrlib.errors import ConfigError


def test_maps_of_decoder_cross_are_always_among_those_that_are_stored():
    assert load_config(overrides={"evaluate.store_sites": ["decoder_self"]}).evaluate.store_sites == (
        "decoder_cross",
        "decoder_self",
    )


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"data.cache": True, "data.workers": 2}, r"data\.workers"),
        ({"data.image_size": 31}, r"data\.image_size"),
        ({"loss.no_object": 0}, r"loss\.no_object"),
        ({f"loss.weight_{part}": 0 for part in ("class", "bbox", "giou")}, r"loss\.weight_class"),
        ({f"loss.cost_{part}": 0 for part in ("class", "bbox", "giou")}, r"loss\.cost_class"),
        (
            {"model.attention.decoder_cross": "entmax15", "model.attention.anneal.epochs": 2, "train.epochs": 1},
            r"model\.attention\.anneal\.epochs.*train\.epochs",
        ),
        ({"evaluate.store_sites": "encoder"}, r"evaluate\.store_sites"),
        ({"train.freeze": ["encoder"], "model.encoder_layers": 0}, r"train\.freeze"),
        ({"data.scales": "epoch"}, r"data\.scales"),
        ({"model.polling.train_ratios": 0.3}, r"model\.polling\.train_ratios.*list"),
    ],
)
def test_values_out_of_range_and_contradictions_are_named(overrides, named):
    with pytest.raises(ConfigError, match=named):
        load_config(overrides=overrides)


def test_parts_of_a_batch_are_a_number_or_auto():
    chosen = [load_config(None, {"train.micro_batch": value}).train.micro_batch for value in (None, 4, "4", "auto")]
    assert chosen == [None, 4, 4, "auto"]
    for wrong in (0, -1, 1.5, "most"):
        with pytest.raises(ConfigError, match=r"train\.micro_batch"):
            load_config(None, {"train.micro_batch": wrong})


def test_parts_that_are_computed_again_are_named_or_all():
    given = (False, "true", "backbone", "backbone,encoder", ["encoder"])
    chosen = [
        load_config(None, {"train.checkpoint_activations": value}).train.checkpoint_activations for value in given
    ]
    assert chosen == [False, True, ("backbone",), ("backbone", "encoder"), ("encoder",)]
    with pytest.raises(ConfigError, match=r"train\.checkpoint_activations"):
        load_config(None, {"train.checkpoint_activations": "decoder"})
