"""papermill_runs/slurm.sh, with stand-ins of the commands of Slurm and of the library."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from detrlib.config import PROJECT
from detrlib.errors import STOPPED

SCRIPT = PROJECT / "papermill_runs" / "slurm.sh"
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

def stop(number, _):
    time.sleep(0.3)  # saving takes its time
    print("stopped by", signal.Signals(number).name, file=sys.stderr, flush=True)
    os._exit(75)

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
Path(os.environ["NOTED"]).write_text(json.dumps([sys.argv[1:], os.getcwd(), str(signal.getsignal(signal.SIGINT))]))
if "fails" in sys.argv:
    sys.exit("error: it fails")
if "dies" in sys.argv:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(60 if "waits" in sys.argv else 0)
"""


@pytest.fixture
def script(tmp_path, slurm, monkeypatch):
    """`script(*words, job=...)`: starts slurm.sh of a project in whose place there is a stand-in, in another folder."""
    project, elsewhere = tmp_path / "a project", tmp_path / "elsewhere"
    for folder in (project / "detrlib", project / "papermill_runs", elsewhere):
        folder.mkdir(parents=True)
    (project / "detrlib" / "__main__.py").write_text(STAND_IN)
    shutil.copy(SCRIPT, copied := tmp_path / "slurm_script")  # as Slurm does
    says = f"JobId=15\n   Command={project}/papermill_runs/slurm.sh a papermill_runs/configs/b\n   WorkDir=/\n"
    slurm.says("scontrol", says)
    slurm.says("squeue", "RUNNING\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "bin" / "sleep").write_text("#!/bin/sh\n")  # what waits to be ended by Slurm
    (tmp_path / "bin" / "sleep").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NOTED", str(tmp_path / "noted"))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    begun = []

    def start(*words, **job):
        environment = dict(os.environ, SLURM_SUBMIT_DIR=str(elsewhere), **job)
        command = ["bash", copied, *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        begun.append(subprocess.Popen(command, cwd=elsewhere, env=environment, **pipes))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def noted(tmp_path):
    path, latest = tmp_path / "noted", time.monotonic() + 60
    while not path.exists() and time.monotonic() < latest:
        time.sleep(0.05)
    time.sleep(0.05)
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "given, job, wanted",
    [
        (
            ["configs/a b.yaml", "run 'ü\"", "train.lr=1", "x.y=[1, 2]"],
            {},
            ["train", "configs/a b.yaml", "--name", "run 'ü\"", "--job", "--set", "train.lr=1", "--set", "x.y=[1, 2]"],
        ),
        (
            ["sweep", "/x/many.yaml", "--name", "a b"],
            {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"},
            ["sweep", "/x/many.yaml", "--name", "a b", "--run", "3"],
        ),
        (["explain", "run", "--images", "5"], {}, ["explain", "run", "--images", "5"]),
    ],
)
def test_the_script_hands_its_words_on_from_any_folder(script, tmp_path, given, job, wanted):
    process = script(*given, **job)
    log, _ = process.communicate(timeout=120)
    words, folder, interrupts = noted(tmp_path)
    assert process.returncode == 0, log
    assert words == wanted and folder == str(tmp_path / "a project")
    assert "default_int_handler" in interrupts  # a shell's background would ignore them


def test_the_script_says_how_it_is_used(script):
    for words in ([], ["configs/a.yaml"]):
        process = script(*words)
        log, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and "RUN_NAME" in log


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_script_waits_until_all_is_saved_and_puts_the_job_back(script, slurm, tmp_path, number):
    process = script("sweep", "waits", SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3")
    noted(tmp_path)
    process.send_signal(number)
    log, _ = process.communicate(timeout=120)
    assert f"stopped by {number.name}" in log and process.returncode == STOPPED
    assert ["requeue", "12_3"] in slurm.asked("scontrol")  # not all of the array
    assert ["--noheader", "--format=%T", "--jobs=12_3"] in slurm.asked("squeue")


def test_the_script_leaves_what_slurm_ends_or_restarts_alone(script, slurm, tmp_path):
    slurm.says("squeue", "COMPLETING\n")
    process = script("train", "waits")
    noted(tmp_path)
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED and log.rstrip().endswith("stopped by SIGTERM")
    assert [words[0] for words in slurm.asked("scontrol")] == ["show"]


@pytest.mark.parametrize("word, code, why", [("fails", 1, "error: it fails"), ("dies", 138, "error: job 15 was ended")])
def test_a_job_that_fails_ends_with_why_and_is_not_put_back(script, slurm, word, code, why):
    """One dies of a signal that comes while it begins."""
    process = script("train", word)
    log, _ = process.communicate(timeout=120)
    assert process.returncode == code and log.rstrip().splitlines()[-1].startswith(why)
    assert [words[0] for words in slurm.asked("scontrol")] == ["show"]


def test_the_script_is_what_shellcheck_would_have():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    assert subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True).stdout == ""
