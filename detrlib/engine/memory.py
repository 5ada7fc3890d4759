"""How much memory training takes, and how many images of a batch fit at a time.

Nothing is assumed about the model: passes forward and backward are made and watched. On a GPU they are of the largest
images that training can draw, and its allocator says what it gave. On a CPU, where these would take long, they are of
small images: the worst moment takes w + n (a + b A + c A^2) for n images of area A, since scores of attention grow with
the square of the area, and four passes give the four numbers.
"""

import ctypes
import os
import platform
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from detrlib.config import Config
from detrlib.data import Batch, CocoDataset
from detrlib.data.augment import largest_canvas
from detrlib.engine.evaluate import autocast
from detrlib.engine.optimizer import freeze
from detrlib.errors import ConfigError, ModelError
from detrlib.files import load_json, write_json
from detrlib.losses.criterion import Criterion
from detrlib.models import build_model, checkpoint_activations

REMEMBERED = "micro_batch.json"  # in the run folder
SPARE = 20  # a part of the GPU's memory that `auto` leaves free, for what fragments leave unusable
HEAP = 1.3  # on a CPU, resident memory over that of tensors: the heap has gaps, and convolutions room to work in
OBJECTS = 20  # in an image, where no data tells
SIDE = 224  # of the smallest images that passes are watched for on a CPU: whole cells and windows of every backbone
SMALLER = "train.micro_batch, train.checkpoint_activations: true, train.precision: bfloat16 or a lower data.image_size"


