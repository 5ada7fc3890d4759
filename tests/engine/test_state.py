"""What a checkpoint holds, and that a state restored from it is the same one."""

import pytest
import torch
from accelerate import Accelerator

from detrlib.attention.transforms import Entmax
from detrlib.engine import state as engine_state
from detrlib.engine.start import initial_model
from detrlib.engine.state import TrainingState
from detrlib.errors import DamagedFile, RunError
from detrlib.files import load_checkpoint


@pytest.fixture
def make(tiny_config):
    """A state of a tiny model after some updates with made-up gradients."""

    def make(updates=0, **train):
        overrides = {name if "." in name else f"train.{name}": value for name, value in train.items()}
        cfg = tiny_config({"model.num_classes": 7, "train.schedule": "cosine"} | overrides)
        state = TrainingState(initial_model(cfg), cfg, steps_per_epoch=4, accelerator=Accelerator(cpu=True))
        generator = torch.Generator().manual_seed(0)
        for _ in range(updates):
            for parameter in state.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            state.optimizer.step()
            state.advance()
        return state

    return make


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_restored_state_is_the_one_that_was_saved(make, same, tmp_path, ema):
    state, other = make(updates=3, ema=ema), make(ema=ema)
    state.epoch = 1
    state.save(tmp_path, ap=0.25)
    assert not same(state.state_dict(), other.state_dict())
    assert other.restore(tmp_path) == ""
    assert same(state.state_dict(), other.state_dict())
    assert (other.epoch, other.global_step, other.best) == (1, 3, 0.25)
    assert other.learning_rates == state.learning_rates != make().learning_rates


def test_best_is_the_epoch_with_the_highest_ap_and_some_are_kept_for_good(make, tmp_path):
    state = make()
    for epoch, ap in enumerate([0.2, 0.5, 0.3, 0.5], start=1):
        state.epoch = epoch
        state.save(tmp_path, ap, keep_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"{name}.pt" for name in ("best", "epoch-0002", "epoch-0004", "last", "previous"))
    ]
    best, last, previous = (load_checkpoint(tmp_path / f"{name}.pt") for name in ("best", "last", "previous"))
    assert best["epoch"] == 2 and "optimizer" not in best
    assert last["epoch"] == 4 and last["best"] == 0.5 and previous["epoch"] == 3


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_whole_one_before_it(make, tmp_path):
    state, other = make(), make()
    for state.epoch in (1, 2):
        state.save(tmp_path, ap=0.5)
    (tmp_path / "last.pt").write_bytes(b"")
    assert "previous.pt" in other.restore(tmp_path) and other.epoch == 1
    for other.epoch, previous in ((2, 1), (3, 2)):
        other.save(tmp_path, ap=0.5)
        assert load_checkpoint(tmp_path / "previous.pt")["epoch"] == previous


def test_of_several_processes_the_main_one_decides_which_checkpoint_is_taken(make, tmp_path, monkeypatch):
    state, other = make(), make()
    for state.epoch in (1, 2):
        state.save(tmp_path, ap=0.5)
    monkeypatch.setattr(engine_state, "broadcast_object_list", lambda said: ["previous.pt", "last.pt is damaged there"])
    assert other.restore(tmp_path) == "last.pt is damaged there" and other.epoch == 1
    monkeypatch.setattr(engine_state, "broadcast_object_list", lambda said: ["last.pt", ""])
    assert other.restore(tmp_path) == "" and other.epoch == 2
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"last\.pt"):  # here alone
        other.restore(tmp_path)


def test_the_average_is_evaluated_and_follows_the_weights_slowly(make):
    start, state = make(), make(updates=2, ema=0.9)
    first, trained, averaged = (
        next(m.transformer.parameters()) for m in (start.evaluated, state.trained, state.evaluated)
    )
    assert make().evaluated is not None and start.evaluated is start.trained
    assert 0 < (averaged - first).abs().mean() < (trained - first).abs().mean()


def test_annealed_alphas_follow_from_the_step_alone(make, tmp_path):
    annealed = {"model.attention.decoder_cross": "entmax15", "model.attention.anneal.epochs": 1.25, "ema": 0.9}

    def alphas(state):
        models = (state.trained, state.evaluated)
        return {t.alpha for model in models for t in model.modules() if isinstance(t, Entmax)}

    states = {updates: make(updates, **annealed) for updates in (0, 2, 4, 5, 8)}
    for updates, state in states.items():
        assert alphas(state) == {state.alphas["decoder_cross"]}
        assert state.alphas["decoder_cross"] == pytest.approx(1.01 + 0.49 * min(1.0, updates / 5))
    assert alphas(states[5]) == alphas(states[8]) == {1.5}

    for updates in (4, 8):  # the best of a sparse model is no denser one
        states[updates].save(tmp_path / str(updates), ap=0.5)
    assert [(tmp_path / name / "best.pt").exists() for name in ("4", "8")] == [False, True]
    states[0].restore(tmp_path / "4")
    assert alphas(states[0]) == alphas(states[4])


def test_a_checkpoint_without_the_optimizer_is_named(make, tmp_path):
    state = make()
    state.save(tmp_path, ap=0.5)
    (tmp_path / "best.pt").replace(tmp_path / "last.pt")
    with pytest.raises(RunError, match=r"last\.pt"):
        state.restore(tmp_path)
