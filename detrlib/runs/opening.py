"""Whether training may begin, or go on, in a run folder, and what such a folder begins with."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from detrlib.config import PROJECT, Config, changed_settings, flat_settings, save_config
from detrlib.data import describe_data
from detrlib.errors import ConfigError, DamagedFile, RunError, listed
from detrlib.files import load_json, write_atomic, write_json
from detrlib.runs.folder import is_finished, known_environment, name_fault, run_config, run_path, training_starts
from detrlib.runs.trained import can_resume

# Where data lie: they may move, as long as they hold the same.
WHERE = (
    "data.root",
    *(f"data.{part}_{what}" for part in ("train", "val") for what in ("split", "images", "annotations")),
)
FREE_TO_CHANGE = (
    *("data.workers", "data.cache", "data.check", "data.truncated", "train.micro_batch"),
    *("train.checkpoint_activations", "train.compile", "train.log_every", "train.keep_every", "train.tracking"),
    "train.save_minutes",
    "evaluate",
)
FROM_DATA = ("model.num_classes", "data.classes")  # which training fills in where a config leaves them open


def open_run(cfg: Config, run_dir: Path, data: Mapping[str, Any] | None = None) -> bool:
    """Make `run_dir` ready for training with `cfg`; True if it holds an unfinished run. As `refuse_run`."""
    refuse_run(cfg, run_dir, data)
    begun = (run_dir / "config.yaml").exists()
    begin_folder(run_dir, cfg, data)
    return begun


def refuse_run(cfg: Config, run_dir: Path, data: Mapping[str, Any] | None = None) -> bool:
    """Whether training with `cfg` would resume in `run_dir`; nothing is written.

    data: as `describe_data` describes those of `cfg`, where they are open already.
    Raises RunError if the run is finished, has lost its checkpoints or its settings, or was begun with other ones or
    other data, and ConfigError if it would start from its own weights.
    """
    if is_finished(run_dir):
        raise RunError(f"{run_dir} is finished and is not overwritten; choose another run name, or delete the folder")
    checkpoint, start = can_resume(run_dir), cfg.train.start
    if start and not checkpoint and name_fault(start) is None and run_path(start) == run_dir:
        raise ConfigError(f"train.start: {start} is the run itself; name another one, or leave it out")
    if checkpoint:  # before the first one, other settings lose nothing
        refuse_other_settings(cfg, run_dir, data)
    return checkpoint


def begin_folder(run_dir: Path, cfg: Config, data: Mapping[str, Any] | None = None) -> None:
    """Write what a folder of results begins with: its settings, its data, and the commit and machine that make it."""
    write_atomic(run_dir / "config.yaml", lambda path: save_config(cfg, path))
    if data:
        write_json(run_dir / "data.json", data, checksum=True)
    starts = training_starts(run_dir)
    write_json(run_dir / "environment.json", environment() | ({"starts": starts} if starts else {}), checksum=True)


def note_start(run_dir: Path, global_step: int) -> None:
    """Add to `starts` in environment.json that training begins, or goes on, after so many steps, and when."""
    known, begun = known_environment(run_dir), datetime.now().isoformat(timespec="seconds")
    starts = [*known.get("starts", []), {"at": begun, "global_step": global_step}]
    write_json(run_dir / "environment.json", known | {"starts": starts}, checksum=True)


def note_stop(run_dir: Path, global_step: int, by: str) -> None:
    """Add to the last of `starts` in environment.json at which step, and by which signal, training was stopped."""
    known = known_environment(run_dir)
    *earlier, last = known["starts"]
    starts = [*earlier, last | {"stopped": global_step, "signal": by}]
    write_json(run_dir / "environment.json", known | {"starts": starts}, checksum=True)


def refuse_other_settings(new: Config, run_dir: Path, data: Mapping[str, Any] | None = None) -> None:
    """Raise RunError if the run in `run_dir` was begun with settings, or data, that give other results than `new`.

    data: as of `refuse_run`; None: those of `new` are opened if they lie elsewhere than before.
    """
    old = run_config(run_dir)
    moved = any(key.startswith(WHERE) for key in changed_settings(new, old))
    free = FREE_TO_CHANGE
    if (run_dir / "data.json").exists():
        free += WHERE
        if data or moved:
            refuse_other_data(run_dir, data or describe_data(new.data))
    before = flat_settings(old)
    changed = [
        f"{key} was {before.get(key, 'not there')}, now {value}"
        for key, value in changed_settings(new, old).items()
        if not key.startswith(free) and not (key in FROM_DATA and None in (value, before[key]))
    ]
    if changed:
        raise RunError(
            f"{run_dir} was begun with other settings ({'; '.join(changed[:5])}); choose another run name, "
            "delete the folder, or go back to its settings to resume"
        )


def refuse_other_data(run_dir: Path, data: Mapping[str, Any]) -> None:
    """Raise RunError if `data`, as `describe_data` has them, are not what the run in `run_dir` was begun with."""
    path = run_dir / "data.json"
    remedy = "delete it to tell data apart by their path"
    before = load_json(path, remedy)
    try:
        differing = [
            f"{part} {name}: {_short(before[part][name])}, now {_short(data[part][name])}"
            for part in ("train", "val")
            if part in data
            for name in before[part]
            if before[part][name] != data[part][name]
        ]
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged (it lacks {error}); {remedy}") from None
    if differing:
        raise RunError(
            f"{run_dir} was begun with other data ({'; '.join(differing)}); go back to those, choose another run name, "
            "or evaluate it on these as other data (detrlib evaluate RUN --on DATA)"
        )


def _short(value: Any) -> str:
    return listed(value.values()) if isinstance(value, dict) else str(value)


def environment() -> dict[str, Any]:
    """Commit, versions and hardware, so that a number can be traced to what made it."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "faster-coco-eval")
    cuda, changes = torch.cuda.is_available(), _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),  # None: not known, without git
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "slurm": slurm_job(),
    }


def slurm_job() -> dict[str, Any] | None:
    """The job of Slurm that this process belongs to, or None: job, array_task (None of no array), node, restarts."""
    given = os.environ
    if "SLURM_JOB_ID" not in given:
        return None
    task = given.get("SLURM_ARRAY_TASK_ID")
    return {
        "job": given.get("SLURM_ARRAY_JOB_ID", given["SLURM_JOB_ID"]),
        "array_task": None if task is None else int(task),
        "node": given.get("SLURM_JOB_NODELIST"),
        "restarts": int(given.get("SLURM_RESTART_COUNT", "0")),
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command in the project, or None outside a checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
