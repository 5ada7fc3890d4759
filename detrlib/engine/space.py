"""The room that checkpoints take on disk, asked for before the first step rather than when it is used up."""

import shutil
from pathlib import Path

from detrlib.config import Train
from detrlib.engine.memory import gib
from detrlib.engine.state import TrainingState
from detrlib.errors import RunError

OTHERS = 2**25  # bytes for all else that a run writes, at least


def checkpoint_space(state: TrainingState, cfg: Train, folder: Path) -> str:
    """In words, what the checkpoints of a training will take, and what is free.

    last.pt, previous.pt, the one that is written beside them, best.pt, and those of `train.keep_every`; what is there
    already counts. Raises RunError where they do not fit.
    """
    weights, whole = checkpoint_sizes(state)
    kept = cfg.epochs // cfg.keep_every if cfg.keep_every else 0
    needed = 3 * whole + (1 + kept) * weights
    there = {path.stat().st_ino: path.stat().st_size for path in folder.glob("*.pt")}  # one file may have two names
    left = max(0, needed - sum(there.values())) + OTHERS
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    text = f"checkpoints: {gib(whole)} each, at most {gib(needed)} in all"
    if left > free:
        also = f", set train.keep_every above {cfg.keep_every}" if kept else ""
        raise RunError(
            f"{text}, and {gib(OTHERS)} for the rest, but {gib(free)} are free for {folder}: make {gib(left - free)} "
            f"more free{also}, and start again"
        )
    return f"{text}; {gib(free)} are free"


def checkpoint_sizes(state: TrainingState) -> tuple[int, int]:
    """Bytes of a checkpoint of weights such as best.pt, and of last.pt."""
    models = [state.trained] if state.average is None else [state.trained, state.average]
    weights = sum(tensor.nbytes for model in models for tensor in model.state_dict().values())
    trained = sum(p.nbytes for group in state.optimizer.param_groups for p in group["params"])
    return weights, weights + 2 * trained  # AdamW keeps two moments of each
