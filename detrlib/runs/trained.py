"""What a training leaves in its folder to go on from: last.pt, and the checkpoint before it."""

from collections.abc import Collection
from pathlib import Path

from detrlib.errors import DamagedFile, RunError
from detrlib.files import load_checkpoint, reach_disk, write_checkpoint
from detrlib.runs.folder import read_metrics, training_starts

LAST, PREVIOUS = "last.pt", "previous.pt"


def write_trained(folder: Path, content: dict, keep: bool = True) -> None:
    """Write last.pt; the one that was there becomes previous.pt, unless (`keep`) it is known to be damaged.

    Raises RunError naming the file on a full disk; what was there is left as it was.
    """
    if (log := folder.parent / "metrics.jsonl").exists():
        reach_disk(log)  # a checkpoint that outlasts a crash has its log beside it
    write_checkpoint(folder / LAST, content, folder / PREVIOUS if keep else None)


def read_trained(folder: Path, needed: Collection[str] = ()) -> tuple[dict, Path, str]:
    """What training goes on from: last.pt, or previous.pt where that is damaged or gone.

    Args:
        folder: the checkpoints of a run.
        needed: entries that it must have.

    Returns:
        The checkpoint, on the CPU, its file, and in words why it is the one before; empty where it is the last.

    Raises:
        RunError: both are damaged or gone, or what is there is no checkpoint of a training.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    fault = "is gone"
    if last.exists():
        try:
            return load_checkpoint(last, needed), last, ""
        except DamagedFile as error:
            if not previous.exists():
                raise DamagedFile(f"{error}; {_from_weights(folder)}") from None
            fault = "is damaged"
    try:
        content = load_checkpoint(previous, needed)
    except DamagedFile as error:
        raise DamagedFile(f"{last} {fault}, and {error}; {_from_weights(folder)}") from None
    return content, previous, f"warning: {last} {fault}; going on from {PREVIOUS}, the checkpoint before it"


def _from_weights(folder: Path) -> str:
    best = folder / "best.pt"
    start = best if best.exists() else "one of its weights"
    return f"to go on from weights alone, begin a new run with train.start={start}"


def can_resume(run_dir: Path) -> bool:
    """Whether a run has a checkpoint to go on from. Raises RunError where it must have had one, and has none now."""
    folder = run_dir / "checkpoints"
    if (folder / LAST).exists() or (folder / PREVIOUS).exists():
        return True
    records = read_metrics(run_dir)
    saved = any(start["global_step"] or start.get("stopped") for start in training_starts(run_dir))
    evaluated = (run_dir / "results.json").exists()  # as it was, unfinished
    # An epoch is logged before it is saved, so that what comes after the first was logged with a checkpoint at hand.
    if saved or evaluated or sum(record["epoch"] > 0 for record in records) > 1:
        raise RunError(
            f"{folder} holds neither {LAST} nor {PREVIOUS}, but the run had come to step {_step(records)}: put one of "
            "them back to go on, or delete the run's folder to begin anew, or choose another run name"
        )
    return False


def begins_again(run_dir: Path) -> list[str]:
    """In words, that steps of a run without a checkpoint are made anew."""
    records = read_metrics(run_dir)
    again = f"warning: no checkpoint is left of the {_step(records)} steps that were logged; they are made again"
    return [again] if records else []


def _step(records: list[dict]) -> int:
    return max((record["global_step"] for record in records), default=0)
