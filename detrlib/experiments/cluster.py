"""Sweeps on a Slurm cluster: one array, each task of which is one run, and then one job that draws.

    detrlib sweep FILE --slurm --gpus-per-node=1 --time=4:00:00     submit what is missing and not queued or running
    detrlib sweep FILE --list                                       number, name and state of every run
    detrlib sweep FILE --run 3                                      train and measure run 3, here

Tasks have the numbers of their runs. Runs that start from another one of the sweep are an array of their own, after it.
What was submitted for a run stands in slurm.json in its folder, where sweeps that share runs find it. All jobs are
papermill_runs/slurm.sh, which starts again what a time limit or a preemption has stopped.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from detrlib import runs
from detrlib.config import PROJECT, Config, project_path
from detrlib.engine.children import interrupt, passing_on, stopped
from detrlib.engine.launch import launch
from detrlib.engine.notebooks import execute_notebook, find_notebook
from detrlib.errors import ConfigError, RunError, Stopped, listed
from detrlib.experiments.sweep import LOG, REPORT, Job, drawn, last_line, planned, sweep, waves
from detrlib.files import load_json, write_json
from detrlib.runs.owner import owned

SCRIPT = PROJECT / "papermill_runs" / "slurm.sh"
FINDS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")  # without which sbatch finds no cluster, or is not let in
SUBMITTED = "slurm.json"  # in a folder: the task that works on it, such as 12_3, and its log


def submit(
    path: Path, folder: Path | None = None, options: Sequence[str] = (), parallel: int | None = None
) -> list[str]:
    """Submit to Slurm what is missing of a sweep and is neither queued nor running.

    Args:
        path, folder: as of `sweep`.
        options: of sbatch, for all jobs.
        parallel: how many runs may run at a time.

    Returns:
        In words, what was submitted.

    Raises:
        ConfigError: as `sweep`; or the options name an array, which is what is missing.
        RunError: Slurm is not there, or does not take a job; names the command.
    """
    if given := [option for option in options if re.match("--array|-a", option)]:
        raise ConfigError(f"{given[0]}: the array is what is missing; --parallel says how many runs at a time")
    jobs, home, _ = planned(path, folder)
    if drawn(jobs, home / REPORT):
        return [f"all {len(jobs)} runs are done: {home / REPORT}"]
    queue, before, told = queued(), [], []
    numbers = {job.folder: number for number, job in enumerate(jobs, start=1)}
    command = ["sweep", str(project_path(path)), *(["--name", str(folder)] if folder else [])]
    for wave in waves(jobs):
        missing = [job.folder for job in wave if submitted(job.folder).get("task") not in queue]
        begun = [submitted(job.folder)["task"] for job in wave if job.folder not in missing]
        if missing:
            array = ",".join(str(numbers[name]) for name in missing) + (f"%{parallel}" if parallel else "")
            task = _sbatch(home, [*options, f"--array={array}"], "slurm-%A_%a.out", before, command)
            for name in missing:
                log = home / f"slurm-{task}_{numbers[name]}.out"
                write_json(name / SUBMITTED, {"task": f"{task}_{numbers[name]}", "log": str(log)})
            told.append(f"{task}: {len(missing)} of {len(jobs)} runs, {listed(name.name for name in missing)}")
            begun.append(task)
        before = before + begun
    drawing = submitted(home).get("task")
    if told or drawing not in queue:
        if drawing in queue:
            _ask("scancel", drawing)  # it waits for fewer runs
        task = _sbatch(home, [*options, "--nodes=1"], "slurm-%j.out", before, [*command, "--draw"])
        write_json(home / SUBMITTED, {"task": task, "log": str(home / f"slurm-{task}.out")})
        told.append(f"{task}: figures and tables" + (", when all runs are done" if before else ""))
    return told or [f"nothing is missing: all is queued or running, {listed(sorted({*before, drawing}))}"]


def _sbatch(home: Path, options: Sequence[str], log: str, before: Sequence[str], command: Sequence[str]) -> str:
    """Submit slurm.sh with a command of detrlib, to begin once jobs `before` have ended; its number.

    Whether they have succeeded is seen by that command: to Slurm, one that finishes while it is preempted has failed.
    """
    home.mkdir(parents=True, exist_ok=True)
    own = [f"--job-name={home.name}", f"--output={str(home).replace('%', '%%')}/{log}"]
    after = [f"--dependency=afterany:{':'.join(before)}"] if before else []
    # A job that submits hands on none of its own variables. Without .venv, jobs have the Python of this process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in FINDS}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    given = ["--parsable", f"--chdir={PROJECT}", *own, *options, *after, str(SCRIPT), *command]
    number = _ask("sbatch", *given, environment=environment).strip().partition(";")[0]
    if not number.isdecimal():
        raise RunError(f"sbatch {' '.join(options)}: gave no number of a job, but {number!r}")
    return number


def queued() -> dict[str, str]:
    """The state of each of one's jobs that wait or run, by number: 12, or 12_3 for task 3 of an array.

    Raises RunError where Slurm is not there.
    """
    lines = _ask("squeue", "--me", "--array", "--noheader", "--format=%i %T").splitlines()
    return {number: state.lower() for number, state in map(str.split, lines)}


def _ask(*command: str, environment: dict[str, str] | None = None) -> str:
    """What a command of Slurm's says."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise RunError(f"{command[0]}: {error.strerror}; submit where Slurm is, on a login node of a cluster") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
        raise RunError(f"{command[0]}: {said[-1]}")
    return done.stdout


