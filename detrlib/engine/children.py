"""Processes that end together: signals are passed on to what a process has started, and nothing outlives its starter.

What starts others (several processes of a training, the runs of a sweep, the kernel of a notebook) would otherwise end
at once where it is told to, and leave them behind, or cut them off in the midst of saving. Here the first signal is
handed on, and what was started is waited for: training saves, see `stopping`. The next one ends it at once.
Where the starter itself is killed, what it has started is told so.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psutil

from detrlib.errors import STOPPED, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
HANDED_ON = signal.SIGUSR1  # whichever came: srun hands on no other
SAME = 2.0  # seconds in which signals count as one (training takes longer ones): Slurm sends them to all processes
PARENT = "DETRLIB_PARENT"  # environment variable of a process that is to end with those of these numbers
LEAVING = 300  # seconds that a process has for saving: a step may be long
GRACE = 10  # seconds that it has when told for the second time


@contextmanager
def taking(take: Callable[[signal.Signals], bool]) -> Iterator[None]:
    """While entered, `take` is called with every signal; where it returns False, that does what it did before.

    Those that are ignored, as by nohup, stay so. In a thread other than the first no signal comes, and none is taken.
    """
    process, before = os.getpid(), {}

    def handle(number: int, _frame: object) -> None:
        # A fork, such as one that decodes pictures, has the handler too: it is not its matter.
        if os.getpid() != process or not take(signal.Signals(number)):
            signal.signal(number, before[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        # None is of a program that is not in Python.
        before = {number: known for number, known in handlers.items() if known not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


@contextmanager
def passing_on(tell: Callable[[], None]) -> Iterator[list[signal.Signals]]:
    """While entered, `tell` is called in place of what a signal does otherwise; gives the signals that have come."""
    came, last = [], [-SAME]

    def take(number: signal.Signals) -> bool:
        since, last[0] = time.monotonic() - last[0], time.monotonic()
        came.append(number)
        if len(came) == 1 or since > SAME:
            tell()
        return True

    with taking(take):
        yield came


def stopped(came: Sequence[signal.Signals], *said: str) -> Stopped:
    """The error of a command that a signal has ended: what was said of it, or else which came."""
    name = came[0].name if came else "a signal"
    return Stopped(said[0] if said else f"stopped by {name}; the same command goes on where it can")


def interrupt() -> None:
    """Raise what an interrupt from the terminal raises."""
    raise KeyboardInterrupt


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Tell processes to end and wait until they have: they save. They are told again on a `KeyboardInterrupt`, or where
    they do not leave, and killed where that does not help; each leads a session of its own."""
    for seconds in (LEAVING, GRACE):
        for process in processes:
            process.send_signal(HANDED_ON)  # nothing happens to one that has left
        latest = time.monotonic() + seconds
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0, latest - time.monotonic()))
            return
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def with_parent(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that is to end with this one, see `follow`."""
    return dict(os.environ if environment is None else environment) | {PARENT: str(os.getpid())}


def follow() -> list[str]:
    """Send this process SIGTERM as soon as one of those has ended that `PARENT` names, however it did; their numbers.

    SIGKILL follows where it does not leave. What this process starts in its turn does not inherit it.
    """
    parents = [number for number in os.environ.pop(PARENT, "").split(",") if number]
    for number in parents:
        threading.Thread(target=_watch, args=(int(number),), daemon=True).start()
    return parents


def _watch(parent: int) -> None:
    wait_for_end(parent)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for said in (1, 2):  # nobody reads any more what this process says, which would be an error in what saves
        os.dup2(nowhere, said)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVING)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_end(number: int) -> None:
    """Wait until the process of a number has ended, also where nobody has asked yet how."""
    try:
        handle = os.pidfd_open(number)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # an older Linux, or none
        with suppress(psutil.NoSuchProcess):
            psutil.Process(number).wait()
        return
    (ended := select.poll()).register(handle, select.POLLIN)
    ended.poll()
    os.close(handle)


@contextmanager
def saving_without_parent() -> Iterator[None]:
    """In the kernel of a notebook, give training the time to save where the program that runs the notebook is killed:
    ipykernel ends its process within a second of that, by a thread that looks for its parent."""
    module = sys.modules.get("ipykernel.kernelapp")
    app = module.IPKernelApp.instance() if module and module.IPKernelApp.initialized() else None
    if app is None or app.poller is None:
        yield
        return
    over, parent = threading.Event(), os.getppid()

    def watch() -> None:
        wait_for_end(parent)
        if over.is_set():
            return
        app.poller.parent_pid = os.getppid()  # so that it finds nothing amiss
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait(LEAVING)
        os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
