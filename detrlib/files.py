"""Whole files, written so that a reader never meets half of one, and read so that no code in them runs."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrlib.errors import RunError, listed

if TYPE_CHECKING:  # what only executes notebooks need not wait for torch
    import torch


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then put it in place; on failure `path` stays as it was.

    Raises RunError naming the file when the disk is full or not writable.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes files for the owner alone; results are there to be shared
        os.replace(temporary, path)
    # torch.save turns a full disk into a RuntimeError of its own.
    except (OSError, RuntimeError) as error:
        reason = "is the disk full, or the folder not yours?"
        raise RunError(f"could not write {path}: {error}. What was there before is intact; {reason}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """While it is entered, other processes that enter it for the same `path` wait: what takes long is made once.

    Raises RunError where nothing can be written beside `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise RunError(f"could not write beside {path}: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_json(path: Path, values: Any) -> None:
    """`values` as indented JSON, written atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(values, indent=1) + "\n"))


def save_checkpoint(path: Path, state: dict) -> None:
    """`state` as torch saves it, written atomically."""
    import torch

    write_atomic(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path, needed: Collection[str] = ()) -> dict:
    """A checkpoint on the CPU; no code in the file is run. Raises RunError naming the file, and entries it lacks."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.pt")))
        hint = f"there are {there}" if there else "has the run finished its first epoch?"
        raise RunError(f"no checkpoint {path}; {hint}") from None
    except Exception as error:
        raise RunError(
            f"{path} is not a checkpoint of this project, or cut short ({path.stat().st_size} bytes); copy it "
            "again, or use another checkpoint of the run"
        ) from error
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
    faults = weight_faults(model.state_dict(), state)
    if faults:
        raise RunError(f"{source} holds weights that do not fit this architecture: {listed(faults, 4, '; ')}")
    model.load_state_dict(state)