def submitted(folder: Path) -> dict[str, str]:
    """What was submitted last for a folder: task and log; nothing where nothing was. Raises RunError if damaged."""
    path = folder / SUBMITTED
    return load_json(path, "delete it, if its job is neither queued nor running") if path.exists() else {}


def describe(path: Path, folder: Path | None = None) -> list[str]:
    """A line for each run of a sweep: its number, its name, its state. Arguments as of `sweep`."""
    jobs, _, _ = planned(path, folder)
    try:
        queue = queued()
    except RunError:  # no Slurm here
        queue = {}
    width = max(len(job.folder.name) for job in jobs)
    return [f"{number:4d}  {job.folder.name:{width}}  {_state(job, queue)}" for number, job in enumerate(jobs, start=1)]


def _state(job: Job, queue: dict[str, str]) -> str:
    """In words, how far a run is, and the task that works on it, or what the last one ended with."""
    if job.finished:
        return "done"
    far = job.progress().strip() if runs.read_metrics(job.folder) else ""
    last = submitted(job.folder)
    if (task := last.get("task")) in queue:
        return " ".join(filter(None, (queue[task], task, far)))
    logs = [log for log in (Path(last.get("log", "")), job.folder / LOG) if log.is_file()]
    if not logs:
        return far or "not begun"
    newest = max(logs, key=lambda log: log.stat().st_mtime)
    return f"stopped at {far or 'its start'}: {last_line(newest)} ({newest})"


