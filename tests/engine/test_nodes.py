"""How torchrun is started: on this machine, or on every node of a job of Slurm."""

import sys
from itertools import pairwise

import pytest

from detrlib.engine import nodes
from detrlib.errors import RunError


@pytest.fixture
def in_job(monkeypatch, tmp_path):
    """A job of two nodes, whose names a stand-in of scontrol knows."""
    for name in ("STEP_ID", "CPUS_PER_TASK"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in {"JOB_ID": "40007", "NNODES": "2", "JOB_NODELIST": "gpu[3-4]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$3" = "gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_on_this_machine_alone(monkeypatch):
    for name in ("NNODES", "STEP_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    assert nodes.node_count() == 1
    command = nodes.torchrun(3)
    assert command[0] == sys.executable and "--standalone" in command
    assert command[command.index("--nproc-per-node") + 1] == "3"


def test_on_every_node_of_a_job(in_job, monkeypatch):
    assert nodes.node_count() == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    srun, rest = (
        (command := nodes.torchrun(4))[: command.index(sys.executable)],
        command[command.index(sys.executable) :],
    )
    assert srun[0] == "srun" and {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8"} <= set(srun)
    given = dict(pairwise(rest))
    assert (given["--nnodes"], given["--nproc-per-node"], given["--rdzv-id"]) == ("2", "4", "40007")
    assert given["--rdzv-endpoint"] == "gpu3:20007" and "--standalone" not in rest


def test_what_srun_has_started_is_on_one_node(in_job, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert nodes.node_count() == 1


def test_nodes_that_nobody_names_are_one_line(in_job, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "others")
    with pytest.raises(RunError, match="40007") as caught:
        nodes.torchrun(1)
    assert len(str(caught.value).splitlines()) == 1
