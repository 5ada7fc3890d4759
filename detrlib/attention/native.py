"""Entmax of rows and TVMax's patches on a CPU by compiled loops (kernels/rows.c and patches.c), which a C compiler
builds once, where there is one.

Plain PyTorch sends every intermediate number to the cache and back; here a row is worked on until it is done, as the
Triton kernels do on a GPU. Without a compiler, or with `CC` set to nothing, `newton.solve` and tvmax.py compute the
same. Legend: R rows, K keys; M maps of h x w = N cells.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SOURCES = [Path(__file__).parent / "kernels" / name for name in ("rows.c", "patches.c")]
# Sums may be taken in any order where the source says so; not a number stays what it is.
FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILED_ALPHA = 1.009  # below it, errors of about 1e-7 / (alpha - 1) would show; learned alphas reach 1.01
SCORES_OF_A_THREAD = 2**16  # at least: what a thread costs is then a small part

logger = logging.getLogger(__name__)


def supported(scores: Tensor, alpha: float | Tensor) -> bool:
    """Whether such scores and alpha are for `entmax_rows`, and it could be built on this machine."""
    if not scores.is_cpu or scores.dtype != torch.float32:
        return False
    return (alpha.min().item() if isinstance(alpha, Tensor) else alpha) >= COMPILED_ALPHA and library() is not None


def entmax_rows(x: Tensor, alpha: float | Tensor) -> Tensor:
    """Weights of scores x [R,K] -> [R,K], rows sum to one; alpha from `COMPILED_ALPHA` to 2, a number or a tensor [R].

    Scores of -inf get weight zero; a row of nothing else, or with one that is not a number, is not a number.
    """
    weights = torch.empty_like(x)
    _each_row(library().entmax_rows, alpha, x, weights)
    return weights


def normmax_rows(x: Tensor, alpha: float) -> Tensor:
    """Weights of normmax, as of `entmax_rows`; 2 - 1 / alpha from `COMPILED_ALPHA` to 2."""
    weights = torch.empty_like(x)
    _each_row(library().normmax_rows, alpha, x, weights)
    return weights


def budget_rows(x: Tensor, budget: float) -> Tensor:
    """Weights that sum to a budget, as of `entmax_rows`: in rows with fewer keys to their number."""
    weights = torch.empty_like(x)
    _each_row(library().budget_rows, budget, x, weights)
    return weights


def entmax_rows_backward(
    p: Tensor, g: Tensor, alpha: float | Tensor, need_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradients of scores [R,K] and, if asked for, of each alpha [R], from weights p and their gradient g [R,K]."""
    to_scores, to_alpha = torch.empty_like(p), p.new_empty(len(p)) if need_alpha else None
    _each_row(library().entmax_gradients, alpha, p, g, to_scores, to_alpha)
    return to_scores, to_alpha


def tv_prox_maps(maps: Tensor, hidden: Tensor, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """The proximal step of maps [M,h,w] where they are not hidden (bool), the labels of its patches [M,N], the gap [M].

    See tvmax.py: the same up to its `RESOLUTION`.
    """
    (_, h, w), prox, gap = maps.shape, torch.empty_like(maps), maps.new_empty(len(maps))
    patches = torch.empty(len(maps), h * w, dtype=torch.int32)

    def solve(pointers: list[int], _: int, count: int) -> int:
        return library().tv_prox(*pointers, lam, count, h, w)

    _each_part(solve, maps.flatten(1), hidden, prox, patches, gap)
    return prox, patches, gap


def tv_prox_gradient(gradient: Tensor, hidden: Tensor, patches: Tensor) -> Tensor:
    """The mean of a gradient [M,N] over each of the patches; zero where hidden."""
    to_scores = torch.empty_like(gradient)

    def average(pointers: list[int], _: int, count: int) -> int:
        return library().tv_prox_gradient(*pointers, count, gradient.shape[1])

    _each_part(average, gradient, hidden, patches, to_scores)
    return to_scores


def _each_row(function: Callable[..., int], alpha: float | Tensor, *tensors: Tensor | None) -> None:
    """Call a function of the library that takes an alpha, one for all rows or one for each, on the rows of tensors."""
    alphas = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1).contiguous()
    each = len(alphas) > 1

    def solve(pointers: list[int | None], start: int, count: int) -> int:
        own = alphas[start if each else 0 :]
        return function(*pointers, own.data_ptr(), int(each), count, tensors[0].shape[1])

    _each_part(solve, *tensors)


def _each_part(solve: Callable[[list[int | None], int, int], int], *tensors: Tensor | None) -> None:
    """Call `solve` in each of PyTorch's threads: pointers to its part of the rows, the first of them, their number."""
    rows, keys = tensors[0].shape
    threads = min(torch.get_num_threads(), 1 + rows * keys // SCORES_OF_A_THREAD)
    size = max(1, -(-rows // threads))

    def work(start: int) -> None:
        pointers = [None if tensor is None else tensor[start : start + size].data_ptr() for tensor in tensors]
        if solve(pointers, start, min(size, rows - start)):
            raise MemoryError(f"no memory for rows of {keys} keys")

    starts = range(0, rows, size)
    list(map(work, starts) if threads == 1 else _pool(threads).map(work, starts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "entmax")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its threads


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None, said once, where they cannot be had."""
    named = [shlex.split(os.environ["CC"])] if "CC" in os.environ else [["cc"], ["gcc"], ["clang"]]
    compiler = next((command for command in named if command and shutil.which(command[0])), None)
    if compiler is None:
        tried = ", ".join(" ".join(command) for command in named)
        logger.info(
            "no C compiler (%s): sparse attention takes two to four times as long on this CPU as with one", tried
        )
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # without a home, the second
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning("%s cannot be compiled (%s): sparse attention takes longer", SOURCES[0].parent, reason.strip())
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    for function in (loaded.entmax_rows, loaded.normmax_rows, loaded.budget_rows):
        function.argtypes = [pointer] * 3 + [number] * 3
    loaded.entmax_gradients.argtypes = [pointer] * 5 + [number] * 3
    loaded.tv_prox.argtypes = [pointer] * 5 + [ctypes.c_double] + [number] * 3
    loaded.tv_prox_gradient.argtypes = [pointer] * 4 + [number] * 2
    return loaded


def _built(compiler: list[str]) -> Path:
    """The library in the cache, compiled now if it is not there for such a processor. Raises as `subprocess.run`."""
    parts = (*(source.read_text() for source in SOURCES), *FLAGS, *compiler, _processor())
    known = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    cache = os.environ.get("DETRLIB_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "detrlib")
    built = Path(cache).expanduser() / "compiled" / f"rows-{known}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:  # appears whole, however many compile it at once
            made = Path(folder, "rows.so")
            command = [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(built)
    return built


def _processor() -> str:
    """What tells processors apart for which different instructions are made: a cache may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
