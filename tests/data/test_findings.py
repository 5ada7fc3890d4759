"""What is said of data before training: each thing once, and nothing of data without faults."""

import json

import numpy as np
import pytest
from PIL import Image

from detrlib.config import Data
from detrlib.data import look_over, open_splits


@pytest.fixture
def splits(tmp_path, monkeypatch):
    """`splits(train, val, **settings)` opens two splits; each is a list of images, an image a list of class ids."""
    monkeypatch.setenv("DETRLIB_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)

    def write(train, val, **settings):
        for split, objects in (("train2017", train), ("val2017", val)):
            (tmp_path / split).mkdir()
            images, annotations = [], []
            for number, ids in enumerate(objects):
                Image.fromarray(random.integers(0, 255, (30, 40, 3), np.uint8)).save(tmp_path / split / f"{number}.png")
                images.append({"id": number, "file_name": f"{number}.png", "width": 40, "height": 30})
                boxes = [{"image_id": number, "category_id": id, "bbox": [3, 4, 10 + id, 9]} for id in ids]
                annotations += [box | {"id": len(annotations) + n} for n, box in enumerate(boxes)]
            categories = [{"id": id, "name": name} for id, name in ((1, "cat"), (2, "dog"), (3, "bird"))]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (tmp_path / "annotations").mkdir(exist_ok=True)
            (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        return open_splits(Data(root=str(tmp_path), image_size=32, **settings))

    write.root = tmp_path
    return write


MANY = [[1, 2, 3]] * 20


def test_nothing_but_counts_is_said_of_data_without_faults(splits):
    found = look_over(splits(MANY, MANY[:3]), num_queries=3)
    assert found.sentences == [] and found.images == {"train": 20, "val": 3}
    assert found.counts.to_dict("list") == {"train": [20] * 3, "val": [3] * 3}
    assert found.counts.index.tolist() == ["cat", "dog", "bird"]
    assert str(found).splitlines()[0] == "data: train 20 images 60 objects, val 3 images 9 objects"


def said(found, *words):
    """The one sentence that has the first of `words` has them all."""
    (sentence,) = [one for one in found.sentences if words[0] in one]
    assert all(word in sentence for word in words), sentence


def test_rare_and_absent_classes_and_crowded_images(splits):
    found = look_over(splits([*[[1, 1]] * 10, [2, 2, 2]], [[1], [3, 3, 3, 3], []]), num_queries=2)
    said(found, "fewer than 20", "train", "dog (3)")
    said(found, "cannot be learned", "train", "bird")
    assert "bird" not in str([one for one in found.sentences if "not defined" in one])
    said(found, "AP is not defined", "val", "dog")
    said(found, "train: 1 images hold more objects", "num_queries 2", "up to 3")
    said(found, "val: 1 images hold more objects", "up to 4")
    assert len(found.sentences) == 5


def test_pictures_of_both_splits_and_repeated_ones(splits):
    opened = splits(MANY, MANY[:3])
    root = splits.root
    (root / "val2017" / "1.png").write_bytes((root / "train2017" / "4.png").read_bytes())
    Image.open(root / "train2017" / "5.png").save(root / "val2017" / "2.png", compress_level=1)
    (root / "train2017" / "7.png").write_bytes((root / "train2017" / "6.png").read_bytes())
    assert look_over(opened, check="headers").sentences == [], "pixels are not known yet"
    found = look_over(opened)
    said(found, "val: 2 of 3 pictures are in train too", "1.png = 4.png", "2.png = 5.png")
    said(found, "train: 1 pictures are there more than once", "7.png")
    assert look_over(opened, check="headers").sentences == found.sentences, "what is remembered costs nothing"
    assert look_over(opened, check="none").sentences == []


@pytest.mark.parametrize("orientation, words", [("stored", "data.orientation: exif"), ("exif", "turned upright")])
def test_what_is_odd_in_pictures_is_said(splits, orientation, words):
    opened = splits(MANY, MANY[:3], orientation=orientation, truncated="accept")
    tag = Image.Exif()
    tag[0x0112] = 3
    folder = splits.root / "train2017"
    picture = Image.open(folder / "0.png")
    picture.save(folder / "0.png", exif=tag)
    picture.point(lambda value: value // 8).save(folder / "1.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 16).save(folder / "2.png")
    picture.save(folder / "3.png", "JPEG")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:1000])
    found = look_over(opened)
    said(found, "orientation in EXIF", "train: 1 pictures", "0.png", words)
    said(found, "no pixel above 64", "train: 1 pictures", "1.png")
    said(found, "scaled by the range", "8 bits 19", "12 bits 1")
    said(found, "cut short", "train: 1 JPEG files", "3.png")


def test_what_was_done_to_annotations_is_said_with_the_split(splits):
    opened = splits(MANY, MANY[:3])
    opened["val"].notes.append("3 boxes have no area inside their image and are left out")
    found = look_over(opened)
    assert found.sentences == ["val: 3 boxes have no area inside their image and are left out"]


def test_a_block_stays_short_and_says_where_the_rest_is(splits):
    opened = splits(MANY, MANY[:3])
    opened["train"].notes += [f"note {number}" for number in range(30)]
    found = look_over(opened)
    assert len(str(found).splitlines()) == 12 and "21 more: detrlib check" in str(found) and len(found.lines) == 32