def run_one(path: Path, number: int, folder: Path | None = None) -> Path:
    """Train and measure one run of a sweep in this process, or go on with it; one that is done is left as it is.

    Args:
        path, folder: as of `sweep`.
        number: of the run, from 1; in a task of an array that `submit` has made, the run it was made for, wherever
            that stands in the file by now.

    Returns:
        Its folder.

    Raises:
        ConfigError, RunError: as `sweep`; there is no such run, or it starts from one that is not finished.
        Stopped: as `train_in_job`.
    """
    jobs, _, _ = planned(path, folder)
    tasks, here = [submitted(job.folder).get("task", "") for job in jobs], _this_job()
    if here in tasks:
        number = tasks.index(here) + 1
    elif number > len(jobs):
        raise ConfigError(f"--run {number}: {path} has {len(jobs)} runs; --list shows their numbers")
    elif here and tasks[number - 1].partition("_")[0] == here.partition("_")[0]:  # another task has that one
        raise ConfigError(f"{path}: the run that task {here} was submitted for is not in it any more; --slurm submits")
    job = jobs[number - 1]
    for other, first in enumerate(jobs, start=1):
        if job.cfg.train.start == runs.run_name(first.folder) and not runs.is_finished(first.folder):
            raise RunError(f"{job.folder}: it starts from {first.folder}, which is not finished; first: --run {other}")
    with owned(job.folder), getting_further(job.folder), passing_on(interrupt) as came:
        try:
            if not job.finished:
                train_in_job(job.cfg, job.folder)
                parameters = {"run_name": runs.run_name(job.folder), "gpus": _gpus()}
                execute_notebook("evaluate", job.folder / find_notebook("evaluate").name, job.measure | parameters)
        except KeyboardInterrupt:  # while neither of them takes signals
            raise stopped(came) from None
    return job.folder


def draw(path: Path, folder: Path | None = None) -> Path:
    """The report of a sweep all of whose runs are done. Arguments as of `sweep`. Raises RunError where one is not."""
    jobs, _, _ = planned(path, folder)
    if missing := [job.folder.name for job in jobs if not job.finished]:
        raise RunError(
            f"{path}: {len(missing)} of {len(jobs)} runs are not done, {listed(missing)}; --list says why, --slurm "
            "submits them again"
        )
    with getting_further(planned(path, folder)[1]):
        return sweep(path, folder)


def train_in_job(cfg: Config, run_dir: Path) -> dict:
    """Train as `launch` does, with the GPUs that Slurm has given on each node, or else all there are.

    A run that is finished is read, since a job that is started again may find it so.

    Raises:
        Stopped: as `launch`; it is worth starting again.
        RunError: as `launch`; or a time limit came before a single step was made, and would again.
    """
    if runs.is_finished(run_dir):
        runs.refuse_other_settings(cfg, run_dir)
        return runs.load_results(run_dir)
    with getting_further(run_dir):
        return launch(cfg, run_dir, _gpus())


@contextmanager
def getting_further(run_dir: Path) -> Iterator[None]:
    """While entered, being stopped in a job is an error where training made no step since, and would make none again.

    So it is where nothing is trained. But for a preemption, which may have come too early by chance.
    """
    before = len(runs.training_starts(run_dir))
    try:
        yield
    except Stopped as fault:
        records = runs.read_metrics(run_dir)
        step = math.inf if runs.is_finished(run_dir) else records[-1]["global_step"] if records else 0
        starts = runs.training_starts(run_dir)[before:]
        further = any(start.get("stopped", step) > start["global_step"] for start in starts)
        if runs.slurm_job() and not further and not _preempted():
            raise RunError(
                f"{fault}; no step was made since the job was started, so it is not started again: give it more "
                "--time, or look into what takes so long"
            ) from None
        raise


def _gpus() -> int | None:
    """How many GPUs to use: as many as the job has on its node; None where there are none that are known."""
    given = os.environ.get("SLURM_GPUS_ON_NODE")
    if given is None and os.environ.get("SLURM_GPUS_PER_NODE") == "0":
        given = "0"
    return int(given) if given else torch.cuda.device_count() or None


def _this_job() -> str | None:
    """Its number, 12 or 12_3 of a task: one of an array has that of the whole as its own. None: there is no job."""
    if (place := runs.slurm_job()) is None:
        return None
    return place["job"] if place["array_task"] is None else f"{place['job']}_{place['array_task']}"


def _preempted() -> bool:
    """Whether Slurm is taking this job's nodes away, and starts it again by itself or wants it to be."""
    said = _ask("scontrol", "show", "job", _this_job())
    return bool(re.search(r"PreemptTime=\d", said)) or "JobState=RUNNING" not in said
