"""YOLO's data.yaml as it is written in the wild, every kind of line, and every fault with its file and line."""

import pytest
import yaml
from PIL import ExifTags, Image

from detrlib.config import Data
from detrlib.data import build_dataset
from detrlib.data.yolo import is_data_yaml, pictures, read, splits
from detrlib.errors import DataError


@pytest.fixture
def data_yaml(tmp_path, write_layout):
    """`data_yaml(train=..., names=...)` writes a data.yaml over a data set; returns the path of its training split."""
    root = write_layout(tmp_path / "set", "yolo")

    def write(**values):
        values = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"]} | values
        text = yaml.safe_dump({name: value for name, value in values.items() if value is not None})
        (root / "data.yaml").write_text(text)
        return root / "data.yaml" / "train"

    return write


@pytest.fixture
def label(data_yaml):
    """`label(text)` writes the boxes of the first training picture, 48 x 40; returns the path of the split."""

    def write(text, **values):
        train = data_yaml(**values)
        (train.parent.parent / "labels" / "train" / "train0.txt").write_text(text)
        return train

    return write


def boxes(train):
    return [(one["category_id"], one["bbox"]) for one in read(train)["annotations"] if one["image_id"] == 1]


@pytest.mark.parametrize(
    "places",
    [
        {"train": "../images/train"},  # as Roboflow writes it, beside the file itself
        {"path": "..", "train": "set/images/train"},
        {"path": "/home/of/somebody/set"},
        {"train": "./images/train/"},
        {"train": "images\\train"},
        {"train": ["images/train", "images/val"]},
        {"train": "train.txt"},
        {"train": ["train.txt", "images/val"]},
        {"train": "windows.txt"},
    ],
    ids=str,
)
def test_places_as_people_write_them(data_yaml, places):
    train = data_yaml(**places)
    root = train.parent.parent
    (root / "train.txt").write_text("".join(f"./images/train/train{n}.png\n" for n in range(4)) + "\n")
    (root / "windows.txt").write_bytes((root / "train.txt").read_bytes().replace(b"/", b"\\").replace(b"\n", b"\r\n"))
    folder, files = pictures(train)
    of_val = isinstance(places.get("train"), list)
    assert [file.name for file in files[:4]] == [f"train{n}.png" for n in range(4)] and len(files) == 4 + 3 * of_val
    dataset = build_dataset(Data(root=str(root)), "train")
    assert dataset.images_path == folder == root / ("images" if of_val else "images/train")
    assert dataset.objects(0)[0].tolist() == [[4, 6, 24, 22]] and dataset.names == {0: "cat", 1: "dog"}


def test_what_lies_beside_the_file_goes_before_a_neighbour(data_yaml, write_layout, tmp_path):
    write_layout(tmp_path, "yolo")  # another data set, one folder higher
    assert pictures(data_yaml(train="../images/train"))[0] == tmp_path / "set" / "images" / "train"


@pytest.mark.parametrize("names", [["no", "dog"], {0: "no", 1: "dog"}])
def test_names_are_text_whatever_yaml_makes_of_them(data_yaml, names):
    train = data_yaml(names=None, nc=2)
    text = f"[{names[0]}, {names[1]}]" if isinstance(names, list) else f"{{0: {names[0]}, 1: {names[1]}}}"
    train.parent.write_text(train.parent.read_text() + f"names: {text}\n")
    assert read(train)["categories"] == [{"id": 0, "name": "no"}, {"id": 1, "name": "dog"}]


def test_data_yaml_is_told_from_settings(data_yaml, tmp_path):
    train = data_yaml(test="")
    assert is_data_yaml(train.parent) and list(splits(train.parent.parent)) == ["train", "val"]
    (tmp_path / "config.yaml").write_text("base: shapes.yaml\ntrain:\n  epochs: 2\n")
    assert not is_data_yaml(tmp_path / "config.yaml") and splits(tmp_path) == {}
    train.parent.rename(train.parent.with_name("cells.yml"))
    assert splits(train.parent.parent) == {n: train.parent.with_name("cells.yml") / n for n in ("train", "val")}


@pytest.mark.parametrize(
    "line, expected, area",
    [
        ("1 0.5 0.5 0.25 0.5", (1, [18, 10, 12, 20]), None),
        ("1.0\t0.5  0.5 0.25 5e-1\n\n", (1, [18, 10, 12, 20]), None),
        ("0 0.25 0.25 0.75 0.25 0.75 0.75", (0, [12, 10, 24, 20]), 240),  # a triangle
        ("0 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5", (0, [12, 10, 24, 20]), 240),  # a rotated box
    ],
)
def test_boxes_of_boxes_polygons_and_rotated_boxes(label, line, expected, area):
    train = label(line)
    assert boxes(train) == [(expected[0], pytest.approx(expected[1]))]
    assert read(train)["annotations"][0].get("area") == (area and pytest.approx(area))


def test_keypoints_follow_the_box(label):
    points = "0.5 0.5 2 0.6 0.6 0"
    train = label(f"1 0.5 0.5 0.25 0.5 {points}", kpt_shape=[2, 3])
    assert boxes(train) == [(1, pytest.approx([18, 10, 12, 20]))]


