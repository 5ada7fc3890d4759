"""Any folder that people have: found, read alike, its splits by any of their names; a share held out; every refusal."""

import json
import shutil

import pytest
from PIL import Image

from detrlib.config import Data, load_config
from detrlib.data import build_dataset, describe_data
from detrlib.data.annotations import read_annotations
from detrlib.data.formats import find_split, find_splits, held_out, other_split, same_split
from detrlib.errors import ConfigError, DataError

LAYOUTS = ["coco", "roboflow", "yolo", "voc", "voc beside pictures"]


@pytest.fixture
def open_data():
    def open_data(split="train", **settings):
        """The data set of a split by settings of `data`."""
        return build_dataset(
            Data(**{name: str(value) if name == "root" else value for name, value in settings.items()}), split
        )

    return open_data


def content(dataset):
    """What a model is taught, without ids."""
    found = []
    for index, name in enumerate(dataset.file_names):
        boxes, labels = dataset.objects(index)
        found.append((name, boxes.tolist(), [dataset.names[label] for label in labels.tolist()]))
    return found


def refused(settings, split, *words):
    with pytest.raises(DataError) as error:
        find_split(settings, split)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_data_set_in_every_layout(tmp_path, write_layout, open_data, layout):
    root = write_layout(tmp_path, layout)
    train, val = open_data("train", root=root), open_data("val", root=root)
    assert content(train) == [
        ("train0.png", [[4, 6, 24, 22]], ["cat"]),
        ("train1.png", [[5, 6, 25, 22]], ["dog"]),
        ("train2.png", [[6, 6, 26, 22]], ["cat"]),
        ("train3.png", [], []),
    ]
    assert [name for name, _, _ in content(val)] == ["val0.png", "val1.png", "val2.png"]
    assert train[0][0].shape[0] == 3 and train.names == val.names and sorted(train.names.values()) == ["cat", "dog"]
    settings = Data(root=str(root), val_limit=1)
    whole = load_config(
        None, {f"data.{name}": v for name, v in ({"root": str(root)} | other_split(settings, "test")).items()}
    )
    assert [name for name, _, _ in content(build_dataset(whole.data, "val"))] == ["test0.png", "test1.png"]
    assert len(val.ground_truth["annotations"]) == 2


def test_ids_from_zero_are_kept(tmp_path, write_layout, open_data):
    train = open_data(root=write_layout(tmp_path, "roboflow"))
    assert train.names == {0: "cat", 1: "dog"} and train.image_ids == [0, 1, 2, 3] and train.num_classes == 2


def test_names_of_splits():
    for one, other in [("train2017", "train"), ("val2017", "valid"), ("validation", "val"), ("testing", "test2014")]:
        assert same_split(one, other) and same_split(other, one)
    for one, other in [("train2017", "train2014"), ("train", "val"), ("trainval", "train"), ("fold1", "fold2")]:
        assert not same_split(one, other)
    assert same_split("fold1", "fold1")


def test_a_split_of_another_year_or_of_two_years_is_refused(tmp_path, write_layout):
    write_layout(tmp_path, "coco", train=2, val=2)
    annotations = tmp_path / "annotations"
    shutil.copy(annotations / "instances_val2017.json", annotations / "instances_val2014.json")
    assert find_split(Data(root=str(tmp_path)), "val")[1].name == "instances_val2017.json"
    refused(
        Data(root=str(tmp_path), val_split="val"), "val", "no split val, only", "val2014, val2017", "data.val_split"
    )
    refused(
        Data(root=str(tmp_path), train_split="train2014"), "train", "train2014, only", "train2017", "data.train_split"
    )


def test_the_only_split_is_trained_on(tmp_path, write_layout):
    """As labelling programs export them: instances_default.json and images/."""
    write_layout(tmp_path, "coco", train=2)
    (tmp_path / "train2017").rename(tmp_path / "images")
    default = tmp_path / "annotations" / "instances_default.json"
    (tmp_path / "annotations" / "instances_train2017.json").rename(default)
    assert find_split(Data(root=str(tmp_path)), "train") == (tmp_path / "images", default)
    refused(Data(root=str(tmp_path)), "val", "only default", "data.holdout")
    assert find_split(Data(root=str(tmp_path), holdout=0.5), "val")[1] == default


# --- a share held out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_validation_split_a_share_is_held_out(tmp_path, write_layout, open_data, layout):
    root = write_layout(tmp_path, layout, train=12)
    refused(Data(root=str(root)), "val", str(root), "train", "data.holdout")
    settings = {"root": root, "holdout": 0.4}
    train, val = open_data("train", **settings), open_data("val", **settings)
    assert 0 < len(val) < 12 and sorted(train.file_names + val.file_names) == sorted(f"train{n}.png" for n in range(12))
    assert len(val.ground_truth["images"]) == len(val)
    described = describe_data(Data(root=str(root), holdout=0.4))
    assert described["held_out"] == val.file_names and described["train"]["images"] == len(train)


