"""The published transforms, with the same draws, give the same pixels and boxes; the benchmark says what it saw."""

import json

import pytest
import torch

from detrlib.benchmarks import loader
from detrlib.data.augment import STD, build_augmentation
from detrlib.data.batch import Drawn
from detrlib.data.coco import CocoDataset

LEVELS = 255 * torch.tensor(STD).view(3, 1, 1)  # of grey, for a difference after normalisation


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return loader.photographs(tmp_path_factory.mktemp("photographs"), 4, size=(160, 120))


@pytest.mark.parametrize("image_size", [64, 256])
@pytest.mark.parametrize("recipe, train", [("detr", True), ("flip", True), ("none", False)])
def test_batches_are_those_of_the_published_transforms(photographs, image_size, recipe, train):
    """To one level of grey, with the same padding, which is exactly zero, and the same boxes.

    Where torch has no kernel for 8 bit numbers, it does not round between rows and columns, as Pillow does.
    """
    levels = 2 if recipe == "detr" and torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 1
    dataset = CocoDataset(*photographs, build_augmentation(image_size, recipe, train))
    for batch in range(12):
        asked = [Drawn(index, f"{batch} {index}", str(batch)) for index in (batch % 4, (batch + 1) % 4)]
        images, padding, targets = loader.official_batch(dataset, asked)
        own = loader.own_batch(dataset, asked)
        assert own.pixels.dtype == torch.uint8 and own.images.shape == images.shape
        assert torch.equal(own.mask(), padding) and not own.images.movedim(1, -1)[padding].any()
        difference = (own.images - images).abs() * LEVELS
        assert difference.max() < levels + 0.01 and difference.mean() < 0.3
        for target, expected in zip(own.targets, targets, strict=True):
            torch.testing.assert_close(target["boxes"], expected["boxes"], atol=1e-6, rtol=1e-6)
            assert torch.equal(target["labels"], expected["labels"])


def test_the_table_is_printed_and_written(photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loader, "photographs", lambda folder, count: photographs)
    measured = loader.measure
    monkeypatch.setattr(loader, "measure", lambda *data: measured(*data, image_size=64, rounds=1))
    loader.main(tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "loader.json").read_text())["results"]
    assert [row["times"] for row in rows if row["way"] == loader.OFFICIAL] == [1.0, 1.0] and len(rows) == 6
    assert all(row["ms"] * row["images_per_second"] == pytest.approx(1e3) for row in rows)
    assert loader.NORMALISED in capsys.readouterr().out
