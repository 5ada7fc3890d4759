"""How time and memory grow: with images evaluated, with keys, queries and images of attention, with processes, with
annotations read.

    detrlib benchmark growth --out build/growth       about ten minutes of one core

Every series gets the exponent of a power law: the slope of a line through its larger half in logarithms (1: twice as
much takes twice as long; 0: no growth). Times are CPU seconds of a process with one thread, but where processes train
together: those are seconds by the clock. Memory of attention is the most that tensors held at a time; elsewhere it is
resident memory of a process of its own, beyond what it had before.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel

from detrlib.attention import attend, build_transform
from detrlib.benchmarks.measure import environment, peak_memory, seconds, threads
from detrlib.config import Config, load_config, replace
from detrlib.data import build_dataset
from detrlib.data.index import read_columns
from detrlib.engine.evaluate import evaluate, save_results
from detrlib.figures.style import figure, run_colours, save, styled
from detrlib.files import write_json
from detrlib.losses.criterion import Criterion
from detrlib.metrics.bootstrap import ap_table
from detrlib.models import build_model
from detrlib.runs.results import load_matches

TRANSFORMS = ("softmax", "sparsemax", "entmax15", "alpha_entmax")
HEADS, CHANNELS = 8, 32
FRESH = get_context("forkserver")  # processes that have imported what they need, and done nothing yet
FRESH.set_forkserver_preload([__name__])
ENTRIES = 7.3  # annotations of an image, as in COCO
SEEN = {  # a small detector whose every map is measured and stored: what is done for each image beside the model
    **{"data.image_size": 64, "data.workers": 0, "model.num_classes": 7},
    "model.backbone": {"name": "tiny", "weights": "none"},
    "model.attention": dict.fromkeys(("encoder_self", "decoder_self", "decoder_cross"), "entmax15"),
    **{"model.hidden_dim": 64, "model.num_heads": 4, "model.encoder_layers": 2, "model.decoder_layers": 2},
    **{"model.feedforward_dim": 128, "model.num_queries": 20, "evaluate.batch_size": 50},
    **{"evaluate.store_maps": "all", "evaluate.store_sites": ["encoder_self", "decoder_self", "decoder_cross"]},
}


class Sizes(NamedTuple):
    """What is measured: rising sizes of each series, and the others that stay as they are."""

    evaluated: tuple[int, ...] = (500, 1500, 5000)  # images
    keys: tuple[int, ...] = (256, 1024, 4096, 10_000, 20_000, 40_000)
    queries: tuple[int, ...] = (64, 256, 1024, 4096)
    images: tuple[int, ...] = (1, 4, 16, 64)
    processes: tuple[int, ...] = (1, 2)
    annotated: tuple[int, ...] = (2000, 10_000, 40_000, 118_000)  # images of an annotation file
    few: int = 100  # queries, where keys or images grow
    keys_of: int = 1024  # keys, where queries or images grow
    repeats: int = 2
    pixels: int = 128  # side of an image that processes train on
    steps: int = 4


def main(out: Path) -> None:
    """Measure, print the exponents, and write growth.json and a figure for each series into `out`."""
    with threads(1):
        known, points = environment("cpu"), measure(Sizes())
    exponents = slopes(points)
    print(exponents.to_string(index=False, float_format="{:.2f}".format))
    rows = {"environment": known, "points": points.to_dict("records"), "slopes": exponents.to_dict("records")}
    write_json(out / "growth.json", rows)
    for against, own in points.groupby("against", sort=False):
        save(growth(own), f"growth_{against.replace(' ', '_')}", out.absolute(), f"{known['processor']}, one thread")


def measure(sizes: Sizes) -> pd.DataFrame:
    """A row per point: against (what grows), series, size, seconds, bytes."""
    return pd.DataFrame(
        [
            *_attention("keys", sizes.keys, sizes),
            *_attention("queries", sizes.queries, sizes),
            *_attention("images", sizes.images, sizes),
            *_evaluations(sizes.evaluated),
            *_annotations(sizes.annotated),
            *_processes(sizes),
        ]
    )


def slopes(points: pd.DataFrame) -> pd.DataFrame:
    """The exponents of time and memory over the larger half of each series, two sizes at least: columns against,
    series, seconds, bytes."""
    rows = []
    for (against, series), own in points.groupby(["against", "series"], sort=False):
        own = own.sort_values("size").iloc[-max(2, (len(own) + 1) // 2) :]
        fitted = [np.polyfit(np.log(own["size"]), np.log(own[what]), 1)[0] for what in ("seconds", "bytes")]
        rows.append((against, series, *fitted))
    return pd.DataFrame(rows, columns=["against", "series", "seconds", "bytes"])


@styled
def growth(points: pd.DataFrame) -> Figure:
    """Time and memory of every series against what grows, with the exponents of their larger halves."""
    drawn, axes = figure(1.0, 0.45, ncols=2)
    exponents = slopes(points).set_index("series")
    colours = run_colours(points["series"].unique())
    for panel, what, unit in zip(axes, ("seconds", "bytes"), (1, 2**20), strict=True):
        for series, own in points.groupby("series", sort=False):
            label = f"{series}: {exponents.loc[series, what]:.2f}"
            panel.plot(own["size"], own[what] / unit, "o-", color=colours[series], markersize=3.5, label=label)
        panel.set(xscale="log", yscale="log", xlabel=points["against"].iloc[0])
        sizes = sorted(set(points["size"]))
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        panel.set_xticks([], minor=True)
        panel.legend(title="exponent")
    axes[0].set_ylabel("seconds")
    axes[1].set_ylabel("MiB")
    return drawn


# Attention


def _attention(against: str, grown: Iterable[int], sizes: Sizes) -> list[dict]:
    """Both passes of `attend` without maps, with every transform; the shortest of some times."""
    rows = []
    for size in grown:
        images, queries, keys = {
            "images": (size, sizes.few, sizes.keys_of),
            "queries": (1, size, sizes.keys_of),
            "keys": (1, sizes.few, size),
        }[against]
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, requires_grad=True)
        inputs = [draw(images, HEADS, count, CHANNELS) for count in (queries, keys, keys)]
        gradient = torch.ones_like(inputs[0])
        for name in TRANSFORMS:
            transform = build_transform(name, HEADS)
            learned = list(transform.parameters())
            both = partial(_both_passes, inputs, transform, learned, gradient)
            taken = min(seconds(both, "cpu", time.process_time) for _ in range(sizes.repeats + 1))  # the first warms up
            rows.append(_point(against, name, size, taken, peak_memory(both)))
    return rows


def _both_passes(inputs: list, transform: torch.nn.Module, learned: list, gradient: torch.Tensor) -> None:
    mixed, _ = attend(*inputs, transform)
    torch.autograd.grad(mixed, [*inputs, *learned], gradient)


def _point(against: str, series: str, size: int, seconds: float, memory: float) -> dict:
    numbers = {"seconds": max(seconds, 1e-6), "bytes": max(memory, 1)}  # which have logarithms
    return {"against": against, "series": series, "size": size} | numbers


# Processes of their own


def _alone(work: Callable, *arguments: Any) -> Any:
    """What a function returns in a fresh process, whose peak of memory is its own."""
    with ProcessPoolExecutor(1, FRESH) as pool:
        return pool.submit(work, *arguments).result()


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Evaluation


def _evaluations(counts: Sequence[int]) -> list[dict]:
    """An evaluation with every measure and map, its files and the spread over samples of images; in the process that
    does it, what the pass over images takes, and all of it."""
    rows = []
    build_dataset(_seen(counts).data, "val")  # drawn here, and not in the process that is measured
    for count in counts:
        measured = _alone(_evaluated, _seen(counts), count)
        rows += [_point("images evaluated", series, count, *numbers) for series, numbers in measured.items()]
    return rows


def _seen(counts: Sequence[int]) -> Config:
    return load_config(None, SEEN | {"data.shapes": {"train": 32, "val": max(counts), "size": 64}})


def _evaluated(cfg: Config, count: int) -> dict[str, tuple[float, int]]:
    torch.set_num_threads(1)
    cfg = replace(cfg, {"data.val_limit": count})
    dataset, model = build_dataset(cfg.data, "val"), build_model(cfg.model)
    with tempfile.TemporaryDirectory() as folder:
        run_dir, before, start = Path(folder), _resident(), time.process_time()
        results, detections = evaluate(model, dataset, cfg, Accelerator(cpu=True), run_dir=run_dir, progress=False)
        passed = time.process_time() - start, _peak() - before
        save_results(run_dir, results, detections, dataset.ground_truth)
        ap_table(load_matches(run_dir), resamples=100)
        return {"pass over images": passed, "with files and AP": (time.process_time() - start, _peak() - before)}


# Annotations


def _annotations(counts: Iterable[int]) -> list[dict]:
    """Reading a file of COCO's kind: the first time on a machine, and after that."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "annotations.json"
            write_annotations(path, count)
            for series in ("first process", "later processes"):
                rows.append(_point("images annotated", series, count, *_alone(_read, path)))
    return rows


