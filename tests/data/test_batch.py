"""Batches: padding below and to the right, and the same global batch whatever the number of processes."""

import itertools
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from detrlib.config import PROJECT, Data
from detrlib.data import batch as batch_module
from detrlib.data import build_dataset
from detrlib.data.batch import EpochSampler, Shared, batches, collate, open_loader, pack, unpack
from detrlib.errors import ConfigError, DataError, RunError, fault_of


def test_collate_pads_below_and_to_the_right_and_masks_padding():
    samples = [(torch.rand(3, 40, 65), {"image_id": 1}), (torch.rand(3, 64, 32), {"image_id": 2})]
    batch = collate(samples)
    assert batch.pixels.shape == (2, 3, 64, 65) and batch.padding_mask.shape == (2, 64, 65)
    assert batch.padding_mask.dtype == torch.bool
    for (image, target), padded, mask, kept in zip(samples, *batch, strict=True):
        height, width = image.shape[-2:]
        assert torch.equal(padded[:, :height, :width], image) and kept is target
        assert not mask[:height, :width].any() and mask[height:].all() and mask[:, width:].all()
        assert not padded[:, mask].any()
    unpadded = collate([(torch.rand(3, 63, 32), {})])
    assert unpadded.padding_mask is None and not unpadded.mask().any()
    assert unpadded.to("cpu").padding_mask is None and unpadded.mask().shape == (1, 63, 32)
    assert torch.equal(batch.mask(), batch.padding_mask)


def test_parts_of_a_batch_lose_the_padding_that_they_do_not_need():
    sizes = [(20, 30), (20, 30), (10, 12), (8, 16), (24, 8)]
    batch = collate([(torch.rand(3, *size), {"image_id": number}) for number, size in enumerate(sizes)])
    parts = batch.split(2)
    assert [tuple(part.pixels.shape[-2:]) for part in parts] == [(20, 30), (10, 16), (24, 8)]
    assert [len(part.pixels) for part in parts] == [2, 2, 1]  # 2 does not divide 5: the last part is smaller
    assert [part.padding_mask is None for part in parts] == [True, False, True]
    assert [target for part in parts for target in part.targets] == batch.targets
    for number, part in enumerate(parts):
        assert torch.equal(part.pixels, collate_again(batch, sizes, slice(2 * number, 2 * number + 2)).pixels)
        assert torch.equal(part.mask(), collate_again(batch, sizes, slice(2 * number, 2 * number + 2)).mask())
    kept = batch.split(2, keep_padding=True)
    assert all(torch.equal(part.pixels, batch.pixels[2 * i : 2 * i + 2]) for i, part in enumerate(kept))
    assert all(torch.equal(part.mask(), batch.mask()[2 * i : 2 * i + 2]) for i, part in enumerate(kept))
    assert batch.split(5) == batch.split(9) == [batch]


@pytest.mark.gpu
def test_parts_of_a_pinned_batch_are_sent_without_a_detour():
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((4, 6), (3, 5), (5, 4), (2, 7))]
    batch = collate([(image, {}) for image in images])
    pinned = batch._replace(pixels=batch.pixels.pin_memory(), padding_mask=batch.padding_mask.pin_memory())
    for part, same in zip(pinned.split(2), batch.split(2), strict=True):
        assert part.pixels.is_pinned() and part.pixels.is_contiguous(memory_format=torch.channels_last)
        assert part.padding_mask.is_pinned() and part.padding_mask.is_contiguous()
        sent = part.to("cuda")
        assert torch.equal(sent.pixels.cpu(), same.pixels) and torch.equal(sent.padding_mask.cpu(), same.padding_mask)


def collate_again(batch, sizes, rows):
    """These images of a batch, put into one of their own."""
    samples = zip(batch.pixels[rows], sizes[rows], batch.targets[rows], strict=True)
    return collate([(image[:, :height, :width], target) for image, (height, width), target in samples])


def indices_of(sampler):
    return [[drawn.index for drawn in batch] for batch in sampler]


