"""Whole files, written so that a reader never meets half of one, and read so that no code in them runs.

What is written stays written: a file and its folder have reached the disk before the name is given to the new one. A
checkpoint is a zip archive, as torch makes it, whose comment is a checksum of all bytes before; torch itself checks
none when it reads.
"""

import errno
import fcntl
import json
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from detrlib.errors import TAKEN, DamagedFile, RunError, fault_of, in_one_line, listed

if TYPE_CHECKING:  # what only executes notebooks need not wait for torch
    import torch


# What mkstemp makes of a dot, the name of a file, with its suffix, and another dot; and hidden parts of tables.
TEMPORARY = re.compile(r"\.(.+\.\w+\.[a-z0-9_]{8}|part-\d+-of-\d+\.parquet)")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system
CHECKSUM = b"detrlib crc32 "  # in front of the eight hexadecimal digits that end a checkpoint
TRAILER = len(CHECKSUM) + 8
SUM = "crc32"  # the last entry of files of JSON that are checked
END = b"PK\5\6"  # in front of the 22 bytes that end an archive without a comment, which has the length 0


def write_atomic(path: Path, write: Callable[[Path], None], before: Path | None = None) -> None:
    """Let `write` fill a temporary neighbour of `path`, then put it in place; on failure `path` stays as it was.

    before: a name in the same folder under which what was there is kept. Raises RunError naming the file when the disk
    is full or not writable.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes files for the owner alone; results are there to be shared
        reach_disk(temporary)
        if before is not None and path.exists():
            _keep(path, before)
        os.replace(temporary, path)
        reach_disk(path.parent)
    # torch.save turns a full disk into a RuntimeError of its own.
    except (OSError, RuntimeError) as error:
        if isinstance(error, TAKEN):
            what = "a folder is in its place" if path.is_dir() else "a file is in the place of its folder"
            raise RunError(f"could not write {path}: {what}; move that away, or choose another place") from error
        fault = f"could not write {path}: {in_one_line(error)}. What was there before is intact"
        raise RunError(f"{fault}; is the disk full, or the folder not yours?") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def reach_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a machine that loses its power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know it for files alone
            raise
    finally:
        os.close(handle)


def _keep(path: Path, before: Path) -> None:
    """Give a file the name `before` too, so that it is missing under its own at no time."""
    before.unlink(missing_ok=True)
    try:
        os.link(path, before)
    except OSError:  # a file system where a file has one name
        os.replace(path, before)


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove what writers that were killed have left in a folder; to be called by the one process that writes there."""
    left = [path for path in folder.glob(".*") if TEMPORARY.fullmatch(path.name)]
    for path in left:
        path.unlink(missing_ok=True)
    return left


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """While it is entered, other processes that enter it for the same `path` wait: what takes long is made once.

    But by each of them where the file system has no locks. Raises RunError where nothing can be written beside `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise RunError(f"could not write beside {path}: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def write_json(path: Path, values: Any, checksum: bool = False) -> None:
    """`values` as indented JSON, written atomically; a mapping may get a last entry by which `load_json` checks it."""
    text = json.dumps(values, indent=1)
    if checksum:
        text = json.dumps(values | {SUM: _sum(text)}, indent=1)
    write_atomic(path, lambda temporary: temporary.write_text(text + "\n"))


def load_json(path: Path, remedy: str) -> dict:
    """The mapping that `write_json` has written. Raises DamagedFile with the remedy, RunError where it is not ours."""
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError(f"it holds {type(values).__name__}, expected names and values")
        known = values.pop(SUM, None)  # files of earlier versions have none
        if known not in (None, _sum(json.dumps(values, indent=1))):
            raise ValueError("it does not hold what was written")
    except PermissionError:
        raise RunError(f"{path} is not yours to read; change its rights") from None
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged ({in_one_line(error)}); {remedy}") from None
    return values


def _sum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def write_checkpoint(path: Path, content: dict, before: Path | None = None) -> None:
    """`content` as torch saves it, with a checksum at its end; written as `write_atomic` does."""
    import torch

    def write(temporary: Path) -> None:
        torch.save(content, temporary)
        with temporary.open("r+b") as file:
            file.seek(-2, os.SEEK_END)  # a zip archive ends with the length of its comment
            file.write(struct.pack("<H", TRAILER))
            size = file.tell()
            file.seek(0)
            checksum = _trailer(file, size)
            file.seek(size)
            file.write(checksum)

    write_atomic(path, write, before)


def _trailer(file: BinaryIO, size: int) -> bytes:
    """What a checkpoint ends with whose other bytes are the next `size`."""
    crc, block = 0, memoryview(bytearray(2**20))
    while size and (count := file.readinto(block[:size])):
        crc, size = zlib.crc32(block[:count], crc), size - count
    return CHECKSUM + b"%08x" % crc


def damage(path: Path, ours: bool = True) -> str:
    """In words, what is wrong with the bytes of a checkpoint; empty where they are what was written.

    Of one without our checksum, as earlier versions and other programs write them, those of the archive are looked at,
    which stand for what it holds. `ours`: the archive has no other comment. Raises FileNotFoundError.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TRAILER))
        if (trailer := file.read()).startswith(CHECKSUM):
            file.seek(0)
            return "" if _trailer(file, size - TRAILER) == trailer else "its bytes are not those that were written"
        file.seek(max(0, size - 22))
        if ours and not ((end := file.read()).startswith(END) and end.endswith(b"\0\0")):
            return f"it does not end as one, after {size} bytes"
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{changed} in it has changed" if (changed := archive.testzip()) else ""
    except Exception as error:  # zipfile has many, for every field that may be wrong
        return f"no whole archive: {in_one_line(error)}"


