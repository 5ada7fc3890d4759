"""Who may write into a run folder: one process, and what it has started; also after it was killed, and elsewhere."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from detrlib.config import PROJECT
from detrlib.errors import RunError
from detrlib.runs import owner
from detrlib.runs.owner import OWNER, owned, owning

HOLD = f"""
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from detrlib.errors import RunError
spec = spec_from_file_location("owner", {owner.__file__!r})  # without all that detrlib.runs imports
spec.loader.exec_module(owner := module_from_spec(spec))
try:
    with owner.owned(Path(sys.argv[1])):
        print("owned", flush=True)
        sys.stdin.readline()
except RunError as error:
    print(error, flush=True)
"""
SHARE = HOLD.replace(
    "sys.stdin.readline()", "subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]])"
).replace("import sys", "import subprocess, sys", 1)


@pytest.fixture
def start():
    """Starts a process that owns a folder until it reads a line; gives it and the line that it prints."""
    started = []

    def start(folder, program=HOLD):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder), HOLD],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def elsewhere(tmp_path):
    """Leaves a folder as a killed process of another machine does."""

    def elsewhere(**known):
        said = {"host": "other", "boot": "b", "process": os.getpid(), "started": 0.0, "job": None, "restarts": 0}
        said |= {"numbers": owner._own()["numbers"]}
        (tmp_path / OWNER).write_text(json.dumps(said | known))

    return elsewhere


def test_a_second_process_is_refused_at_once_naming_the_first(tmp_path, start, monkeypatch):
    first, line = start(tmp_path / "run")
    assert line == "owned"
    monkeypatch.setattr(owner.time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(RunError) as caught, owned(tmp_path / "run"):
        pytest.fail("owned twice")
    message = str(caught.value)
    assert f"process {first.pid} on {socket.gethostname()}" in message and str(tmp_path / "run") in message
    assert start(tmp_path / "run")[1] == message
    first.communicate("\n")
    assert not (tmp_path / "run").exists()  # nothing was written, nothing is left
    with owned(tmp_path / "run"):
        pass


def test_a_killed_owner_is_followed(tmp_path, start):
    first, _ = start(tmp_path)
    first.kill()
    first.wait()
    assert (tmp_path / OWNER).exists()
    with owned(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_what_the_owner_has_started_shares_it_and_lasts_as_its_lock(tmp_path, start, monkeypatch):
    monkeypatch.setattr(owner, "LEAVING", 0.2)
    first, line = start(tmp_path, SHARE)
    assert (line, first.stdout.readline()) == ("owned", "owned\n")
    first.kill()
    first.wait()
    with pytest.raises(RunError, match=f"process {first.pid} on .*or what that has started"), owned(tmp_path):
        pytest.fail("its child is still at work")
    os.killpg(first.pid, signal.SIGKILL)
    monkeypatch.setattr(owner, "LEAVING", 30)
    with owned(tmp_path):
        pass


def test_within_one_process_it_is_entered_again(tmp_path):
    with owned(tmp_path):
        with owned(tmp_path):
            pass
        assert (tmp_path / OWNER).exists()
    assert not (tmp_path / OWNER).exists()


def test_of_processes_of_torchrun_the_first_owns_it(tmp_path, start, monkeypatch):
    start(tmp_path)
    monkeypatch.setenv("RANK", "1")
    with owned(tmp_path):
        pass


def test_an_owner_on_another_machine_is_not_taken_for_dead(tmp_path, elsewhere, monkeypatch):
    elsewhere()
    remedy = rf"process {os.getpid()} on other.*--take-over.*{owner.TAKE_OVER}=1"
    with pytest.raises(RunError, match=remedy), owned(tmp_path):
        pytest.fail("taken over")
    monkeypatch.setenv(owner.TAKE_OVER, "1")
    with owned(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("restarts, taken", [("0", False), ("1", True)])
def test_a_requeued_job_takes_over_from_itself(tmp_path, elsewhere, monkeypatch, restarts, taken):
    elsewhere(job="7")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    try:
        with owned(tmp_path):
            assert taken
    except RunError:
        assert not taken


def test_without_locks_the_file_decides(tmp_path, elsewhere, monkeypatch, caplog):
    """As on Lustre without the option flock: said once, and an owner that is there is seen all the same."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with owned(tmp_path), owned(tmp_path):
        pass
    assert "no locks on this file system" in caplog.text and not (tmp_path / OWNER).exists()
    parent = owner.psutil.Process().parent()
    elsewhere(host=socket.gethostname(), process=parent.pid, started=parent.create_time())
    with owned(tmp_path):  # the owner has started this process
        pass
    other = subprocess.Popen(["sleep", "60"])
    try:
        elsewhere(host=socket.gethostname(), process=other.pid, started=owner.psutil.Process(other.pid).create_time())
        with pytest.raises(RunError, match=f"process {other.pid}"), owned(tmp_path):
            pytest.fail("owned twice")
    finally:
        other.kill()
        other.wait()
    with owned(tmp_path):
        pass
    elsewhere()
    with pytest.raises(RunError, match="--take-over"), owned(tmp_path):
        pytest.fail("taken over")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"{tmp_path / 'file'} cannot be written") as caught, owned(tmp_path / "file"):
        pytest.fail("owned a file")
    assert len(str(caught.value).splitlines()) == 1


