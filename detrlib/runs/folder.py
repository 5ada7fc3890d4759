"""The run folder: the contract between training and everything that reads its results.

    papermill_runs/<run_name>/
        config.yaml        every setting, resolved          environment.json   commit, versions, hardware
        data.json          what it is trained and judged on: counts, classes, digests; images that were held out
        start.json         what training started from, where that was other weights (`train.start`)
        micro_batch.json   what `train.micro_batch: auto` has found, and on which device
        metrics.jsonl      one line per logged step or epoch, flat "group/name" keys
        checkpoints/       last.pt (resume), previous.pt (the one before), best.pt and epoch-*.pt (weights)
        results.json       final numbers; with `unfinished`: of a run that was interrupted, evaluated all the same
        predictions.json   COCO-format detections           examples/*.npz     images and their detections
        maps/*.parquet     attention maps, see `maps`
        measures/*         of single images and objects: sparsity, localisation, matches that AP is computed from;
                           parquet files, or folders of them, one for each process of an evaluation
        *.ipynb            executed notebooks
        .owner             who is writing there just now, see `owner`

Files are written to a temporary neighbour and renamed, so a reader or a resumed run never meets half of one; lines of
metrics.jsonl are appended, and one that is cut short or damaged is left out.
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from shlex import quote

import numpy as np
import pandas as pd

from detrlib.config import PROJECT, Config, load_config
from detrlib.data.classes import names_by_label
from detrlib.errors import DamagedFile, RunError, in_one_line, listed, shown
from detrlib.files import load_json, write_atomic
from detrlib.metrics.tables import part_files, read_table, write_table

log = logging.getLogger(__name__)

RUNS = PROJECT / "papermill_runs"
NOT_RUNS = ("configs", "pictures", "study")  # folders there; in the last are sweeps, and their runs
LONGEST_NAME = 200  # bytes: file systems take 255, of which names of temporary files have some
RESERVED = ("checkpoints", "examples", "maps", "measures", "untrained")  # folders that are no results of a split


def run_path(name: str | int | Path) -> Path:
    """The folder of a run: a bare or nested name lies under papermill_runs/, an absolute path is itself.

    A number is a name too: papermill makes one of `-p run_name 2024`. Raises RunError for what cannot be the name of a
    folder on every file system, or is that of something else.
    """
    if fault := name_fault(name):
        raise RunError(f"{shown(name)} names no run: {fault}")
    return _run_path(name)


def _run_path(name: str | int | Path) -> Path:
    path = Path(str(name))
    return PROJECT / path if path.parts[:1] == (RUNS.name,) else RUNS / path


def name_fault(name: str | int | Path) -> str | None:
    """Why a run cannot be called so, in words; None where it can."""
    if isinstance(name, bool) or not isinstance(name, str | int | Path):
        return "expected a text; papermill leaves it one with -r run_name ... in place of -p"
    text, path = str(name), _run_path(name)
    here = path.is_relative_to(RUNS)
    within = path.parts[len(RUNS.parts) :] if here else path.parts[-1:]
    if not text.isprintable():  # before the system is asked anything
        return "it holds a line break, or another character that is not printed"
    if not text.strip() or RUNS.is_relative_to(path):  # that folder itself, or one around it
        return f"give a folder under {RUNS.name}/"
    if ".." in path.parts:
        return f"it has .. in it; give a folder under {RUNS.name}/, or the absolute path of one elsewhere, without"
    if odd := next((part for part in within if part != part.strip() or part.startswith(("-", "~"))), None):
        return f"{odd!r} begins with - or ~, or begins or ends with a space, which a shell takes for something else"
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        return f"it has more than {LONGEST_NAME} bytes in one part, and file systems take little longer ones"
    if here and within[0] in NOT_RUNS and (len(within) == 1 or within[0] != "study"):
        return f"{RUNS.name}/{within[0]} is for something else; choose another name"
    if within[-1] in RESERVED[:-1]:
        return f"{within[-1]} is a part of a run; choose another name"
    if file := next((part for part in (path, *path.parents) if os.path.isfile(part)), None):
        return f"{file} is a file; choose another name, or move it away"
    return None


def finished_runs() -> list[Path]:
    """The runs under papermill_runs/, in folders of sweeps too, that are trained and evaluated; the newest first."""
    checkpoints = sorted(RUNS.rglob("checkpoints/last.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    results = {path.parent.parent: _results_if_any(path.parent.parent) for path in checkpoints}
    return [run_dir for run_dir, known in results.items() if "detection" in known and "unfinished" not in known]


def _results_if_any(run_dir: Path) -> dict:
    """The results of a run, or none where it is not finished or they are damaged."""
    try:
        return load_results(run_dir)
    except RunError:
        return {}


def newest_run() -> Path:
    """The newest finished run. Raises RunError where there is none."""
    if not (finished := finished_runs()):
        raise RunError(f"no finished run in {RUNS}; train some with: make quickstart")
    return finished[0]


def find_run(name: str = "") -> Path:
    """The run of this name, or, for an empty one, the newest that is finished. Raises RunError where there is none."""
    return newest_run() if name == "" else run_path(name)


def find_runs(names: Sequence[str] = (), seeds: bool = False) -> list[Path]:
    """Find several runs to be compared.

    Args:
        names: of the runs; none: the newest finished run, and, where it lies in the folder of a sweep, the other
            finished runs there.
        seeds: where none are named, take all seeds of a group of runs instead of the newest.

    Returns:
        Their folders, the newest first where none are named.

    Raises:
        RunError: there is no run of a name; or none is named, and none is finished.
    """
    if names:
        run_dirs = [run_path(name) for name in names]
        for run_dir in run_dirs:
            if not run_dir.is_dir():
                raise RunError(f"there is no run {run_name(run_dir)}; {_meant(run_dir) or 'correct the name'}")
        return run_dirs
    newest, chosen = newest_run(), {}
    for run_dir in finished_runs():
        if run_dir == newest or run_dir.parent == newest.parent != RUNS:
            chosen.setdefault(run_dir.name if seeds else group_of(run_dir.name), run_dir)
    return list(chosen.values())


def looking_at(run_dirs: Sequence[Path]) -> str:
    """Say in words which runs are looked at, when their training was finished, and which others there are."""
    shown = ", ".join(f"{run_name(run_dir)}{_finished(run_dir)}" for run_dir in run_dirs)
    others = [run_name(run_dir) for run_dir in finished_runs() if run_dir not in run_dirs]
    return f"looking at {shown}; others: {listed(others) or 'none'}"


def run_name(run_dir: Path) -> str:
    """The name of a run, of which `run_path` makes its folder."""
    return str(run_dir.relative_to(RUNS)) if run_dir.is_relative_to(RUNS) else str(run_dir)


def to_measure(run_dir: Path, command: str = "detrlib evaluate") -> str:
    """The command that measures a run, as a shell takes it, whatever the run is called."""
    return f"{command} {quote(run_name(run_dir))}"


def within_project(path: Path) -> str:
    """`path` from the project root where it lies in it: an executed notebook should not name the machine."""
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def _finished(run_dir: Path) -> str:
    path = run_dir / "checkpoints" / "last.pt"
    if standing := _results_if_any(run_dir).get("unfinished"):
        return f" (unfinished: {standing})"
    return f" (finished {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M})" if path.exists() else ""


def is_finished(run_dir: Path) -> bool:
    """Whether training in a run folder has come to its end; an interrupted run may have results all the same.

    Raises RunError where its results are damaged.
    """
    return (run_dir / "results.json").exists() and "unfinished" not in load_results(run_dir)


def run_config(run_dir: Path) -> Config:
    """The settings of a run, finished or not. Raises RunError for a folder that is no run."""
    if not (run_dir / "config.yaml").exists():
        remedy = _meant(run_dir) or "put it back, or correct the name"
        raise RunError(f"{run_dir} has no config.yaml: not a run, or it has lost that; {remedy}")
    if not (run_dir / "config.yaml").stat().st_size:  # which would be read as the defaults
        raise DamagedFile(f"{run_dir / 'config.yaml'} is empty; put back the settings that the run was begun with")
    return load_config(run_dir / "config.yaml")


def _meant(run_dir: Path) -> str:
    """What may be meant by the name of a folder that is no run: runs in it, or one of like name; empty: nothing."""
    runs = [run_name(file.parent) for file in sorted(RUNS.glob("**/config.yaml")) if file.parent.name not in RESERVED]
    name = run_name(run_dir)
    if inside := [run for run in runs if run.startswith(f"{name}/")]:
        return f"a folder of runs: {listed(inside)}"
    near = difflib.get_close_matches(name, runs, 2, 0.6)
    return f"did you mean {' or '.join(near)}?" if near else ""


def class_names(run_dir: Path) -> dict[int, str]:
    """The classes of a run by their labels: those of its settings, and those of the data it was evaluated on.

    Empty where neither is known. Raises DataError naming the results where their names are damaged.
    """
    results = run_dir / "results.json"
    evaluated = names_by_label(load_results(run_dir).get("names", {}), results) if results.exists() else {}
    return (run_config(run_dir).data.names or {}) | evaluated


def append_metrics(run_dir: Path, record: dict[str, float | int | None]) -> None:
    """Add one line to metrics.jsonl; a number that is not finite becomes null."""
    clean = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in record.items()}
    path = run_dir / "metrics.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
    except OSError as error:
        raise RunError(f"could not write {path}: {error}; free some space, the same run name continues") from error


def read_metrics(run_dir: Path) -> list[dict]:
    """The records of metrics.jsonl, each of which has a global_step and an epoch.

    A last line cut short by a crash is left out; any other that is no record too, with a warning naming it.
    """
    path = run_dir / "metrics.jsonl"
    *lines, cut = path.read_bytes().split(b"\n") if path.exists() else [b""]
    records = [_record(line) for line in (*lines, cut)]
    if lost := [number for number, record in enumerate(records[: len(lines)], start=1) if record is None]:
        log.warning("%s: what line %s said is lost: the file was damaged", path, listed(lost))
    return [record for record in records if record is not None]


def _record(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
        return record if isinstance(record["global_step"] + record["epoch"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def truncate_metrics(run_dir: Path, last_step: int, epoch: int) -> None:
    """Forget what was logged after the checkpoint that a run resumes from, of a step and of so many whole epochs."""
    kept = [r for r in read_metrics(run_dir) if r["global_step"] <= last_step and r["epoch"] <= epoch]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomic(run_dir / "metrics.jsonl", lambda path: path.write_text(lines))


def load_results(run_dir: Path) -> dict:
    """results.json of a run that was evaluated. Raises RunError when it was not, or the file is damaged."""
    path, again = run_dir / "results.json", to_measure(run_dir)
    if not path.exists():
        kept = next((name for name in ("best", "last") if (run_dir / "checkpoints" / f"{name}.pt").exists()), None)
        measure = f", or measure it as it is: {again} --checkpoint {kept}" if kept else ""
        raise RunError(
            f"{run_dir} has no results.json: not a run, or not finished; start it again to continue{measure}"
        )
    return load_json(path, f"delete it, then start the run again, or: {again}")


def run_labels(run_dirs: Iterable[Path]) -> dict[Path, str]:
    """A short name for each run: its folder's, with those above it where that is not enough to tell runs apart."""
    run_dirs = list(run_dirs)
    depth = 1
    while len({run_dir.parts[-depth:] for run_dir in run_dirs}) < len(set(run_dirs)):
        depth += 1
    return {run_dir: "/".join(run_dir.parts[-depth:]) for run_dir in run_dirs}


