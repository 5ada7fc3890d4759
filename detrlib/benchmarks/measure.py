"""Time, memory and accuracy of the transforms, side by side with other implementations.

Results are tidy, a row per number. Columns: benchmark, case (a shape, or sites of a model), transform, source (whose
implementation), quantity, unit, value, low and high (quartiles), repeats. Legend: B images, H heads, Q queries, K keys.
"""

import functools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from detrlib import runs
from detrlib.attention import AlphaEntmax, build_transform, reference
from detrlib.attention.transforms import ALPHA_HIGH, ALPHA_LOW
from detrlib.benchmarks.rivals import Candidate, left_out, others, package_version, prox, tvmax_by_map
from detrlib.benchmarks.synthetic import random, training_step
from detrlib.config import load_config
from detrlib.engine.memory import keep_freed_memory
from detrlib.models.outputs import Site

FORWARD, BOTH = "forward", "forward + backward"
SITES = get_args(Site)
KEPT = ", memory kept"  # at the end of cases of `measure_keeping_memory`
NUMBER = ["value", "low", "high", "repeats"]
KEYS = ["benchmark", "case", "transform", "source", "quantity", "unit"]
NO_ROWS = pd.DataFrame(columns=[*KEYS, *NUMBER]).astype(dict.fromkeys(NUMBER, float))


class Shape(NamedTuple):
    """Of attention scores [B,H,Q,K], K = height * width."""

    images: int
    heads: int
    queries: int
    height: int
    width: int

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K)."""
        return self.images, self.heads, self.queries, self.height * self.width

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.height, self.width


class Settings(NamedTuple):
    """Of a measurement; `repeats` and `limit` are those of `compare`."""

    device: str = "cpu"
    repeats: int = 5
    limit: float = 10.0
    score_scale: float = 2.0  # scores are drawn from N(0, score_scale^2)
    alpha: float = 1.25  # of "entmax"; heads of alpha_entmax have alphas from 1.1 to 1.9
    tv_lambda: float = 0.1  # of "tvmax"


def compare(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    limit: float = math.inf,
    device: str = "cpu",
    clock: Callable[[], float] | None = None,
) -> pd.DataFrame:
    """Seconds that each candidate takes: columns value (the median), low and high (quartiles), repeats.

    clock: `time.process_time` counts what this process works; None: that on the wall, until the device has finished.

    Candidates take turns, so that whatever else the machine does hits all of them alike. The first turn only warms up;
    a candidate that has taken more than `limit` seconds in those after it takes no more turns.
    """
    taken = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            if sum(taken[name]) <= limit:
                took = seconds(run, device, clock)
                taken[name] += [took] if turn else []
    quartiles = {name: [*np.quantile(each, (0.5, 0.25, 0.75)), len(each)] for name, each in taken.items()}
    table = pd.DataFrame.from_dict(quartiles, orient="index", columns=NUMBER)
    return table.astype({"repeats": "Int64"}).rename_axis("candidate")


def seconds(run: Callable[[], object], device: str, clock: Callable[[], float] | None = None) -> float:
    """How long `run` takes by a clock, or until the device has finished.

    On a GPU by its own clock: it is kept busy by filling memory until `run` has told it what to do, for a millisecond
    at most, and what it then has to read is no longer in its cache.
    """
    if clock or not device.startswith("cuda"):
        clock = clock or partial(now, device)
        start = clock()
        run()
        return clock() - start
    for _ in range(4):
        _spoiler(device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@functools.cache
def _spoiler(device: str) -> Tensor:
    """More than the cache of any GPU holds."""
    return torch.empty(2**28, dtype=torch.uint8, device=device)


def now(device: str) -> float:
    """The clock, in seconds, when the device has finished what it was told to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that tensors held at a time while `run` ran, beyond those held before, by PyTorch's own count."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    profile = profiled(run, profile_memory=True)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    return int(np.cumsum([0, *(size for _, size in sorted(changes, key=lambda change: change[0]))]).max())


