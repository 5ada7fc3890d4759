"""A training step of DETR-R50 beside transformers' and the model in plain PyTorch, and where its time goes.

    detrlib benchmark step

Two images, one of them padded, stem and first stage frozen: from the batch to updated weights. On one thread the time
is that which the process works, whatever else the machine does; on two it is that on the wall.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from detrlib.benchmarks.detectors import plain_step, transformers_model, transformers_step
from detrlib.benchmarks.measure import compare, environment, profiled, threads
from detrlib.benchmarks.synthetic import random_batch, training_step
from detrlib.config import load_config
from detrlib.engine.memory import keep_freed_memory
from detrlib.files import write_json

OURS = "detrlib"
MODEL = {"model.backbone": {"name": "resnet50", "weights": "none", "freeze_stem": True}, "model.num_classes": 91}
KINDS = {  # of operations, by what their names contain; the first that fits
    "optimiser": ("Optimizer.",),  # and all within it
    "convolution": ("conv",),
    "attention": ("bmm", "softmax", "scaled_dot_product", "attention"),
    "linear": ("aten::mm", "addmm"),
    "dropout": ("bernoulli", "random_"),
    "copy": ("copy_", "aten::cat"),
    "mask": ("masked_fill", "where"),
}


class Case(NamedTuple):
    """What is measured, and how often."""

    size: tuple[int, int]  # height, width
    threads: int
    repeats: int

    @property
    def name(self) -> str:
        return f"2 x {self.size[0]} x {self.size[1]}, {self.threads} thread{'s' if self.threads > 1 else ''}"


CASES = (Case((512, 512), 1, 5), Case((800, 1066), 1, 3), Case((512, 512), 2, 5))


def main(out: Path) -> None:
    """Measure all `CASES`, print a table and a profile, and write them with the machine to step.json in `out`."""
    keep_freed_memory()
    rows, profiles = [], {}
    for case in (case for case in CASES if case.threads <= (os.cpu_count() or 1)):
        with threads(case.threads):
            steps = steps_of(case.size)
            rows.append(times(steps, case))
            if case.threads == 1:
                profiles[case.name] = profile(steps[OURS])
    known = environment("cpu") | {"vector instructions": torch.backends.cpu.get_cpu_capability()}
    table = pd.concat(rows)
    print(f"{known['processor']}, {known['vector instructions']}\n\n{table.round(3).to_string()}\n")
    print("shares of the time of our step, by kind of operation\n")
    print(pd.DataFrame(profiles).round(3).to_string())
    results = table.reset_index().to_dict("records")
    write_json(out / "step.json", {"environment": known, "results": results, "profiles": profiles})


def steps_of(size: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Steps on two images of `size`, by whose they are; those of transformers where it is installed."""
    batch = random_batch(size, 2, "cpu", padded=True)
    ours = training_step(load_config(None, MODEL), size, 2, padded=True)
    steps = {OURS: ours, "plain PyTorch": plain_step(batch)}
    try:
        steps["transformers"] = transformers_step(batch, transformers_model("detr", {}, {}))
    except ImportError:
        print("transformers: not installed, left out")
    return steps


def times(steps: dict[str, Callable[[], object]], case: Case) -> pd.DataFrame:
    """Seconds of each step in turn: median and quartiles by case and source, and how much longer than ours it takes."""
    clock = time.process_time if case.threads == 1 else time.perf_counter
    table = compare(steps, case.repeats, clock=clock).rename_axis("source").reset_index()
    table["time / ours"] = table.value / table.value[table.source == OURS].item()
    names = {"value": "median [s]", "low": "quartile 1 [s]", "high": "quartile 3 [s]"}
    return table.assign(case=case.name, threads=case.threads).rename(columns=names).set_index(["case", "source"])


def profile(step: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of a step by kind of operation, the largest first."""
    spent = Counter()
    for event in profiled(step).events():
        spent[kind_of(event)] += event.self_cpu_time_total
    return {kind: amount / spent.total() for kind, amount in spent.most_common()}


def kind_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    """The kind of an operation in a profile, "elementwise" where it is none of `KINDS`."""
    outer = event
    while outer is not None:
        if KINDS["optimiser"][0] in outer.name:
            return "optimiser"
        outer = outer.cpu_parent
    return next((kind for kind, parts in KINDS.items() if any(p in event.name for p in parts)), "elementwise")
