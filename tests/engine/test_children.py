"""Signals are handed on once and then again, and what was started ends with what has started it."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from detrlib.config import PROJECT
from detrlib.engine import children
from detrlib.engine.children import PARENT, end, passing_on, saving_without_parent, stopped, with_parent
from detrlib.errors import STOPPED

PATIENCE = 120  # seconds, on a machine that has other things to do

DEAF = """
import signal, sys, time
left = int(sys.argv[1])  # signals until it leaves
def heard(*_):
    global left
    left -= 1
    if not left:
        raise SystemExit(3)
signal.signal(signal.SIGUSR1, heard)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""
FOLLOWS = """
import time
from detrlib.engine.children import follow
follow()
print("ready", flush=True)
time.sleep(600)
"""
STARTS = f"""
import subprocess, sys, time
from detrlib.engine.children import with_parent
child = subprocess.Popen([sys.executable, "-c", {FOLLOWS!r}], env=with_parent(), start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def start():
    """Starts a program in a session of its own, and waits for its first line."""
    started = []

    def start(program, *arguments, **options):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "cwd": PROJECT, "start_new_session": True} | options
        started.append(subprocess.Popen(command, **options))
        return started[-1], started[-1].stdout.readline().decode().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_signal_is_handed_on_once_and_later_again(monkeypatch):
    told = []
    with passing_on(lambda: told.append(time.monotonic())) as came:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)  # as from a terminal that is closed, and a launcher
        assert len(told) == 1
        monkeypatch.setattr(children, "SAME", 0)
        signal.raise_signal(signal.SIGINT)
    assert len(told) == 2 and came == [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    assert "SIGTERM" in str(stopped(came)) and str(stopped(came, "as it was said")) == "as it was said"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_fork_takes_no_signals_for_its_parent():
    with passing_on(lambda: os._exit(9)):
        heard, said = os.pipe()
        child = os.fork()
        if not child:
            os.write(said, b"here")  # a signal before that is lost in the fork
            time.sleep(600)
        os.read(heard, 4)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with passing_on(lambda: pytest.fail("told")):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_takes_no_signals():
    with passing_on(lambda: pytest.fail("told")):
        handler, found = signal.getsignal(signal.SIGTERM), []

        def work():
            with passing_on(lambda: None):
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [handler]


def test_who_does_not_leave_is_told_again_and_then_killed(start, monkeypatch):
    monkeypatch.setattr(children, "LEAVING", 0.3)
    monkeypatch.setattr(children, "GRACE", 1)
    processes = [start(DEAF, count)[0] for count in (1, 2, 9)]
    end(processes)
    assert [process.wait(PATIENCE) for process in processes] == [3, 3, -signal.SIGKILL]


def test_an_interrupt_while_they_leave_tells_them_again(start, monkeypatch):
    process, _ = start(DEAF, 2)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    end([process])
    timer.join()
    assert process.wait(PATIENCE) == 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_started_ends_with_its_starter(start, how):
    starter, line = start(STARTS)
    child = psutil.Process(int(line))
    assert starter.stdout.readline() == b"ready\n"
    starter.send_signal(how)
    starter.wait()
    child.wait(PATIENCE)


def test_a_starter_that_is_gone_already_is_noticed(start):
    gone = subprocess.Popen(["true"])
    gone.wait()
    process, _ = start(FOLLOWS, env=dict(os.environ, **{PARENT: f"{os.getpid()},{gone.pid}"}))
    assert process.wait(PATIENCE) == -signal.SIGTERM


def test_who_is_not_asked_to_follow_does_not(monkeypatch):
    monkeypatch.delenv(PARENT, raising=False)
    assert children.follow() == []
    assert with_parent({"A": "1"}) == {"A": "1", PARENT: str(os.getpid())}


ORPHAN = """
import os, signal, sys, time, types
from detrlib.engine import children
poller = types.SimpleNamespace(parent_pid=os.getppid())
app = types.SimpleNamespace(initialized=lambda: True, instance=lambda: types.SimpleNamespace(poller=poller))
sys.modules["ipykernel.kernelapp"] = types.SimpleNamespace(IPKernelApp=app)
def saves(*_):
    time.sleep(0.5)
    open(sys.argv[1], "w").write(f"{poller.parent_pid == os.getppid()}")
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, saves)
with children.saving_without_parent():
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_a_kernel_saves_where_what_runs_the_notebook_is_killed(start, tmp_path):
    between = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    papermill, line = start(between, ORPHAN, tmp_path / "saved")
    papermill.kill()
    psutil.Process(int(line)).wait(PATIENCE)
    assert (tmp_path / "saved").read_text() == "True"  # and the thread that ends the kernel was told nothing is amiss


def test_without_a_kernel_nothing_is_watched(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "ipykernel.kernelapp", SimpleNamespace(IPKernelApp=SimpleNamespace(initialized=bool))
    )
    count = threading.active_count()
    with saving_without_parent():
        assert threading.active_count() == count
    assert STOPPED == 75