class Memory(NamedTuple):
    """What training holds at most, in bytes."""

    weights: int  # with their averages, and what AdamW keeps of every gradient
    gradients: int
    once: int  # in a pass, whatever the number of images
    per_image: int

    def needed(self, images: int, parts: int = 1) -> int:
        """With so many images at a time, in `parts`: gradients of the first are there when the second runs."""
        return self.weights + (parts > 1) * self.gradients + self.once + images * self.per_image

    def images_within(self, room: int) -> int:
        """How many images at a time need no more than `room`; none where that is 0 or less."""
        return (room - self.needed(0, parts=2)) // max(1, self.per_image)


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of all tensors that operations have made and that are still there."""

    def __init__(self, there: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in there})

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return results

    def _add(self, amount: int) -> None:
        self.now += amount
        self.peak = max(self.peak, self.now)


class Passes:
    """Passes of a model in training, forward and backward, that leave it as it was."""

    def __init__(self, model: nn.Module, cfg: Config, objects: int, device: torch.device):
        self.model, self.device, self.precision, self.objects = model, device, cfg.train.precision, objects
        self.criterion = Criterion(**dict(cfg.loss))

    def bytes(self, images: int, size: tuple[int, int], backward: bool = True) -> tuple[int, int]:
        """What a pass over random images of `size` (height, width) needs besides the weights.

        Returns bytes that are there when the forward pass is over, and the most that are there at a time; without
        `backward` the pass ends there.
        """
        cuda, training = self.device.type == "cuda", self.model.training
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            with torch.random.fork_rng([self.device] if cuda else []):
                measure = self._of_allocator if cuda else self._of_tensors
                return measure(self._batch(images, size), backward)
        finally:
            self.model.zero_grad()
            self.model.train(training)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])

    def _of_allocator(self, batch: Batch, backward: bool) -> tuple[int, int]:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        kept = self._run(batch, backward, lambda: torch.cuda.memory_allocated(self.device))
        return kept - before, torch.cuda.max_memory_allocated(self.device) - before

    def _of_tensors(self, batch: Batch, backward: bool) -> tuple[int, int]:
        with LiveBytes([*self.model.parameters(), *self.model.buffers()]) as live:
            kept = self._run(batch, backward, lambda: live.now)
        return kept + batch.pixels.nbytes, live.peak + batch.pixels.nbytes

    def _run(self, batch: Batch, backward: bool, held: Callable[[], int]) -> int:
        batch = batch.to(self.device)
        with autocast(self.precision, self.device):
            predictions = self.model.train()(batch.images, batch.padding_mask)
        loss, _ = self.criterion(predictions, batch.targets)
        kept = held()
        if backward:
            loss.backward()
        return kept

    def _batch(self, images: int, size: tuple[int, int]) -> Batch:
        mask = torch.zeros(images, *size, dtype=torch.bool)
        mask[0, -1] = True  # layers keep masks where there is padding
        boxes = torch.rand(images, self.objects, 4) / 2 + 0.25
        targets = [{"labels": torch.zeros(self.objects, dtype=torch.long), "boxes": own} for own in boxes]
        pixels = torch.randint(256, (3, *size), dtype=torch.uint8)  # drawing as many as a GPU holds would take seconds
        return Batch(pixels.expand(images, -1, -1, -1), mask, targets)


def estimate(
    model: nn.Module, cfg: Config, size: tuple[int, int], objects: int, device: torch.device, processes: int = 1
) -> Memory:
    """What training of a model takes on a device.

    Args:
        model: on the device; it is left as it was.
        cfg: settings of the loss and of training.
        size: (height, width) of the largest batch, pixels.
        objects: of an image, at most.
        device: where passes are made.
        processes: several exchange gradients, in memory of its own.

    Raises:
        torch.OutOfMemoryError: two images do not fit on a GPU.
    """
    passes = Passes(model, cfg, objects, device)
    parameters, trained = _bytes(model.parameters()), _bytes(p for p in model.parameters() if p.requires_grad)
    weights = (parameters + _bytes(model.buffers())) * (2 if cfg.train.ema else 1)
    weights += (2 if processes == 1 else 3) * trained
    height, width = size
    side = SIDE
    while device.type == "cpu" and height * width > (2 * side) ** 2:
        try:
            return Memory(weights, trained, *_extrapolated(passes, height * width, side))
        except ModelError:  # such small images have too few tokens for the queries
            side *= 2
    one, two = (passes.bytes(images, size)[1] for images in (1, 2))
    return Memory(weights, trained, max(0, 2 * one - two), two - one)


def training_memory(cfg: Config, size: tuple[int, int], room: float) -> str:
    """In words, what training takes on a CPU for images of `size` (height, width), and how many fit into `room` GiB.

    A GPU takes no more: softmax attention with dropout keeps its scores on a CPU alone.
    """
    model = build_model(cfg.model, "none")
    freeze(model, cfg.train)
    checkpoint_activations(model, cfg.train.checkpoint_activations)
    memory = estimate(model, cfg, size, OBJECTS, torch.device("cpu"))
    fixed, fit = memory.needed(0, parts=2), max(0, memory.images_within(int(room * 2**30)))
    return (
        f"training: {gib(fixed)} for weights, gradients and AdamW, {gib(memory.per_image)} for each image of "
        f"{size[0]} x {size[1]} pixels; {fit} at a time fit into {room:g} GiB (train.micro_batch)"
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _extrapolated(passes: Passes, area: int, side: int) -> tuple[int, int]:
    """What images of an area need once and each, from passes over images of 1, 2 and 4 squares of `side`."""
    sizes = (side, side), (side, 2 * side), (2 * side, 2 * side)
    (kept, one), (_, wide), (_, large) = (passes.bytes(1, size) for size in sizes)
    two, _ = passes.bytes(2, (side, side), backward=False)  # of which only what is kept is asked
    square = max(0.0, (large - 3 * wide + 2 * one) / 6)
    linear = (large - one - 15 * square) / 3
    areas = area / side**2
    each = two - kept + linear * (areas - 1) + square * (areas**2 - 1)
    return max(0, 2 * kept - two) + one - kept, round(each)


def most_that_fit(whole: int, fits: Callable[[int], bool]) -> int:
    """`whole`, or the first of its half, quarter and so on for which `fits` is true.

    Raises ConfigError where not even one does.
    """
    images = whole
    while not fits(images):
        if images == 1:
            raise ConfigError(f"train.micro_batch auto: not even one image fits; try {SMALLER.partition(', ')[2]}")
        images = (images + 1) // 2
    return images


class Plan:
    """How many images a process has on its device at a time, and what that takes.

    whole: images of a process in a batch. fits: whether so many do, for `train.micro_batch: auto`; None: a GPU tells.
    """

    def __init__(
        self,
        cfg: Config,
        model: nn.Module,
        train_set: CocoDataset,
        whole: int,
        accelerator: Accelerator,
        fits: Callable[[int], bool] | None = None,
    ):
        self.cfg, self.model, self.whole, self.accelerator = cfg, model, whole, accelerator
        self.sizes, self.device = train_set.sizes.values(), accelerator.device
        self.objects = int(train_set.objects_per_image().max())
        self.fits = self._tried if fits is None and self.device.type == "cuda" else fits

    def images(self, run_dir: Path) -> int:
        """`train.micro_batch`; `auto` is looked for once: the run folder remembers what it was on such a device."""
        asked = self.cfg.train.micro_batch
        if asked != "auto" or self.fits is None:
            return self.whole if asked in (None, "auto") else min(asked, self.whole)
        path, where = run_dir / REMEMBERED, self._where()
        known = load_json(path, "delete it, and it is looked for anew") if path.exists() else {}
        found = known["images"] if where.items() <= known.items() else most_that_fit(self.whole, self.fits)
        found = self.accelerator.gather(torch.tensor([found], device=self.device)).min().item()
        if self.accelerator.is_main_process:
            write_json(path, where | {"images": found})
        return found

    def line(self, images: int) -> str:
        """What training with so many images at a time will take, beside what there is, and the remedy if it is more."""
        height, width = size = self._largest(images)
        each = f"images of {height} x {width} pixels"
        room, processes = free_memory(self.device), self.accelerator.num_processes
        share = f" in each of {processes} processes" if processes > 1 else ""
        try:
            memory = estimate(self.model, self.cfg, size, self.objects, self.device, processes)
        except torch.OutOfMemoryError:
            return f"memory: two {each} do not fit into {gib(room)}{share}; set {SMALLER}"
        gaps = HEAP if self.device.type == "cpu" else 1.0
        needed = int(gaps * memory.needed(images, -(-self.whole // images)))
        text = f"about {gib(needed)}{share} for {images} {each} at a time, {gib(memory.per_image)} each"
        if self.cfg.train.micro_batch == "auto" and self.fits is None:
            text = f"train.micro_batch auto is the whole batch on a CPU; {text}"
        text = f"memory: {text}"
        if needed <= room:
            return f"{text}; {gib(room)} are free"
        if needed > gaps * (there := all_memory(self.device)) and self.device.type == "cpu":
            raise ConfigError(f"{text}: more than the {gib(there)} that the machine has{share}; set {SMALLER}")
        fewer = memory.images_within(int(room / gaps))
        first = f"train.micro_batch: {min(fewer, images - 1)}, or " if fewer > 0 and images > 1 else ""
        return f"{text}: more than the {gib(room)} that are free; set {first}{SMALLER}"

    def _largest(self, images: int) -> tuple[int, int]:
        return largest_canvas(self.sizes, self.cfg.data.image_size, self.cfg.data.augment, images)

    def _where(self) -> dict:
        """What the answer to `auto` depends on besides the settings that cannot change in a run."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        parts = self.cfg.train.model_dump(mode="json")["checkpoint_activations"]
        return {"device": name, "of": self.whole, "checkpoint_activations": parts}

    def _tried(self, images: int) -> bool:
        """Whether a pass over the largest images fits on the GPU, beside what an update will add and some to spare."""
        trained = _bytes(p for p in self.model.parameters() if p.requires_grad)
        spare = 3 * trained + _limit(self.device) // SPARE
        try:
            held = torch.empty(spare, dtype=torch.uint8, device=self.device)
            Passes(self.model, self.cfg, self.objects, self.device).bytes(images, self._largest(images))
            del held
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take: of its GPU, with what PyTorch holds there, or its share of the machine's."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device)
        return min(torch.cuda.mem_get_info(device)[0] + held, _limit(device))
    return _in_container(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def all_memory(device: torch.device, processes: int | None = None) -> int:
    """Bytes that a process may have at most: of its GPU, or its share of the machine's, swap included.

    processes: on this machine; None: as torchrun says.
    """
    if device.type == "cuda":
        return _limit(device)
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return _in_container(psutil.virtual_memory().total + psutil.swap_memory().total) // processes


def _in_container(amount: int) -> int:
    """An amount of memory, or the limit of the container where that is lower."""
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text().strip() if limit.exists() else ""
    return min(amount, int(given)) if given.isdigit() else amount


def _limit(device: torch.device) -> int:
    """Bytes of a GPU that PyTorch may take at all: fewer than it has after `set_per_process_memory_fraction`."""
    share = torch.cuda.get_per_process_memory_fraction(device.index)  # takes no device without a number
    return int(share * torch.cuda.get_device_properties(device).total_memory)


def keep_freed_memory() -> None:
    """Tell glibc to keep large blocks: otherwise every step returns its activations and pages them in again."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def gib(amount: int) -> str:
    """Bytes in words: 1.5 GiB, 48 MiB."""
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**30 // 10 else f"{amount / 2**20:.0f} MiB"
