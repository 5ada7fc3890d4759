"""Train several variants of one experiment side by side, evaluate them, and draw what they show together.

    detrlib sweep papermill_runs/configs/quickstart.yaml

A sweep file names a `base` config, `overrides` for all runs, and `runs`: a name and the overrides of each. With
`seeds`, every run is repeated for each of them, or for those among its own overrides, under the name <run>-seed<N>, and
{seed} in its overrides is the number.
`measure` and `report` hold parameters of the notebooks evaluate and thesis_figures, such as how many images to explain
and which groups to compare.
Every run is the notebook train, then evaluate, executed in papermill_runs/<sweep>/<run>/; then attention_maps and
thesis_figures are executed over all runs and the last becomes report.html, beside viewer.html, its maps to click on.
What is finished is skipped, what was interrupted goes on. Runs whose `train.start` is another run of the sweep wait for
it.
Sweeps that name the same `folder` keep their runs together in it, and one that several of them ask for is trained once;
each reports in a folder of its own there.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

import torch
from tqdm import tqdm

from detrlib import runs
from detrlib.config import PROJECT, Config, save_config
from detrlib.config.machine import cores
from detrlib.data import build_dataset, look_over, open_splits
from detrlib.engine.children import end, interrupt, passing_on, stopped, with_parent
from detrlib.engine.notebooks import (
    ASKED,
    execute_notebook,
    executed_with,
    find_executed,
    find_notebook,
    report_html,
    shrink_pictures,
)
from detrlib.engine.presented import present_report
from detrlib.engine.pretrain import backbone_weights
from detrlib.engine.start import learns_from_crops
from detrlib.engine.tracking import duration
from detrlib.errors import ConfigError, RunError
from detrlib.experiments.sweep_file import read_sweep
from detrlib.experiments.time_left import Course, seconds_left
from detrlib.files import write_atomic, write_json
from detrlib.runs.owner import owned
from detrlib.runs.results import first_of_groups

INDIFFERENT = ("batch_size", "engine", "examples", "store_maps", "store_sites")  # of `evaluate`: to what is measured
WHO = ("run_name", "gpus")  # parameters of the notebook that change no results
MANY = 8  # runs, of which those under way alone are named while it goes on
SECONDS = 2  # between two looks at the runs where a bar is shown
LINES = {False: 15, True: 60}  # seconds between two lines elsewhere, before and after the time left is known
REPORT, VIEWER, LOG = "report.html", "viewer.html", "log.txt"


@dataclass
class Job:
    """One run of a sweep and the subprocess that works on it."""

    folder: Path
    cfg: Config
    measure: dict[str, Any]  # parameters of notebook evaluate
    process: subprocess.Popen | None = None
    failed: bool = False
    course: Course = field(default_factory=Course)

    @property
    def finished(self) -> bool:
        executed = self.process is None and find_executed(self.folder, "evaluate") is not None
        # One that was interrupted may have been evaluated by hand.
        return executed and (runs.is_finished(self.folder) or not (self.folder / "results.json").exists())

    def progress(self) -> str:
        """In a word or two, how far it is; its course is told."""
        if self.course.over:
            return "failed" if self.failed else "done"
        records = runs.read_metrics(self.folder)
        if not records:
            return "waiting" if self.process is None else "starting"
        ap50 = [r["detection/AP50"] for r in records if r.get("detection/AP50") is not None]
        times = [r["extra/iter_time"] for r in records if "extra/iter_time" in r]
        done = records[-1]["global_step"] / max(1, self._steps)
        self.course.see(time.monotonic(), done, times[-1] * self._steps if times else None)
        return (f"{done:4.0%}" if done < 1 else "measuring") + (f" AP50 {ap50[-1]:.2f}" if ap50 else "")

    @cached_property
    def _steps(self) -> int:
        settings, images = self.cfg.train, len(build_dataset(self.cfg.data, "train"))
        return settings.epochs * (settings.epoch_updates or max(1, images // settings.batch_size))


def sweep(path: Path, folder: Path | None = None, parallel: int | None = None) -> Path:
    """Train and evaluate everything that a sweep file asks for, and report.

    Args:
        path: the sweep file.
        folder: where the runs go, each in a folder of its name; None: that of the file's name under papermill_runs/,
            or the one that it names.
        parallel: runs side by side; None: one per GPU, or one per core of the CPU.

    Returns:
        The path of the report.

    Raises:
        ConfigError: the file is no sweep, or a setting in it is wrong.
        RunError: runs failed; the others are finished first. Or one is worked on by another process.
        Stopped: a signal came, and everything that was begun has saved and left.
    """
    jobs, home, parameters = planned(path, folder)
    report = home / REPORT
    for job in jobs:
        if runs.is_finished(job.folder) and job.finished and (otherwise := _measured_otherwise(job)):
            executed = find_executed(job.folder, "evaluate")
            print(f"warning: {executed} was made with {otherwise}; delete it to measure that run again")
    if drawn(jobs, report):
        print(f"all {len(jobs)} runs are done: {report}")
        return report
    with ExitStack() as stack:
        for own in dict.fromkeys([home, *(job.folder for job in jobs if not job.finished)]):
            stack.enter_context(owned(own))
        came = stack.enter_context(passing_on(interrupt))
        try:
            return _carry_out(jobs, home, parameters, parallel)
        except KeyboardInterrupt:
            raise stopped(came) from None


def drawn(jobs: list[Job], report: Path) -> bool:
    """Whether all runs are done, and the report is of them as they are: none was measured since it was made."""
    executed = [find_executed(job.folder, "evaluate") if job.finished else None for job in jobs]
    return report.exists() and all(path and path.stat().st_mtime <= report.stat().st_mtime for path in executed)


def _carry_out(jobs: list[Job], home: Path, parameters: dict[str, Any], parallel: int | None) -> Path:
    """Train and evaluate what is missing, and report. Arguments and faults are those of `sweep`."""
    report, ordered = home / REPORT, waves(jobs)
    _prepare(jobs)
    for wave in ordered:
        _work_off(jobs, wave, parallel or _slots())
    if failed := [job.folder / LOG for job in jobs if job.failed]:
        logs = "; ".join(f"{log}: {last_line(log)}" for log in failed)
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed: {logs}. Call again to retry them.")
    print("drawing figures and tables", flush=True)
    executed = _draw(home, [runs.within_project(job.folder) for job in jobs], parameters)
    shrink_pictures(executed)
    table = home / "figures" / "main_table.md"
    if table.exists():  # an edited notebook need not write it
        print(table.read_text())
    viewer = home / "figures" / VIEWER
    if viewer.exists():
        print(f"images, detections and maps, to look through in a browser: {viewer.replace(home / VIEWER)}")
    report_html(executed, report, f"{home.name}: report")
    present_report(jobs[0].cfg, home, report)
    return report


def _measured_otherwise(job: Job) -> str:
    """In words, with what a run was measured that the sweep asks for otherwise: settings and the notebook's parameters.
    Those that do not change results are left out, and those of which an earlier version knew nothing."""
    before = runs.load_results(job.folder).get("evaluate", {})
    asked = {name: value for name, value in job.cfg.evaluate.model_dump(mode="json").items() if name not in INDIFFERENT}
    told = [f"evaluate.{n}={before[n]}, not {value}" for n, value in asked.items() if before.get(n, value) != value]
    given = executed_with(find_executed(job.folder, "evaluate"))
    names = [name for name in job.measure | given if name not in WHO and given.get(name) != job.measure.get(name)]
    return "; ".join([*told, *(f"{n}={given.get(n)}, not {job.measure.get(n)}" for n in names)])


def planned(path: Path, folder: Path | None = None) -> tuple[list[Job], Path, dict[str, Any]]:
    """The runs of a sweep file, the folder of its report, and the parameters of that. Arguments as of `sweep`.

    Raises:
        ConfigError: the file is no sweep, or a setting in it is wrong.
        RunError: a run of such a name was trained with other settings.
    """
    asked = read_sweep(path)
    folder = folder or runs.run_path(asked.folder or path.stem)
    jobs = [Job(runs.run_path(folder / name), cfg, asked.measure) for name, cfg in asked.configs.items()]
    for job in jobs:
        if runs.is_finished(job.folder):
            runs.refuse_other_settings(job.cfg, job.folder)
    return jobs, folder / path.stem if asked.folder else folder, asked.report


def waves(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that are not finished, those that start from another one's weights after it."""
    waiting, ordered = [job for job in jobs if not job.finished], []
    while waiting:
        names = {runs.run_name(job.folder) for job in waiting}
        ordered.append([job for job in waiting if job.cfg.train.start not in names])
        if not ordered[-1]:
            raise ConfigError(f"{', '.join(sorted(names))}: train.start goes round in a circle; name another run")
        waiting = [job for job in waiting if job.cfg.train.start in names]
    return ordered