def test_what_is_held_out_depends_on_the_name_alone():
    names = [f"{n}.jpg" for n in range(400)]
    held = held_out(names, 0.1, seed=0)
    assert 20 < len(held) < 60 and held_out(names, 0.2, 0) > held and held_out(names, 0.1, 1) != held
    more = held_out([*names, *(f"new{n}.jpg" for n in range(200))], 0.1, 0)
    assert more & set(names) == held  # those that were trained on stay so
    assert held_out([f"a/{name}" for name in names], 0.1, 0) == {f"a/{name}" for name in held}  # folders do not count
    assert len(held_out(names[:3], 1e-6, 0)) == 1
    copies = {f"{n}_jpg.rf.{letter}.jpg" for n in range(50) for letter in "abc"}
    chosen = held_out(copies, 0.3, 0)
    pictures = [{name.split(".rf.")[0] for name in part} for part in (chosen, copies - chosen)]
    assert pictures[0] and not pictures[0] & pictures[1]


def test_a_share_that_leaves_nothing_or_is_none_is_refused(tmp_path, write_layout, open_data):
    root = write_layout(tmp_path, "yolo", train=3)
    with pytest.raises(DataError, match=r"data\.holdout 0\.999.*nothing to train on"):
        open_data(root=root, holdout=0.999)
    for share in (0, 1, -0.1):
        with pytest.raises(ConfigError, match=r"data\.holdout"):
            load_config(None, {"data.holdout": share})


# --- explicit paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_split_of_explicit_paths_lies_around_them(tmp_path, write_layout, layout):
    splits = find_splits(write_layout(tmp_path, layout))
    paths = {name: str(path) for name, path in splits.items()}
    train, val = (next(path for name, path in paths.items() if name.startswith(kind)) for kind in ("train", "val"))
    settings = Data(train_annotations=train, val_annotations=val, val_limit=1)
    for split, expected in (("test", "test0.png"), ("train", "train0.png"), ("val", "val0.png")):
        chosen = {f"data.{name}": value for name, value in other_split(settings, split).items()}
        dataset = build_dataset(load_config(None, chosen).data, "val")
        assert dataset.file_names[0] == expected and len(dataset) > 1
    with pytest.raises(DataError, match=r"data\.val_annotations .*no split holdback.*--split"):
        other_split(settings, "holdback")


def test_a_split_that_is_nowhere_near_explicit_paths_is_refused(tmp_path, write_layout):
    root = write_layout(tmp_path, "coco")
    file = shutil.move(root / "annotations" / "instances_val2017.json", tmp_path / "mine.json")
    with pytest.raises(DataError, match=r"data\.val_annotations .*mine\.json.*--on"):
        other_split(Data(val_annotations=str(file), val_images=str(root / "val2017")), "test")
    # Pictures that lie elsewhere, annotations in the folder.
    settings = Data(root=str(root), val_images=str(root / "val2017"))
    assert other_split(settings, "test2017")["val_images"] == str(root / "test2017")


def test_explicit_paths_that_are_not_there_are_named(tmp_path, write_layout):
    root = write_layout(tmp_path, "coco")
    refused(Data(val_annotations=str(root / "val.json")), "val", "data.val_annotations", "val.json", "holds")
    refused(Data(root=str(root), val_images=str(root / "vals")), "val", "data.val_images", "vals", "val2017")
    shutil.rmtree(root / "train2017")
    refused(
        Data(root=str(root)), "train", "instances_train2017.json", "no folder of its pictures", str(root / "train2017")
    )


# --- what is no data set ----------------------------------------------------------------------------------------


def test_a_folder_that_is_none_is_refused_with_what_was_looked_for_and_found(tmp_path):
    refused(Data(root=str(tmp_path / "nowhere")), "train", "nowhere", "no such folder", "data.root")
    (tmp_path / "notes.txt").write_text("")
    refused(
        Data(root=str(tmp_path)), "train", str(tmp_path), "COCO", "Roboflow", "YOLO", "Pascal VOC", "holds notes.txt"
    )
    refused(Data(root=str(tmp_path / "notes.txt")), "train", "notes.txt", "data.root")


def test_pictures_without_annotations_are_for_predict(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    refused(Data(root=str(tmp_path)), "train", f"detrlib predict RUN {tmp_path}")
    listed = tmp_path / "annotations" / "image_info_test2017.json"
    listed.parent.mkdir()
    listed.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}]}))
    refused(Data(root=str(tmp_path)), "train", f"detrlib predict RUN {listed}")


def test_mixed_layouts_are_refused(tmp_path, write_layout):
    write_layout(tmp_path, "yolo")
    write_layout(tmp_path, "coco")
    refused(Data(root=str(tmp_path)), "train", "COCO and YOLO", "data.train_annotations")
    assert find_split(Data(root=str(tmp_path / "data.yaml")), "train")[0] == tmp_path / "images" / "train"


def test_data_yaml_without_a_split_is_no_annotation_file(tmp_path, write_layout):
    write_layout(tmp_path, "yolo")
    with pytest.raises(DataError, match=r"data\.yaml: .*data\.yaml/val"):
        read_annotations(tmp_path / "data.yaml")
