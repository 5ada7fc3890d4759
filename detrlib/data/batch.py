"""A batch of images of different sizes: padded to one size, with a mask that tells image from padding."""

import atexit
import logging
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detrlib.config import Data
from detrlib.config.machine import cores
from detrlib.data.augment import LONGEST, PAPER_SIZE, normalised
from detrlib.errors import WORKER_GONE, WORKERS, ConfigError, DataError, RunError, fault_of

MOST_WORKERS = 8  # that are taken unasked: each decodes and augments some 200 photographs a second
SHARED, AHEAD = Path("/dev/shm"), 3  # where batches of workers lie, and how many of each: two are prepared ahead
log_once = cache(logging.getLogger(__name__).warning)


class Batch(NamedTuple):
    """Images, which of their pixels are padding, and what is annotated in them."""

    pixels: Tensor  # [B,3,H,W] uint8, 0 where there is padding
    padding_mask: Tensor | None  # [B,H,W], True = padding; None: no image is padded
    targets: list[dict]  # of each image, see `CocoDataset`

    @property
    def images(self) -> Tensor:
        """What models see, float32 [B,3,H,W] on the device of the batch, made anew each time; see `normalised`."""
        return normalised(self.pixels, self.padding_mask)

    @property
    def padding(self) -> float:
        """The share of its pixels that are padding. On a GPU this waits: ask before the batch is there."""
        return 0.0 if self.padding_mask is None else self.padding_mask.float().mean().item()

    def mask(self) -> Tensor:
        """The padding mask [B,H,W], all False where no image is padded."""
        if self.padding_mask is not None:
            return self.padding_mask
        return torch.zeros_like(self.pixels[:, 0], dtype=torch.bool, memory_format=torch.contiguous_format)

    def to(self, device: torch.device | str) -> "Batch":
        """This batch on `device`. Copies from pinned memory do not wait."""

        def moved(value):
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        targets = [{name: moved(value) for name, value in target.items()} for target in self.targets]
        return Batch(moved(self.pixels), moved(self.padding_mask), targets)

    def split(self, size: int, keep_padding: bool = False) -> list["Batch"]:
        """Parts of `size` images, the last of fewer where that does not divide them.

        Padding that no image of a part needs is cut off, while the batch is on a CPU, unless it is to be kept because
        predictions depend on it, as in official code.
        """
        if size >= len(self.pixels):
            return [self]
        parts = []
        for rows in (slice(first, first + size) for first in range(0, len(self.pixels), size)):
            pixels, mask = self.pixels[rows], None if self.padding_mask is None else self.padding_mask[rows]
            if mask is not None and not keep_padding:
                height, width = (int((~edge).sum(1).max()) for edge in (mask[:, :, 0], mask[:, 0]))
                pixels, mask = _whole(pixels[:, :, :height, :width]), _whole(mask[:, :height, :width])
                mask = mask if mask.any() else None
            parts.append(Batch(pixels, mask, self.targets[rows]))
        return parts


def _whole(part: Tensor) -> Tensor:
    """Images cut out of pinned memory, as one piece of it: many would be sent by way of memory that is not pinned."""
    scattered = part.stride(0) != part[0].numel()
    return torch.empty_like(part, pin_memory=True).copy_(part) if scattered and part.is_pinned() else part


