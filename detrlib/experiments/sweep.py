"""Train several variants of one experiment side by side, evaluate them, and draw what they show together.

    detrlib sweep papermill_runs/configs/quickstart.yaml

A sweep file names a `base` config, `overrides` for all runs, and `runs`: a name and the overrides of each. With
`seeds`, every run is repeated for each of them under the name <run>-seed<N>. `measure` holds parameters of notebook
07_evaluate, such as how many images to explain.
Every run is notebook 06_train, then 07_evaluate, executed in papermill_runs/<sweep>/<run>/; then 08 and 09 are
executed over all runs and the last becomes report.html. What is finished is skipped, what was interrupted goes on.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detrlib import runs
from detrlib.config import PROJECT, Config, load_config, project_path, read_yaml, save_config
from detrlib.data import build_dataset
from detrlib.engine.notebooks import (
    checked_parameters,
    execute_notebook,
    find_notebook,
    is_executed,
    report_html,
    shrink_pictures,
)
from detrlib.engine.pretrain import backbone_weights
from detrlib.errors import ConfigError, RunError
from detrlib.files import write_atomic, write_json

SECONDS_BETWEEN_REPORTS = 15


@dataclass
class Job:
    """One run of a sweep and the subprocess that works on it."""

    folder: Path
    cfg: Config
    measure: dict = field(default_factory=dict)  # parameters of notebook 07_evaluate
    process: subprocess.Popen | None = None
    failed: bool = False
    num_images: int | None = None  # of the training split, once it is known

    @property
    def finished(self) -> bool:
        return self.process is None and is_executed(self.folder / "07_evaluate.ipynb")

    def progress(self) -> tuple[float, str]:
        """Share of the training steps done, and a few words."""
        records = runs.read_metrics(self.folder)
        if self.finished:
            return 1.0, "done"
        if self.failed:
            return 1.0, "failed"
        if not records:
            return 0.0, "waiting" if self.process is None else "starting"
        found = [r["detection/AP50"] for r in records if r.get("detection/AP50") is not None]
        done = records[-1]["global_step"] / max(1, self._steps())
        return min(done, 0.99), f"{done:4.0%}" + (f" AP50 {found[-1]:.2f}" if found else "")

    def _steps(self) -> int:
        if self.num_images is None:
            self.num_images = len(build_dataset(self.cfg.data, "train"))
        return self.cfg.train.epochs * max(1, self.num_images // self.cfg.train.batch_size)


class Sweep(NamedTuple):
    """What a sweep file asks for."""

    configs: dict[str, Config]  # by run name
    measure: dict[str, Any]  # parameters of notebook 07_evaluate


def read_sweep(path: Path) -> Sweep:
    """A sweep file, everything in it checked. Raises ConfigError naming the file and the setting."""
    path = project_path(path)
    values = read_yaml(path)
    unknown = values.keys() - {"base", "overrides", "runs", "seeds", "measure"}
    if unknown or not isinstance(values.get("runs"), dict) or "base" not in values:
        fault = f"unknown {', '.join(sorted(unknown))}" if unknown else "'base' or 'runs' is missing"
        raise ConfigError(
            f"{path}: {fault}; a sweep has base, runs (a name and overrides each), and optionally overrides, seeds and "
            "measure (parameters of notebook 07_evaluate)"
        )
    shared, seeds, measure = (values.get(name) or {} for name in ("overrides", "seeds", "measure"))
    if seeds and not (isinstance(seeds, list) and all(type(seed) is int for seed in seeds)):
        raise ConfigError(f"{path}: seeds is {seeds!r}, expected whole numbers such as [1, 2, 3]")
    try:
        measure = checked_parameters(find_notebook("07_evaluate"), measure) if measure else {}
    except RunError as error:
        raise ConfigError(f"{path}: measure: {error}") from None
    wanted = {name: {**shared, **(overrides or {})} for name, overrides in values["runs"].items()}
    if seeds:  # seed by seed, so that every variant has a first result early
        wanted = {f"{name}-seed{seed}": {**w, "train.seed": seed} for seed in seeds for name, w in wanted.items()}
    base = path.parent / values["base"]
    return Sweep({name: load_config(base, overrides) for name, overrides in wanted.items()}, measure)


def sweep(path: Path, folder: Path, parallel: int | None = None) -> Path:
    """Everything that `path` asks for, in `folder`; returns the path of the report.

    parallel: runs side by side; None: one per GPU, or one per core of the CPU.
    Raises RunError when runs failed; the others are finished first.
    """
    configs, measure = read_sweep(path)
    jobs = [Job(folder / name, cfg, measure) for name, cfg in configs.items()]
    for job in jobs:
        if (job.folder / "results.json").exists():
            runs.refuse_other_settings(job.cfg, job.folder)
    report = folder / "report.html"
    if report.exists() and all(job.finished for job in jobs):
        print(f"all {len(jobs)} runs are done: {report}")
        return report
    _prepare(jobs)
    _work_off(jobs, parallel or _slots())
    failed = [job for job in jobs if job.failed]
    if failed:
        logs = "; ".join(f"{job.folder}/log.txt: {_last_line(job.folder / 'log.txt')}" for job in failed)
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed: {logs}. Call again to retry them.")
    names = [_run_name(job.folder) for job in jobs]
    print("drawing figures and tables", flush=True)
    execute_notebook("08_attention_maps", folder / "08_attention_maps.ipynb", {"run_names": names})
    results = {"run_names": names, "output": _within_project(folder / "figures")}
    execute_notebook("09_thesis_figures", folder / "09_thesis_figures.ipynb", results)
    shrink_pictures(folder / "09_thesis_figures.ipynb")
    table = folder / "figures" / "main_table.md"
    if table.exists():  # an edited notebook need not write it
        print(table.read_text())
    return report_html(folder / "09_thesis_figures.ipynb", report, f"{folder.name}: report")


def _prepare(jobs: list[Job]) -> None:
    """Draw data and pretrain backbones once, before runs that would wait for each other ask for them."""
    for data, backbone in {(job.cfg.data, job.cfg.model.backbone) for job in jobs if not job.finished}:
        dataset = build_dataset(data, "train")
        if backbone.weights == "crops":
            backbone_weights(backbone, dataset, data.image_size)


def _slots() -> int:
    """How many runs fit side by side: one per GPU, or per core this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work_off(jobs: list[Job], slots: int) -> None:
    """Keep `slots` subprocesses busy until every job is finished or failed, reporting on the way."""
    waiting = [job for job in jobs if not job.finished]
    slots = max(1, min(slots, len(waiting)))
    free, running = list(range(slots)), {}
    start, first = time.monotonic(), [job.progress()[0] for job in jobs]
    last_report = 0.0
    try:
        while waiting or running:
            while waiting and free:
                slot = free.pop(0)
                running[slot] = waiting.pop(0)
                _start(running[slot], slot, slots)
            for slot, job in list(running.items()):
                if job.process.poll() is not None:
                    job.failed, job.process = job.process.returncode != 0, None
                    free.append(slot)
                    del running[slot]
            if time.monotonic() - last_report > SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                print(_status(jobs, first, last_report - start), flush=True)
            time.sleep(0.5)
    except KeyboardInterrupt:
        for job in running.values():
            job.process.wait()
        raise