def _read(path: Path) -> tuple[float, int]:
    torch.set_num_threads(1)
    os.environ["DETRLIB_CACHE"] = str(path.parent / "cache")
    before, start = _resident(), time.process_time()
    read_columns(path)
    return time.process_time() - start, _peak() - before


def write_annotations(path: Path, images: int, points: int = 25) -> None:
    """Write an annotation file like COCO's, of drawn numbers: with 118,000 images it has 861,000 boxes and 500 MB.

    Args:
        path: of the file.
        images: how many; they are named as COCO's are, and need not be there.
        points: of the polygon of each annotation; 0: no polygons.
    """
    draws = np.random.default_rng(0)
    address = "http://images.example.org/train2017/"
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "categories": ')
        json.dump([{"supercategory": "thing", "id": id, "name": f"class {id}"} for id in range(1, 81)], file)
        for section, count, entry in (
            ("images", images, partial(_image_entry, address)),
            ("annotations", int(ENTRIES * images), partial(_box_entry, draws, images, points)),
        ):
            file.write(f', "{section}": [')
            for start in range(0, count, 10_000):
                entries = [json.dumps(entry(number)) for number in range(start, min(start + 10_000, count))]
                file.write((", " if start else "") + ", ".join(entries))
            file.write("]")
        file.write("}")


