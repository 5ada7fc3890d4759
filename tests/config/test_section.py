"""What all sections have in common: frozen, and values as people write them."""

import pytest
from pydantic import ValidationError

from detrlib.config import Config, load_config
from detrlib.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("train.tracking.also", "tensorboard", ["tensorboard"]),
        ("evaluate.sites", "encoder_self", ["encoder_self"]),
        ("evaluate.sites", "encoder_self,decoder_self", ["encoder_self", "decoder_self"]),
        ("evaluate.store_sites", "encoder_self, decoder_self", ["encoder_self", "decoder_self"]),
        ("model.deformable.stages", 4, [4]),
        ("model.deformable.stages", "2,3,4", [2, 3, 4]),
    ],
)
def test_values_between_commas_are_a_list_also_if_there_is_one_only(name, given, meant):
    family = {"model.architecture": "deformable"}
    assert load_config(overrides=family | {name: given}) == load_config(overrides=family | {name: meant})


def test_settings_are_frozen_at_every_depth():
    cfg = Config()
    for section, name in ((cfg, "train"), (cfg.train, "epochs"), (cfg.train.tracking, "group")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, None)


def test_true_is_no_number():
    stages = {"model.architecture": "deformable", "model.deformable": {"levels": 2, "stages": [True, 4]}}
    for overrides, named in (({"train.micro_batch": True}, "train.micro_batch"), (stages, "model.deformable.stages")):
        with pytest.raises(ConfigError, match=named):
            load_config(overrides=overrides)
