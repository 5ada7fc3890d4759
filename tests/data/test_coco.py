"""COCO-format folders as data sets: what images and boxes become, every fault, and the data sets of settings."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.config import Data, Shapes
from detrlib.data import CocoDataset, build_dataset, collate
from detrlib.data.augment import build_augmentation
from detrlib.errors import DataError
from detrlib.metrics.detection import coco_ap, coco_detections


def picture(width=40, height=30, colour=(90, 120, 60)):
    return Image.new("RGB", (width, height), colour)


def annotation(id, box=(4, 5, 10, 8), image_id=1, category_id=7, **fields):
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": list(box)} | fields


@pytest.fixture
def folder(tmp_path):
    """`folder(annotations, ...)` writes a data set and returns the paths of its images and its annotations."""

    def write(annotations=(), pictures=None, categories=((3, "cat"), (7, "dog")), **replaced):
        pictures = pictures or {"1.png": picture()}
        for name, image in pictures.items():
            image.save(tmp_path / name)
        content = {
            "images": [
                {"id": id, "file_name": name, "width": image.width, "height": image.height}
                for id, (name, image) in enumerate(pictures.items(), start=1)
            ],
            "annotations": list(annotations),
            "categories": [{"id": id, "name": name} for id, name in categories],
        }
        (tmp_path / "a.json").write_text(json.dumps(content | replaced))
        return tmp_path, tmp_path / "a.json"

    return write


def refused(paths, *words, **arguments):
    """Opening the data set raises a DataError that names the annotation file and all of `words`."""
    with pytest.raises(DataError) as error:
        CocoDataset(*paths, **arguments)
    for word in (str(paths[1]), *words):
        assert word in str(error.value)


def test_a_missing_annotation_file_and_a_missing_folder_are_named(folder, tmp_path):
    images, _ = folder()
    refused((images, tmp_path / "b.json"))
    refused((tmp_path / "nowhere", tmp_path / "a.json"), str(tmp_path / "nowhere"))


def test_a_missing_image_is_named_with_its_annotations(folder):
    images, annotations = folder([annotation(41), annotation(42)])
    (images / "1.png").unlink()
    refused((images, annotations), str(images / "1.png"), "annotation ids 41, 42")


def test_a_truncated_image_is_named_with_its_annotations_when_it_is_used(folder):
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    images, annotations = folder([annotation(41)], {"1.png": Image.fromarray(noise)})
    content = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(content[: len(content) // 2])
    dataset = CocoDataset(images, annotations)  # decoding every image up front would take minutes on COCO
    with pytest.raises(DataError, match=r"1\.png: not readable .*annotation ids 41"):
        dataset[0]


def test_a_picture_of_another_size_than_annotated_is_refused(folder):
    images, annotations = folder([annotation(41)])
    picture(20, 15).save(images / "1.png")
    with pytest.raises(DataError, match=r"20 x 15 pixels.*40 x 30"):
        CocoDataset(images, annotations)[0]


def test_sizes_that_the_file_lacks_are_read_from_the_pictures(folder):
    paths = folder([annotation(1, (30, 20, 100, 100))], images=[{"id": 1, "file_name": "1.png"}])
    assert CocoDataset(*paths).objects(0)[0].tolist() == [[30, 20, 40, 30]]


def test_training_without_a_box_is_refused(folder):
    paths = folder([annotation(1, iscrowd=1)])
    refused(paths, "nothing to learn from", train=True)
    assert len(CocoDataset(*paths)) == 1


def test_boxes_without_area_are_dropped_with_a_count_or_refused(folder, caplog):
    flat = [annotation(2, (4, 4, 0, 9)), annotation(3, (4, 4, 9, -1)), annotation(4, (40, 5, 10, 10))]
    paths = folder([annotation(1), *flat])
    with caplog.at_level(logging.WARNING):
        dataset = CocoDataset(*paths)
    assert dataset.dropped == 3 and "3 boxes have no area" in caplog.text
    assert len(dataset.objects(0)[0]) == len(dataset.frame()) == len(dataset.ground_truth["annotations"]) == 1
    refused(paths, "annotation ids 2, 3, 4", strict=True)


def test_boxes_are_clipped_to_the_image(folder):
    dataset = CocoDataset(*folder([annotation(1, (-6, 20, 26, 90))]))
    assert dataset.objects(0)[0].tolist() == [[0, 20, 20, 30]]
    _, target = dataset[0]
    assert torch.allclose(target["boxes"], torch.tensor([[0.25, 25 / 30, 0.5, 10 / 30]]))


def test_crowds_are_no_targets_but_stay_in_the_ground_truth(folder):
    dataset = CocoDataset(*folder([annotation(1), annotation(2, iscrowd=1)]))
    assert len(dataset[0][1]["labels"]) == 1 and dataset.dropped == 0
    assert [a["iscrowd"] for a in dataset.ground_truth["annotations"]] == [0, 1]
    assert dataset.frame()["crowd"].tolist() == [False, True]


def test_every_kind_of_picture_becomes_rgb(folder):
    grey = Image.fromarray(np.full((30, 40), 51, np.uint8))
    deep = Image.fromarray(np.full((30, 40), 51 * 256 + 9, np.uint16))
    kinds = {
        "grey.png": grey,
        "rgba.png": Image.new("RGBA", (40, 30), (51, 51, 51, 0)),
        "palette.png": grey.convert("P"),
        "deep.png": deep,
        "cmyk.tif": Image.new("CMYK", (40, 30), (0, 0, 0, 204)),
    }
    dataset = CocoDataset(*folder(pictures=kinds))
    for image, target in dataset:
        assert image.dtype == torch.float32 and image.shape == (3, 30, 40)
        assert torch.allclose(image, torch.tensor(51 / 255)), dataset.image_ids.index(target["image_id"])


def test_an_image_without_objects_is_kept(folder):
    paths = folder([annotation(1, image_id=2)], {"1.png": picture(), "2.png": picture()})
    (_, first), (_, second) = CocoDataset(*paths, transform=build_augmentation(64, "detr", train=True))
    assert first["boxes"].shape == (0, 4) and first["labels"].shape == (0,) and first["labels"].dtype == torch.int64
    assert (first["image_id"], second["image_id"]) == (1, 2)


def test_labels_are_category_ids_or_contiguous(folder):
    paths = folder([annotation(1), annotation(2, category_id=3)])
    by_id, contiguous = CocoDataset(*paths), CocoDataset(*paths, contiguous=True)
    assert by_id.objects(0)[1].tolist() == [7, 3] and contiguous.objects(0)[1].tolist() == [1, 0]
    assert (by_id.num_classes, contiguous.num_classes) == (8, 2)
    assert by_id.names == {3: "cat", 7: "dog"} and contiguous.names == {0: "cat", 1: "dog"}
    assert by_id.category_ids == {3: 3, 7: 7} and contiguous.category_ids == {0: 3, 1: 7}


def test_a_limit_keeps_the_first_images_and_their_annotations(folder):
    found = [annotation(1), annotation(2, image_id=2)]
    dataset = CocoDataset(*folder(found, {"1.png": picture(), "2.png": picture()}), limit=1)
    assert dataset.image_ids == [1] and [a["id"] for a in dataset.ground_truth["annotations"]] == [1]


def test_a_cache_changes_nothing(folder):
    paths = folder([annotation(1)])
    cached = CocoDataset(*paths, cache=True)
    first = cached[0][0].clone()
    cached[0][0].zero_()
    (paths[0] / "1.png").unlink()  # the second look needs no file
    assert torch.equal(cached[0][0], first)


def perfect_ap(dataset):
    """The AP of detections that are the targets of `dataset`."""
    detections = []
    for index, image_id in enumerate(dataset.image_ids):
        boxes, labels = dataset.objects(index)
        ids = [dataset.category_ids[label] for label in labels.tolist()]
        detections += coco_detections(image_id, boxes, torch.ones(len(boxes)), ids)
    return coco_ap(dataset.ground_truth, detections)


def test_perfect_detections_have_an_ap_of_one(folder):
    crowd = annotation(3, (0, 0, 40, 30), iscrowd=1)
    without_id = {name: value for name, value in annotation(0, (20, 2, 9, 9)).items() if name != "id"}
    dataset = CocoDataset(*folder([annotation(1), annotation(2, category_id=3), crowd, without_id]), contiguous=True)
    result = perfect_ap(dataset)
    assert result["AP"] == pytest.approx(1) and set(result["per_class"]) == {"cat", "dog"}


# --- data sets of settings --------------------------------------------------------------------------------------


def test_build_dataset_augments_the_training_split_only(tmp_path, monkeypatch):
    monkeypatch.setenv("DETRLIB_CACHE", str(tmp_path))
    settings = Data(shapes=Shapes(train=6, val=3, size=64), image_size=64, train_limit=4)
    train, val = build_dataset(settings, "train"), build_dataset(settings, "val")
    assert (len(train), len(val), train.num_classes) == (4, 3, 7)
    assert torch.equal(val[0][0], val[0][0])
    assert not all(train[1][0].shape == train[1][0].shape for _ in range(10))
    plain = build_dataset(settings, "train", augment=False)
    assert torch.equal(plain[1][0], plain[1][0])


def test_build_dataset_says_what_it_looked_for_and_what_is_there(tmp_path):
    with pytest.raises(DataError, match=r"no such folder.*data\.root") as error:
        build_dataset(Data(root=str(tmp_path / "nowhere")), "train")
    assert str(tmp_path / "nowhere") in str(error.value)
    (tmp_path / "training").mkdir()
    with pytest.raises(DataError, match="holds training"):
        build_dataset(Data(root=str(tmp_path)), "train")


def test_explicit_paths_win_over_root_and_split(folder):
    images, annotations = folder([annotation(1)])
    settings = Data(root="/nowhere", val_images=str(images), val_annotations=str(annotations), image_size=32)
    assert build_dataset(settings, "val")[0][0].shape == (3, 32, 42)


# --- real photographs ------------------------------------------------------------------------------------------


def test_coco_mini(shared_data):
    settings = Data(root=str(shared_data / "coco_mini"), image_size=128)
    dataset = build_dataset(settings, "train")
    frame = dataset.frame()
    assert (len(dataset), dataset.num_classes, len(dataset.names)) == (92, 91, 80)
    assert (len(frame), frame["crowd"].sum(), dataset.dropped) == (829, 9, 0)
    (empty,) = set(dataset.image_ids) - set(frame["image_id"])
    _, target = dataset[dataset.image_ids.index(empty)]
    assert target["boxes"].shape == (0, 4)
    batch = collate([dataset[index] for index in range(4)])
    for target in batch.targets:
        assert (cxcywh_to_xyxy(target["boxes"]) > -1e-5).all() and (cxcywh_to_xyxy(target["boxes"]) < 1 + 1e-5).all()
    assert perfect_ap(build_dataset(settings, "val"))["AP"] == pytest.approx(1)


@pytest.mark.parametrize("split, count", [("train2017", 205), ("val2017", 87), ("test2017", 72)])
def test_bccd(shared_data, split, count):
    settings = Data(root=str(shared_data / "bccd"), val_split=split, strict=True)
    dataset = build_dataset(settings, "val")
    assert len(dataset) == count and len(dataset.names) == 3
    assert dataset[0][0].shape[0] == 3