@pytest.mark.parametrize("length, batch, processes", [(33, 8, 1), (33, 8, 2), (33, 12, 3), (5, 8, 2)])
def test_shards_partition_every_batch(length, batch, processes):
    def epoch(number, process, processes):
        sampler = EpochSampler(length, batch, process, processes, seed=3)
        sampler.epoch = number
        assert len(list(sampler)) == len(sampler)
        return indices_of(sampler)

    size = min(batch, length - length % processes)
    for number in (0, 1):
        shards = [epoch(number, process, processes) for process in range(processes)]
        batches = [sorted(itertools.chain(*parts)) for parts in zip(*shards, strict=True)]
        assert {len(part) for shard in shards for part in shard} == {size // processes}
        assert len(batches) == length // size
        if size == batch:
            assert batches == [sorted(part) for part in epoch(number, 0, 1)]
        seen = list(itertools.chain(*batches))
        assert len(set(seen)) == len(seen) and set(seen) <= set(range(length))
    assert epoch(0, 0, 1) != epoch(1, 0, 1)
    assert epoch(1, 0, 1) == epoch(1, 0, 1)


@pytest.mark.parametrize("length, batch, processes", [(13, 3, 2), (13, 8, 2), (3, 8, 2), (33, 8, 4)])
def test_an_evaluation_is_shared_by_whole_batches(length, batch, processes):
    """Those of one process, some with one batch less than others; one may have none."""
    alone = list(map(list, Shared(length, batch)))
    shares = [Shared(length, batch, process, processes) for process in range(processes)]
    for share in shares:
        own = list(map(list, share))
        assert own == alone[shares.index(share) :: processes] and len(own) == len(share)
        assert [part[0] for part in own] == list(share.firsts)
    assert list(itertools.chain(*alone)) == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    "length, batch, processes, updates", [(33, 8, 1, 3), (33, 8, 2, 10), (8, 12, 3, 7), (5, 8, 2, 1)]
)
def test_epochs_of_so_many_updates_take_every_image_equally_often(length, batch, processes, updates):
    """They go on where the one before ended, whoever asks for them and in which order."""

    def epoch(number, process, processes):
        sampler = EpochSampler(length, batch, process, processes, seed=3, updates=updates)
        sampler.epoch = number
        assert len(list(sampler)) == len(sampler) == updates
        return indices_of(sampler)

    size, epochs = min(batch, length - length % processes), 20
    shards = [[epoch(number, process, processes) for number in range(epochs)] for process in range(processes)]
    seen = []
    for number in range(epochs):
        together = [sorted(itertools.chain(*parts)) for parts in zip(*(shard[number] for shard in shards), strict=True)]
        assert {len(part) for part in together} == {size}
        if size == batch:
            assert together == [sorted(part) for part in epoch(number, 0, 1)]
        seen += itertools.chain(*together)
    counts = [seen.count(index) for index in range(length)]
    assert max(counts) - min(counts) <= 1 and sum(counts) == epochs * updates * size
    assert epoch(7, 0, processes) == shards[0][7]  # a resumed run begins in the middle


def test_one_pass_as_so_many_updates_begins_with_the_same_images():
    """The first pass of a seed is the same; the images that fill no batch come next instead of being left out."""
    one, many = (EpochSampler(33, 8, 0, 1, 3, updates) for updates in (None, 4))
    assert list(one) == list(many)
    first_pass = set(itertools.chain(*indices_of(one)))
    many.epoch = 1
    assert not set(indices_of(many)[0][:1]) & first_pass


def test_fewer_images_than_processes_is_refused():
    with pytest.raises(ConfigError, match=r"1 training images .* 2 processes"):
        EpochSampler(1, 8, 0, 2, 0)


class Torn(torch.utils.data.Dataset):
    """Pictures that cannot be decoded."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise DataError(f"{index}.png cannot be read: truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_data_is_one_line_whichever_process_meets_it(workers, tiny_config):
    loader = open_loader(Torn(), tiny_config({"data.workers": workers}).data, pinned=False)
    with pytest.raises(DataError) as caught:
        list(batches(loader))
    assert str(caught.value) == "0.png cannot be read: truncated"


class Deadly(Torn):
    """Pictures that end the process which reads them, as where the machine has no memory left."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_prepares_images_and_is_killed_is_one_line(tiny_config):
    loader = open_loader(Deadly(), tiny_config({"data.workers": 1}).data, pinned=False)
    with pytest.raises(RunError, match=r"^a process .* (killed|exited).*data\.workers") as caught:
        list(batches(loader))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionResetError(), EOFError()])
def test_a_process_that_is_killed_while_it_hands_over_a_batch_is_one_line(error):
    def loader():
        raise error
        yield

    with pytest.raises(RunError, match=r"data\.workers"):
        list(batches(loader()))


class Slow(Torn):
    """Pictures of which one takes long."""

    def __getitem__(self, index):
        time.sleep(600 if index else 0)
        return torch.zeros(3, 8, 8, dtype=torch.uint8), {"image_id": index}


def test_that_such_a_process_was_killed_is_one_line_wherever_training_stands():
    """PyTorch raises it from a signal's handler, not only where the next batch is waited for."""
    loader = open_loader(Slow(), Data(workers=1), pinned=False, batch_size=1)
    others = psutil.Process().children()
    kept = batches(loader)
    next(kept)
    for worker in {*psutil.Process().children()} - {*others}:
        worker.kill()
    with pytest.raises(RuntimeError) as caught:
        time.sleep(60)  # as training computes
    fault = fault_of(caught.value)
    assert "killed" in fault and "data.workers" in fault and "\n" not in fault


KEPT = """
from detrlib.config import Data
from detrlib.data.batch import open_loader

class Numbers:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.zeros(3, 8, 8, dtype=torch.uint8), {"image_id": index}

import torch
kept = iter(open_loader(Numbers(), Data(workers=1), pinned=False))
next(kept)
raise SystemExit("error: as a fault ends a program")
"""


