"""The Triton kernels: whether they compute what plain PyTorch computes on a CPU, and how fast they are.

Functions yield rows, dictionaries of what a table shows, as soon as each is measured. On a CPU, with TRITON_INTERPRET=1
in the environment, they do the same with tiny tensors. Legend as in `attention.mixing` and `attention.deformable`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detrlib.attention import build_transform
from detrlib.attention.deformable import sample_and_mix
from detrlib.attention.entmax import entmax
from detrlib.attention.kernels import deformable, flash, rows
from detrlib.attention.mixing import mix
from detrlib.benchmarks.measure import Settings, Shape, compare, implementations, peak_memory, seconds
from detrlib.benchmarks.report import fault
from detrlib.benchmarks.rivals import attention_rivals, by_grid_sample
from detrlib.benchmarks.synthetic import random

ALPHAS = {"sparsemax": 2.0, "entmax15": 1.5, "entmax 1.3": 1.3, "alpha per head": None}
BACKWARD = "forward + backward"


class Sizes(NamedTuple):
    """Of what is computed on a device."""

    half: torch.dtype
    rows: tuple[tuple[int, int], ...]  # (rows, keys) that are compared; the longest are not held in registers
    fused: tuple[tuple[int, ...], ...]  # (B, H, Q, K, D)
    deformable: tuple[int, int, list[tuple[int, int]]]  # B, Q, and (h, w) of the levels
    timed_rows: dict[str, Shape]
    timed_fused: dict[str, tuple[int, ...]]
    timed_deformable: dict[str, tuple[int, int, list[tuple[int, int]]]]
    repeats: int
    block: int  # bytes that are copied to find out how fast memory is


LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]  # of an image of 800 x 1066
SIZES = {
    "cuda": Sizes(
        half=torch.bfloat16,
        rows=((64, 950), (64, 100), (32, 16384), (16, 40000)),
        fused=((2, 8, 300, 2500, 32), (1, 4, 100, 300, 64), (1, 2, 100, 300, 128)),
        deformable=(2, 300, LEVELS),
        timed_rows={
            "decoder_cross 8 x 8 x 100 x 850": Shape(8, 8, 100, 25, 34),
            "encoder_self 8 x 8 x 850 x 850": Shape(8, 8, 850, 25, 34),
            "encoder_self, DC5 1 x 8 x 3350 x 3350": Shape(1, 8, 3350, 50, 67),
            "long rows 1 x 8 x 300 x 40000": Shape(1, 8, 300, 200, 200),
        },
        timed_fused={
            "encoder_self 8 x 8 x 850 x 850": (8, 8, 850, 850, 32),
            "DC5 2 x 8 x 3350 x 3350": (2, 8, 3350, 3350, 32),
            "decoder_cross, DC5 8 x 8 x 100 x 3350": (8, 8, 100, 3350, 32),
            "127 x 129 cells 1 x 8 x 16383 x 16383": (1, 8, 16383, 16383, 32),
        },
        timed_deformable={"encoder, 4 images": (4, 17821, LEVELS), "decoder, 4 images": (4, 300, LEVELS)},
        repeats=20,
        block=2**30,
    ),
    "cpu": Sizes(
        half=torch.float16,  # the interpreter has no product of bfloat16
        rows=((3, 7), (3, 110), (2, 16400)),
        fused=((1, 2, 19, 45, 16),),
        deformable=(1, 3, [(4, 5), (2, 3)]),
        timed_rows={"1 x 2 x 3 x 8": Shape(1, 2, 3, 2, 4)},
        timed_fused={"1 x 2 x 5 x 9": (1, 2, 5, 9, 16)},
        timed_deformable={"1 image": (1, 3, [(4, 5), (2, 3)])},
        repeats=1,
        block=2**20,
    ),
}


def _compared(
    case: dict, names: Sequence[str], found: Sequence[Tensor], expected: Sequence[Tensor], limits: dict[str, float]
) -> Iterator[dict]:
    """A row per result: its largest error in units of the largest number expected, or of 1 if that is larger.

    limits: of errors, by name; "": of all others.
    """
    for name, mine, wanted in zip(names, found, expected, strict=False):  # alpha is not always there
        error = (mine.detach().double().cpu() - wanted.detach()).abs().max() / wanted.detach().abs().max().clamp(min=1)
        most = limits.get(name, limits[""])
        yield case | {"result": name, "error": error.item(), "limit": most, "ok": error.item() <= most}


def _exact(*tensors: Tensor) -> list[Tensor]:
    """Copies in float64 on the CPU that collect gradients."""
    return [tensor.detach().double().cpu().requires_grad_() for tensor in tensors]


def check_rows(device: str) -> Iterator[dict]:
    """Weights of rows and the gradients of scores and alpha; half of the keys of every other row are padding."""
    sizes = SIZES[device]
    for (count, keys), dtype, (kind, alpha) in product(sizes.rows, (torch.float32, sizes.half), ALPHAS.items()):
        if dtype == sizes.half and (count, keys) != sizes.rows[0]:
            continue  # what differs is how scores are read
        scores = random((count, keys), 2.0, device).to(dtype)
        scores[::2, (keys + 1) // 2 :] = -math.inf
        weighting = random((count, keys), 1.0, device, 1)
        alphas = [torch.linspace(1.02, 1.98, count, device=device)] if alpha is None else []
        exact = _exact(scores, *alphas)
        weights = entmax(exact[0], *[x[:, None] for x in exact[1:]] or [alpha])
        wanted = weights, *torch.autograd.grad((weights * weighting.double().cpu()).sum(), exact)
        found = rows.entmax_rows(scores, *alphas or [alpha])
        results = found, *rows.entmax_rows_backward(found, weighting, *alphas or [alpha], need_alpha=bool(alphas))
        case = {"case": f"{count} x {keys}", "dtype": _name(dtype), "alpha": kind}
        names = ("weights", "gradient of scores", "gradient of alpha")
        yield from _compared(case, names, results, wanted, {"": 2e-6, "gradient of alpha": 1e-4})


def check_fused(device: str) -> Iterator[dict]:
    """Mixed values and all gradients in float32, with and without padding, and what dropout leaves of the weights."""
    yield from _check_attention(device, torch.float32, {"": 6e-5, "mixed values": 2e-5, "gradient of alpha": 2e-4})
    yield from _check_dropout(device)


def check_fused_half(device: str) -> Iterator[dict]:
    """As `check_fused`, in half precision."""
    yield from _check_attention(device, SIZES[device].half, {"": 3e-2, "gradient of alpha": 6e-2})


def _check_attention(device: str, dtype: torch.dtype, limits: dict[str, float]) -> Iterator[dict]:
    usual = product(SIZES[device].fused[:1], ("sparsemax", "entmax15"), (False, True))
    for shape, kind, padded in [*usual, *product(SIZES[device].fused, ("alpha per head",), (False, True))]:
        images, heads, _, keys, channels = shape
        padding = torch.zeros(images, keys, dtype=torch.bool, device=device)
        padding[0, 3 : keys // 2] = padding[-1, -5:] = padded  # a hole wider than a block, and the end
        alpha = ALPHAS[kind] or torch.linspace(1.02, 1.98, heads, device=device)
        inputs = [*_heads(shape, device, dtype), *([] if ALPHAS[kind] else [alpha])]
        exact = _exact(*inputs)
        scores = ((exact[0] * channels**-0.5) @ exact[1].mT).masked_fill(padding.cpu()[:, None, None], -math.inf)
        mixed = entmax(scores, ALPHAS[kind] or exact[3][:, None, None]) @ exact[2]
        weighting = random((*mixed.shape,), 1.0, device, 9).to(dtype)
        wanted = mixed, *torch.autograd.grad((mixed * weighting.double().cpu()).sum(), exact)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        found = flash.sparse_attention(*inputs[:3], alpha, padding if padded else None)
        results = found, *torch.autograd.grad(found, inputs, weighting)
        case = {"case": " x ".join(map(str, shape)) + ", padding" * padded, "dtype": _name(dtype), "alpha": kind}
        names = ("mixed values", *(f"gradient of {name}" for name in ("query", "key", "value", "alpha")))
        yield from _compared(case, names, results, wanted, limits)


def _check_dropout(device: str, dropout: float = 0.2) -> Iterator[dict]:
    """The weights, which are what the identity is mixed to: a share of them is zero, the others are scaled."""
    query, key, _ = _heads((1, 2, 64, 64, 16), device, torch.float32)
    identity = torch.eye(64, device=device).expand(1, 2, -1, -1)
    kept, used = (flash.sparse_attention(query, key, identity, 1.05, None, share) for share in (0.0, dropout))
    zeros = ((used == 0) & (kept > 0)).sum() / (kept > 0).sum()
    wanted = torch.tensor(dropout), (kept / (1 - dropout) * (used > 0)).cpu()
    case = {"case": f"dropout {dropout}", "dtype": "float32", "alpha": "1.05"}
    limits = {"share of zeros": 4 * math.sqrt(dropout * (1 - dropout) / kept.numel()), "": 1e-5}
    yield from _compared(case, ("share of zeros", "other weights"), (zeros, used), wanted, limits)


def check_deformable(device: str) -> Iterator[dict]:
    """Mixed values and all gradients, at locations in and around every level."""
    sizes = SIZES[device]
    for dtype in (torch.float32, sizes.half):
        inputs, shapes = _samples(sizes.deformable, device, dtype), sizes.deformable[2]
        exact = _exact(*inputs)
        mixed = sample_and_mix(exact[0], shapes, *exact[1:])
        weighting = random((*mixed.shape,), 1.0, device, 9).to(dtype)
        wanted = mixed, *torch.autograd.grad((mixed * weighting.double().cpu()).sum(), exact)
        found = deformable.sample_and_mix(inputs[0], shapes, *inputs[1:])
        results = found, *torch.autograd.grad(found, inputs, weighting)
        names = ("mixed values", *(f"gradient of {name}" for name in ("values", "locations", "weights")))
        rounding = max(1e-5, 4 * torch.finfo(dtype).eps)
        limits = {"": rounding, "gradient of locations": 5e-5, "gradient of weights": 2e-5}
        yield from _compared(
            {"case": f"{sizes.deformable[1]} queries", "dtype": _name(dtype)}, names, results, wanted, limits
        )


def copy_speed(device: str) -> float:
    """Bytes a second, read and written, of copying from memory to memory: the most that a kernel can reach."""
    source = torch.ones(SIZES[device].block, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source), device) for _ in range(5))


def machine(device: str) -> Iterator[dict]:
    """What the device can do at most."""
    yield {"what": "copying", "speed": copy_speed(device) / 1e9, "unit": "GB/s"}
    for dtype, edge in product((SIZES[device].half, torch.float32), (int(SIZES[device].block ** 0.5) // 4,)):
        matrix = torch.randn(edge, edge, device=device).to(dtype)
        took = min(seconds(lambda matrix=matrix: matrix @ matrix, device) for _ in range(5))
        yield {"what": f"matrix product, {_name(dtype)}", "speed": 2 * edge**3 / took / 1e12, "unit": "TFLOP/s"}


def timed(case: dict, run: Callable, inputs: list[Tensor], moved: tuple[int, int], speed: float, device: str) -> dict:
    """A row: milliseconds and memory of `run`, and its share of the speed at which memory can be copied.

    moved: the bytes that a forward pass has to read and write at least, and a backward pass.
    """
    try:
        gradient = torch.randn_like(run())
        passes = {"forward": torch.no_grad()(run), BACKWARD: lambda: torch.autograd.grad(run(), inputs, gradient)}
        times = compare(passes, SIZES[device].repeats, 0.5, device).value.to_dict()
        held = peak_memory(passes[BACKWARD], device)
    except Exception as error:  # of one implementation; the others go on
        return case | {"fault": fault(error)}
    rates = {"forward": moved[0] / times["forward"], BACKWARD: sum(moved) / times[BACKWARD]}
    row = case | {f"{name} [ms]": 1000 * value for name, value in times.items()} | {"memory [MiB]": held / 2**20}
    return row | {f"{name} [% of copying]": 100 * rate / speed for name, rate in rates.items() if moved[0]}


def time_rows(device: str) -> Iterator[dict]:
    """Transforms of scores beside `torch.softmax`, and the same of entmax and adasplash where they are installed."""
    sizes, speed = SIZES[device], copy_speed(device)
    for case, shape in sizes.timed_rows.items():
        scores = random(shape.scores, 2.0, device).requires_grad_()
        for name in ("softmax", "sparsemax", "entmax15", "entmax", "alpha_entmax"):
            for candidate in implementations([name], shape, Settings(device)):
                told = {"case": case, "transform": name, "source": candidate.source}
                inputs = [scores] if candidate.alpha is None else [scores, candidate.alpha]
                moved = 2 * scores.nbytes, 3 * scores.nbytes
                yield timed(told, partial(candidate.apply, scores), inputs, moved, speed, device)


def time_fused(device: str) -> Iterator[dict]:
    """Attention in one kernel, by kernels of rows, and PyTorch's, which is softmax; the sharper the sparser."""
    sizes = SIZES[device]
    for (case, shape), dtype, sharp in product(sizes.timed_fused.items(), (torch.float32, sizes.half), (1.0, 3.0)):
        inputs = [tensor.requires_grad_() for tensor in _heads(shape, device, dtype, sharp)]
        alphas = torch.linspace(1.1, 1.9, shape[1], device=device)
        told = {"case": case, "dtype": _name(dtype), "deviation of scores": sharp}
        found = {("softmax", "torch"): partial(F.scaled_dot_product_attention, *inputs)}
        for name, alpha in {"sparsemax": 2.0, "entmax15": 1.5, "alpha_entmax": alphas}.items():
            transform = build_transform(name, shape[1]).to(device)
            found[name, "one kernel"] = partial(flash.sparse_attention, *inputs, alpha)
            if math.prod(shape[:4]) <= 2**28:
                found[name, "by rows"] = lambda transform=transform, inputs=inputs: mix(*inputs, transform)[0]
        found |= {(name, source): run for name, source, run in attention_rivals(*inputs)}
        for (name, source), run in found.items():
            yield timed(told | {"transform": name, "source": source}, run, inputs, (0, 0), 1.0, device)


