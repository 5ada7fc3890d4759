"""Training on a GPU: speed of a step beside detectors of transformers, the price of sparsity, memory, waits.

Functions yield rows, dictionaries of what a table shows, as soon as each is measured. On a CPU they do the same with
tiny models and images. Batches are random, a part of each is padding, and nothing is loaded.
"""

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from detrlib.benchmarks.detectors import transformers_model, transformers_step
from detrlib.benchmarks.measure import SITES, compare, peak_memory, seconds
from detrlib.benchmarks.report import fault
from detrlib.benchmarks.synthetic import random_batch, training_step
from detrlib.config import PROJECT, Config, load_config
from detrlib.data.augment import largest_canvas
from detrlib.engine.memory import Plan
from detrlib.errors import ConfigError
from detrlib.models import build_model


class Sizes(NamedTuple):
    """Of what is trained on a device."""

    image: tuple[int, int]
    batch: int
    ours: dict[str, Any]  # settings
    theirs: dict[str, Any]  # of transformers' configuration, and of its backbone
    backbone: dict[str, Any]
    repeats: int
    rooms: tuple[float | None, ...]  # GiB, in which the largest part of a batch is looked for; None: all there is
    compiler: str  # of torch.compile


SIZES = {
    "cuda": Sizes((800, 1066), 4, {}, {}, {}, 10, (12, 24, None), "inductor"),
    "cpu": Sizes(
        (64, 96),
        2,
        {
            "model.backbone.name": "tiny",
            "model.hidden_dim": 32,
            "model.num_heads": 4,
            "model.encoder_layers": 1,
            "model.decoder_layers": 1,
            "model.feedforward_dim": 32,
            "model.num_queries": 10,
        },
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "num_queries": 10}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"},
        1,
        (None,),
        "eager",
    ),
}
COMPARED = {"detr-r50": "detr", "deformable-r50": "deformable_detr"}  # configs, and what transformers calls them
MODELS = (*COMPARED, "efficient-r50", "pnp-detr-r50")
PRECISIONS = ("float32", "TF32", "bfloat16")
WHOLE = 32  # images of a batch whose largest part is looked for


def config(name: str, device: str, settings: dict[str, Any]) -> Config:
    """The settings of papermill_runs/configs/<name>.yaml for 91 classes, without weights of the backbone."""
    fixed = {"model.num_classes": 91, "model.backbone.weights": "none", "model.backbone.freeze_stem": True}
    path = PROJECT / "papermill_runs" / "configs" / f"{name}.yaml"
    return load_config(path, fixed | SIZES[device].ours | settings)


def of_precision(precision: str) -> str:
    """What `train.precision` is called; TF32 is float32 whose matrix products PyTorch is told to round."""
    return precision if precision == "bfloat16" else "float32"


@contextmanager
def rounding(precision: str) -> Iterator[None]:
    """Matrix products of float32 in TF32 within, if that is asked for; those of convolutions always are, on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measured(case: dict, make: Callable[[], Callable[[], object]], device: str) -> dict:
    """A row: images a second and memory, weights and AdamW's numbers included, of the step that `make` makes."""
    made, sizes = [], SIZES[device]
    try:
        held = peak_memory(lambda: made.append(make()) or made[0](), device)
        time = compare({"step": made[0]}, sizes.repeats, 5.0, device).loc["step"]
    except Exception as error:  # of one model; the others go on
        return case | {"fault": fault(error)}
    speed = {"images/s": float(sizes.batch / time.value), "step [ms]": float(1000 * time.value)}
    return case | speed | {"quartiles [ms]": spread(time), "memory [GiB]": held / 2**30}


def spread(time) -> str:
    """Quartiles of a row of `compare`, in milliseconds."""
    return f"{1000 * time.low:.1f} to {1000 * time.high:.1f}"


def ours(
    name: str, device: str, precision: str, settings: dict[str, Any] | None = None, compiler: str | None = None
) -> Callable[[], object]:
    """A training step of a model of this library, by the name of its config and what is to differ from that."""
    sizes, cfg = SIZES[device], config(name, device, {"train.precision": of_precision(precision)} | (settings or {}))
    return training_step(cfg, sizes.image, sizes.batch, device, True, compiler)


def theirs(name: str, device: str, precision: str) -> Callable[[], object]:
    """A training step of the same detector by transformers, with the loss that it comes with."""
    sizes = SIZES[device]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers_model(COMPARED[name], sizes.theirs, sizes.backbone)
    batch = random_batch(sizes.image, sizes.batch, device, padded=True)
    return transformers_step(batch, model, of_precision(precision))


