"""Random batches, and steps of training on them."""

import pytest
import torch

from detrlib.benchmarks.synthetic import random, random_batch, training_step


def test_numbers_are_the_same_each_time():
    assert torch.equal(random((3, 4), 2.0, "cpu", 1), random((3, 4), 2.0, "cpu", 1))
    assert random((1000,), 2.0, "cpu").std().item() == pytest.approx(2, 0.1)


def test_all_images_but_the_first_are_padded():
    batch = random_batch((16, 24), 3, "cpu", padded=True)
    assert batch.padding_mask.sum((1, 2)).tolist() == [0, 48, 48] and batch.padding_mask[1, :, 21:].all()
    assert random_batch((16, 24), 3, "cpu").padding_mask is None
    assert all(((target["boxes"] > 0) & (target["boxes"] < 1)).all() for target in batch.targets)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_trains(precision, tiny_config):
    cfg = tiny_config({"model.num_classes": 9, "train.precision": precision})
    step = training_step(cfg, (64, 96), 2, "cpu", padded=True)
    losses = [step()["loss"].item() for _ in range(4)]
    assert losses[-1] < losses[0]
