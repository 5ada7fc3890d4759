"""What tests of experiments share."""

import pytest
import yaml

from detrlib.config import save_config


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
