"""What tests of experiments share."""

import contextlib

import pytest
import torch
import yaml

from detrlib.config import save_config

SITES = ("encoder_self", "decoder_self", "decoder_cross")


@pytest.fixture(scope="module")
def untouched(predict):
    """A context after which a model is what it was; `predict` is that of the test file, and returns maps too."""

    def predicted(model):
        found = predict(model)
        maps = [weights for site in SITES for weights in getattr(found.attention, site) or []]
        return [found.logits, found.boxes, *(weights for weights in maps if isinstance(weights, torch.Tensor))]

    @contextlib.contextmanager
    def untouched(model):
        """Weights, their names, the very modules, predictions and maps are the same afterwards, bit for bit."""
        state = {name: value.clone() for name, value in model.state_dict().items()}
        modules, before = dict(model.named_modules()), predicted(model)
        yield
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert list(model.named_modules()) == list(modules.items())
        assert not any(module.training for module in model.modules())
        for one, other in zip(predicted(model), before, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    return untouched


@pytest.fixture
def sweep_file(tmp_path, tiny_config):
    """A sweep of three tiny runs; values may be changed."""
    save_config(tiny_config(), tmp_path / "base.yaml")

    def write(**changes):
        runs = {"one": None, "two": {"train.epochs": 3}, "three": {"train.seed": 3}}
        values = {"base": "base.yaml", "overrides": {"train.epochs": 1, "train.lr": 5e-4}, "runs": runs} | changes
        path = tmp_path / "many.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
        return path

    return write
