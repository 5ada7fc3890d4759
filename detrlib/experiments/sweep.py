"""Train several variants of one experiment side by side, evaluate them, and draw what they show together.

    detrlib sweep papermill_runs/configs/quickstart.yaml

A sweep file names a `base` config, `overrides` for all runs, and `runs`: a name and the overrides of each. With
`seeds`, every run is repeated for each of them under the name <run>-seed<N>. `measure` holds parameters of the notebook
evaluate, such as how many images to explain.
Every run is the notebook train, then evaluate, executed in papermill_runs/<sweep>/<run>/; then attention_maps and
thesis_figures are executed over all runs and the last becomes report.html. What is finished is skipped, what was
interrupted goes on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, NamedTuple

import torch

from detrlib import runs
from detrlib.config import PROJECT, Config, load_config, project_path, read_yaml, save_config
from detrlib.data import build_dataset, look_over, open_splits
from detrlib.data.shapes import cores
from detrlib.engine.notebooks import (
    checked_parameters,
    execute_notebook,
    find_executed,
    find_notebook,
    report_html,
    shrink_pictures,
)
from detrlib.engine.pretrain import backbone_weights
from detrlib.errors import ConfigError, RunError
from detrlib.files import write_atomic, write_json

SECONDS_BETWEEN_REPORTS = 15
GRACE = 5  # seconds; a terminal interrupts children too, and twice would be in the midst of their leaving in order


@dataclass
class Job:
    """One run of a sweep and the subprocess that works on it."""

    folder: Path
    cfg: Config
    measure: dict[str, Any]  # parameters of notebook evaluate
    process: subprocess.Popen | None = None
    failed: bool = False

    @property
    def finished(self) -> bool:
        executed = self.process is None and find_executed(self.folder, "evaluate") is not None
        # One that was interrupted may have been evaluated by hand.
        return executed and (runs.is_finished(self.folder) or not (self.folder / "results.json").exists())

    def progress(self) -> tuple[float, str]:
        """Share of the training steps done, and a few words."""
        records = runs.read_metrics(self.folder)
        if self.finished:
            return 1.0, "done"
        if self.failed:
            return 1.0, "failed"
        if not records:
            return 0.0, "waiting" if self.process is None else "starting"
        ap50 = [r["detection/AP50"] for r in records if r.get("detection/AP50") is not None]
        done = records[-1]["global_step"] / max(1, self._steps)
        return min(done, 0.99), f"{done:4.0%}" + (f" AP50 {ap50[-1]:.2f}" if ap50 else "")

    @cached_property
    def _steps(self) -> int:
        images = len(build_dataset(self.cfg.data, "train"))
        return self.cfg.train.epochs * max(1, images // self.cfg.train.batch_size)


class Sweep(NamedTuple):
    """What a sweep file asks for."""

    configs: dict[str, Config]  # by run name
    measure: dict[str, Any]  # parameters of notebook evaluate


def read_sweep(path: Path) -> Sweep:
    """A sweep file, everything in it checked. Raises ConfigError naming the file and the setting."""
    path = project_path(path)
    values = read_yaml(path)
    shared, seeds, measure = (values.get(name) or {} for name in ("overrides", "seeds", "measure"))
    if fault := _fault(values):
        raise ConfigError(
            f"{path}: {fault}; a sweep has base (a config), runs (a name and overrides each), and optionally overrides "
            "for all, seeds such as [1, 2, 3], and measure (parameters of notebook evaluate)"
        )
    try:
        measure = checked_parameters(find_notebook("evaluate"), measure) if measure else {}
    except RunError as error:
        raise ConfigError(f"{path}: measure: {error}") from None
    wanted = {name: {**shared, **(overrides or {})} for name, overrides in values["runs"].items()}
    if seeds:  # seed by seed, so that every variant has a first result early
        wanted = {f"{name}-seed{seed}": {**w, "train.seed": seed} for seed in seeds for name, w in wanted.items()}
    base = path.parent / values["base"]
    return Sweep({name: load_config(base, overrides) for name, overrides in wanted.items()}, measure)


def _fault(values: dict[str, Any]) -> str | None:
    """What a sweep file must not be, in words."""
    if unknown := values.keys() - {"base", "overrides", "runs", "seeds", "measure"}:
        return f"unknown {', '.join(sorted(map(str, unknown)))}"
    wanted = {"base": str, "runs": dict, "overrides": dict, "seeds": list, "measure": dict}
    for name, kind in wanted.items():
        given = values.get(name)
        if not isinstance(given, kind) and (given is not None or name in ("base", "runs")):
            return f"{name} is {given!r}"
    for name, overrides in values["runs"].items():
        if not isinstance(name, str) or not isinstance(overrides, dict | None):
            return f"runs: {name!r} is {overrides!r}"
    if not all(type(seed) is int for seed in values.get("seeds") or []):
        return f"seeds is {values['seeds']!r}"
    return None if values["runs"] else "runs names none"


def sweep(path: Path, folder: Path, parallel: int | None = None) -> Path:
    """Train and evaluate everything that a sweep file asks for, and report.

    Args:
        path: the sweep file.
        folder: where the runs go, each in a folder of its name.
        parallel: runs side by side; None: one per GPU, or one per core of the CPU.

    Returns:
        The path of the report.

    Raises:
        ConfigError: the file is no sweep, or a setting in it is wrong.
        RunError: runs failed; the others are finished first.
    """
    configs, measure = read_sweep(path)
    jobs = [Job(folder / name, cfg, measure) for name, cfg in configs.items()]
    for job in jobs:
        if runs.is_finished(job.folder):
            runs.refuse_other_settings(job.cfg, job.folder)
    report = folder / "report.html"
    if report.exists() and all(job.finished for job in jobs):
        print(f"all {len(jobs)} runs are done: {report}")
        return report
    _prepare(jobs)
    _work_off(jobs, parallel or _slots())
    if failed := [job.folder / "log.txt" for job in jobs if job.failed]:
        logs = "; ".join(f"{log}: {_last_line(log)}" for log in failed)
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed: {logs}. Call again to retry them.")
    print("drawing figures and tables", flush=True)
    names = {"run_names": [_within_project(job.folder) for job in jobs]}
    _execute(folder, "attention_maps", names)
    executed = _execute(folder, "thesis_figures", names | {"output": _within_project(folder / "figures")})
    shrink_pictures(executed)
    table = folder / "figures" / "main_table.md"
    if table.exists():  # an edited notebook need not write it
        print(table.read_text())
    return report_html(executed, report, f"{folder.name}: report")


def _execute(folder: Path, name: str, parameters: dict[str, Any]) -> Path:
    return execute_notebook(name, folder / find_notebook(name).name, parameters)


def _prepare(jobs: list[Job]) -> None:
    """Draw data, decode pictures and pretrain backbones once, before runs that would wait for each other ask for it."""
    needed = {(job.cfg.data, getattr(job.cfg.model, "backbone", None)) for job in jobs if not job.finished}
    for data, backbone in needed:
        splits = open_splits(data)
        look_over(splits, check=data.check)  # raises what no run can be trained with
        if backbone is not None and backbone.weights == "crops":
            backbone_weights(backbone, splits["train"], data.image_size)


def _slots() -> int:
    """How many runs fit side by side: one per GPU, or per core this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return cores()