def group_of(label: str) -> str:
    """The name that runs of several seeds share: `label` without "-seed3" or "_seed3" at the end of a folder's name."""
    return re.sub(r"[-_]seed\d+(?=/|$)", "", label)


def provenance(run_dirs: Iterable[Path], made_by: str) -> str:
    """Where a figure comes from: what made it, and of each run the commit, the device and the resolved config."""
    lines = [f"made by {made_by}"]
    for run_dir, label in run_labels(run_dirs).items():
        lines.append(f"{label}: {_made_with(run_dir)}")
    lines.append("each run with a model: detrlib train <its folder>/config.yaml --name <a new name>")
    return "\n".join(lines)


def known_environment(run_dir: Path) -> dict:
    """environment.json, empty where there is none. Raises DamagedFile naming it."""
    path = run_dir / "environment.json"
    return load_json(path, "delete it: what has made the run is then not known") if path.exists() else {}


def training_starts(run_dir: Path) -> list[dict]:
    """When and at which step training was started, and stopped by which signal, each time. Raises DamagedFile."""
    return known_environment(run_dir).get("starts", [])


def _made_with(run_dir: Path) -> str:
    """In words, commit, version and device."""
    if not (known := known_environment(run_dir)):
        return "commit and device are not known"
    changed = " with uncommitted changes" if known["uncommitted_changes"] else ""
    device = ", ".join(known["gpus"]) or f"CPU, {known['threads']} threads"
    commit = known["commit"] or "not known, without git"
    return f"commit {commit}{changed}; torch {known['packages']['torch']}; {device}"


