"""torchrun that ends with what has started it, and not before the processes that it has started have saved.

    python -m detrlib.engine.agent --standalone --nproc-per-node 2 -m detrlib.engine.loop RUN_DIR

Arguments are those of torchrun. That hands a signal on too, but leaves at the second one, which Slurm and a terminal
send along with a launcher, and its processes are then cut off in the midst of saving. Its exit code is 75 where
training was stopped, and its report of a failure, which does not say what it was, is left out.
`started` is the other side of it: what a process does that it has started.
"""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from detrlib.engine.children import HANDED_ON, PARENT, follow, passing_on
from detrlib.errors import STOPPED, Stopped, fault_of, is_main_process, show_messages

logger = logging.getLogger(__name__)

FAULT = "error: "  # how the line of a foreseeable one begins
KILLED = "memory may be short (the system's log says so); the same command goes on from what was saved last"
KILLS = 25  # seconds: torchrun itself kills what has not left 30 after the first process, having told it to
LOST = 76  # exit code of a process that has lost another one, which is no fault of its own
ENDED = re.compile(r"(reset|closed) by peer|broken pipe|remote (worker|process)", re.I)  # as gloo and NCCL say it
LAST_WORDS = 5  # seconds that a process whose fault nobody foresaw waits: it may follow from that of another one


def main() -> None:
    """Start the processes that the command line asks for, and wait for them."""
    above = follow()
    with passing_on(_tell) as came:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

        os.environ[PARENT] = ",".join([*above, str(os.getpid())])
        try:
            run(parse_args(["--signals-to-handle", "SIGQUIT", *sys.argv[1:]]))  # the others are taken here
        except ChildFailedError as error:
            late, every = error.get_first_failure()[1].timestamp + KILLS, error.failures.values()
            codes = {each.exitcode for each in every if each.exitcode != -signal.SIGKILL or each.timestamp < late}
            ended = {-HANDED_ON, -signal.SIGTERM, LOST}  # by the signal itself, before there was anything to save
            stopped = codes <= {STOPPED, *ended} and (came or STOPPED in codes)
            killed = [-code for code in codes if code < 0 and code not in ended]
            if LOST in codes and codes <= ended and not came:  # torchrun may have ended the others
                gone = "processes have lost each other: one ended on another node, or the network failed"
                raise SystemExit(f"{FAULT}{gone}; the same command goes on from what was saved last") from None
            if killed and 1 not in codes:  # nothing else has failed: there is nobody to say what has happened
                by = f"signal {killed[0]} ({signal.strsignal(killed[0])})"
                raise SystemExit(f"{FAULT}{by} has ended a process; {KILLED}") from None
            raise SystemExit(STOPPED if stopped else 1) from None


def _tell() -> None:
    if not (children := psutil.Process().children()):
        raise SystemExit(STOPPED)
    for child in children:
        with suppress(psutil.NoSuchProcess):  # one that has just left
            child.send_signal(HANDED_ON)


@contextmanager
def started() -> Iterator[None]:
    """Work in a process that torchrun has started: it ends with that, and what has ended it is one line and a code."""
    follow()
    show_messages()
    try:
        yield
    except Stopped as stopped:
        if is_main_process():  # all say the same
            logger.info("%s", stopped)
        raise SystemExit(STOPPED) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if fault := fault_of(error):
            raise SystemExit(f"{FAULT}{fault}") from None
        if "TORCHELASTIC_RUN_ID" in os.environ:
            if isinstance(error, RuntimeError) and ENDED.search(str(error)):
                raise SystemExit(LOST) from None
            time.sleep(LAST_WORDS)  # in which torchrun ends it, where it only lost another one
        raise


if __name__ == "__main__":
    main()
