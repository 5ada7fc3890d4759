"""Detections as a table and in COCO's results format: the same numbers, whichever way they go."""

import json

import pandas as pd
import pytest
import torch

from detrlib.files import write_json
from detrlib.metrics.coco_format import box_table, coco_detections, coco_entries, save_detections


def test_detections_hold_plain_numbers():
    table = coco_detections(7, torch.tensor([[1.0, 2, 4, 8], [0, 0, 1, 1]]), torch.tensor([0.5, 0.25]), [3, 9])
    one, two = coco_entries(table)
    assert one == {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert json.loads(json.dumps(two)) == two
    assert coco_detections([5, 7], torch.zeros(2, 4), [0.5, 0.25], [3, 9])["image_id"].tolist() == [5, 7]


def test_none_are_a_table_too():
    none = coco_detections(7, torch.zeros(0, 4), torch.zeros(0), [])
    assert none.empty and coco_entries(none) == [] and list(none) == list(box_table([]))


@pytest.mark.parametrize("lengths", [(2, 2, 2, 1), (2, 2, 1, 2), (2, 1, 2, 2), (3, 2, 2, 2)])
def test_columns_of_different_lengths_are_refused(lengths):
    images, boxes, scores, labels = lengths
    with pytest.raises(ValueError, match=r"length|broadcast"):
        coco_detections([1] * images, torch.zeros(boxes, 4), torch.zeros(scores), [1] * labels)


def test_a_table_takes_no_more_than_its_numbers_and_keeps_them(random_detection_task):
    """36 bytes for each detection of a model, whose numbers are float32; those of a file keep their 64 bits."""
    found = coco_detections([1] * 1000, torch.rand(1000, 4), torch.rand(1000), [2] * 1000)
    assert pd.concat([found[:600], found[600:]], ignore_index=True).memory_usage(index=False).sum() == 36_000
    _, detections = random_detection_task(0)
    assert coco_entries(box_table(detections)) == detections


@pytest.mark.parametrize("cuts", [(0, 0), (0, 3, 3, 7)], ids=["none", "an empty part"])
def test_parts_are_one_file(tmp_path, random_detection_task, cuts):
    _, detections = random_detection_task(1)
    parts = (box_table(detections[cuts[at] : cuts[at + 1]]) for at in range(len(cuts) - 1))
    save_detections(tmp_path / "parts.json", parts)
    write_json(tmp_path / "whole.json", detections[: cuts[-1]])
    assert (tmp_path / "parts.json").read_text() == (tmp_path / "whole.json").read_text()