def collate(samples: list[tuple[Tensor, dict]]) -> Batch:
    """Pad images with zeros, below and to the right, to the size of the largest, and put them into one batch.

    The batch is as official code makes it. Cells of a feature map lie on the same pixels whether an image comes alone
    or beside larger ones, so that its prediction can be the same too.

    Whether a batch has padding is known here, and from here on by `padding_mask`, which is None if it has none: nobody
    needs to ask a tensor on a GPU.

    Args:
        samples: pixels uint8 [3,h,w] with their targets, as data sets return them.

    Returns:
        A batch; targets stay as they are.

    Raises:
        ValueError: there are no samples.
    """
    pixels, targets = zip(*samples, strict=True)
    colours_last = [image.permute(1, 2, 0) for image in pixels]  # as they lie in memory: rows are copied whole
    height, width = (max(image.shape[axis] for image in colours_last) for axis in (0, 1))
    if all(image.shape[:2] == (height, width) for image in colours_last):
        return Batch(torch.stack(colours_last).permute(0, 3, 1, 2), None, list(targets))
    padded = colours_last[0].new_zeros(len(pixels), height, width, colours_last[0].shape[2])
    padding_mask = torch.ones(len(pixels), height, width, dtype=torch.bool)
    for index, image in enumerate(colours_last):
        h, w = image.shape[:2]
        padded[index, :h, :w] = image
        padding_mask[index, :h, :w] = False
    return Batch(padded.permute(0, 3, 1, 2), padding_mask, list(targets))


class Packed(NamedTuple):
    """A batch on its way between processes, where every tensor costs its receiver 0.1 ms: few, and long ones."""

    pixels: Tensor
    padding_mask: Tensor | None
    columns: dict[str, Tensor | list]  # of all targets one after the other
    lengths: dict[str, list[int]]  # of a column, what each image has of it


def pack(samples: list[tuple[Tensor, dict]]) -> Packed:
    """What `collate` makes of samples, with one tensor for each entry of the targets."""
    batch = collate(samples)
    columns = {name: [target[name] for target in batch.targets] for name in batch.targets[0]}
    tensors = {name: torch.cat(column) for name, column in columns.items() if isinstance(column[0], Tensor)}
    lengths = {name: [len(own) for own in columns[name]] for name in tensors}
    return Packed(batch.pixels, batch.padding_mask, columns | tensors, lengths)


def unpack(packed: Packed) -> Batch:
    """The batch; tensors of its targets are parts of those that came."""
    columns = packed.columns | {name: packed.columns[name].split(own) for name, own in packed.lengths.items()}
    targets = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Batch(packed.pixels, packed.padding_mask, targets)


def open_loader(dataset: Dataset, settings: Data, pinned: bool, **order: Any) -> DataLoader:
    """Batches of a data set, for `batches`, prepared by as many processes as `data.workers` says.

    settings: the section `data` of a config.
    pinned: batches lie in memory that a GPU copies from while it computes.
    order: arguments of `DataLoader`: batch_sampler, or batch_size.

    Raises ConfigError as `worker_processes`.
    """
    images = order["batch_sampler"].own_size if "batch_sampler" in order else order.get("batch_size", 1)
    workers = worker_processes(settings, images)
    if workers:
        _end_workers_at_exit()
    return DataLoader(
        dataset,
        collate_fn=pack,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_training,
        persistent_workers=workers > 0,
        pin_memory=pinned,
        generator=torch.Generator(),  # or it would draw from that of the model, and when depends on the workers
        **order,
    )


