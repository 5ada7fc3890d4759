"""Sweeps on a cluster: what is submitted, and what its jobs do; commands of Slurm only note what they are asked.

Where a Slurm can be had, a sweep on it.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from detrlib.config import PROJECT, save_config
from detrlib.engine.loop import train
from detrlib.errors import ConfigError, RunError, Stopped
from detrlib.experiments import cluster
from detrlib.experiments.sweep import planned
from detrlib.files import load_checkpoint, write_json
from detrlib.runs import append_metrics

SCRIPT = PROJECT / "papermill_runs" / "slurm.sh"
TOY = PROJECT.parent / "shared" / "cluster" / "slurm_up.sh"  # a Slurm on one machine


@pytest.fixture
def in_job(monkeypatch, slurm):
    """This process is task 3 of array 12, which nobody is taking the nodes of."""
    for name, value in {"JOB_ID": "15", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3", "JOB_NODELIST": "node1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    slurm.says("scontrol", "JobId=15\n   JobState=RUNNING Reason=None\n   PreemptTime=None\n")


def done(folder: Path) -> None:
    """Make a run look trained and measured."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "07_evaluate.ipynb").write_text('{"metadata": {}, "cells": []}')


# --- what is submitted -----------------------------------------------------------------------------------------


def test_one_array_and_a_job_that_draws(sweep_file, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")  # of a job in which one submits
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    folder, path = tmp_path / "100% many", sweep_file()
    told = cluster.submit(path, folder, ["--time=1:00:00", "-p", "main"], parallel=2)
    assert "101" in told[0] and "one, three, two" in told[0] and "102" in told[1]
    handed_on = (slurm.folder / "environment").read_text()
    assert "SLURM_CONF=/etc/slurm.conf" in handed_on and "SLURM_GPUS_ON_NODE" not in handed_on
    runs, drawing = slurm.asked("sbatch")
    command = [str(SCRIPT), "sweep", str(path), "--name", str(folder)]
    assert runs[-len(command) :] == command and drawing[-len(command) - 1 :] == [*command, "--draw"]
    assert "--array=1,2,3%2" in runs and f"--output={tmp_path}/100%% many/slurm-%A_%a.out" in runs
    for words in (runs, drawing):
        assert [words[words.index("-p") + 1], "--time=1:00:00" in words, f"--chdir={PROJECT}" in words] == [
            *("main", True, True)
        ]
    assert not any(word.startswith("--dependency") for word in runs) and "--dependency=afterany:101" in drawing
    assert folder.is_dir() and cluster.submitted(folder)["task"] == "102"
    assert cluster.submitted(folder / "two") == {"task": "101_3", "log": f"{folder}/slurm-101_3.out"}


def test_again_only_what_is_missing_is_submitted(sweep_file, slurm, tmp_path):
    folder, path = tmp_path / "many", sweep_file()
    cluster.submit(path, folder)
    slurm.says("squeue", "101_2 RUNNING\n101_3 PENDING\n102 PENDING\n7 RUNNING\n")
    done(folder / "one")
    slurm.forget()
    (told,) = cluster.submit(path, folder)
    assert "two" not in told and "101_2" in told and "102" in told and slurm.asked("sbatch") == []

    slurm.says("squeue", "101_3 PENDING\n102 PENDING\n")  # 2, three, has failed
    cluster.submit(path, folder)
    runs, drawing = slurm.asked("sbatch")
    assert "--array=2" in runs and slurm.asked("scancel") == [["102"]]
    (dependency,) = [word for word in drawing if word.startswith("--dependency")]
    assert sorted(dependency.removeprefix("--dependency=afterany:").split(":")) == ["101_3", "103"]
    assert (cluster.submitted(folder / "three")["task"], cluster.submitted(folder)["task"]) == ("103_2", "104")

    slurm.says("squeue", "")
    slurm.forget()
    done(folder / "two")
    done(folder / "three")
    (told,) = cluster.submit(path, folder)  # the drawing alone has failed
    assert "105" in told and len(slurm.asked("sbatch")) == 1
    (folder / "report.html").touch()
    (told,) = cluster.submit(path, folder)
    assert "report.html" in told and len(slurm.asked("sbatch")) == 1
    os.utime(folder / "report.html", (0, 0))  # a run was measured since
    (told,) = cluster.submit(path, folder)
    assert "106" in told and "figures" in told


def test_runs_that_sweeps_share_are_submitted_once(sweep_file, slurm, tmp_path):
    folder = tmp_path / "shared"
    cluster.submit(sweep_file(folder="any", runs={"one": None, "two": None}), folder)
    slurm.says("squeue", "101_1 RUNNING\n101_2 PENDING\n102 PENDING\n")
    slurm.forget()
    others = sweep_file(folder="any", runs={"three": None, "one": None}).rename(tmp_path / "others.yaml")
    cluster.submit(others, folder)
    runs, drawing = slurm.asked("sbatch")
    assert "--array=2" in runs and "--dependency=afterany:101_1:103" in drawing and slurm.asked("scancel") == []


def test_runs_that_start_from_another_one_are_an_array_after_it(sweep_file, slurm, tmp_path):
    folder = tmp_path / "many"
    wanted = {"last": {"train.start": f"{folder}/first"}, "first": None}
    cluster.submit(sweep_file(runs=wanted), folder)
    first, last, drawing = slurm.asked("sbatch")
    assert "--array=1" in first and "--array=2" in last and "--dependency=afterany:101" in last
    assert "--dependency=afterany:101:102" in drawing


def test_what_slurm_does_not_take_is_one_line(sweep_file, slurm, tmp_path, monkeypatch):
    path, folder = sweep_file(), tmp_path / "many"
    with pytest.raises(ConfigError, match=r"--array=1-2.*--parallel"):
        cluster.submit(path, folder, ["--array=1-2"])
    slurm.fails("sbatch", "sbatch: error: a plugin speaks\nsbatch: error: invalid partition specified: nosuch\n")
    with pytest.raises(RunError, match=r"invalid partition specified: nosuch$") as caught:
        cluster.submit(path, folder, ["-p", "nosuch"])
    assert len(str(caught.value).splitlines()) == 1 and cluster.submitted(folder / "one") == {}
    (folder / "one").mkdir()
    (folder / "one" / "slurm.json").write_text("[")
    with pytest.raises(RunError, match=r"one/slurm\.json"):
        cluster.submit(path, folder)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"squeue.*login node"):
        cluster.submit(path, folder)