def profiled(run: Callable[[], object], **options: bool) -> torch.profiler.profile:
    """What PyTorch's profiler tells of `run` on the CPU; options are its own."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would complain of a missing GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **options) as profile:
        run()
    return profile


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch has so many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(device: str) -> dict:
    """What `runs.environment` tells, and processor, device and the packages that are measured against."""
    known = runs.environment()
    compared = {name: package_version(name) for name in ("entmax", "numba", "triton", "adasplash")}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    return known | {"packages": known["packages"] | compared, "processor": processor, "device": device}


def _rows(benchmark: str, case: str, measured: list[Candidate], quantity: str, unit: str, values: list) -> list[dict]:
    rows = [{"benchmark": benchmark, "case": case, "transform": c.transform, "source": c.source} for c in measured]
    numbers = [value if isinstance(value, dict) else {"value": value} for value in values]
    return [row | {"quantity": quantity, "unit": unit} | n for row, n in zip(rows, numbers, strict=True)]


# Transforms


def implementations(names: list[str], shape: Shape, settings: Settings, compared: bool = True) -> list[Candidate]:
    """The transforms `names`, each followed by the other implementations at hand if they are to be `compared`.

    Others take one map at a time for tvmax: see `measure_tvmax`.
    """
    alphas, candidates = torch.linspace(1.1, 1.9, shape.heads, device=settings.device), []
    pre_alpha = torch.logit((alphas - ALPHA_LOW) / (ALPHA_HIGH - ALPHA_LOW))
    told = {"alpha": settings.alpha, "alpha_init": pre_alpha, "tv_lambda": settings.tv_lambda}
    for name in names:
        own = build_transform(name, shape.heads, **told).to(settings.device)
        learned = own.pre_alpha if isinstance(own, AlphaEntmax) else None
        candidates.append(Candidate(name, "detrlib", partial(own, grid=shape.grid), learned))
        if compared or name == "softmax":
            candidates += others(name, settings.alpha, alphas)
    return candidates


def measure_transforms(
    names: list[str], shapes: Mapping[str, Shape], settings: Settings, compared: bool = True
) -> pd.DataFrame:
    """Seconds of both passes, and peak memory of the two together in maps [B,H,Q,K] of float32, at every shape.

    Gradients are those of the scores, and of alpha where it is learned.
    """
    rows, device = [], settings.device
    for case, shape in shapes.items():
        scores = random(shape.scores, settings.score_scale, device).requires_grad_()
        gradient = random(shape.scores, 1.0, device, 1)
        candidates = implementations(names, shape, settings, compared)
        for quantity, make in ((FORWARD, _forward), (BOTH, _forward_and_backward)):
            passes = {i: make(candidate, scores, gradient) for i, candidate in enumerate(candidates)}
            times = compare(passes, settings.repeats, settings.limit, device)
            rows += _rows("transform", case, candidates, quantity, "s", times.to_dict("records"))
        both = (_forward_and_backward(candidate, scores, gradient) for candidate in candidates)
        memory = [peak_memory(run, device) / (4 * scores.numel()) for run in both]
        rows += _rows("transform", case, candidates, "memory", "maps", memory)
    return pd.DataFrame(rows)


def measure_keeping_memory(names: list[str], shapes: Mapping[str, Shape], settings: Settings) -> pd.DataFrame:
    """As `measure_transforms`, of ours alone, where the process keeps freed memory, as training does (and this process
    does from now on). No rows on a GPU, whose memory PyTorch keeps anyway.
    """
    if settings.device != "cpu":
        return NO_ROWS
    keep_freed_memory()
    named = {name + KEPT: shape for name, shape in shapes.items()}
    return measure_transforms([name for name in names if name != "tvmax"], named, settings, compared=False)


def _forward(candidate: Candidate, scores: Tensor, gradient: Tensor) -> Callable[[], object]:
    return partial(torch.no_grad()(candidate.apply), scores)


def _forward_and_backward(candidate: Candidate, scores: Tensor, gradient: Tensor) -> Callable[[], object]:
    inputs = [scores] if candidate.alpha is None else [scores, candidate.alpha]
    return lambda: torch.autograd.grad(candidate.apply(scores), inputs, gradient)


def measure_accuracy(names: list[str], shape: Shape, settings: Settings) -> pd.DataFrame:
    """The largest error of a weight against the definition (attention/reference.py) in float64, and the error of the
    gradients of alpha against its differences, relative to all of them (2-norms). Without tvmax, whose errors are in
    `measure_tvmax`.
    """
    rows, device = [], settings.device
    scores, gradient = random(shape.scores, settings.score_scale, device), random(shape.scores, 1.0, device, 1)
    alphas = torch.linspace(1.1, 1.9, shape.heads, device=device, dtype=torch.float64)[:, None, None]  # [H,1,1]
    powers = {"softmax": 1, "sparsemax": 2.0, "entmax15": 1.5, "entmax": settings.alpha, "alpha_entmax": alphas}
    for name in (name for name in names if name != "tvmax"):
        candidates = implementations([name], shape, settings)
        expected = reference.entmax(scores.double(), powers[name])
        errors = [(_forward(candidate, scores, gradient)() - expected).abs().max().item() for candidate in candidates]
        rows += _rows("accuracy", "weights", candidates, "error", "", errors)
        if name == "alpha_entmax":
            above, below = (reference.entmax(scores.double(), alphas + step) for step in (1e-5, -1e-5))
            expected = ((above - below) / 2e-5 * gradient).sum((0, 2, 3))  # [H]
            slopes = [_alpha_gradient(candidate, scores, gradient) for candidate in candidates]
            errors = [((slope - expected).norm() / expected.norm()).item() for slope in slopes]
            rows += _rows("accuracy", "alpha gradient", candidates, "relative error", "", errors)
    return pd.DataFrame(rows)


def _alpha_gradient(candidate: Candidate, scores: Tensor, gradient: Tensor) -> Tensor:
    """[H]. detrlib learns pre_alpha, with alpha = low + (high - low) sigmoid(pre_alpha)."""
    (slope,) = torch.autograd.grad(candidate.apply(scores), candidate.alpha, gradient)
    if candidate.source != "detrlib":
        return slope.flatten()
    share = candidate.alpha.detach().double().sigmoid()
    return slope / ((ALPHA_HIGH - ALPHA_LOW) * share * (1 - share))


def measure_tvmax(shape: Shape, maps: int, settings: Settings) -> pd.DataFrame:
    """Seconds of tvmax, forward and backward, of all maps at once, and of loops over them on the CPU, which are
    measured on `maps` of them and scaled up. Also the largest error of a weight, on four maps with scores from
    N(0, (2 tv_lambda)^2), which leave weight to many cells. No rows without numba, which compiles the loops.
    """
    if "numba" in left_out(settings.device):
        return NO_ROWS
    by_map = partial(tvmax_by_map, grid=shape.grid, lam=settings.tv_lambda)
    accurate = partial(by_map, search=False, iterations=1000, tolerance=1e-5, digits=4)
    candidates = [
        *implementations(["tvmax"], shape, settings),
        Candidate("tvmax", "loop, as published", by_map),
        Candidate("tvmax", "loop, linear gradient", partial(by_map, search=False)),
        Candidate("tvmax", "loop, linear gradient, accurate", accurate),
    ]
    whole = random(shape.scores, settings.score_scale, settings.device).flatten(0, 2)  # [B*H*Q,K]
    part, passes = whole[:maps].cpu(), {}
    for candidate in candidates:
        scores = (whole if candidate.source == "detrlib" else part).detach().requires_grad_()
        gradient = random(scores.shape, 1.0, scores.device.type, 1)
        passes[candidate.source] = _forward_and_backward(candidate, scores, gradient)
    times = compare(passes, settings.repeats, settings.limit, settings.device)
    times.loc[times.index != "detrlib", ["value", "low", "high"]] *= len(whole) / len(part)

    few = whole[:4] * (2 * settings.tv_lambda / settings.score_scale)
    smooth = [prox(y, settings.tv_lambda, 20000, 1e-9) for y in few.cpu().double().unflatten(1, shape.grid).numpy()]
    expected = reference.entmax(torch.from_numpy(np.stack(smooth)).flatten(1), 2.0)
    errors = [(candidate.apply(few).cpu() - expected).abs().max().item() for candidate in candidates]
    rows = _rows("tvmax", "decoder_cross", candidates, BOTH, "s", times.to_dict("records"))
    return pd.DataFrame(rows + _rows("tvmax", "decoder_cross", candidates, "error", "", errors))


# Training steps


def measure_steps(names: list[str], backbone: str, image_size: int, batch: int, settings: Settings) -> pd.DataFrame:
    """Seconds of a training step of DETR, from images to updated weights, with each transform in the decoder's
    cross-attention alone and at all three sites, beside softmax everywhere. Images and boxes are random.
    """
    cases, steps, size = {"decoder_cross": SITES[-1:], "all sites": SITES}, {}, (image_size, image_size)
    # The stem stays frozen, as if there were weights to keep.
    plain = {"model.backbone": {"name": backbone, "weights": "none", "freeze_stem": True}, "model.num_classes": 91}
    for case, sites in cases.items():
        for name in names:
            # tvmax needs keys on a grid, and those of decoder_self are none.
            where = {site: name for site in sites if (site, name) != ("decoder_self", "tvmax")}
            cfg = load_config(None, plain | {"model.attention": where})
            steps[case, name] = training_step(cfg, size, batch, settings.device)
    softmax = training_step(load_config(None, plain), size, batch, settings.device)
    times = compare({"softmax": softmax} | steps, settings.repeats, settings.limit, settings.device)
    rows = []
    for case in cases:
        candidates = [Candidate(name, "detrlib", None) for name in ("softmax", *names)]
        values = times.loc[["softmax", *((case, name) for name in names)]].to_dict("records")
        rows += _rows("step", case, candidates, "step", "s", values)
    return pd.DataFrame(rows)
