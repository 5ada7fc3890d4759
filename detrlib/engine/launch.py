"""Start what takes long: in this process, or with torchrun when there is more than one.

    detrlib train papermill_runs/configs/shapes.yaml --name first --set train.epochs=2
    detrlib train papermill_runs/configs/detr-r50.yaml --name detr --gpus 8
    detrlib evaluate detr --gpus 8
    torchrun --nnodes 2 --nproc-per-node 8 ... -m detrlib evaluate detr        on each of two nodes

From Python or a notebook cell: `launch(cfg, run_dir, gpus=2)`, where the same name again resumes, and
`in_processes(evaluate_run, run_dir, gpus=2)`.
"""

import atexit
import os
import pickle
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs

from detrlib.config import PROJECT, Config
from detrlib.engine.agent import FAULT, started
from detrlib.engine.children import HANDED_ON, passing_on, saving_without_parent, stopped, with_parent
from detrlib.engine.loop import train
from detrlib.engine.memory import keep_freed_memory
from detrlib.engine.nodes import node_count, torchrun
from detrlib.engine.ready import ready_for_processes
from detrlib.engine.tracking import PROGRESS
from detrlib.errors import STOPPED, RunError, Stopped
from detrlib.runs.folder import load_results, run_config
from detrlib.runs.opening import open_run
from detrlib.runs.owner import owned, owning

TAIL = 30  # lines of a failed subprocess that are repeated in the error
PATIENCE = timedelta(days=7)  # with processes whose share takes longer; torchrun ends all where one is lost


@owning
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
        Stopped: a signal came, and all processes have saved.
        DetrlibError: as `detrlib.engine.loop.train`.
    """
    if not (several := _to_start(gpus, processes)):
        keep_freed_memory()
        with saving_without_parent():
            return train(cfg, run_dir)
    count, used = several
    ready_for_processes(cfg, run_dir, count, node_count(), gpus=used > 0)
    open_run(cfg, run_dir)
    _torchrun("detrlib.engine.loop", run_dir, count, used)
    return load_results(run_dir)


def in_processes(
    function: Callable, run_dir: Path, *arguments: Any, gpus: int | None = None, processes: int = 1, **named: Any
) -> Any:
    """Call a function that shares its work among processes: in this one, or in several with the work shared.

    Args:
        function: of the library, such as `evaluate_run`, `faithfulness_run`, `measure_plan`. Results do not depend on
            the number of processes.
        run_dir: its first argument, the folder of a run.
        arguments, named: the others.
        gpus, processes: as of `launch`. In a process that torchrun has started, they are not asked for.

    Returns:
        What the function returns, in the main process.

    Raises:
        RunError: as `launch`; or an argument is made of code that other processes do not have, as that of a notebook.
            Or a signal came: unlike training, it begins anew.
        DetrlibError: as the function.
    """
    if _is_one_of_several():
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])
        result = function(run_dir, *arguments, **named)
        atexit.register(accelerator.end_training)  # processes leave each other in order
        return result
    if not (several := _to_start(gpus, processes)):
        return function(run_dir, *arguments, **named)
    run_config(run_dir)  # says what is wrong here rather than in a subprocess
    try:
        work = pickle.dumps((function, (run_dir, *arguments), named))
        if b"__main__" in work:
            raise pickle.PicklingError("some of it is defined in a notebook")
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RunError(f"{run_dir}: several processes need code that they can import ({error}); use one") from None
    # Nobody else may write there: what is read from it runs.
    shared = run_dir if node_count() > 1 else None  # other nodes do not see /tmp
    with owned(run_dir), tempfile.TemporaryDirectory(prefix=".detrlib-", dir=shared) as folder:
        (path := Path(folder) / "work").write_bytes(work)
        try:
            _torchrun("detrlib.engine.launch", path, *several)
        except Stopped as stopped:  # as one process would end, too: nothing of it is there to go on from
            raise RunError(f"{run_dir}: {str(stopped).partition(';')[0]}, and begins anew; give it more time") from None
        return pickle.loads(path.read_bytes())


def _to_start(gpus: int | None, processes: int) -> tuple[int, int] | None:
    """How many processes to start and how many GPUs they have; None where this one will do, or is one of several."""
    if _is_one_of_several():
        return None
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = min(1, there) if gpus is None else gpus
    if wanted < 0 or processes < 1:
        raise RunError(f"{wanted} GPUs and {processes} processes asked for; GPUs start at 0, processes at 1")
    if wanted > there:
        raise RunError(f"{wanted} GPUs asked for, {there} available; use --gpus {there} (0 computes on the CPU)")
    if wanted and processes > 1:
        raise RunError("processes are for the CPU; with GPUs there is one process for each")
    return None if (wanted, processes, node_count()) == (min(1, there), 1, 1) else (max(wanted, processes), wanted)


def _is_one_of_several() -> bool:
    """Whether torchrun has started this process, and others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _torchrun(module: str, path: Path, processes: int, gpus: int) -> None:
    """Run a module that takes a path in several processes, passing on what they print, but not after a fault."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if sys.stderr.isatty():
        environment[PROGRESS] = "1"
    if not gpus:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    child = subprocess.Popen(
        [*torchrun(processes), "-m", module, str(path)],
        cwd=PROJECT,
        # Of several nodes only one has this process; there Slurm ends what is left of a step.
        env=with_parent(environment) if node_count() == 1 else environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # signals from a terminal come by this process
    )
    tail, said, reporting = deque(maxlen=TAIL), [], False
    with passing_on(partial(child.send_signal, HANDED_ON)) as came:
        for line in TextIOWrapper(child.stdout, errors="replace", newline=""):  # a bar ends in a return
            if line.startswith(FAULT):  # a fault that was foreseen, in one line
                said.append(line.removeprefix(FAULT).strip())
            # torchrun's own report of a failure is long, and does not say what the failure was.
            reporting = reporting or "torch/distributed/elastic" in line
            if said or (came and "torch/distributed/elastic" in line):  # it follows from what is known
                continue
            print(line, end="", flush=True)
            if not (reporting or line.endswith("\r")):
                tail.append(line)
        code = child.wait()
    if code and not said and (came or code == STOPPED):  # a fault while it was saved is one all the same
        raise stopped(came, *(line.strip() for line in tail if line.startswith("stopped by")))
    if code:
        if said:
            raise RunError(f"{processes} processes failed: {said[0]}")
        raise RunError(f"{processes} processes of torchrun failed with code {code}:\n{''.join(tail)}")


def main() -> None:
    """The door for torchrun: do the work in a file of `in_processes`, in whose place the main one leaves the result."""
    path = Path(sys.argv[1])
    with started():
        function, arguments, named = pickle.loads(path.read_bytes())
        result = in_processes(function, *arguments, **named)
        if PartialState().is_main_process:  # all have read the file, or there would be no result
            path.write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