def _work_off(jobs: list[Job], slots: int) -> None:
    """Keep `slots` subprocesses busy until every job is finished or failed, reporting on the way."""
    waiting = [job for job in jobs if not job.finished]
    slots = max(1, min(slots, len(waiting)))
    free = SimpleQueue()
    for slot in range(slots):
        free.put(slot)
    starting, interrupted = Lock(), Event()  # so that a run that begins meanwhile is interrupted too, or never begins

    def work(job: Job) -> None:
        slot = free.get()
        with starting:
            if interrupted.is_set():
                return
            _start(job, slot, slots)
        job.failed, job.process = job.process.wait() != 0, None
        free.put(slot)

    start, first = time.monotonic(), [job.progress()[0] for job in jobs]
    with ThreadPoolExecutor(slots) as pool:
        left = {pool.submit(work, job) for job in waiting}
        try:
            while left:
                print(_status(jobs, first, time.monotonic() - start), flush=True)
                done, left = wait(left, SECONDS_BETWEEN_REPORTS)
                for future in done:
                    future.result()  # raises what went wrong in `work` itself
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            interrupted.set()
            wait({future for future in left if not future.cancelled()}, GRACE)
            with starting:
                for job in jobs:
                    if process := job.process:
                        process.send_signal(signal.SIGINT)
            raise


def _start(job: Job, slot: int, slots: int) -> None:
    """Begin or continue a run in a subprocess with its share of the machine."""
    write_atomic(job.folder / "sweep.yaml", lambda path: save_config(job.cfg, path))
    write_json(job.folder / "measure.json", job.measure)
    environment = dict(os.environ, PYTHONUNBUFFERED="1", WANDB_SILENT="true")
    if torch.cuda.is_available():
        inherited = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(inherited.split(",")[slot::slots])
    else:
        # Several runs with a thread each use the cores better than one run with several threads; on a machine that
        # others use as well, threads wait for each other, so what the user has set wins.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _slots() // slots)))
    command = [sys.executable, "-m", "detrlib", "sweep-run", str(job.folder)]
    with (job.folder / "log.txt").open("a") as log:
        job.process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_one(folder: Path) -> None:
    """Train and evaluate one run of a sweep through its notebooks, skipping what is done."""
    name = _within_project(folder)
    if not runs.is_finished(folder):
        parameters = {"config": str(folder / "sweep.yaml"), "run_name": name, "gpus": torch.cuda.device_count() or None}
        _execute(folder, "train", parameters)
    asked = folder / "measure.json"
    measure = json.loads(asked.read_text()) if asked.exists() else {}
    _execute(folder, "evaluate", measure | {"run_name": name})


def _within_project(path: Path) -> str:
    """`path` from the project root where it lies in it: an executed notebook should not name the machine."""
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def _status(jobs: list[Job], first: list[float], seconds: float) -> str:
    """One line: how far each run is, and the time that is left at the pace so far."""
    states = [job.progress() for job in jobs]
    done = sum(share for share, _ in states) - sum(first)
    left = len(jobs) - sum(share for share, _ in states)
    pace = f"about {max(1, round(seconds * left / done / 60))} min left" if done > 0.02 else "estimating the time left"
    words = "  ".join(f"{job.folder.name} {text}" for job, (_, text) in zip(jobs, states, strict=True))
    return f"[{int(seconds) // 60:02d}:{int(seconds) % 60:02d}] {words}  ({pace})"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else "no output"