def _leave_signals_to_training(_worker: int) -> None:
    """Signals often come to all processes of a group. A step whose batch is on its way still wants it; workers whose
    training has ended end by themselves."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@cache
def _end_workers_at_exit() -> None:
    """Python ends what it has started by SIGTERM, which workers leave to training, and then waits; the traceback of a
    fault may keep a loader, and so its workers, until then."""

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's own handler would report them as crashed
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(end)


def worker_processes(settings: Data, images: int, processes: int | None = None) -> int:
    """How many processes prepare batches of so many images: by `data.workers`, or for each core that is left.

    processes: of the training, on this machine; None: as torchrun says.

    One that finds no room in shared memory never sends its batch, and who waits for that waits for ever; containers
    often have 64 MB. Raises ConfigError where more are asked for than there is room for.
    """
    workers, processes = settings.workers, processes or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if workers == "auto":  # the process itself wants a core
        workers = 0 if settings.cache else min(max(cores() // processes - 1, 0), MOST_WORKERS)
    batch = images * 4 * (settings.image_size * LONGEST / PAPER_SIZE) ** 2  # bytes of pixels and mask, at most
    room = shutil.disk_usage(SHARED).free / processes if SHARED.is_dir() else math.inf
    if workers * AHEAD * batch <= room:
        return workers
    fit = int(room / (AHEAD * batch))
    found = f"{SHARED} has room for {fit} ({room / 2**20:.0f} MB); give it more (docker run --shm-size)"
    if settings.workers != "auto":
        raise ConfigError(f"data.workers: {workers}, but {found}, or set data.workers: auto")
    log_once(f"data.workers: auto is {fit}, since {found}")
    return fit


def batches(loader: Iterable[Packed]) -> Iterator[Batch]:
    """The batches of a loader. A fault of the data that a worker process has met is the one line it is without workers.

    PyTorch hands on an exception of a worker with the worker's traceback for a message, and says of a worker that was
    killed by which signal. Raises RunError for the latter.
    """
    try:
        yield from map(unpack, loader)
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except RuntimeError as error:
        if WORKER_GONE.match(str(error)):
            raise RunError(fault_of(error)) from None
        raise
    except (ConnectionError, EOFError):  # it was killed between a batch and the memory in which that lies
        raise RunError(WORKERS.format("has ended")) from None


class Shared(torch.utils.data.Sampler):
    """Batches of a data set in its order, each for one of the processes that share it.

    They are those that one process alone would see, whole: what is computed of an image, by itself and beside which
    others, does not depend on the number of processes, and none is counted twice. Some processes have a batch less.
    """

    def __init__(self, length: int, batch_size: int, process: int = 0, processes: int = 1):
        self.length, self.own_size = length, batch_size
        self.firsts = range(process * batch_size, length, processes * batch_size)  # of every batch its first image

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self):
        for first in self.firsts:
            yield range(first, min(first + self.own_size, self.length))


class Drawn(NamedTuple):
    """An image of a training batch, and what its random numbers follow from, see `augment.Draws`."""

    index: int
    image: str
    batch: str


class EpochSampler(torch.utils.data.Sampler):
    """Batches for one process: which images, and how they are augmented, depends on seed and epoch alone.

    It depends neither on the number of processes nor on that of their workers, nor on what else draws random numbers.

    An epoch is a shuffle of all images, incomplete batches dropped; or, with `updates`, so many batches, which go on in
    an endless sequence of shuffles where the epoch before ended, so that every image comes equally often. Every process
    takes its slice of the same global batch. A set smaller than one batch is one batch.

    `epoch` and `first`, the batch of it to begin with, from 0, are set from outside.
    """

    def __init__(
        self, length: int, batch_size: int, process: int, processes: int, seed: int, updates: int | None = None
    ):
        self.length, self.batch_size = length, min(batch_size, length - length % processes)
        self.process, self.processes, self.seed, self.updates = process, processes, seed, updates
        self.epoch = self.first = 0
        if not self.batch_size:
            raise ConfigError(f"{length} training images cannot be shared by {processes} processes; use fewer")

    @property
    def own_size(self) -> int:
        """Images of this process in every batch."""
        return self.batch_size // self.processes

    def __len__(self) -> int:
        return self.updates or self.length // self.batch_size

    def __iter__(self):
        images = len(self) * self.batch_size
        if self.updates is None:
            order = self._shuffle(self.epoch)[:images]
        else:
            shuffle, start = divmod(self.epoch * images, self.length)
            shuffles = range(shuffle, shuffle - (-(start + images) // self.length))
            order = torch.cat([self._shuffle(number) for number in shuffles])[start : start + images]
        left = order.view(-1, self.batch_size)[self.first :].tolist()
        for number, batch in enumerate(left, self.epoch * len(self) + self.first):
            drawn = [
                Drawn(index, f"{self.seed} batch {number} image {place}", f"{self.seed} batch {number}")
                for place, index in enumerate(batch)
            ]
            yield drawn[self.process :: self.processes]

    def _shuffle(self, number: int) -> Tensor:
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number))
