"""Which transform stands where, what it is told, and null keys."""

from typing import get_args

import pytest

from detrlib.attention import TRANSFORMS
from detrlib.attention.build import NULL_KEYS, TransformSettings
from detrlib.config import load_config
from detrlib.config.attention import Attention, NullKey, SiteName, TransformName
from detrlib.errors import ConfigError

NULL = {"model.attention.null_key": "learned"}
RT_DETR = {"model.architecture": "huggingface", "model.type": "rt_detr_v2"}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model.encoder_layers": 0, "model.attention.encoder_self": "sparsemax"}, "model.encoder_layers"),
        ({"model.attention.alpha_init": 3}, "model.attention.alpha_init"),
        ({"model.attention.alpha_init": 1.005}, "model.attention.alpha_init.*cloned"),
        ({"model.attention.null_key": "one"}, "model.attention.null_key"),
        ({"model.attention.null_key_sites": "encoder_self"}, "model.attention.null_key_sites.*null_key"),
        (NULL | {"model.encoder_layers": 0, "model.attention.null_key_sites": "encoder_self"}, "null_key_sites"),
        (NULL | {"model.architecture": "deformable", "model.attention.null_key_sites": "decoder_cross"}, "points"),
        (NULL | RT_DETR | {"model.attention.null_key_sites": "decoder_cross"}, "points"),
        (NULL | {"model.attention.null_key_sites": []}, "null_key_sites names no site"),
        ({"model.attention.gate": "head", "model.attention.gate_sites": []}, "gate_sites names no site"),
        ({"model.attention.differential": True, "model.attention.differential_sites": []}, "differential_sites names"),
        ({"model.attention.anneal": {"epochs": 1, "sites": []}}, "model.attention.anneal"),
        ({"model.registers": 2, "model.encoder_layers": 0}, "model.registers"),
        ({"model.attention.normmax_alpha": 1}, "model.attention.normmax_alpha"),
        ({"model.attention.normmax_alpha": 1e300}, "model.attention.normmax_alpha"),
        ({"model.attention.budget": 0}, "model.attention.budget"),
        ({"model.attention.sparsegen_lambda": 1}, "model.attention.sparsegen_lambda"),
        ({"model.attention.topk": 0}, "model.attention.topk"),
    ],
)
def test_attention_that_cannot_be_is_refused(overrides, named):
    with pytest.raises(ConfigError, match=named):
        load_config(None, overrides)


def test_configs_know_every_transform():
    assert set(get_args(TransformName)) == set(TRANSFORMS)
    assert set(get_args(NullKey)) == set(NULL_KEYS)


def test_settings_of_transforms_and_their_defaults_are_those_of_configs():
    told = TransformSettings(num_heads=8)._asdict()
    known = {name: field.default for name, field in Attention.model_fields.items() if name in told}
    assert set(told) - set(known) == {"num_heads", "alpha_clamped"}
    assert known == {name: told[name] for name in known}


def test_null_keys_stand_where_keys_are_scored_or_where_they_are_said_to():
    def where(overrides):
        model = load_config(overrides=NULL | overrides).model
        return {site for site in get_args(SiteName) if model.null_key_at(site) == "learned"}

    assert where({}) == set(get_args(SiteName))
    assert where({"model.attention.null_key_sites": "decoder_cross"}) == {"decoder_cross"}
    assert where({"model.architecture": "deformable"}) == {"decoder_self"}
    assert where(RT_DETR) == {"encoder_self", "decoder_self"}