def time_deformable(device: str) -> Iterator[dict]:
    """Sampling and mixing in one kernel, and by `grid_sample`, level by level, as in published code."""
    sizes, speed = SIZES[device], copy_speed(device)
    for (case, size), dtype in product(sizes.timed_deformable.items(), (torch.float32, sizes.half)):
        inputs = _samples(size, device, dtype)
        forward = sum(tensor.nbytes for tensor in inputs) + size[0] * size[1] * inputs[0][0, 0].nbytes
        told = {"case": case, "dtype": _name(dtype)}
        found = {"one kernel": deformable.sample_and_mix, "grid_sample": by_grid_sample}
        for source, function in found.items():
            run = partial(function, inputs[0], size[2], *inputs[1:])
            moved = forward, forward + sum(tensor.nbytes for tensor in inputs)
            yield timed(told | {"source": source}, run, inputs, moved, speed, device)


def _heads(shape: tuple[int, ...], device: str, dtype: torch.dtype, sharp: float = 2.0) -> list[Tensor]:
    """Queries [B,H,Q,D], keys and values [B,H,K,D] whose scores have a standard deviation of `sharp`."""
    images, heads, queries, keys, channels = shape
    sizes = ((queries, sharp), (keys, 1.0), (keys, 1.0))
    drawn = (random((images, heads, n, channels), scale, device, seed) for seed, (n, scale) in enumerate(sizes))
    return [tensor.to(dtype) for tensor in drawn]


def _samples(size: tuple[int, int, list[tuple[int, int]]], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Values [B,S,H,D], locations [B,Q,H,L,P,2] and weights [B,Q,H,L,P] of 8 heads of 32 channels and 4 points.

    No location lies near the border of a cell, on whose sides the gradient differs: rounding would choose.
    """
    images, queries, shapes = size
    values = random((images, sum(h * w for h, w in shapes), 8, 32), 1.0, device).to(dtype).requires_grad_()
    extent = torch.tensor([(w, h) for h, w in shapes], device=device)[:, None]  # [L,1,2]
    where = extent * (0.5 + 0.3 * random((images, queries, 8, len(shapes), 4, 2), 1.0, device, 1))
    locations = (where.floor() + 0.5 + where.frac().abs().clamp(0.05, 0.95)) / extent
    weights = random((images, queries, 8, len(shapes) * 4), 1.0, device, 2).softmax(-1).view(*locations.shape[:-1])
    return [values, locations.requires_grad_(), weights.requires_grad_()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