def time_steps(device: str) -> Iterator[dict]:
    """Images a second of training, beside transformers' models on the same batch."""
    for name, precision in product(COMPARED, PRECISIONS):
        for source, make in {"detrlib": ours, "transformers": theirs}.items():
            case = {"model": name, "precision": precision, "source": source}
            with rounding(precision):
                yield measured(case, lambda make=make, told=(name, device, precision): make(*told), device)


def time_compiled(device: str) -> Iterator[dict]:
    """The same, of ours, by torch.compile, and how long the first step took."""
    for name, precision in product(COMPARED, ("bfloat16", "float32")):
        case, made = {"model": name, "precision": precision}, []

        def make(name: str = name, precision: str = precision, made: list = made) -> Callable[[], object]:
            step = ours(name, device, precision, compiler=SIZES[device].compiler)
            made.append(seconds(step, device))
            return step

        row = measured(case, make, device)
        yield row | ({"first step [s]": made[0]} if made else {})


def time_sparsity(device: str) -> Iterator[dict]:
    """A training step of DETR with a transform at all sites, beside softmax everywhere."""
    for precision in ("bfloat16", "float32"):
        softmax = ours("detr-r50", device, precision)
        for name in ("sparsemax", "entmax15", "alpha_entmax"):
            case = {"model": "detr-r50", "precision": precision, "transform": name}
            try:
                sparse = ours("detr-r50", device, precision, {f"model.attention.{site}": name for site in SITES})
                times = compare({"softmax": softmax, name: sparse}, SIZES[device].repeats, 5.0, device)
            except Exception as error:
                yield case | {"fault": fault(error)}
                continue
            dense, own = times.value.tolist()
            row = {"softmax [ms]": 1000 * dense, "step [ms]": 1000 * own, "quartiles [ms]": spread(times.loc[name])}
            yield case | row | {"step / softmax": own / dense}


class Pictures(NamedTuple):
    """What `Plan` asks of a data set: sizes of wide and upright pictures as in COCO, and objects in them."""

    sizes: dict[int, tuple[int, int]]

    def objects_per_image(self) -> np.ndarray:
        """Many, since a loss takes memory for each."""
        return np.full(len(self.sizes), 60)


@contextmanager
def within(room: float | None, device: str) -> Iterator[None]:
    """PyTorch takes at most so many GiB of the GPU."""
    whole = torch.cuda.get_device_properties(device).total_memory / 2**30 if room else 1.0
    if room:
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / whole))
    try:
        yield
    finally:
        if room:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)


def largest_parts(device: str) -> Iterator[dict]:
    """How many images at a time `train.micro_batch: auto` finds to fit, of a batch, or its half, its quarter..."""
    pictures = Pictures({1: (640, 480), 2: (480, 640)})
    for name, precision, room in product(COMPARED, ("float32", "bfloat16"), SIZES[device].rooms):
        told = {"train.precision": precision, "train.micro_batch": "auto", "train.batch_size": WHOLE}
        cfg = config(name, device, told)
        case = {"model": name, "precision": precision, "GiB": room or "all"}
        try:
            with within(room, device), tempfile.TemporaryDirectory() as folder:
                model = build_model(cfg.model).to(device)
                plan = Plan(cfg, model, pictures, WHOLE, Accelerator(cpu=device == "cpu"))
                images = plan.images(Path(folder))
        except (ConfigError, torch.OutOfMemoryError) as error:
            yield case | {"fault": fault(error)}
            continue
        canvas = largest_canvas(pictures.sizes.values(), cfg.data.image_size, cfg.data.augment, images)
        yield case | {"images at a time": images, "of pixels": " x ".join(map(str, canvas))}


@contextmanager
def waits(device: str) -> Iterator[Counter]:
    """Where in the code the CPU waits for a GPU within, and how often: known when it is left."""
    lines: Counter = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    lines.update(line_of(one) for one in caught if "called a synchronizing" in str(one.message))


def line_of(warning: warnings.WarningMessage) -> str:
    """file:line of a warning."""
    return f"{Path(warning.filename).name}:{warning.lineno}"


def count_waits(device: str) -> Iterator[dict]:
    """How often a training step waits for all that a GPU has to do: never is as it should be.

    The matcher waits for its costs alone, by an event, which torch does not count.
    """
    for name in MODELS:
        case = {"model": name}
        try:
            step = ours(name, device, "float32")
            step()
            with waits(device) as lines:
                step()
        except Exception as error:
            yield case | {"fault": fault(error)}
            continue
        yield case | {"waits": lines.total(), "where": ", ".join(f"{at} x {n}" for at, n in lines.most_common())}
