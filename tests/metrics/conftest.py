"""Detections to be evaluated: random ones, and cases whose numbers are published."""

import json

import numpy as np
import pytest

from detrlib.metrics.coco_format import coco_detections, coco_entries

PUBLISHED = [
    ("cocoapi_val2014_100", "instances_val2014_100.json", "instances_val2014_fakebbox100_results.json", 0.0),
    ("detectron2_mini", "gt.json", "detections.json", 0.0),
    ("faster_coco_eval", "gt_ignore_test.json", "dt_ignore_test.json", 0.1),
]


@pytest.fixture
def published_cases():
    """The names of all published cases."""
    return {case for case, *_ in PUBLISHED}


@pytest.fixture(params=PUBLISHED, ids=[case for case, *_ in PUBLISHED])
def published(request, shared_data):
    """One published case: the file of its ground truth, its detections, and what is expected of them."""
    case, truth, detections, lowest_score = request.param
    folder = shared_data / "coco_eval_cases" / case
    kept = [one for one in json.loads((folder / detections).read_text()) if one["score"] >= lowest_score]
    return folder / truth, kept, json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="session")
def random_detection_task():
    """Ground truth with crowds, an empty image and a class without objects; detections near and far from it."""

    def make(seed: int, first_annotation: int = 1) -> tuple[dict, list[dict]]:
        random = np.random.default_rng(seed)
        images = [{"id": 10 + i, "height": 400, "width": 400} for i in range(12)]
        categories = [{"id": i, "name": name} for i, name in [(3, "ant"), (4, "bee"), (9, "cat"), (11, "unused")]]
        annotations, detections = [], []
        for image in images[1:]:
            for _ in range(random.integers(1, 7)):
                side = random.choice([15, 60, 150])
                box = np.concatenate([random.uniform(0, 240, 2), side * random.uniform(0.7, 1.3, 2)])
                category = int(random.choice([3, 4, 9]))
                annotations.append(
                    {
                        "id": first_annotation + len(annotations),
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": box.tolist(),
                        "area": float(0.8 * box[2] * box[3]),
                        "iscrowd": int(random.random() < 0.1),
                    }
                )
                for _ in range(random.integers(0, 4)):
                    moved = box + random.normal(0, 0.08 * side, 4)
                    corners = np.concatenate([moved[:2], moved[:2] + np.abs(moved[2:])])
                    guess = category if random.random() < 0.8 else int(random.choice([3, 4, 9, 11]))
                    found = coco_detections(image["id"], corners[None], [random.random()], [guess])
                    detections += coco_entries(found)
        return {"images": images, "categories": categories, "annotations": annotations}, detections

    return make


@pytest.fixture(scope="session")
def crowded_task(random_detection_task):
    """Equal scores, equal IoU, areas at the ends of ranges, more than 100 detections of one class in an image."""

    def make(seed):
        truth, detections = random_detection_task(seed)
        random = np.random.default_rng(seed)
        annotations = [
            one | {"image_id": 11, "category_id": 3} for one in truth["annotations"] if random.random() < 0.7
        ]
        annotations += [one | {"area": float(random.choice([500, 1024, 9216]))} for one in annotations[:9]]  # twice
        moved = [
            one | {"bbox": np.clip(np.add(one["bbox"], random.normal(0, 2, 4)), 0, None).tolist()}
            for one in 6 * detections
        ]
        crowd = [one | {"image_id": 11, "category_id": 3, "score": round(random.random(), 2)} for one in moved]
        assert len(crowd) > 150
        detections = [one | {"score": round(one["score"], 1)} for one in detections]
        return truth | {"annotations": truth["annotations"] + annotations}, crowd + detections

    return make


@pytest.fixture(scope="session")
def worse():
    """Boxes moved aside in a share of the detections."""

    def make(detections, share, seed=0):
        random = np.random.default_rng(seed)
        return [
            one | {"bbox": [one["bbox"][0] + 0.3 * one["bbox"][2], *one["bbox"][1:]]}
            if random.random() < share
            else one
            for one in detections
        ]

    return make