def save_tables(run_dir: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Each table as measures/<name>.parquet, written atomically."""
    for name, table in tables.items():
        write_table(run_dir / "measures" / f"{name}.parquet", table)


def has_table(run_dir: Path, name: str) -> bool:
    """Whether a table of this name was written."""
    return _table_path(run_dir, name).exists()


def load_table(run_dir: Path, name: str, made_by: str = "detrlib evaluate") -> pd.DataFrame:
    """Read one of a run's tables.

    Args:
        run_dir: folder of the run.
        name: of the table: the file measures/<name>.parquet, or the folder measures/<name> with parts of it.
        made_by: the command that makes it, for messages.

    Raises:
        RunError: there is no such table, or it is damaged, or parts of it are missing; names the file or folder.
    """
    path = _table_path(run_dir, name)
    if not path.exists():
        raise RunError(f"no {path}; measure the run (again): {to_measure(run_dir, made_by)}")
    parts = part_files(path)  # raises where some are missing
    try:
        table = read_table(path)
    except Exception as error:  # pyarrow has many
        remedy = f"delete it, then: {to_measure(run_dir, made_by)}"
        raise RunError(f"{path} is damaged ({in_one_line(error)}); {remedy}") from error
    # Processes have every other batch each.
    return table.sort_values("image_id", kind="stable", ignore_index=True) if len(parts) > 1 else table


def _table_path(run_dir: Path, name: str) -> Path:
    folder = run_dir / "measures" / name
    return folder if any(folder.glob("part-*.parquet")) else folder.with_suffix(".parquet")
