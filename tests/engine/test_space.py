"""Whether checkpoints will fit on the disk is known before they are written."""

import shutil
from collections import namedtuple

import pytest
from accelerate import Accelerator

from detrlib.engine.space import OTHERS, checkpoint_sizes, checkpoint_space
from detrlib.engine.start import initial_model
from detrlib.engine.state import TrainingState
from detrlib.errors import RunError

Usage = namedtuple("Usage", "free")


@pytest.fixture
def state(tiny_config):
    cfg = tiny_config({"model.num_classes": 7, "train.ema": 0.9, "train.freeze": ["encoder"]})
    state = TrainingState(initial_model(cfg), cfg, steps_per_epoch=4, accelerator=Accelerator(cpu=True))
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = parameter.detach().clone()
    state.optimizer.step()
    state.advance()
    return state


def test_sizes_are_those_of_the_files(state, tmp_path):
    state.save(tmp_path, ap=0.5)
    for name, size in zip(("best.pt", "last.pt"), checkpoint_sizes(state), strict=True):
        assert (tmp_path / name).stat().st_size == pytest.approx(size, rel=0.15)  # names and padding of a tiny model


def test_a_disk_too_small_is_refused_naming_folder_and_size(state, tmp_path, monkeypatch, tiny_config):
    folder, cfg = tmp_path / "checkpoints", tiny_config({"train.epochs": 10, "train.keep_every": 2}).train
    weights, whole = checkpoint_sizes(state)
    needed = 3 * whole + 6 * weights + OTHERS
    for free in (needed - 2**20, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free))
        if free == needed:
            assert "free" in checkpoint_space(state, cfg, folder)
        else:
            with pytest.raises(RunError, match=f"{folder}: make 1 MiB more free, set train.keep_every"):
                checkpoint_space(state, cfg, folder)
    state.save(folder, ap=0.5)  # what is there already needs no room
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - whole - weights))
    assert "free" in checkpoint_space(state, cfg, folder)