def test_every_run_is_listed_with_its_state(sweep_file, slurm, tmp_path):
    path, folder = sweep_file(runs=dict.fromkeys("abcde")), tmp_path / "many"
    cluster.submit(path, folder)
    slurm.says("squeue", "101_2 RUNNING\n101_3 PENDING\n")
    done(folder / "a")
    append_metrics(folder / "b", {"global_step": 2, "epoch": 0})
    (folder / "slurm-101_4.out").write_bytes(b"job \xff 101_4\nerror: no GPU\n\n")
    rows = [line.split(maxsplit=2) for line in cluster.describe(path, folder)]
    assert [row[:2] for row in rows] == [["1", "a"], ["2", "b"], ["3", "c"], ["4", "d"], ["5", "e"]]
    states = [row[2] for row in rows]
    assert states[0] == "done" and states[1].startswith("running 101_2 50%") and states[2] == "pending 101_3"
    assert "error: no GPU" in states[3] and "slurm-101_4.out" in states[3] and states[4] == "not begun"
    shutil.rmtree(slurm.folder)  # and without Slurm
    assert cluster.describe(path, folder)[2].split()[1:] == ["c", "not", "begun"]


# --- what jobs do ----------------------------------------------------------------------------------------------


@pytest.fixture
def worked(monkeypatch):
    """What is trained and measured, which takes no time."""
    worked = []

    def measure(name, output, parameters):
        worked.append((name, output.parent.name, parameters))
        done(output.parent)

    monkeypatch.setattr(cluster, "launch", lambda cfg, run_dir, gpus: worked.append((cfg.train.seed, run_dir.name)))
    monkeypatch.setattr(cluster, "execute_notebook", measure)
    return worked


def test_one_run_by_its_number(sweep_file, worked, tmp_path):
    path, folder = sweep_file(measure={"num_examples": 2}), tmp_path / "many"
    assert cluster.run_one(path, 3, folder) == folder / "two"
    trained, (name, where, parameters) = worked
    assert trained == (42, "two") and (name, where) == ("evaluate", "two")
    assert parameters["num_examples"] == 2 and parameters["run_name"] == str(folder / "two")
    cluster.run_one(path, 3, folder)
    assert len(worked) == 2  # what is done is left as it is
    with pytest.raises(ConfigError, match="--run 4"):
        cluster.run_one(path, 4, folder)


def test_a_task_is_the_run_that_it_was_submitted_for(sweep_file, worked, in_job, slurm, tmp_path):
    path, folder = sweep_file(), tmp_path / "many"
    slurm.folder.joinpath("number").write_text("11")
    cluster.submit(path, folder)
    sweep_file(runs=dict.fromkeys(("new", "one", "three", "two")))
    assert cluster.run_one(path, 3, folder) == folder / "two"
    sweep_file(runs=dict.fromkeys(("three", "two")))  # fewer than its number
    assert cluster.run_one(path, 3, folder) == folder / "two"
    sweep_file(runs=dict.fromkeys(("three", "new", "one")))  # it has gone, and its place is that of another task
    with pytest.raises(ConfigError, match="12_3"):
        cluster.run_one(path, 3, folder)


