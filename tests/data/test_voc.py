"""Pascal VOC's XML: coordinates from one, difficult objects, classes of all splits, and every fault with its object."""

import logging

import pytest

from detrlib.config import Data
from detrlib.data import build_dataset, voc
from detrlib.data.voc import read, splits
from detrlib.errors import DataError


@pytest.fixture
def root(tmp_path, write_layout):
    return write_layout(tmp_path / "voc", "voc")


@pytest.fixture
def train(root):
    return root / "ImageSets" / "Main" / "train.txt"


def write(root, text):
    """The annotation of the first training picture; returns its path."""
    path = root / "Annotations" / "train0.xml"
    path.write_text(f"<annotation>{text}</annotation>")
    return path


def an_object(box=(1, 1, 48, 40), name="cat", more=""):
    corners = "".join(f"<{c}>{v}</{c}>" for c, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def first(train):
    return [one for one in read(train)["annotations"] if one["image_id"] == 1]


@pytest.mark.parametrize(
    "box, expected",
    [
        ((1, 1, 48, 40), [0, 0, 48, 40]),  # the whole picture
        ((5, 7, 5, 7), [4, 6, 1, 1]),  # one pixel
        ((0, 0, 48, 40), [0, 0, 48, 40]),  # counted from zero
        ((" 5.5 ", 7, "24.0", 22), [4.5, 6, 19.5, 16]),
    ],
)
def test_the_first_pixel_is_one_and_the_last_belongs_to_the_box(root, train, box, expected):
    write(root, an_object(box))
    assert first(train)[0]["bbox"] == expected


def test_a_difficult_object_is_no_target_and_no_false_detection(root, train):
    write(root, an_object(more="<difficult>1</difficult>") + an_object((1, 1, 9, 9), more="<difficult>0</difficult>"))
    assert [one["iscrowd"] for one in first(train)] == [1, 0]
    dataset = build_dataset(Data(root=str(root)), "train")
    assert dataset.objects(0)[0].tolist() == [[0, 0, 9, 9]] and len(dataset.frame()) == 4


def test_parts_of_objects_are_no_objects(root, train):
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part>"
    write(root, an_object(more=part))
    assert len(first(train)) == 1
    assert [category["name"] for category in read(train)["categories"]] == ["cat", "dog"]


def test_a_size_that_is_missing_is_read_from_the_picture(root, train):
    for size in ("", "<size><width>0</width><height>0</height></size>"):
        write(root, size + an_object())
        assert read(train)["images"][0] == {"id": 1, "file_name": "train0.png"}
    assert build_dataset(Data(root=str(root)), "train")[0][1]["original_size"].tolist() == [40, 48]


@pytest.mark.parametrize("layout", ["voc", "voc beside pictures"])
def test_classes_are_those_of_all_splits(tmp_path, write_layout, layout):
    root = write_layout(tmp_path, layout)
    (path,) = root.rglob("test0.xml")
    path.write_text(f"<annotation>{an_object(name='bird')}</annotation>")
    for split in ("train", "val"):
        assert build_dataset(Data(root=str(root)), split).names == {1: "bird", 2: "cat", 3: "dog"}


def test_ids_are_the_numbers_that_files_are_named_by(root, train):
    for number in range(4):
        for path in root.rglob(f"train{number}.*"):
            path.rename(path.with_stem(f"00{number + 5}"))
    train.write_text("005\n006\n\n007\n008\n")
    assert [image["id"] for image in read(train)["images"]] == [5, 6, 7, 8]


def test_without_lists_every_file_is_trained_on_and_other_pictures_are_counted(root, caplog):
    for path in (root / "ImageSets" / "Main").iterdir():
        path.unlink()
    assert splits(root) == {"all": root / "Annotations"}
    (root / "Annotations" / "train3.xml").unlink()
    voc.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert len(build_dataset(Data(root=str(root)), "train")) == 8
    assert "1 pictures have no XML file" in caplog.text


def test_the_picture_may_be_named_in_the_file(root, train):
    write(root, "<filename>other.png</filename>" + an_object())
    (root / "JPEGImages" / "train0.png").rename(root / "JPEGImages" / "other.png")
    assert read(train)["images"][0]["file_name"] == "other.png"
    (root / "JPEGImages").rename(root / "images")
    assert build_dataset(Data(root=str(root)), "train").images_path == root / "images"


@pytest.mark.parametrize(
    "text, words",
    [
        (an_object((1, 1, 48, "x")), "object 1 (cat): bndbox/ymax is 'x'"),
        (an_object() + an_object((1, "nan", 48, 40)), "object 2 (cat): bndbox/ymin is nan"),
        ("<object><name>cat</name><polygon/></object>", "object 1 (cat): bndbox/xmin is None"),
        (an_object(name=" "), "object 1: has no name"),
        ("<size><width>wide</width><height>40</height></size>", "size: wide x 40"),
        ("<object>", "not readable as XML"),
    ],
)
def test_a_fault_is_named_with_its_file_and_object(root, train, text, words):
    path = write(root, text)
    with pytest.raises(DataError) as error:
        read(train)
    assert str(error.value).startswith(f"{path}: {words}")


def test_what_is_missing_is_named(root, train):
    train.write_text("train0\nlost\n")
    with pytest.raises(DataError, match=r"train\.txt: 1 of 2 have no XML file in Annotations: lost"):
        read(train)
    train.write_text("train0\n")
    (root / "JPEGImages" / "train0.png").unlink()
    with pytest.raises(DataError, match=r"train0\.xml: its picture train0 is not in .*JPEGImages"):
        read(train)
    (root / "Annotations" / "train0.xml").write_text("<html/>")
    with pytest.raises(DataError, match=r"train0\.xml: begins with <html>"):
        read(train)
    (root / "JPEGImages").rename(root / "pictures")
    (root / "Annotations" / "train0.xml").unlink()
    with pytest.raises(DataError, match=r"train\.txt: there is no folder of its pictures"):
        read(train)


def test_files_without_any_object_are_refused(root):
    for path in (root / "Annotations").iterdir():
        path.write_text("<annotation/>")
    with pytest.raises(DataError, match="no object in any XML file"):
        build_dataset(Data(root=str(root)), "train")


def test_a_list_that_is_no_text_is_named(train):
    train.write_bytes("bär".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.txt"):
        read(train)
