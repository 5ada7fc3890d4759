"""Nodes of a Slurm job: torchrun is started once on each of them; outside of a job there is this machine alone."""

import os
import subprocess
import sys

from detrlib.errors import RunError


def node_count() -> int:
    """How many nodes the Slurm job has in which this process runs; 1 outside, and in what srun has started."""
    return 1 if "SLURM_STEP_ID" in os.environ else int(os.environ.get("SLURM_NNODES", "1"))


def torchrun(processes: int) -> list[str]:
    """The command that starts so many processes on this machine, or on every node of a Slurm job of several.

    Raises RunError where Slurm does not say which nodes a job has.
    """
    run = [sys.executable, "-m", "detrlib.engine.agent", "--nproc-per-node", str(processes)]
    if (nodes := node_count()) == 1:
        return [*run, "--standalone"]
    job = os.environ["SLURM_JOB_ID"]
    try:
        asked = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        first = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise RunError(f"job {job} has {nodes} nodes, and Slurm does not say which: {error}") from None
    on_each = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not inherit it
        on_each.append(f"--cpus-per-task={cores}")
    meeting = f"{first}:{20000 + int(job) % 20000}"
    run += ["--nnodes", str(nodes), "--rdzv-id", job, "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting]
    return [*on_each, *run]
