"""What torchrun's exit code says once its processes have ended; with real processes in test_launch."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from detrlib.engine import agent
from detrlib.engine.children import PARENT
from detrlib.errors import STOPPED


@pytest.fixture
def ended(monkeypatch):
    """The exit code of the agent whose processes end with `codes`, after a signal or without one."""
    monkeypatch.setattr(sys, "argv", ["agent", "--standalone", "train.py"])
    monkeypatch.setattr(agent, "_tell", lambda: None)

    def ended(codes, by=None, late=0):
        monkeypatch.setattr(agent, "follow", lambda: ["7"])
        monkeypatch.setenv(PARENT, "")  # it names itself there, for its processes

        def run(arguments):
            assert (arguments.training_script, arguments.signals_to_handle) == ("train.py", "SIGQUIT")
            assert os.environ[PARENT] == f"7,{os.getpid()}"
            if by:
                signal.raise_signal(by)
            if any(codes):
                failures = {rank: ProcessFailure(rank, 1, code, "<NA>") for rank, code in enumerate(codes) if code}
                failures[len(codes) - 1].timestamp += late
                raise ChildFailedError("train.py", failures)

        monkeypatch.setattr(torchrun, "run", run)
        try:
            agent.main()
        except SystemExit as left:
            return left.code
        return 0

    return ended


def test_it_is_stopped_where_all_were(ended):
    assert ended([0, 0]) == 0
    assert ended([STOPPED, STOPPED]) == ended([STOPPED, -signal.SIGTERM]) == STOPPED
    assert ended([-signal.SIGUSR1, -signal.SIGTERM], by=signal.SIGTERM) == STOPPED  # before there was anything to save
    assert ended([-signal.SIGTERM, -signal.SIGTERM]) == 1  # which nobody has asked for here
    assert ended([STOPPED, 1], by=signal.SIGTERM) == ended([1, -signal.SIGKILL]) == 1


def test_it_follows_what_has_started_it_in_a_step_of_slurm_too(ended, monkeypatch):
    """As from a shell that srun has opened."""
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert ended([0, 0]) == 0


def test_who_has_not_left_in_time_and_is_killed_by_torchrun_was_stopped(ended):
    """As one that waits in NCCL for another one, which a signal has ended before the first step."""
    assert ended([STOPPED, -signal.SIGKILL], late=31) == STOPPED
    assert "signal 9" in ended([-signal.SIGKILL, -signal.SIGKILL], late=31)


def test_a_process_that_was_killed_is_named_in_one_line(ended):
    for line in (ended([-signal.SIGKILL, -signal.SIGTERM]), ended([STOPPED, -signal.SIGKILL], by=signal.SIGTERM)):
        assert line.startswith(agent.FAULT) and "signal 9" in line and len(line.splitlines()) == 1


def test_who_has_lost_another_process_leaves_it_to_that_one_to_say_why(ended, monkeypatch):
    """However late torchrun ends it: what gloo says of it is long, and not what has happened."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(agent, "follow", list)
    with pytest.raises(SystemExit) as left, agent.started():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:47253: Connection reset by peer")
    assert left.value.code == agent.LOST
    assert "signal 9" in ended([-signal.SIGKILL, agent.LOST]) and ended([1, agent.LOST]) == 1
    assert ended([STOPPED, agent.LOST]) == STOPPED
    for line in (ended([agent.LOST, agent.LOST]), ended([agent.LOST, -signal.SIGTERM])):  # the first is elsewhere
        assert line.startswith(agent.FAULT) and "lost" in line and len(line.splitlines()) == 1


def test_a_signal_before_there_are_processes_stops(monkeypatch):
    monkeypatch.setattr(agent.psutil, "Process", lambda: SimpleNamespace(children=list))
    with pytest.raises(SystemExit) as left:
        agent._tell()
    assert left.value.code == STOPPED
