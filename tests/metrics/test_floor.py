"""Fixed boxes: which are chosen, what they reach beside a computation by hand, and what keeps them cheap."""

import json

import pytest
import torch
from PIL import Image

from detrlib.data import CocoDataset
from detrlib.metrics import floor as floors
from detrlib.metrics.coco_format import coco_entries
from detrlib.metrics.floor import CORNERS, choose_boxes, fixed_boxes, fixed_detections, floor

MIDDLE, CORNER = (0.2, 0.2, 0.6, 0.6), (0.7, 0.7, 0.9, 1.0)


@pytest.fixture
def folder(tmp_path):
    """Writes a data set of pictures with objects: by picture its size, and (category, box xyxy in 0..1) of each."""

    def write(name, pictures):
        images, annotations = [], []
        for number, ((width, height), objects) in enumerate(pictures, start=1):
            Image.new("RGB", (width, height)).save(tmp_path / f"{name}-{number}.png")
            images.append({"id": number, "file_name": f"{name}-{number}.png", "width": width, "height": height})
            for category, (x0, y0, x1, y1) in objects:
                box = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
                annotations.append({"image_id": number, "category_id": category, "bbox": box})
        annotations = [{"id": number, **one} for number, one in enumerate(annotations, start=1)]
        categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return CocoDataset(tmp_path, tmp_path / f"{name}.json")

    return write


def test_the_floor_is_that_of_a_computation_by_hand(folder):
    """Three pictures of four have a cat in the middle, the last one in the corner, whatever their sizes."""
    sizes = [(100, 100), (200, 80), (60, 120), (90, 90)]
    boxes = [MIDDLE, MIDDLE, MIDDLE, CORNER]
    train = folder("train", [(size, [(3, box)]) for size, box in zip(sizes, boxes, strict=True)])
    fixed = fixed_boxes(train)
    assert fixed["label"].tolist() == [3, 3] and fixed["score"].tolist() == pytest.approx([0.75, 0.25])
    assert fixed[CORNERS].to_numpy() == pytest.approx(torch.tensor([MIDDLE, CORNER]).numpy(), abs=1e-6)
    # By falling score: true, true, true, false; false, false, false, true. Precision is 1 up to a recall of 3/4, at
    # 76 of the 101 levels, then 4 of 8; the same at every threshold.
    expected = (76 + 25 / 2) / 101
    for engine in ("faster_coco_eval", "pycocotools"):
        reached = floor(fixed, train, engine)
        assert reached["AP"] == pytest.approx(expected) and reached["AP50"] == pytest.approx(expected)
        assert reached["per_class"]["dog"]["AP"] == -1 and (reached["boxes"], reached["images"]) == (2, 4)
    # Judged on other pictures, three with a cat in the corner: three false ones come first.
    other = folder("val", [((50, 70), [(3, CORNER)])] * 3)
    assert floor(fixed, other)["AP"] == pytest.approx(3 / 6)


def test_what_a_box_finds_is_not_left_for_the_next():
    """A second box beside the first would be a false positive wherever the first is true."""
    near = torch.tensor(MIDDLE) + 0.001
    boxes = torch.stack([torch.tensor(MIDDLE), near, torch.tensor(CORNER)])
    chosen = choose_boxes(boxes, torch.tensor([3, 3, 3]), torch.tensor([0, 1, 1]), 4)
    assert len(chosen) == 2 and chosen["score"].tolist() == pytest.approx([0.5, 0.25])
    assert chosen[CORNERS].to_numpy()[1] == pytest.approx(CORNER)


def test_classes_share_the_boxes_of_an_image(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(600, 2, generator=generator) * 0.5
    boxes, images = torch.cat([corners, corners + 0.1], 1), torch.arange(600) // 2

    def counts(classes):
        return choose_boxes(boxes, torch.arange(600) % classes, images, 300).groupby("label").size()

    assert counts(1).tolist() == [10] and counts(20).tolist() == [5] * 20
    assert counts(150).sum() == 100 and counts(150).max() == 1
    monkeypatch.setattr(floors, "IMAGES_PER_CLASS", 20)  # of large sets few images are looked at
    few = choose_boxes(boxes, torch.zeros(600), images, 300)
    assert len(few) == 10 and few["score"].max() <= 1


def test_detections_are_scaled_and_classes_without_a_category_left_out():
    fixed = choose_boxes(torch.tensor([MIDDLE, CORNER]), torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
    other = coco_entries(fixed_detections(fixed, {5: (200, 100)}, {1: 45}))  # those of the second row
    assert [one["category_id"] for one in other] == [45] and other[0]["bbox"] == pytest.approx([140, 70, 40, 30])
    found = coco_entries(fixed_detections(fixed, {5: (200, 100), 6: (10, 10)}, {0: 44}))
    assert [(one["image_id"], one["category_id"], one["score"]) for one in found] == [(5, 44, 1.0), (6, 44, 1.0)]
    assert found[0]["bbox"] == pytest.approx([40, 20, 80, 40]) and found[1]["bbox"] == pytest.approx([2, 2, 4, 4])


def test_large_sets_are_measured_on_a_part(folder, monkeypatch):
    dataset = folder("train", [((50, 50), [(3, MIDDLE)])] * 5)
    monkeypatch.setattr(floors, "IMAGES_MEASURED", 2)
    reached = floor(fixed_boxes(dataset), dataset)
    assert reached["images"] == 2 and reached["AP"] == pytest.approx(1.0)
