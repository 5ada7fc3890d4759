"""A run folder around weights from elsewhere."""

from pathlib import Path

from detrlib.checkpoints.source import Source, build_source
from detrlib.config import save_config
from detrlib.errors import RunError
from detrlib.files import save_checkpoint, write_atomic, write_json
from detrlib.runs.folder import environment, run_path


def free_path(name: str | Path) -> Path:
    """The folder of a run that is to be made. Raises RunError if it is already there."""
    run_dir = run_path(name)
    if run_dir.exists():
        raise RunError(f"{run_dir} is there already; choose another run name, or delete the folder")
    return run_dir


def save_run(source: Source, run_dir: Path) -> None:
    """A run folder around weights, ready to be evaluated, after which it is like any other run's.

    Its results.json, empty of numbers until then, says that there is nothing to resume. Raises RunError if the folder
    is already there.
    """
    free_path(run_dir)
    state = build_source(source).state_dict()
    write_atomic(run_dir / "config.yaml", lambda file: save_config(source.cfg, file))
    write_json(run_dir / "environment.json", environment())
    save_checkpoint(run_dir / "checkpoints" / "last.pt", {"model": state, "epoch": source.epoch, "global_step": 0})
    names = {str(label): name for label, name in (source.names or {}).items()}
    write_json(run_dir / "results.json", {"imported": source.path.name} | ({"names": names} if names else {}))
