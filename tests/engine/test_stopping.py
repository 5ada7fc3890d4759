"""Which signals end training, and when, and that nothing is lost; several processes are in test_launch."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch

from detrlib.engine import stopping
from detrlib.engine.children import SIGNALS
from detrlib.engine.loop import train
from detrlib.engine.stopping import Stopping, Wish
from detrlib.errors import Stopped
from detrlib.files import load_checkpoint

STEPS = 4  # per epoch of a tiny run
ALONE = SimpleNamespace(num_processes=1, is_main_process=True)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock.now)
    return clock


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_taken_and_a_later_one_does_what_it_did_before(number, clock, capfd):
    heard, before = [], signal.getsignal(number)
    signal.signal(number, lambda *_: heard.append(number))
    try:
        with Stopping(ALONE, 0) as own:
            own.training = True
            assert own.agreed() is Wish.NOTHING
            signal.raise_signal(number)
            assert own.agreed() is Wish.STOP and own.asked() and own.name in capfd.readouterr().err
            signal.raise_signal(number)  # sent to all processes, and by torchrun once more
            assert heard == []
            clock.now += stopping.SAME + 1
            signal.raise_signal(number)
            assert heard == [number]
        signal.raise_signal(number)
        assert heard == [number] * 2
    finally:
        signal.signal(number, before)


def test_before_there_is_something_to_save_a_signal_ends_at_once():
    with pytest.raises(Stopped, match="SIGTERM before the first step"), Stopping(ALONE, 0):
        signal.raise_signal(signal.SIGTERM)


def test_it_is_saved_every_so_many_minutes(clock):
    every, never = Stopping(ALONE, 2), Stopping(ALONE, 0)
    clock.now += 119
    assert every.agreed() is Wish.NOTHING
    clock.now += 1
    assert every.agreed() is Wish.SAVE and never.agreed() is Wish.NOTHING
    every.saved()
    assert every.agreed() is Wish.NOTHING


@pytest.mark.parametrize("others, agreed", [(0, Wish.SAVE), (1, Wish.SAVE), (2, Wish.STOP), (12, Wish.STOP)])
def test_what_one_process_wishes_is_done_by_all(clock, others, agreed):
    """`others`: the sum of what six more wish, of whom the main one is this or one of them."""
    seven = SimpleNamespace(num_processes=7, is_main_process=others != 1, reduce=lambda x, _: (x + added) / 7)
    added = torch.tensor([60.0, 0.0, float(others)])
    own = Stopping(seven, 1)
    clock.now += 60
    assert own.mean(torch.tensor([10.0, 7.0])).tolist() == [10.0, 1.0]
    assert own.agreed() is agreed


def test_a_run_stopped_while_it_is_evaluated_does_it_again(
    tmp_path, interrupt, same, metrics_without_times, tiny_config
):
    """And so does one that was stopped in its last evaluation; the interrupt of a notebook is a signal too."""
    cfg = tiny_config()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(cfg, whole)
    for epoch, step in enumerate((STEPS, 2 * STEPS)):
        interrupt(epoch, signal.SIGINT, "evaluate")
        with pytest.raises(Stopped, match=f"SIGINT at step {step}, after epoch {epoch} of 2 and {STEPS} of {STEPS}"):
            train(cfg, parts)
    results = train(cfg, parts)
    assert same(*(load_checkpoint(run / "checkpoints" / "last.pt") for run in (whole, parts)))
    assert metrics_without_times(parts) == metrics_without_times(whole)
    assert {**results, "seconds": 0} == {**expected, "seconds": 0}
    starts = json.loads((parts / "environment.json").read_text())["starts"]
    assert [start["global_step"] for start in starts] == [0, STEPS, 2 * STEPS]
    assert [start.get("stopped") for start in starts] == [STEPS, 2 * STEPS, None]
    assert [start.get("signal") for start in starts] == ["SIGINT", "SIGINT", None]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_where_it_was_saved_last(
    tmp_path, interrupt, same, metrics_without_times, tiny_config, capsys, damaged
):
    """Also where that was at the end of an epoch whose record was written, but not its checkpoint; where the last
    checkpoint is damaged, from the one before it."""
    cfg = tiny_config({"train.save_minutes": 1e-9})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(), whole)
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, parts)
    last = parts / "checkpoints" / "last.pt"
    assert load_checkpoint(last)["global_step"] == 2
    if damaged:
        last.write_bytes(last.read_bytes()[:-40_000])
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 2, "epoch": 1, "epoch/loss": 0.0}\n')
    capsys.readouterr()
    train(cfg, parts)
    assert ("going on from previous.pt" in capsys.readouterr().out) is damaged
    assert metrics_without_times(parts) == metrics_without_times(whole)
    assert same(*(load_checkpoint(run / "checkpoints" / "last.pt") for run in (whole, parts)))


def test_a_signal_before_the_first_step_ends_at_once(tmp_path, interrupt, tiny_config):
    before = signal.getsignal(signal.SIGUSR1)
    interrupt(0, signal.SIGUSR1, "look_over")
    with pytest.raises(Stopped, match="SIGUSR1 before the first step"):
        train(tiny_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists() and signal.getsignal(signal.SIGUSR1) == before
