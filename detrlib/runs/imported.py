"""A run folder around weights from elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detrlib.checkpoints.files import fill, official_config, read_official
from detrlib.config import save_config
from detrlib.errors import RunError
from detrlib.files import save_checkpoint, write_atomic, write_json
from detrlib.runs.folder import environment


def save_run(path: str | Path, run_dir: Path, overrides: Mapping[str, Any] | None = None) -> None:
    """A run folder around an official file, ready to be evaluated, after which it is like any other run's.

    Its results.json, empty of numbers until then, says that there is nothing to resume. Raises RunError if the folder
    is already there, otherwise what `load_official` raises.
    """
    if run_dir.exists():
        raise RunError(f"{run_dir} is there already; choose another run name, or delete the folder")
    checkpoint = read_official(path)
    cfg = official_config(checkpoint, overrides)
    state = fill(checkpoint, cfg).state_dict()
    write_atomic(run_dir / "config.yaml", lambda file: save_config(cfg, file))
    write_json(run_dir / "environment.json", environment())
    epoch = 0 if checkpoint.epoch is None else checkpoint.epoch
    save_checkpoint(run_dir / "checkpoints" / "last.pt", {"model": state, "epoch": epoch, "global_step": 0})
    write_json(run_dir / "results.json", {"imported": checkpoint.path.name})
