"""Settings of several sections that do not go together are refused by name."""

import pytest

from detrlib.config import load_config
from detrlib.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model.encoder_layers": 0, "evaluate.store_sites": ["encoder_self"]}, "evaluate.store_sites"),
        ({"model.encoder_layers": 0, "train.freeze": ["encoder"]}, "train.freeze"),
        ({"model.encoder_layers": 0, "train.checkpoint_activations": ["encoder"]}, "train.checkpoint_activations"),
        ({"model.architecture": "deformable", "model.deformable.refine": True, "loss.auxiliary": False}, "refine"),
    ],
)
def test_what_does_not_go_together_is_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        load_config(overrides=settings)
