"""What a checkpoint holds, and that a state restored from it is the same one."""

import pytest
import torch
from accelerate import Accelerator

from detrlib.engine.evaluate import initial_model
from detrlib.engine.state import TrainingState
from detrlib.errors import RunError
from detrlib.files import load_checkpoint


@pytest.fixture
def make(tiny_config):
    """A state of a tiny model after some updates with made-up gradients."""

    def make(updates=0, **train):
        overrides = {f"train.{name}": value for name, value in train.items()}
        cfg = tiny_config({"model.num_classes": 7, "train.schedule": "cosine"} | overrides)
        state = TrainingState(initial_model(cfg), cfg.train, steps_per_epoch=4, accelerator=Accelerator(cpu=True))
        generator = torch.Generator().manual_seed(0)
        for _ in range(updates):
            for parameter in state.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            state.optimizer.step()
            state.advance()
        return state

    return make


def same(a, b):
    """Whether two nested structures of tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_restored_state_is_the_one_that_was_saved(make, tmp_path, ema):
    state, other = make(updates=3, ema=ema), make(ema=ema)
    state.epoch = 1
    state.save(tmp_path, ap=0.25)
    assert not same(state.state_dict(), other.state_dict())
    other.restore(tmp_path / "last.pt")
    assert same(state.state_dict(), other.state_dict())
    assert (other.epoch, other.global_step, other.best) == (1, 3, 0.25)
    assert other.learning_rates == state.learning_rates != make().learning_rates


def test_best_is_the_epoch_with_the_highest_ap_and_some_are_kept_for_good(make, tmp_path):
    state = make()
    for epoch, ap in enumerate([0.2, 0.5, 0.3, 0.5], start=1):
        state.epoch = epoch
        state.save(tmp_path, ap, keep_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "epoch-0002.pt", "epoch-0004.pt", "last.pt"]
    best, last = (load_checkpoint(tmp_path / f"{name}.pt") for name in ("best", "last"))
    assert best["epoch"] == 2 and "optimizer" not in best
    assert last["epoch"] == 4 and last["best"] == 0.5


def test_the_average_is_evaluated_and_follows_the_weights_slowly(make):
    start, state = make(), make(updates=2, ema=0.9)
    first, trained, averaged = (
        next(m.transformer.parameters()) for m in (start.evaluated, state.trained, state.evaluated)
    )
    assert make().evaluated is not None and start.evaluated is start.trained
    assert 0 < (averaged - first).abs().mean() < (trained - first).abs().mean()


def test_a_checkpoint_without_the_optimizer_is_named(make, tmp_path):
    state = make()
    state.save(tmp_path, ap=0.5)
    (tmp_path / "best.pt").replace(tmp_path / "last.pt")
    with pytest.raises(RunError, match=r"last\.pt"):
        state.restore(tmp_path / "last.pt")
