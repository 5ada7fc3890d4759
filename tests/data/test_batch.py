"""Batches: padding below and to the right, and the same global batch whatever the number of processes."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from detrlib.data import build_dataset
from detrlib.data.batch import EpochSampler, batches, collate
from detrlib.errors import ConfigError, DataError


def test_collate_pads_below_and_to_the_right_and_masks_padding():
    samples = [(torch.rand(3, 40, 65), {"image_id": 1}), (torch.rand(3, 64, 32), {"image_id": 2})]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 64, 65) and batch.padding_mask.shape == (2, 64, 65)
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
    assert [tuple(part.images.shape[-2:]) for part in parts] == [(20, 30), (10, 16), (24, 8)]
    assert [len(part.images) for part in parts] == [2, 2, 1]  # 2 does not divide 5: the last part is smaller
    assert [part.padding_mask is None for part in parts] == [True, False, True]
    assert [target for part in parts for target in part.targets] == batch.targets
    for number, part in enumerate(parts):
        assert torch.equal(part.images, collate_again(batch, sizes, slice(2 * number, 2 * number + 2)).images)
        assert torch.equal(part.mask(), collate_again(batch, sizes, slice(2 * number, 2 * number + 2)).mask())
    kept = batch.split(2, keep_padding=True)
    assert all(torch.equal(part.images, batch.images[2 * i : 2 * i + 2]) for i, part in enumerate(kept))
    assert all(torch.equal(part.mask(), batch.mask()[2 * i : 2 * i + 2]) for i, part in enumerate(kept))
    assert batch.split(5) == batch.split(9) == [batch]


def collate_again(batch, sizes, rows):
    """These images of a batch, put into one of their own."""
    samples = zip(batch.images[rows], sizes[rows], batch.targets[rows], strict=True)
    return collate([(image[:, :height, :width], target) for image, (height, width), target in samples])


@pytest.mark.parametrize("length, batch, processes", [(33, 8, 1), (33, 8, 2), (33, 12, 3), (5, 8, 2)])
def test_shards_partition_every_batch(length, batch, processes):
    def epoch(number, process, processes):
        sampler = EpochSampler(length, batch, process, processes, seed=3)
        sampler.epoch = number
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

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


@pytest.mark.parametrize(
    "length, batch, processes, updates", [(33, 8, 1, 3), (33, 8, 2, 10), (8, 12, 3, 7), (5, 8, 2, 1)]
)
def test_epochs_of_so_many_updates_take_every_image_equally_often(length, batch, processes, updates):
    """They go on where the one before ended, whoever asks for them and in which order."""

    def epoch(number, process, processes):
        sampler = EpochSampler(length, batch, process, processes, seed=3, updates=updates)
        sampler.epoch = number
        assert len(list(sampler)) == len(sampler) == updates
        return list(sampler)

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
    many.epoch = 1
    assert not set(next(iter(many))[:1]) & set(itertools.chain(*one))


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
def test_a_fault_of_the_data_is_one_line_whichever_process_meets_it(workers):
    loader = torch.utils.data.DataLoader(Torn(), collate_fn=collate, num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(batches(loader))
    assert str(caught.value) == "0.png cannot be read: truncated"


def test_the_share_of_padding_is_that_of_pixels():
    samples = [(torch.zeros(3, *size), {"image_id": 0}) for size in [(10, 10), (10, 40)]]
    assert collate(samples).padding == pytest.approx(30 / 80) and collate(samples[:1]).padding == 0


def test_a_loader_asks_for_a_batch_at_once(tiny_config):
    """So that images of a batch can share sizes, also in a worker."""
    cfg = tiny_config({"data.augment": "detr", "data.scales": "batch", "data.workers": 1})
    dataset = build_dataset(cfg.data, "train")
    loader = DataLoader(dataset, batch_sampler=EpochSampler(32, 8, 0, 1, 0), collate_fn=collate, num_workers=1)
    torch.manual_seed(0)
    found = list(loader)
    assert all(batch.padding_mask is None for batch in found) and len({batch.images.shape for batch in found}) > 1
