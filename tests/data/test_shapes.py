"""The drawn shapes: the same wherever and however they are drawn, and an ordinary COCO-format folder."""

import hashlib

import numpy as np
import pytest

from detrlib.config import Shapes
from detrlib.data import CocoDataset, shapes
from detrlib.data.shapes import draw_image, shapes_folder
from detrlib.errors import DataError

TINY = Shapes(train=6, val=3, size=64)


def digest(folder):
    """One hash over the names and contents of all files."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def test_shapes_are_the_same_wherever_they_are_drawn(tmp_path):
    first, second = (shapes_folder(TINY, tmp_path / name) for name in "ab")
    assert digest(first) == digest(second)
    other = shapes_folder(TINY.model_copy(update={"seed": 1}), tmp_path / "a")
    assert other != first and digest(other) != digest(first)


def test_shapes_do_not_depend_on_how_many_processes_draw_or_how_many_images(tmp_path, monkeypatch):
    alone = shapes_folder(TINY, tmp_path / "a")
    monkeypatch.setattr(shapes, "SERIAL", 0)  # a pool, even for these few
    more = shapes_folder(TINY.model_copy(update={"train": 8}), tmp_path / "b")
    for path in sorted((alone / "train2017").iterdir()):
        assert path.read_bytes() == (more / "train2017" / path.name).read_bytes()


def test_shapes_are_an_ordinary_coco_folder_written_once(tmp_path, monkeypatch):
    folder = shapes_folder(TINY, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f".{folder.name}.lock"}  # no draft is left
    assert sorted(path.name for path in folder.iterdir()) == ["annotations", "train2017", "val2017"]
    for split, count in (("train2017", 6), ("val2017", 3)):
        dataset = CocoDataset(folder / split, folder / f"annotations/instances_{split}.json", strict=True)
        assert len(dataset) == count and tuple(dataset.names.values()) == shapes.CLASSES
    monkeypatch.setattr(shapes, "draw_image", None)  # drawing again would fail
    assert shapes_folder(TINY, tmp_path) == folder


def test_shapes_hold_objects_of_every_size_and_class_within_the_image():
    objects = [draw_image(128, np.random.default_rng([0, 0, index]))[1] for index in range(60)]
    every = [found for image in objects for found in image]
    assert all(1 <= len(image) <= shapes.MOST_OBJECTS for image in objects)
    assert {found.category_id for found in every} == {1, 2, 3, 4, 5, 6}
    boxes, areas = np.array([found.box for found in every]), np.array([found.area for found in every])
    assert boxes.min() >= 0 and boxes.max() <= 128
    assert (areas <= 1.02 * (boxes[:, 2:] - boxes[:, :2]).prod(1)).all()
    assert 0.3 < (areas < 32**2).mean() < 0.8  # COCO's small objects, and enough others


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*DETRLIB_CACHE"):
        shapes_folder(Shapes(train=1, val=1), tmp_path / "file")
