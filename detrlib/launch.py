"""Start a training run: in this process, or with torchrun when there is more than one.

    python -m detrlib.launch papermill_runs/configs/shapes.yaml --run-name first --set train.epochs=2
    python -m detrlib.launch papermill_runs/configs/detr-r50.yaml --run-name detr --gpus 8

From Python or a notebook cell: `launch(cfg, run_dir, gpus=2)`. The same name again resumes.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import torch

from detrlib.config import PROJECT, Config, ConfigError, load_config
from detrlib.data import DataError
from detrlib.models.backbone import WeightsError
from detrlib.runs import RunError, load_results, open_run, run_path
from detrlib.tracking import show_messages
from detrlib.train import NonFiniteLoss, refuse_untrainable, train

TAIL = 30  # lines of a failed subprocess that are repeated in the error


class LaunchError(RuntimeError):
    """The run could not be started, or its processes failed; the message says why."""


def launch(cfg: Config, run_dir: Path, gpus: int | None = None, processes: int = 1) -> dict:
    """Train and return the content of results.json.

    gpus: how many to use; None takes one if there is one, 0 none. processes: on the CPU, how many.
    Raises LaunchError when a GPU is asked for and absent, otherwise what `train` raises.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = min(1, there) if gpus is None else gpus
    if wanted < 0 or processes < 1:
        raise LaunchError(f"{wanted} GPUs and {processes} processes asked for; GPUs start at 0, processes at 1")
    if wanted > there:
        raise LaunchError(f"{wanted} GPUs asked for, {there} found; use --gpus {there} (0 trains on the CPU)")
    if wanted and processes > 1:
        raise LaunchError("processes are for training on the CPU; with GPUs there is one process for each")
    if (wanted, processes) == (min(1, there), 1):
        return train(cfg, run_dir)
    refuse_untrainable(cfg)
    open_run(cfg, run_dir)  # says what is wrong here rather than in a subprocess
    _torchrun(run_dir, max(wanted, processes), wanted)
    return load_results(run_dir)


def _torchrun(run_dir: Path, processes: int, gpus: int) -> None:
    """Run `detrlib.train` in several processes, passing on what they print."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if not gpus:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    child = subprocess.Popen(
        [*command, "-m", "detrlib.train", str(run_dir)],
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
        raise LaunchError(f"{processes} processes of torchrun failed with code {child.returncode}:\n{''.join(tail)}")


def main() -> None:
    """The command line; `--help` explains it."""
    show_messages()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="The same run name again resumes an unfinished run."
    )
    parser.add_argument("config", type=Path, help="YAML file, e.g. papermill_runs/configs/shapes.yaml")
    parser.add_argument("--run-name", required=True, help="folder under papermill_runs/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a setting; repeatable")
    parser.add_argument("--gpus", type=int, help="number of GPUs; default: one if there is one")
    parser.add_argument("--processes", type=int, default=1, help="number of processes on the CPU")
    arguments = parser.parse_args()
    malformed = [item for item in arguments.set if "=" not in item]
    if malformed:
        parser.error(f"--set {malformed[0]}: expected name=value, e.g. train.epochs=2")
    try:
        cfg = load_config(arguments.config, dict(item.split("=", 1) for item in arguments.set))
        run_dir = run_path(arguments.run_name)
        results = launch(cfg, run_dir, arguments.gpus, arguments.processes)
    except (ConfigError, DataError, RunError, WeightsError, LaunchError, NonFiniteLoss) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(f"AP {results['detection']['AP']:.3f}  AP50 {results['detection']['AP50']:.3f}  {run_dir}")


if __name__ == "__main__":
    main()