def _image_entry(address: str, number: int) -> dict:
    name = f"{number:012d}.jpg"
    about = {"license": 3, "coco_url": address + name, "date_captured": "2013-11-14 17:02:52"}
    return about | {"id": number, "file_name": name, "height": 480, "width": 640}


def _box_entry(draws: np.random.Generator, images: int, points: int, number: int) -> dict:
    x, y, w, h = (draws.random(4) * (400, 300, 240, 180)).round(2).tolist()
    polygon = (draws.random(2 * points) * 200).round(2).tolist()
    about = {"segmentation": [polygon]} if points else {}
    box = {"bbox": [x, y, w + 1, h + 1], "area": round(0.6 * w * h + 1, 4), "iscrowd": 0}
    return about | box | {"id": number + 1, "image_id": number % images, "category_id": 1 + number % 80}


# Processes that train together


def _processes(sizes: Sizes) -> list[dict]:
    """A training step of so many processes, each with two images; by the clock, the slowest of them."""
    rows = []
    for count in sizes.processes:
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(count, FRESH) as pool:
            train = partial(_trained, count, f"file://{folder}/meeting", sizes.pixels, sizes.steps)
            taken, memory = zip(*pool.map(train, range(count)), strict=True)
        rows.append(_point("processes", "training step", count, max(taken), max(memory)))
    return rows


def _trained(processes: int, meeting: str, pixels: int, steps: int, rank: int) -> tuple[float, int]:
    """Seconds of the quickest step after the first one, and memory, of one of several processes."""
    torch.set_num_threads(1)
    cfg: Config = load_config(None, SEEN)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    try:
        torch.manual_seed(rank)
        before = _resident()
        model = DistributedDataParallel(build_model(cfg.model).train())
        optimizer, criterion = torch.optim.AdamW(model.parameters()), Criterion(**dict(cfg.loss))
        images = torch.randn(2, 3, pixels, pixels)
        targets = [{"labels": torch.arange(4), "boxes": 0.25 + 0.25 * torch.rand(4, 4)} for _ in images]
        taken = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            loss, _ = criterion(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(time.perf_counter() - start)
        return min(taken[1:]), _peak() - before
    finally:
        torch.distributed.destroy_process_group()