def test_a_run_does_not_start_from_one_that_is_not_finished(sweep_file, worked, tmp_path):
    folder = tmp_path / "many"
    path = sweep_file(runs={"last": {"train.start": f"{folder}/first"}, "first": None})
    with pytest.raises(RunError, match=r"first.*--run 1"):
        cluster.run_one(path, 2, folder)
    (folder / "first").mkdir(parents=True)
    save_config(planned(path, folder)[0][0].cfg, folder / "first" / "config.yaml")
    write_json(folder / "first" / "results.json", {})
    assert cluster.run_one(path, 2, folder) == folder / "last"


def test_the_report_is_drawn_once_all_runs_are_done(sweep_file, tmp_path, monkeypatch):
    path, folder = sweep_file(), tmp_path / "many"
    monkeypatch.setattr(cluster, "sweep", lambda path, folder: folder / "report.html")
    done(folder / "one")
    with pytest.raises(RunError, match="three, two"):
        cluster.draw(path, folder)
    done(folder / "two")
    done(folder / "three")
    assert cluster.draw(path, folder) == folder / "report.html"


def test_a_report_that_is_not_drawn_in_time_is_not_begun_again(sweep_file, in_job, tmp_path, monkeypatch):
    def stopped(*_):
        raise Stopped("stopped by SIGUSR1")

    monkeypatch.setattr(cluster, "sweep", stopped)
    path, folder = sweep_file(runs={"one": None}), tmp_path / "many"
    done(folder / "one")
    with pytest.raises(RunError, match="--time"):
        cluster.draw(path, folder)


@pytest.fixture
def stopped_at(monkeypatch):
    """`stopped_at(*starts)`: training adds starts to environment.json, and is stopped."""

    def stopped_at(*starts):
        def launch(cfg, run_dir, gpus):
            path = run_dir / "environment.json"
            before = json.loads(path.read_text())["starts"] if path.exists() else []
            write_json(path, {"starts": [*before, *starts]})
            raise Stopped("stopped by SIGUSR1")

        monkeypatch.setattr(cluster, "launch", launch)

    return stopped_at


def test_what_makes_no_step_is_not_started_again(tmp_path, tiny_config, stopped_at, in_job, slurm, monkeypatch):
    cfg = tiny_config()
    stopped_at({"global_step": 0, "stopped": 3})
    with pytest.raises(Stopped):
        cluster.train_in_job(cfg, tmp_path)
    # Of this start; the one before made steps. The last one was stopped while it made ready for them.
    for starts in ([{"global_step": 3, "stopped": 3}], [], [{"global_step": 3}]):
        stopped_at(*starts)
        with pytest.raises(RunError, match=r"SIGUSR1.*--time"):
            cluster.train_in_job(cfg, tmp_path)
    assert ["show", "job", "12_3"] in slurm.asked("scontrol")  # not all of the array
    # Slurm takes the nodes away, in so many seconds or now.
    for said in ("JobState=RUNNING\n PreemptTime=2026-11-28T21:04:58", "JobState=COMPLETING PreemptTime=None"):
        slurm.says("scontrol", said)
        with pytest.raises(Stopped):
            cluster.train_in_job(cfg, tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")  # no job
    with pytest.raises(Stopped):
        cluster.train_in_job(cfg, tmp_path)


def test_measuring_that_is_stopped_twice_is_not_started_again(sweep_file, tmp_path, in_job, monkeypatch):
    path, folder = sweep_file(), tmp_path / "many"

    def launch(cfg, run_dir, gpus):
        write_json(run_dir / "environment.json", {"starts": [{"global_step": 0}]})
        write_json(run_dir / "results.json", {})

    def measure(*_):
        raise Stopped("stopped by SIGUSR1")

    monkeypatch.setattr(cluster, "launch", launch)
    monkeypatch.setattr(cluster, "execute_notebook", measure)
    monkeypatch.setattr(cluster.runs, "refuse_other_settings", lambda cfg, run_dir: None)
    with pytest.raises(Stopped):  # it was trained
        cluster.run_one(path, 1, folder)
    with pytest.raises(RunError, match="--time"):
        cluster.run_one(path, 1, folder)


def test_a_signal_between_training_and_measuring_is_no_end(sweep_file, worked, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_gpus", lambda: signal.raise_signal(signal.SIGUSR1))
    monkeypatch.setattr(cluster, "train_in_job", lambda *_: None)
    with pytest.raises(Stopped, match="SIGUSR1"):
        cluster.run_one(sweep_file(), 1, tmp_path / "many")
    assert worked == [] and not list((tmp_path / "many" / "one").glob(".owner"))


def test_a_finished_run_is_read_where_its_settings_are_the_same(tmp_path, tiny_config, monkeypatch):
    cfg = tiny_config({"train.epochs": 1})
    results = train(cfg, tmp_path)
    monkeypatch.setattr(cluster, "launch", lambda *_: pytest.fail("started"))
    assert cluster.train_in_job(cfg, tmp_path)["detection"]["AP"] == pytest.approx(results["detection"]["AP"])
    with pytest.raises(RunError, match=r"train\.seed"):
        cluster.train_in_job(tiny_config({"train.epochs": 1, "train.seed": 9}), tmp_path)


@pytest.mark.parametrize(
    "given, there, wanted",
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "4"}, 8, 4),
        ({"SLURM_GPUS_PER_NODE": "0"}, 8, 0),  # asked for none, and Slurm hides none
        ({}, 8, 8),
        ({}, 0, None),
    ],
)
def test_as_many_gpus_as_the_job_has(given, there, wanted, monkeypatch):
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster.torch.cuda, "device_count", lambda: there)
    assert cluster._gpus() == wanted