def test_pictures_without_a_file_or_with_an_empty_one_have_no_objects(label):
    train = label("")
    (train.parent.parent / "labels" / "train" / "train1.txt").unlink()
    content = read(train)
    assert len(content["images"]) == 4 and {one["image_id"] for one in content["annotations"]} == {3}


def test_labels_may_lie_beside_the_pictures(data_yaml):
    train = data_yaml()
    root = train.parent.parent
    for file in (root / "labels" / "train").iterdir():
        file.rename(root / "images" / "train" / file.name)
    assert boxes(train) == [(0, pytest.approx([4, 6, 20, 16]))]


def test_a_turned_picture_is_labelled_as_it_is_shown(label):
    train = label("0 0.5 0.5 1 0.5")
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    folder = train.parent.parent / "images" / "train"
    (folder / "train0.png").unlink()
    Image.new("RGB", (48, 40)).save(folder / "train0.jpg", exif=tags)
    content = read(train)
    assert content["images"][0] == {"id": 1, "file_name": "train0.jpg", "width": 40, "height": 48}
    assert content["annotations"][0]["bbox"] == pytest.approx([0, 12, 40, 24])


@pytest.mark.parametrize(
    "line, words",
    [
        ("1 0.5 0.5 0.25", "4 numbers"),
        ("1 0.5 0.5 0.25 0.5 0.9", "6 numbers"),
        ("2 0.5 0.5 0.25 0.5", "class 2 has no name; there are 0 to 1"),
        ("-1 0.5 0.5 0.25 0.5", "class -1"),
        ("0.5 0.5 0.5 0.25 0.5", "class 0.5"),
        ("cat 0.5 0.5 0.25 0.5", "'cat' is no number"),
        ("0 0.5 nan 0.25 0.5", "nan is no finite number"),
        ("0 0.5 0.5 inf 0.5", "inf"),
        ("0 24 20 12 20", "24.0 is outside 0..1"),
        ("0 0.5 0.5 -0.25 0.5", "-0.25 is outside 0..1"),
    ],
)
def test_a_faulty_line_is_named(label, line, words):
    train = label(f"0 0.5 0.5 0.25 0.5\n{line}\n")
    with pytest.raises(DataError) as error:
        read(train)
    assert str(error.value).startswith(f"{train.parent.parent}/labels/train/train0.txt: line 2: ")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"names": None}, "names: missing"),
        ({"names": None, "nc": 2}, "names: missing"),
        ({"names": {"a": "cat"}}, "names: 'a'"),
        ({"names": [["cat"]]}, "names: "),
        ({"nc": 3}, "nc is 3"),
        ({"train": "images/nowhere"}, "train: no images/nowhere"),
        ({"train": "data.yaml"}, "train: data.yaml is neither"),
        ({"train": "empty"}, "train: no pictures in empty"),
    ],
)
def test_a_faulty_data_yaml_is_named(data_yaml, values, words):
    train = data_yaml(**values)
    (train.parent.parent / "empty").mkdir()
    with pytest.raises(DataError) as error:
        read(train)
    assert str(error.value).startswith(f"{train.parent}: {words}")


def test_a_key_is_there_once(data_yaml):
    train = data_yaml()
    train.parent.write_text(train.parent.read_text() + "\ntrain: images/val\n")
    with pytest.raises(DataError, match=r"data\.yaml: .*'train' is there twice"):
        read(train)


def test_files_that_are_not_there_or_not_readable_are_named(data_yaml):
    train = data_yaml(train="train.txt")
    root = train.parent.parent
    (root / "train.txt").write_text("images/train/other.png\n")
    with pytest.raises(DataError, match=r"train\.txt: no picture images/train/other\.png"):
        read(train)
    (root / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"train\.txt: not readable as text"):
        read(train)
    (root / "images" / "train" / "train0.png").write_text("no picture")
    with pytest.raises(DataError, match=r"train0\.png: not a picture"):
        read(data_yaml())
    (root / "labels").rename(root / "annotated")
    with pytest.raises(DataError, match=r"none of its 4 pictures has a file of boxes.*labels/train/train0\.txt"):
        read(data_yaml())
    (root / "data.yaml").write_text("train: [")
    with pytest.raises(DataError, match=r"data\.yaml: not readable as YAML"):
        splits(root)


def test_every_picture_that_cannot_be_read_is_named(data_yaml):
    train = data_yaml()
    for number in (0, 2):
        (train.parent.parent / "images" / "train" / f"train{number}.png").write_bytes(b"")
    with pytest.raises(DataError) as error:
        read(train)
    assert "train0.png" in str(error.value) and "train2.png" in str(error.value)


def test_pictures_without_a_file_of_boxes_are_counted(data_yaml, caplog):
    train = data_yaml()
    (train.parent.parent / "labels" / "train" / "train0.txt").unlink()
    with caplog.at_level("INFO"):
        read(train)
        read(train)
    assert caplog.text.count("1 of 4 pictures") == 1 and "train0.png" in caplog.text
