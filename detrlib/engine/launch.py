"""Start a training run: in this process, or with torchrun when there is more than one.

    detrlib train papermill_runs/configs/shapes.yaml --name first --set train.epochs=2
    detrlib train papermill_runs/configs/detr-r50.yaml --name detr --gpus 8

From Python or a notebook cell: `launch(cfg, run_dir, gpus=2)`. The same name again resumes.
"""

import os
import signal
import subprocess
from collections import deque
from pathlib import Path

import torch

from detrlib.config import PROJECT, Config
from detrlib.engine.loop import train
from detrlib.engine.memory import keep_freed_memory
from detrlib.engine.nodes import node_count, torchrun
from detrlib.errors import RunError
from detrlib.runs.folder import load_results
from detrlib.runs.opening import open_run

TAIL = 30  # lines of a failed subprocess that are repeated in the error
FAULT = "error: "  # how the line of a foreseeable one begins


def launch(cfg: Config, run_dir: Path, gpus: int | None = None, processes: int = 1) -> dict:
    """Train in this process, or in several where more than one GPU or process is asked for.

    Args:
        cfg: every setting.
        run_dir: the run folder; one that holds an unfinished run is gone on with.
        gpus: how many to use, on each node of a Slurm job; None takes one if there is one, 0 none.
        processes: on the CPU, how many, on each node.

    Returns:
        What results.json holds, see `detrlib.engine.evaluate.evaluate`.

    Raises:
        RunError: more GPUs are asked for than there are, or a process failed; its message is in that of the error.
        DetrlibError: as `detrlib.engine.loop.train`.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = min(1, there) if gpus is None else gpus
    if wanted < 0 or processes < 1:
        raise RunError(f"{wanted} GPUs and {processes} processes asked for; GPUs start at 0, processes at 1")
    if wanted > there:
        raise RunError(f"{wanted} GPUs asked for, {there} available; use --gpus {there} (0 trains on the CPU)")
    if wanted and processes > 1:
        raise RunError("processes are for training on the CPU; with GPUs there is one process for each")
    if (wanted, processes, node_count()) == (min(1, there), 1, 1):
        keep_freed_memory()
        return train(cfg, run_dir)
    open_run(cfg, run_dir)  # says what is wrong here rather than in a subprocess
    _torchrun(run_dir, max(wanted, processes), wanted)
    return load_results(run_dir)


def _torchrun(run_dir: Path, processes: int, gpus: int) -> None:
    """Run `detrlib.engine.loop` in several processes, passing on what they print."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if not gpus:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    child = subprocess.Popen(
        [*torchrun(processes), "-m", "detrlib.engine.loop", str(run_dir)],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    tail, reporting = deque(maxlen=TAIL), False
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            # torchrun's own report of a failure is long, and does not say what the failure was.
            reporting = reporting or "torch/distributed/elastic" in line
            if not reporting:
                tail.append(line)
    except KeyboardInterrupt:
        # A terminal interrupts the child too, a notebook does not.
        child.send_signal(signal.SIGINT)
        child.wait()
        raise
    if child.wait():
        said = [line.removeprefix(FAULT).strip() for line in tail if line.startswith(FAULT)]
        if said:  # a fault that was foreseen, in one line
            raise RunError(f"{processes} processes failed: {said[0]}")
        raise RunError(f"{processes} processes of torchrun failed with code {child.returncode}:\n{''.join(tail)}")
