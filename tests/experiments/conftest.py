"""What tests of experiments share."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
import yaml

from detrlib.config import save_config

SITES = ("encoder_self", "decoder_self", "decoder_cross")
ASKED = """#!/bin/bash
# Notes how it was called, one word a line, and says what the file of its name holds.
here=$(dirname "$0")
env >"$here/environment"
{{ echo "# {name}"; printf '%s\\n' "$@"; }} >>"$here/asked"
[ {name} != sbatch ] || {{ n=$(($(cat "$here/number") + 1)); echo $n >"$here/number"; echo "$n;toy"; }}
[ ! -e "$here/{name}.says" ] || cat "$here/{name}.says"
[ ! -e "$here/{name}.fails" ] || {{ cat "$here/{name}.fails" >&2; exit 1; }}
"""


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


class Slurm:
    """Commands of Slurm that only note what they are asked; jobs have the numbers 101, 102 and so on."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        (folder / "number").write_text("100")
        for name in ("sbatch", "squeue", "scancel", "scontrol"):
            (folder / name).write_text(ASKED.format(name=name))
            (folder / name).chmod(0o755)

    def says(self, name: str, text: str) -> None:
        (self.folder / f"{name}.says").write_text(text)

    def fails(self, name: str, text: str) -> None:
        (self.folder / f"{name}.fails").write_text(text)

    def asked(self, name: str) -> list[list[str]]:
        """The words of each call of a command since the last time anything was asked."""
        path = self.folder / "asked"
        calls = path.read_text().split("# ")[1:] if path.exists() else []
        return [call.splitlines()[1:] for call in calls if call.startswith(f"{name}\n")]

    def forget(self) -> None:
        (self.folder / "asked").unlink()


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}{os.pathsep}{os.environ['PATH']}")
    return Slurm(tmp_path / "slurm")