def load_checkpoint(path: Path, needed: Collection[str] = ()) -> dict:
    """A checkpoint on the CPU; no code in the file is run.

    Raises DamagedFile naming it, or RunError where it is missing, lacks entries of `needed`, or is another program's.
    """
    import torch

    there = ", ".join(sorted(other.stem for other in path.parent.glob("*.pt") if other != path)) or "none"
    try:
        fault = damage(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"no checkpoint {path}; there are {there}") from None
    except PermissionError:
        raise RunError(f"{path} is not yours to read; change its rights, or use another checkpoint: {there}") from None
    except OSError as error:  # of a disk
        fault = in_one_line(error)
    if fault:
        raise DamagedFile(
            f"{path} is damaged, or no checkpoint of this project ({fault}); copy it again, or use another checkpoint "
            f"of the run: there are {there}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whole, but no file of torch, or with code in it: its message tells how to let that run
        if fault_of(error):  # memory may be short
            raise
        raise RunError(
            f"{path} is not a checkpoint of this project: it holds something else than tensors and numbers, which is "
            f"not read; put back what the run has written, or use another checkpoint: there are {there}"
        ) from None
    missing = [name for name in needed if name not in state] if isinstance(state, dict) else ["a state"]
    if missing:
        raise RunError(f"{path} is not a checkpoint of this project: it lacks {', '.join(missing)}")
    return state


def weight_faults(own: dict, given: dict) -> list[str]:
    """In words, every way in which a state dict does not fit another: names, shapes, values that are not finite."""
    faults = [f"missing {name}" for name in own if name not in given]
    faults += [f"unexpected {name}" for name in given if name not in own]
    faults += [
        f"{name} is {tuple(given[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in given and own[name].shape != given[name].shape
    ]
    return faults + [f"{name} holds values that are no numbers" for name in given if not given[name].isfinite().all()]


def load_weights(model: "torch.nn.Module", state: dict, source: Path) -> None:
    """Copy weights into `model`. Raises RunError naming the first faults if they are of another one, or not finite."""
    if faults := weight_faults(model.state_dict(), state):
        raise RunError(f"{source} holds weights that do not fit this architecture: {listed(faults, 4, '; ')}")
    model.load_state_dict(state)
