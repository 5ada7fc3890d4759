"""What fixed boxes reach without looking at the image: the floor that an AP has to leave behind.

A few boxes for each class, the same in every image relative to its size, are chosen on the training split and judged on
the other by the evaluator that judges models. Where objects are large and few, one box in the middle goes a long way.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detrlib.boxes import to_pixels
from detrlib.data import CocoDataset
from detrlib.metrics.coco_format import coco_detections
from detrlib.metrics.detection import IOU_THRESHOLDS, coco_ap

CORNERS = ["x0", "y0", "x1", "y1"]
BOXES_PER_CLASS = 10  # more add nothing that shows: 0.002 on photographs with one large object
BOXES_PER_IMAGE = 100  # as many as a model may give
# What keeps the floor cheap on COCO, where boxes are chosen on so many images of each class, and the floor is measured
# on so many of the split, evenly spaced; smaller sets are taken whole.
IMAGES_PER_CLASS, IMAGES_MEASURED = 250, 500


def fixed_boxes(dataset: CocoDataset) -> pd.DataFrame:
    """Choose the fixed boxes of a training split.

    Args:
        dataset: the training split.

    Returns:
        A row per box, the best first: label, score, and x0, y0, x1, y1 in 0..1 of the image. The score is the share of
        images in which the box finds an object that the boxes of its class before it do not, mean over the IoU
        thresholds of AP; it is the precision to be expected, and hence the order that AP rewards.
    """
    boxes, labels = zip(*(dataset.objects(index) for index in range(len(dataset))), strict=True)
    sides = torch.tensor(list(dataset.sizes.values()), dtype=torch.float32).repeat(1, 2)  # width, height, width, height
    boxes = [of_image / side for of_image, side in zip(boxes, sides, strict=True)]
    images = torch.arange(len(dataset)).repeat_interleave(torch.tensor([len(of_image) for of_image in labels]))
    return choose_boxes(torch.cat(boxes), torch.cat(labels), images, len(dataset))


def choose_boxes(boxes: Tensor, labels: Tensor, images: Tensor, num_images: int) -> pd.DataFrame:
    """As `fixed_boxes`, of objects: boxes [N,4] xyxy in 0..1, labels [N] and numbers of their images [N], ascending.

    Candidates are boxes of the class and their median; the next one chosen is that which finds most of what is left.
    An object that was found is not left, since a second box for it would be a false positive.
    """
    rows, classes = [], labels.unique().tolist()
    most = max(1, min(BOXES_PER_CLASS, BOXES_PER_IMAGE // max(1, len(classes))))
    for label in classes:
        own, image = boxes[labels == label], images[labels == label]
        number = np.unique(image, return_inverse=True)[1]  # of the image among those with the class
        with_class = number[-1] + 1
        seen = np.isin(number, _evenly(with_class, IMAGES_PER_CLASS))
        own, number = own[seen], number[seen]
        candidates = torch.cat([own.median(0).values[None], own[_evenly(len(own), IMAGES_PER_CLASS)]])
        finds = box_iou(candidates, own).numpy()[..., None] >= IOU_THRESHOLDS  # [candidates, N, thresholds]
        first = np.flatnonzero(np.diff(number, prepend=-1))  # object of each image
        left = np.ones(finds.shape[1:], dtype=bool)
        for _ in range(most):
            share = np.logical_or.reduceat(finds & left, first, axis=1).mean((1, 2)) * with_class / num_images
            best = share.argmax()
            if not share[best]:
                break
            rows.append([label, share[best], *candidates[best].tolist()])
            left &= ~finds[best]
    table = pd.DataFrame(rows, columns=["label", "score", *CORNERS])
    return table.sort_values("score", ascending=False, kind="stable", ignore_index=True)[:BOXES_PER_IMAGE]


def fixed_detections(
    fixed: pd.DataFrame, sizes: Mapping[int, tuple[int, int]], category_ids: Mapping[int, int]
) -> pd.DataFrame:
    """The fixed boxes as a table of detections, the same in every image.

    Args:
        fixed: as of `fixed_boxes`; classes without a category are left out.
        sizes: (width, height) in pixels by image id.
        category_ids: by label.
    """
    known = fixed[fixed["label"].isin(list(category_ids))]
    boxes = torch.tensor(known[CORNERS].to_numpy(dtype=np.float32)).reshape(-1, 4)
    scores, ids = known["score"].to_numpy(np.float32), [category_ids[label] for label in known["label"]]
    sides = torch.tensor(list(sizes.values())).flip(1)  # height, width
    boxes = to_pixels(boxes, sides[:, None]).flatten(0, 1)
    return coco_detections(np.repeat(list(sizes), len(ids)), boxes, np.tile(scores, len(sizes)), ids * len(sizes))


def floor(
    fixed: pd.DataFrame,
    dataset: CocoDataset,
    engine: Literal["faster_coco_eval", "pycocotools"] = "faster_coco_eval",
) -> dict:
    """Measure what fixed boxes reach on a split.

    Args:
        fixed: as of `fixed_boxes`, of the training split.
        dataset: the split; of a large one 500 images, evenly spaced.
        engine: the evaluator, see `coco_ap`.

    Returns:
        The numbers of `coco_ap`, and `boxes`, how many there are, and `images`, how many they were measured on.
    """
    images = list(dataset.sizes.items())
    sizes = dict(images[index] for index in _evenly(len(images), IMAGES_MEASURED))
    truth = dict(dataset.ground_truth)
    for part, key in (("images", "id"), ("annotations", "image_id")):
        truth[part] = [entry for entry in truth[part] if entry[key] in sizes]
    numbers = coco_ap(truth, fixed_detections(fixed, sizes, dataset.category_ids), engine)
    return numbers | {"boxes": len(fixed), "images": len(sizes)}


def _evenly(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers from 0, evenly spaced."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)