def _draw(folder: Path, names: list[str], asked: dict[str, Any]) -> Path:
    """Execute the notebooks on maps, of one run of each group, and on figures side by side; the second, the report."""
    of_groups = [runs.within_project(path) for path in first_of_groups(map(runs.run_path, names))]
    write_json(folder / ASKED, {"attention_maps": {"run_names": of_groups}})
    maps, log, report = _begin(folder), folder / LOG, find_notebook("thesis_figures").name
    try:
        parameters = {**asked, "run_names": names, "output": runs.within_project(folder / "figures")}
        executed = execute_notebook("thesis_figures", folder / report, parameters)
        if maps.wait():
            raise RunError(f"{log}: {last_line(log)}. Call again to draw what is missing.")
    except BaseException:
        end([maps])
        raise
    return executed


def _prepare(jobs: list[Job]) -> None:
    """Draw data, decode pictures and pretrain backbones once, before runs that would wait for each other ask for it."""
    waiting = [job.cfg for job in jobs if not job.finished]
    needed = {(cfg.data, cfg.model.backbone if learns_from_crops(cfg) else None) for cfg in waiting}
    for data, backbone in needed:
        splits = open_splits(data)
        look_over(splits, check=data.check)  # raises what no run can be trained with
        if backbone is not None:
            backbone_weights(backbone, splits["train"], data.image_size)


