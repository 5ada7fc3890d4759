"""What can go wrong through no fault of the library. Every message is one line: what is wrong, where, and the remedy.

The command line prints it and ends with a code that is not zero; notebooks show it as the last line of a cell.
"""

import errno
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

STOPPED = 75  # exit code of a training that a signal has stopped: EX_TEMPFAIL of sysexits.h, "start me again"
# Of a disk or of rights: no room, not ours, out of reach.
OUTSIDE = ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EIO", "ESTALE", "ENAMETOOLONG", "EMFILE")
TAKEN = (IsADirectoryError, NotADirectoryError, FileExistsError)  # something else is at the place of a file or folder
WORKER_GONE = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) ([\w ]+)")
WORKERS = "a process that prepares images {}; was memory short? Set data.workers: 0, or fewer"
SHORT_OF_MEMORY = re.compile(r"tried to allocate [\d.]+ \w+|calculation overflowed|(out of|not allocate) memory", re.I)


class DetrlibError(Exception):
    """A fault that can be foreseen; catch this one to catch them all."""


class ConfigError(DetrlibError, ValueError):
    """A setting or an argument is unknown, of the wrong type, or contradicts another; the message names it."""


class DataError(DetrlibError, ValueError):
    """Images or annotations are missing or contradict each other; the message names the file and the entry."""


class WeightsError(DetrlibError):
    """A file of weights is missing, unreachable, or of another model; the message names it and says what it is."""


class RunError(DetrlibError):
    """A run cannot be read, started or finished as asked; the message names the folder or file."""


class DamagedFile(RunError):
    """A file of ours holds other bytes than were written, or is no such file; the message names it and the remedy."""


class ModelError(DetrlibError, ValueError):
    """A model lacks the attention, layer, head or detection that is asked for; the message says which it has."""


class NonFiniteLoss(DetrlibError):
    """Training met a loss that is not a number; the message names step, learning rate and images."""


class Stopped(DetrlibError):
    """A signal has ended training, which was saved at its last step; the message names it and how to go on."""


def fault_of(error: Exception) -> str | None:
    """What an error says that is one of ours, or of a disk, of rights, of memory or of a process that has ended.

    None: it is a defect. PyTorch raises that a process which prepares batches was killed wherever training stands.
    """
    if isinstance(error, DetrlibError):
        return str(error)
    if isinstance(error, TAKEN):
        return f"{in_one_line(error)}; move that away, or choose another place"
    if errno.errorcode.get(getattr(error, "errno", None)) in OUTSIDE:
        return in_one_line(error)
    if gone := WORKER_GONE.match(str(error)):
        return WORKERS.format(gone[1])
    return _memory_fault(error)


def listed(values: Iterable, most: int = 8, between: str = ", ") -> str:
    """The first of `values` for a message, and how many more there are."""
    values = list(values)
    more = [f"and {len(values) - most} more"] if len(values) > most else []
    return between.join([*map(str, values[:most]), *more])


def shown(given: object, most: int = 60) -> str:
    """What was given, for a message, however long it is."""
    text = repr(str(given) if isinstance(given, Path) else given)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def in_one_line(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _memory_fault(error: Exception) -> str | None:
    """In one line, that memory was short, where an exception of Python's or PyTorch's says so; None: it says else."""
    said = SHORT_OF_MEMORY.search(str(error))
    if said is None and not isinstance(error, MemoryError):
        return None
    what = f" ({' '.join(said[0].split())})" if said else ""
    return f"memory is short{what}; smaller images, fewer of them at a time, or a smaller model take less of it"


def is_main_process() -> bool:
    """Whether this is the process that speaks for all that torchrun has started; where there is one alone, it is."""
    return int(os.environ.get("RANK", 0)) == 0


def show_messages() -> None:
    """Let the library's messages (data drawn, boxes dropped, backbone pretrained) appear on a command line, once."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("detrlib").setLevel(logging.INFO if is_main_process() else logging.ERROR)