def _start(job: Job, slot: int, slots: int) -> None:
    """Begin or continue a run in a subprocess with its share of the machine."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(job.folder / "sweep.yaml", lambda path: save_config(job.cfg, path))
    write_json(job.folder / "measure.json", job.measure)
    environment = dict(os.environ, PYTHONUNBUFFERED="1", WANDB_SILENT="true")
    if torch.cuda.is_available():
        inherited = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(inherited.split(",")[slot::slots])
    else:
        # Several runs with a thread each use the cores better than one run with several threads.
        environment["OMP_NUM_THREADS"] = str(max(1, _slots() // slots))
    with (job.folder / "log.txt").open("a") as log:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "detrlib", "sweep-run", str(job.folder)],
            cwd=PROJECT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def run_one(folder: Path) -> None:
    """Train and evaluate one run of a sweep through its notebooks, skipping what is done."""
    name = _run_name(folder)
    if not (folder / "results.json").exists():
        parameters = {"config": str(folder / "sweep.yaml"), "run_name": name, "gpus": torch.cuda.device_count() or None}
        execute_notebook("06_train", folder / "06_train.ipynb", parameters)
    asked = folder / "measure.json"
    measure = json.loads(asked.read_text()) if asked.exists() else {}
    execute_notebook("07_evaluate", folder / "07_evaluate.ipynb", measure | {"run_name": name})


def _run_name(folder: Path) -> str:
    return str(folder.relative_to(runs.RUNS)) if folder.is_relative_to(runs.RUNS) else str(folder)


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
