"""One owner for each run folder: while a process writes into it, no other does.

    with owned(run_dir): ...                     @owning, for a function with an argument `run_dir`

The owner holds a lock (flock) on the file .owner of the folder, which says who it is. The system lets go of the lock
when the process ends, however that is, so what a killed one has left behind is taken over. Processes that the owner has
started, such as those of a launch and the kernel of a notebook, share the lock as long as they last.

On NFS, Linux makes a lock of the server's of it, which holds between machines. Where a mount keeps locks to its machine
(nolock, local_lock) or has none, what the file says decides: an owner on another machine is believed to be there until
it is said not to be (`detrlib --take-over ...`), or it was an earlier start of the same Slurm job.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from detrlib.errors import RunError, is_main_process
from detrlib.files import NO_LOCKS, remove_unfinished

logger = logging.getLogger(__name__)

OWNER = ".owner"
TAKE_OVER = "DETRLIB_TAKE_OVER"  # environment variable: owners on other machines are gone
LEAVING = 10  # seconds that processes have for leaving whose owner is gone
CLOCK = 60  # seconds by which two readings of the start of one process may differ, where clocks are corrected
PARTS = ("checkpoints", "examples", "maps", "measures", "measures/*")  # of a run folder, which may hold other runs


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Own a run folder, which is made if it is not there, as long as this is entered.

    What writers that were killed have left in it is removed at the start.
    Of several processes that torchrun has started, the first owns it for all.

    Raises RunError at once where another process owns it, naming that, or where the folder cannot be written.
    """
    if not is_main_process():
        yield
        return
    path = run_dir / OWNER
    try:
        made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    except OSError as error:
        raise _closed(run_dir, error) from error
    file, shared = _take(path)
    try:
        if not shared:
            _make_ready(run_dir)
        yield
    finally:
        with file, suppress(OSError):  # the folder may be gone
            if not shared and _lock(file, fcntl.LOCK_EX) is not False:  # no process that shares it is left
                path.unlink()
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def owning(function: Callable) -> Callable:
    """Let a function own the folder that is its argument `run_dir`, see `owned`."""
    given = signature(function)

    @wraps(function)
    def owner(*arguments, **named):
        with owned(given.bind(*arguments, **named).arguments["run_dir"]):
            return function(*arguments, **named)

    return owner


def _make_ready(run_dir: Path) -> None:
    """Remove what writers that were killed have left in a run folder. Raises RunError where a part is not writable."""
    folders = [run_dir, *(folder for part in PARTS for folder in run_dir.glob(part) if folder.is_dir())]
    effective = os.access in os.supports_effective_ids
    for folder in folders:
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=effective):
            raise _closed(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if left := [path for folder in folders for path in remove_unfinished(folder)]:
        logger.info("%s: removed %d files that a killed process had not finished", run_dir, len(left))


def _take(path: Path) -> tuple[BinaryIO, bool]:
    """Open `path` with a lock on it; also whether it is shared with the owner, who has started this process."""
    own, end = _own(), time.monotonic() + LEAVING
    while True:
        file = _open(path)
        try:
            shared = _try(file, path, own, patient=time.monotonic() < end)
        except BaseException:
            file.close()
            raise
        if shared is not None:
            return file, shared
        file.close()
        time.sleep(0.05)


def _open(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    except OSError as error:
        raise _closed(path.parent, error) from error


def _closed(run_dir: Path, error: OSError) -> RunError:
    return RunError(f"{run_dir} cannot be written ({error.strerror}); make it writable, or choose another run name")


def _try(file: BinaryIO, path: Path, own: dict[str, Any], patient: bool) -> bool | None:
    """False: the folder is this process's now; True: it is its owner's, who has started this process; None: soon to be
    known. Raises RunError where it is another's."""
    free, said = _lock(file, fcntl.LOCK_EX), _said(file)
    here = said and (said["host"] == own["host"] or said["boot"] == own["boot"] is not None)
    seen = here and said.get("numbers") == own["numbers"]  # not in another container
    if said and not (here and free) and (_has_started_step(said, own) or (seen and _is_above(said))):
        return None if _lock(file, fcntl.LOCK_SH) is False else True
    if seen and not free:
        if _runs(said):
            raise RunError(f"{_in_use(path, said)}; wait for it, end it, or choose another run name")
    elif said and free is False:
        raise RunError(f"{_in_use(path, said)}; wait for it, end it there, or choose another run name")
    elif said and not (here and free) and not _may_be_taken(said, own):
        raise RunError(
            f"{_in_use(path, said)}; whether it still runs cannot be seen from {own['host']}. If it does not, start "
            f"again with detrlib --take-over ..., or {TAKE_OVER}=1 in the environment of a notebook"
        )
    if free is False:  # the owner is just writing down who it is, or it is gone, and what it has started is leaving
        if not patient:
            raise RunError(f"{_in_use(path, said)}, or what that has started; end it, or choose another run name")
        return None
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return None  # the last owner has just removed it
    if free is None:
        logger.warning("%s: no locks on this file system; of two starts at the same moment, both begin", path.parent)
    file.truncate(0)
    os.pwrite(file.fileno(), json.dumps(own).encode(), 0)
    return None if _lock(file, fcntl.LOCK_SH) is False or _said(file) != own else False


def _lock(file: BinaryIO, kind: int) -> bool | None:
    """Whether the lock could be had at once; None where there are none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return None if error.errno in NO_LOCKS else False


def _own() -> dict[str, Any]:
    """Who this process is."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # which containers of a machine have in common
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else None,
        "process": os.getpid(),
        "numbers": os.readlink(space) if os.path.lexists(space := "/proc/self/ns/pid") else None,  # of processes: whose
        "started": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "step": os.environ.get("SLURM_STEP_ID"),
    }


def _said(file: BinaryIO) -> dict[str, Any] | None:
    """Who is said to be the owner; None where nobody is, or it is not written to its end."""
    try:
        return json.loads(os.pread(file.fileno(), 4096, 0))
    except ValueError:
        return None


def _is(said: dict[str, Any], process: psutil.Process) -> bool:
    return process.pid == said["process"] and abs(process.create_time() - said["started"]) < CLOCK


def _is_above(said: dict[str, Any]) -> bool:
    """Whether the owner is this process, or has started it."""
    return any(_is(said, process) for process in (psutil.Process(), *psutil.Process().parents()))


def _runs(said: dict[str, Any]) -> bool:
    """Whether the owner is there; False too where this process may not see it."""
    try:
        return _is(said, psutil.Process(said["process"]))
    except psutil.Error:
        return False


def _has_started_step(said: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether the owner has started this process by srun, as a step of its job; it is then no parent of it."""
    same = said["job"] is not None and (said["job"], said["restarts"]) == (own["job"], own["restarts"])
    return same and said.get("step") is None and own["step"] is not None


def _may_be_taken(said: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether an owner on another machine is known to be gone."""
    requeued = said["job"] is not None and said["job"] == own["job"] and said["restarts"] < own["restarts"]
    return requeued or bool(os.environ.get(TAKE_OVER))


def _in_use(path: Path, said: dict[str, Any] | None) -> str:
    if said is None:
        return f"{path.parent} is in use by another process"
    since = datetime.fromtimestamp(said["started"])
    return f"{path.parent} is in use by process {said['process']} on {said['host']}, begun {since:%Y-%m-%d %H:%M:%S}"
