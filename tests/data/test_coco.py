"""COCO-format folders as data sets: what images and boxes become, every fault, and the data sets of settings."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.config import Data, Shapes
from detrlib.data import CocoDataset, build_dataset, collate, open_splits
from detrlib.data.augment import build_augmentation
from detrlib.errors import DataError
from detrlib.metrics.coco_format import coco_detections, coco_entries
from detrlib.metrics.detection import coco_ap


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


def test_boxes_without_area_are_dropped_with_a_count_or_refused(folder):
    flat = [annotation(2, (4, 4, 0, 9)), annotation(3, (4, 4, 9, -1)), annotation(4, (40, 5, 10, 10))]
    paths = folder([annotation(1), *flat])
    dataset = CocoDataset(*paths)
    assert dataset.dropped == 3 and "3 boxes have no area" in dataset.notes[0]
    assert len(dataset.objects(0)[0]) == len(dataset.frame()) == len(dataset.ground_truth["annotations"]) == 1
    refused(paths, "annotation ids 2, 3, 4", strict=True)


def test_boxes_are_clipped_to_the_image(folder):
    dataset = CocoDataset(*folder([annotation(1, (-6, 20, 26, 90))]))
    assert dataset.objects(0)[0].tolist() == [[0, 20, 20, 30]]
    _, target = dataset[0]
    assert torch.allclose(target["boxes"], torch.tensor([[0.25, 25 / 30, 0.5, 10 / 30]]))


def test_sides_of_objects_are_in_parts_of_the_shorter_side_of_their_image(folder):
    pictures = {"1.png": picture(40, 30), "2.png": picture(20, 80), "3.png": picture()}
    annotations = [annotation(1, (0, 0, 15, 3)), annotation(2, (0, 0, 3, 15)), annotation(3, (2, 0, 10, 40), 2)]
    assert CocoDataset(*folder(annotations, pictures)).object_sides().tolist() == [0.5, 0.5, 2.0]


def test_what_is_taught_and_what_is_judged_is_one_list(folder):
    paths = folder([annotation(1, (25, 12, 32, 10)), annotation(2, (-9, -9, 20, 20)), annotation(3, ())])
    dataset = CocoDataset(*paths)
    assert perfect_ap(dataset)["AP"] == pytest.approx(1)
    beyond, empty = sorted(dataset.notes, reverse=True)
    assert "2 boxes reach beyond" in beyond and "17 pixels" in beyond and "1 annotations" in empty
    official = CocoDataset(*paths, clip=False)
    assert torch.equal(official.objects(0)[0], dataset.objects(0)[0])
    assert official.ground_truth["annotations"][0]["bbox"] == [25, 12, 32, 10]
    assert perfect_ap(official)["AP"] < 0.5 and any("judged as they stand" in note for note in official.notes)


def test_areas_and_flags_of_any_spelling_make_the_same_objects(folder):
    odd = ({"iscrowd": None}, {"iscrowd": "0"}, {"iscrowd": "false"}, {"area": None}, {"area": "900"})
    given = [annotation(id, (2, 2, 36, 26), area=36 * 26) | change for id, change in enumerate(odd, start=1)]
    dataset = CocoDataset(*folder(given))
    assert len(dataset.objects(0)[0]) == 5 and not dataset.frame()["crowd"].any()
    assert dataset.frame()["area"].tolist() == [936, 936, 936, 936, 900]
    with pytest.raises(DataError, match=r"annotations\[0\]\.iscrowd.*'perhaps'"):
        CocoDataset(*folder([annotation(1, iscrowd="perhaps")]))


def test_sizes_as_text_are_read(folder):
    images = [{"id": "1", "file_name": "1.png", "width": "40", "height": "30"}]
    assert CocoDataset(*folder([annotation(1)], images=images))[0][0].shape == (3, 30, 40)


# --- pictures as annotated --------------------------------------------------------------------------------------


@pytest.fixture
def turned(folder):
    """A picture that programs show upright, 40 x 30 with a red object, stored turned with a tag, and its paths."""
    array = np.full((30, 40, 3), 90, np.uint8)
    array[5:13, 4:14] = 250, 20, 20
    tag = Image.Exif()
    tag[0x0112] = 6
    paths = folder([annotation(1)])
    Image.fromarray(array).transpose(Image.Transpose.ROTATE_90).save(paths[0] / "1.png", exif=tag)
    return paths


def test_boxes_lie_on_the_object_as_it_is_shown_or_stored(turned):
    dataset = CocoDataset(*turned, upright=True)
    (x0, y0, x1, y1) = dataset.objects(0)[0][0].int().tolist()
    assert (dataset[0][0][0, y0:y1, x0:x1] > 242).all() and dataset[0][1]["size"].tolist() == [30, 40]
    with pytest.raises(DataError, match=r"30 x 40 pixels.*40 x 30.*data\.orientation: exif"):
        CocoDataset(*turned)[0]


def test_missing_sizes_are_those_of_the_picture_as_annotated(turned):
    content = json.loads(turned[1].read_text()) | {"images": [{"id": 1, "file_name": "1.png"}]}
    turned[1].write_text(json.dumps(content))
    assert CocoDataset(*turned, upright=True)[0][0].shape == (3, 30, 40)
    assert CocoDataset(*turned)[0][0].shape == (3, 40, 30)


def test_twelve_bits_are_as_bright_as_eight(folder):
    grey = np.arange(1200, dtype=np.uint16).reshape(30, 40) % 256
    dataset = CocoDataset(
        *folder(pictures={"8.png": Image.fromarray(grey.astype(np.uint8)), "12.png": Image.fromarray(grey * 16)})
    )
    assert torch.equal(dataset[0][0], dataset[1][0]) and dataset[1][0].max() == 255


@pytest.mark.parametrize("name", ["train\\1.png", "images/train/1.png", "C:\\data\\1.png"])
def test_pictures_are_found_without_the_folders_of_another_machine(folder, name):
    dataset = CocoDataset(*folder([annotation(1)], images=[{"id": 1, "file_name": name}]))
    assert dataset[0][0].shape == (3, 30, 40) and "1 pictures are found" in dataset.notes[0]
    refused(
        folder([annotation(1)], images=[{"id": id, "file_name": f"{id}/1.png"} for id in (1, 2)]), "1.png", "missing"
    )


# --- classes of another split -----------------------------------------------------------------------------------


def test_classes_of_a_split_are_those_of_training_by_name(folder):
    paths = folder([annotation(1), annotation(2, category_id=3)], categories=((3, "Dog"), (7, "cat")))
    dataset = CocoDataset(*paths, classes={3: "cat", 7: "dog", 9: "bird"})
    assert dataset.objects(0)[1].tolist() == [3, 7] and dataset.num_classes == 10
    assert dataset.names == {3: "cat", 7: "dog", 9: "bird"} and dataset.category_ids == {3: 7, 7: 3}
    assert "matched" in dataset.notes[0] and "Dog (id 3) is label 7" in dataset.notes[0]
    assert dataset.frame()["category"].tolist() == ["cat", "dog"]
    assert perfect_ap(dataset)["AP"] == pytest.approx(1)


def test_a_class_that_training_has_not_is_refused_if_it_has_objects(folder):
    paths = folder([annotation(1), annotation(2), annotation(3, category_id=3)])
    refused(paths, "'dog' (2 objects)", "cat", classes={0: "cat"})
    refused(folder([annotation(1, iscrowd=1)]), "'dog' (1 objects)", classes={0: "cat"})
    dataset = CocoDataset(*folder([annotation(3, category_id=3)]), classes={0: "cat"})
    assert dataset.objects(0)[1].tolist() == [0] and dataset.category_ids == {0: 3}


def test_classes_of_one_name_are_told_apart_or_refused(folder):
    """A supercategory may be called as its only class; two that have objects would share their numbers."""
    twins = ((3, "cat"), (7, "cat"))
    assert CocoDataset(*folder([annotation(1)], categories=twins)).labels.tolist() == [7]
    refused(folder([annotation(1), annotation(2, category_id=3)], categories=twins), "3, 7", "'cat'")


def test_category_ids_that_would_be_a_huge_head_are_refused(folder):
    paths = folder([annotation(1, category_id=10**9)], categories=((10**9, "cat"),))
    refused(paths, "1000000000", "data.contiguous")
    assert CocoDataset(*paths, contiguous=True).num_classes == 1


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
        assert image.dtype == torch.uint8 and image.shape == (3, 30, 40)
        assert (image == 51).all(), dataset.image_ids.index(target["image_id"])


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


@pytest.mark.parametrize("recipe, apart", [("none", 0), ("flip", 1), ("detr", None)])
def test_a_cache_keeps_pictures_at_the_size_that_training_needs(folder, recipe, apart):
    rows, columns = np.mgrid[:300, :400]
    smooth = np.stack([rows * 0.8, columns * 0.6, 255 - rows * 0.5], -1).astype(np.uint8)
    paths = folder([annotation(1, (40, 50, 100, 80))], {"1.png": Image.fromarray(smooth)})
    transform = build_augmentation(64, recipe, train=True)
    plain, cached = CocoDataset(*paths, transform), CocoDataset(*paths, transform, cache=True)
    for seed in range(8):
        torch.manual_seed(seed)
        (image, target) = plain[0]
        torch.manual_seed(seed)
        (reduced, other) = cached[0]
        assert other["original_size"].tolist() == [300, 400]
        assert (target["size"] - other["size"]).abs().max() <= 1, "the sides of what is kept are rounded"
        if apart is not None:
            assert (image.int() - reduced.int()).abs().max() <= apart
            assert torch.allclose(target["boxes"], other["boxes"], atol=1e-6)
    kept, size = cached._pixels(0)
    assert kept.shape == (3, 64, 85) and size == (300, 400)
    assert cached.image(0).size == (400, 300), "what is drawn is the file"


def perfect_ap(dataset):
    """The AP of detections that are the targets of `dataset`."""
    detections = []
    for index, image_id in enumerate(dataset.image_ids):
        boxes, labels = dataset.objects(index)
        ids = [dataset.category_ids[label] for label in labels.tolist()]
        detections += coco_entries(coco_detections(image_id, boxes, torch.ones(len(boxes)), ids))
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


def test_labels_of_all_splits_come_from_one_list(tmp_path, folder):
    """A class that validation has not shifts no label, contiguous or not, and swapped ids are no other class."""
    picture().save(tmp_path / "2.png")
    three = ((1, "cat"), (2, "dog"), (3, "bird"))
    images, train = folder([annotation(id, category_id=id) for id in (1, 2, 3)], categories=three)
    train = train.rename(tmp_path / "train.json")
    paths = {"root": "/nowhere", "train_images": str(images), "val_images": str(images)}
    paths |= {"train_annotations": str(train)}
    for categories in (three[1:], ((1, "bird"), (7, "dog")), ((1, "bird"), (5, "dog"), (8, "never drawn"))):
        first, second = categories[0][0], categories[1][0]
        _, val = folder([annotation(4, category_id=first), annotation(5, category_id=second)], categories=categories)
        for contiguous in (False, True):
            splits = open_splits(Data(contiguous=contiguous, val_annotations=str(val), image_size=32, **paths))
            named = [[splits[name].names[label] for label in splits[name].labels.tolist()] for name in splits]
            assert named == [["cat", "dog", "bird"], [categories[0][1], categories[1][1]]]
            assert splits["val"].names == splits["train"].names
            assert perfect_ap(splits["val"])["AP"] == pytest.approx(1)
    _, val = folder([annotation(4, category_id=9)], categories=((9, "wolf"),))
    with pytest.raises(DataError, match=r"a\.json: 'wolf' \(1 objects\)"):
        open_splits(Data(val_annotations=str(val), **paths))


def test_settings_of_classes_order_the_labels_and_notes_are_logged(folder, caplog):
    images, annotations = folder([annotation(1), annotation(2, (4, 4, 0, 9))])
    paths = {"root": "/nowhere", "val_images": str(images), "val_annotations": str(annotations)}
    settings = Data(classes=["dog", None, "cat"], **paths)
    dataset = build_dataset(settings, "val")
    assert dataset.names == {0: "dog", 2: "cat"} and dataset.labels.tolist() == [0]
    assert f"{annotations}: 1 boxes have no area" in caplog.text and "dog (id 7) is label 0" in caplog.text


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


def test_sizes_of_files_and_sides_of_objects(folder):
    """Longer sides in parts of the shorter side of the image, crowds left out."""
    boxes = [annotation(1, (0, 0, 10, 20)), annotation(2, (0, 0, 30, 6), image_id=2), annotation(3, iscrowd=1)]
    dataset = CocoDataset(*folder(boxes, {"1.png": picture(40, 30), "2.png": picture(60, 80)}))
    assert list(dataset.sizes.values()) == [(40, 30), (60, 80)] and list(dataset.sizes) == dataset.image_ids
    assert dataset.object_sides().tolist() == pytest.approx([20 / 30, 30 / 60])