# --- a real Slurm ----------------------------------------------------------------------------------------------


def answers(*command) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.fixture
def real_slurm():
    """A Slurm that runs, or one that is started: nothing is installed for it."""
    if answers("sinfo"):
        yield
        return
    daemons = all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch")))
    if os.geteuid() or not daemons or not TOY.exists():
        pytest.skip("no Slurm runs here, and none can be started: that takes root, its packages and shared/cluster")
    subprocess.run(["bash", TOY, "up"], check=True, capture_output=True, timeout=120)
    yield
    subprocess.run(["bash", TOY, "down"], check=True, timeout=60)


def states(array: str) -> dict[str, str]:
    """The state of each task of an array that is known to Slurm, by its number."""
    said = subprocess.run(["scontrol", "--oneliner", "show", "job", array], capture_output=True, text=True).stdout
    fields = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in said.splitlines()]
    return {job["ArrayTaskId"]: job["JobState"] for job in fields if "ArrayTaskId" in job}


def wait_for(what, seconds=900):
    latest = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < latest
        time.sleep(0.5)


@pytest.mark.slow
def test_an_array_with_a_requeue_gives_what_is_trained_here(real_slurm, sweep_file, tmp_path):
    """The first of two runs is stopped after some of its steps, saved, put back in the queue, and goes on."""
    wanted = {"one": {"train.epochs": 60}, "two": {"train.seed": 3}}
    path, folder = sweep_file(runs=wanted, overrides={"train.eval_every": 60, "train.epochs": 1}), tmp_path / "a ü'"
    told = cluster.submit(path, folder, ["--gpus-per-node=0", "--cpus-per-task=1", "--time=60"])
    array, drawing = (line.partition(":")[0] for line in told)
    subprocess.run(["scancel", drawing], check=True)  # figures are drawn as anywhere
    one = folder / "one"
    wait_for(lambda: (one / "metrics.jsonl").exists() and len((one / "metrics.jsonl").read_text().splitlines()) > 3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_1"], capture_output=True)
    wait_for(lambda: states(array).get("1") == "PENDING")
    subprocess.run(["scontrol", "update", f"JobId={array}_1", "StartTime=now"], check=True)  # not in two minutes
    wait_for(lambda: set(states(array).values()) == {"COMPLETED"})
    known = json.loads((one / "environment.json").read_text())
    assert known["slurm"]["restarts"] == 1 and (known["slurm"]["job"], known["slurm"]["array_task"]) == (array, 1)
    first, second = known["starts"]
    assert 0 < first["stopped"] == second["global_step"] < 240
    for job in planned(path, folder)[0]:
        assert job.finished
        here = tmp_path / "here" / job.folder.name
        train(job.cfg, here)
        ours, theirs = (load_checkpoint(run_dir / "checkpoints" / "last.pt") for run_dir in (here, job.folder))
        assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())
        metrics = [(run_dir / "metrics.jsonl").read_text().splitlines() for run_dir in (here, job.folder)]
        assert [untimed(line) for line in metrics[0]] == [untimed(line) for line in metrics[1]]


def untimed(line):
    return {name: value for name, value in json.loads(line).items() if not name.endswith("_time")}
