"""Everything worth knowing about a GPU, in six minutes: are the kernels right there, and how fast is what.

On a machine with a GPU, in a checkout, these two commands say it; the second writes gpu.md, a table for each part, and
gpu.json into the folder:

    python -m pytest -m gpu                (with pytest-xdist and -n 8, kernels are compiled side by side)
    python -m detrlib benchmark gpu --out build/benchmarks

They need PyTorch 2.11 or newer with Triton, torchvision, transformers, accelerate, pandas, pyarrow, scipy, matplotlib,
seaborn, typer and pytest, and the packages below; not papermill, wandb or anything of Jupyter. For a machine without
network, fetch on another one what is missing there (here for Python 3.12), and carry the folder `wheels` across:

    pip download -d wheels --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux2014_x86_64 pydantic
    pip download -d wheels --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux2014_x86_64 --no-deps msgspec faster-coco-eval pycocotools entmax adasplash
    pip install --no-index --no-deps wheels/*.whl

entmax and adasplash are measured against where they are there; nothing else asks for them here. Each part is a process
of its own, which ends when its time is over: a kernel that hangs or spoils the GPU's state costs its own part alone.
What was measured until then stands in gpu.jsonl, a line for every row, and what processes say in gpu.log.
"""

import os
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from detrlib.benchmarks import report
from detrlib.benchmarks.measure import environment
from detrlib.errors import ConfigError, DetrlibError

ROWS, LOG = "gpu.jsonl", "gpu.log"
SECONDS = 345.0  # of all parts together


class Part(NamedTuple):
    """What a process measures."""

    name: str  # module.function of this folder, which takes a device and yields rows
    title: str
    seconds: float  # at most


STAGES = (  # one after the other; parts of one run side by side
    (Part("kernels.machine", "Machine", 60),),
    (
        Part("kernels.check_rows", "Kernels of rows against plain PyTorch in float64 on the CPU", 90),
        Part("kernels.check_fused", "Fused attention against the same", 100),
        Part("kernels.check_fused_half", "Fused attention in half precision against the same", 100),
        Part("kernels.check_deformable", "Deformable attention against the same", 90),
    ),
    (Part("training.time_steps", "Training steps, 4 images of 800 x 1066", 85),),
    (Part("kernels.time_rows", "Transforms of scores", 45),),
    (Part("kernels.time_fused", "Attention", 60),),
    (Part("kernels.time_deformable", "Deformable attention", 30),),
    (Part("training.time_sparsity", "Price of sparse attention at all sites", 45),),
    (Part("training.count_waits", "Waits in a training step", 25),),
    (Part("training.largest_parts", "Images at a time that fit", 45),),
    (Part("training.time_compiled", "Compiled training steps", 180),),
)


def main(out: Path) -> None:
    """Measure the GPU of this machine, show a table of every part, and write gpu.md and gpu.json to `out`.

    Raises:
        ConfigError: there is no GPU.
        DetrlibError: after all is written: a result is wrong, or something could not be measured.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            f"benchmark gpu: PyTorch {torch.__version__} finds no GPU on this machine, and this needs one"
        )
    measure_parts(out, "cuda")


def measure_parts(
    out: Path, device: str, stages: tuple[tuple[Part, ...], ...] = STAGES, limit: float = SECONDS
) -> None:
    """Let every part be measured on a device, and write what there is after each stage.

    On a CPU Triton's interpreter runs the kernels. While a stage is measured, processes of the next import what they
    need.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / ROWS).unlink(missing_ok=True)
    known, done, end = environment(device), [], time.monotonic() + limit
    with (out / LOG).open("w") as log:
        processes: list[subprocess.Popen] = []
        try:
            processes = [start(part, out, device, log) for part in stages[0]]
            for stage, following in zip(stages, [*stages[1:], ()], strict=True):
                running, processes = processes, [*processes, *(start(part, out, device, log) for part in following)]
                took = await_all(list(zip(stage, running, strict=True)), out, end - time.monotonic())
                processes = processes[len(running) :]
                done += [
                    {"part": part.title, "seconds": took, "rows": report.read(out / ROWS, part.name)} for part in stage
                ]
                report.write(out, "gpu", known, done)
                for part in done[-len(stage) :]:
                    print(f"\n{part['part']}\n{report.table(part['rows'])}", flush=True)
        finally:
            for process in processes:
                process.kill()
    judge(done, out)


def start(part: Part, out: Path, device: str, log) -> subprocess.Popen:
    """A process that imports what a part needs, and measures when it is given a line."""
    words = [sys.executable, "-m", "detrlib.benchmarks.gpu", part.name, str(out), device]
    settings = os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=settings, text=True)


def await_all(parts: list[tuple[Part, subprocess.Popen]], out: Path, left: float) -> float:
    """Let processes measure side by side until they end, or end them when their time is over; how many seconds it was.

    A row of a part says so where it did not end by itself.
    """
    began = time.monotonic()
    for _, process in parts:
        with suppress(BrokenPipeError):  # of one that has ended already, as its code will say
            process.stdin.write("\n")
            process.stdin.close()
    for part, process in parts:
        most = max(0.0, min(part.seconds, left))
        try:
            code = process.wait(max(0.0, began + most - time.monotonic()))
            ended = f"ended with code {code}, see {LOG}" if code else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"stopped after {most:.0f} s"
        if ended:
            report.append(out / ROWS, part.name, {"fault": ended})
    return time.monotonic() - began


def judge(done: list[dict], out: Path) -> None:
    """Say where the tables are, and raise DetrlibError if a result in them is wrong or missing."""
    rows = [row for part in done for row in part["rows"]]
    wrong, faults = sum(row.get("ok") is False for row in rows), sum("fault" in row for row in rows)
    checked, where = sum("ok" in row for row in rows), out / "gpu.md"
    if wrong or faults:
        raise DetrlibError(f"{wrong} of {checked} results are wrong, {faults} rows could not be measured; see {where}")
    print(f"all {checked} results are right; {where}")


def measure_part(name: str, out: Path, device: str) -> None:
    """In a process of its own: wait for a line, then measure a part and add its rows to a file."""
    module, function = name.split(".")
    measurements = getattr(import_module(f"detrlib.benchmarks.{module}"), function)(device)
    sys.stdin.readline()
    try:
        for row in measurements:
            report.append(out / ROWS, name, row)
    except Exception as error:
        traceback.print_exc()
        report.append(out / ROWS, name, {"fault": report.fault(error)})


if __name__ == "__main__":
    measure_part(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