def test_a_program_ends_though_a_loader_is_kept_whose_workers_ignore_signals(tmp_path):
    """As the traceback of a fault keeps it."""
    done = subprocess.run([sys.executable, "-c", KEPT], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.endswith("error: as a fault ends a program\n")


def test_a_batch_is_the_same_after_its_way_between_processes():
    samples = [
        (
            torch.randint(256, (3, 20, 30 + number), dtype=torch.uint8),
            {"boxes": torch.rand(number, 4), "image_id": number},
        )
        for number in range(3)
    ]
    expected, found = collate(samples), unpack(pack(samples))
    assert torch.equal(found.pixels, expected.pixels) and torch.equal(found.padding_mask, expected.padding_mask)
    for target, wanted in zip(found.targets, expected.targets, strict=True):
        assert torch.equal(target["boxes"], wanted["boxes"]) and target["image_id"] == wanted["image_id"]
    tensors = [part for part in pack(samples).columns.values() if isinstance(part, torch.Tensor)]
    assert [len(tensor) for tensor in tensors] == [3]  # not one for each image


def test_the_share_of_padding_is_that_of_pixels():
    samples = [(torch.zeros(3, *size), {"image_id": 0}) for size in [(10, 10), (10, 40)]]
    assert collate(samples).padding == pytest.approx(30 / 80) and collate(samples[:1]).padding == 0


@pytest.mark.parametrize("scales", ["image", "batch"])
def test_augmentation_follows_from_seed_and_epoch_alone(tiny_config, scales):
    """Neither from the workers that do it, nor from other draws, nor from how processes share a batch."""

    def epoch(number, workers, process=0, processes=1, seed=0):
        cfg = tiny_config({"data.augment": "detr", "data.scales": scales, "data.workers": workers})
        dataset = build_dataset(cfg.data, "train")
        sampler = EpochSampler(32, 8, process, processes, seed)
        loader = open_loader(dataset, cfg.data, pinned=False, batch_sampler=sampler)
        next(iter(loader))  # an epoch before, of which workers are kept
        sampler.epoch = number
        before = torch.get_rng_state()
        found = list(batches(loader))
        assert torch.equal(before, torch.get_rng_state())  # dropout does not depend on workers
        return [image for batch in found for image in images_of(batch)]

    here, there = epoch(1, 0), epoch(1, 1)
    assert all(map(torch.equal, here, there)) and len(here) == 32
    shared = [epoch(1, 0, process, 2) for process in (0, 1)]
    together = [shared[place % 2][place // 2] for place in range(32)]
    assert all(map(torch.equal, here, together))
    for other in (epoch(2, 0), epoch(1, 0, seed=1)):
        assert not any(map(torch.equal, here, other))
    sizes = [{image.shape for image in here[first : first + 8]} for first in range(0, 32, 8)]
    assert [len(shapes) == 1 for shapes in sizes] == [scales == "batch"] * 4


def images_of(batch):
    """The pixels of each image without padding."""
    sizes = [target["size"].tolist() for target in batch.targets]
    return [image[:, :height, :width] for image, (height, width) in zip(batch.pixels, sizes, strict=True)]


def test_workers_are_no_more_than_shared_memory_has_room_for(tiny_config, monkeypatch, tmp_path, caplog):
    """In containers it is small, and a worker that finds it full is waited for."""
    monkeypatch.setattr(batch_module, "cores", lambda: 16)
    monkeypatch.setattr(batch_module, "SHARED", tmp_path)

    def workers(free, images, asked="auto"):
        monkeypatch.setattr(batch_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        settings = tiny_config({"data.workers": asked, "data.image_size": 800}).data
        return open_loader(Torn(), settings, pinned=False, batch_size=images).num_workers

    assert workers(2**26, 16) == 0 and str(tmp_path) in caplog.text
    assert workers(2**26, 1) == 3 and workers(2**34, 16) == 8
    assert workers(2**26, 1, 3) == 3 and workers(2**26, 16, 0) == 0
    with pytest.raises(ConfigError, match=rf"data\.workers: 4, but {tmp_path} has room for 3 .*--shm-size.*auto"):
        workers(2**26, 1, 4)


def test_workers_are_as_many_as_the_cores_that_are_left(tiny_config, monkeypatch):
    def workers(cores, processes=1, **settings):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        cfg = tiny_config({"data.workers": "auto"} | settings)
        return open_loader(Torn(), cfg.data, pinned=False).num_workers

    assert [workers(cores) for cores in (1, 2, 4, 64)] == [0, 1, 3, 8]
    assert [workers(16, processes) for processes in (2, 4, 16)] == [7, 3, 0]
    assert workers(16, **{"data.cache": True}) == 0 and workers(16, **{"data.workers": 2}) == 2