def test_a_function_that_owns_its_run_folder(tmp_path):
    @owning
    def write(name, run_dir):
        """Its words."""
        return name, (run_dir / OWNER).exists()

    assert write("a", tmp_path) == write("a", run_dir=tmp_path) == ("a", True)
    assert write.__doc__ == "Its words." and not (tmp_path / OWNER).exists()


def test_the_owner_removes_what_a_killed_writer_has_left_in_its_folder_alone(tmp_path):
    left = ("checkpoints/.last.pt.a1b2c3d4", ".results.json.x_y_z_12", "maps/.part-00000-of-00001.parquet")
    others = ("checkpoints/last.pt", "another-run/.results.json.a1b2c3d4")
    for name in (*left, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with owned(tmp_path), owned(tmp_path):  # what an owner starts removes nothing of the owner's
        assert [name for name in (*left, *others) if (tmp_path / name).exists()] == list(others)


def test_a_step_that_the_owner_has_started_by_srun_shares_its_folder(tmp_path, start, monkeypatch):
    """srun stands between: the owner is no parent of the step's processes."""
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    assert start(tmp_path)[1] == "owned" and "is in use" in start(tmp_path)[1]
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert start(tmp_path)[1] == "owned"
    monkeypatch.setenv("SLURM_JOB_ID", "16")
    assert "is in use" in start(tmp_path)[1]


def test_a_step_on_another_node_of_the_job_shares_it_too(tmp_path, elsewhere, monkeypatch):
    """The first process of a training is on the node whose name sorts first: node10, where the job began on node9."""
    elsewhere(job="15", step=None)
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with owned(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["host"] == "other"
    with (tmp_path / OWNER).open() as held:  # the server's lock
        fcntl.flock(held, fcntl.LOCK_SH)
        with owned(tmp_path):
            pass
        monkeypatch.setenv("SLURM_JOB_ID", "16")
        with pytest.raises(RunError, match=r"on other.*end it there"), owned(tmp_path):
            pytest.fail("owned twice")


def test_another_container_is_not_taken_for_this_process_though_their_numbers_are_the_same(tmp_path, monkeypatch):
    """Both call themselves process 1, and have begun within a minute."""
    (tmp_path / OWNER).write_text(json.dumps(owner._own() | {"host": "3f2a", "numbers": "pid:[1]"}))
    monkeypatch.setattr(owner.time, "sleep", lambda _: pytest.fail("it waits"))
    with (tmp_path / OWNER).open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(RunError, match="is in use by process"), owned(tmp_path):
            pytest.fail("owned twice")
    with owned(tmp_path):  # the system has let go of its lock
        pass


def test_a_process_that_may_not_be_looked_at_is_no_defect(tmp_path, start, monkeypatch):
    """As where /proc shows one's own processes alone (hidepid), or where it ends just now."""
    first, _ = start(tmp_path)
    real = owner.psutil

    def hidden(number=None):
        if number == first.pid:
            raise real.NoSuchProcess(number)
        return real.Process(number)

    monkeypatch.setattr(owner, "LEAVING", 0)
    monkeypatch.setattr(owner, "psutil", SimpleNamespace(Process=hidden, Error=real.Error, pid_exists=real.pid_exists))
    with pytest.raises(RunError, match=f"process {first.pid}"), owned(tmp_path):
        pytest.fail("owned twice")


def test_a_part_of_the_folder_that_is_not_writable_is_named_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode, **named: path.name != "checkpoints")  # root may write anywhere
    with pytest.raises(RunError, match="checkpoints cannot be written"), owned(tmp_path):
        pytest.fail("entered")