def _slots() -> int:
    """How many runs fit side by side: one per GPU, or per core this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return cores()


def _work_off(jobs: list[Job], waiting: list[Job], slots: int) -> None:
    """Keep `slots` subprocesses busy until every job of `waiting` is finished or failed, reporting on all `jobs`."""
    slots = max(1, min(slots, len(waiting)))
    free = SimpleQueue()
    for slot in range(slots):
        free.put(slot)
    starting, interrupted = Lock(), Event()  # so that a run that begins meanwhile is interrupted too, or never begins

    def work(job: Job) -> None:
        slot = free.get()
        try:
            with starting:
                if interrupted.is_set():
                    return
                _start(job, slot, slots)
            job.failed = job.process.wait() != 0
            job.course.ended, job.course.over, job.process = time.monotonic(), True, None
        finally:
            free.put(slot)  # also where it could not be started: the next one waits for it

    for job in jobs:
        job.course.over = job.course.over or job.finished
    start = time.monotonic()
    bar = tqdm(total=1, bar_format="{percentage:3.0f}% {bar:20}{postfix}", dynamic_ncols=True, disable=None)
    with bar, ThreadPoolExecutor(slots) as pool:
        try:
            left = {pool.submit(work, job) for job in waiting}
            while left:
                known = _report(jobs, slots, start, bar)
                done, left = wait(left, LINES[known] if bar.disable else SECONDS)
                for future in done:
                    future.result()  # raises what went wrong in `work` itself
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            interrupted.set()
            with starting:
                processes = [process for job in jobs if (process := job.process)]
            end(processes)
            raise


def _start(job: Job, slot: int, slots: int) -> None:
    """Begin or continue a run in a subprocess with its share of the machine."""
    write_atomic(job.folder / "sweep.yaml", lambda path: save_config(job.cfg, path))
    environment, gpus = dict(os.environ, PYTHONUNBUFFERED="1", WANDB_SILENT="true"), []
    if torch.cuda.is_available():
        inherited = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = inherited.split(",")[slot::slots]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    else:
        # Several runs with a thread each use the cores better than one run with several threads; on a machine that
        # others use as well, threads wait for each other, so what the user has set wins.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _slots() // slots)))
    write_json(job.folder / ASKED, _asked(job, len(gpus) or None))
    job.process = _begin(job.folder, environment)
    job.course.started = time.monotonic()


def _begin(folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Execute what is asked for in a folder in a process of its own, which ends with this one and writes to a log."""
    with (folder / LOG).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "detrlib", "sweep-run", str(folder)],
            cwd=PROJECT,
            env=with_parent(environment),
            stdout=log,
            stderr=log,
            start_new_session=True,  # signals from a terminal come by this process
        )


def _asked(job: Job, gpus: int | None) -> dict[str, dict[str, Any]]:
    """The notebooks that are left of a run, and their parameters."""
    name = {"run_name": runs.within_project(job.folder), "gpus": gpus}
    asked = {"train": {"config": str(job.folder / "sweep.yaml")} | name, "evaluate": job.measure | name}
    if runs.is_finished(job.folder):
        del asked["train"]
    return asked


def _report(jobs: list[Job], slots: int, start: float, bar: tqdm) -> bool:
    """Say how far each run is, and how much time is left for all of it; whether that is known already."""
    told = [(job, job.progress()) for job in jobs]
    if len(jobs) > MANY:
        told = [(job, word) for job, word in told if job.process or job.failed]
    words = "  ".join(f"{job.folder.name} {word}" for job, word in told)
    now, courses = time.monotonic(), [job.course for job in jobs]
    left = seconds_left(courses, slots, now)
    over = f"{sum(course.over for course in courses)} of {len(jobs)} runs done"
    ahead = "estimating the time left" if left is None else f"about {duration(left)} left with all figures"
    minutes, seconds = divmod(int(now - start), 60)
    if bar.disable:
        print(f"[{minutes:02d}:{seconds:02d}] {words}  ({over}, {ahead})", flush=True)
    bar.n = sum(1.0 if course.over else course.share for course in courses) / len(jobs)
    bar.set_postfix_str(f"{over}, {ahead}: {words}")
    return left is not None


def last_line(log: Path) -> str:
    """What a log ends with, which says why a run failed."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else "no output"
