"""A batch of images of different sizes: padded to one size, with a mask that tells image from padding."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from detrlib.errors import ConfigError, DataError


class Batch(NamedTuple):
    """Images, which of their pixels are padding, and what is annotated in them."""

    images: Tensor  # [B,3,H,W]
    padding_mask: Tensor | None  # [B,H,W], True = padding; None: no image is padded
    targets: list[dict]  # of each image, see `CocoDataset`

    @property
    def padding(self) -> float:
        """The share of its pixels that are padding. On a GPU this waits: ask before the batch is there."""
        return 0.0 if self.padding_mask is None else self.padding_mask.float().mean().item()

    def mask(self) -> Tensor:
        """The padding mask [B,H,W], all False where no image is padded."""
        if self.padding_mask is not None:
            return self.padding_mask
        return torch.zeros_like(self.images[:, 0], dtype=torch.bool)

    def to(self, device: torch.device | str) -> "Batch":
        """This batch on `device`. Copies from pinned memory do not wait."""

        def moved(value):
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        targets = [{name: moved(value) for name, value in target.items()} for target in self.targets]
        return Batch(moved(self.images), moved(self.padding_mask), targets)

    def split(self, size: int, keep_padding: bool = False) -> list["Batch"]:
        """Parts of `size` images, the last of fewer where that does not divide them.

        Padding that no image of a part needs is cut off, while the batch is on a CPU, unless it is to be kept because
        predictions depend on it, as in official code.
        """
        if size >= len(self.images):
            return [self]
        parts = []
        for rows in (slice(first, first + size) for first in range(0, len(self.images), size)):
            images, mask = self.images[rows], None if self.padding_mask is None else self.padding_mask[rows]
            if mask is not None and not keep_padding:
                height, width = (int((~edge).sum(1).max()) for edge in (mask[:, :, 0], mask[:, 0]))
                images, mask = images[:, :, :height, :width], mask[:, :height, :width]
                mask = mask if mask.any() else None
            parts.append(Batch(images, mask, self.targets[rows]))
        return parts


def collate(samples: list[tuple[Tensor, dict]]) -> Batch:
    """Pad images with zeros, below and to the right, to the size of the largest, and put them into one batch.

    The batch is as official code makes it. Cells of a feature map lie on the same pixels whether an image comes alone
    or beside larger ones, so that its prediction can be the same too.

    Whether a batch has padding is known here, and from here on by `padding_mask`, which is None if it has none: nobody
    needs to ask a tensor on a GPU.

    Args:
        samples: images [3,h,w] with their targets, as data sets return them.

    Returns:
        A batch; targets stay as they are.

    Raises:
        ValueError: there are no samples.
    """
    images, targets = zip(*samples, strict=True)
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    if all(image.shape[-2:] == (height, width) for image in images):
        return Batch(torch.stack(images), None, list(targets))
    padded = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    padding_mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        h, w = image.shape[-2:]
        padded[index, :, :h, :w] = image
        padding_mask[index, :h, :w] = False
    return Batch(padded, padding_mask, list(targets))


def batches(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader. A fault of the data that a worker process has met is the one line it is without workers.

    PyTorch hands on an exception of a worker with the worker's traceback for a message.
    """
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None


class EpochSampler(torch.utils.data.Sampler):
    """Batches of indices for one process, which depend on seed and epoch alone.

    An epoch is a shuffle of all images, incomplete batches dropped; or, with `updates`, so many batches, which go on in
    an endless sequence of shuffles where the epoch before ended, so that every image comes equally often. Every process
    takes its slice of the same global batch. A set smaller than one batch is one batch.
    """

    def __init__(
        self, length: int, batch_size: int, process: int, processes: int, seed: int, updates: int | None = None
    ):
        self.length, self.batch_size = length, min(batch_size, length - length % processes)
        self.process, self.processes, self.seed, self.epoch, self.updates = process, processes, seed, 0, updates
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
        for batch in order.view(-1, self.batch_size):
            yield batch[self.process :: self.processes].tolist()

    def _shuffle(self, number: int) -> Tensor:
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number))
