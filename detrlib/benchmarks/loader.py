"""Images a second that one core prepares: this library beside the published transforms of DETR.

    detrlib benchmark loader --out FOLDER       about a minute, on photographs that are made up for it

Both read the same files, draw the same flips, sizes and crops, and put two images into a batch. The published way
resizes with Pillow and makes normalised floating point numbers of every image; here pixels stay 8 bit numbers, and a
batch is normalised where the model is, which is counted beside it as if that were the same core.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from detrlib.benchmarks.measure import compare, environment, threads
from detrlib.boxes import xyxy_to_cxcywh
from detrlib.data.augment import MEAN, STD, Crop, Flip, Step, build_augmentation
from detrlib.data.batch import Batch, Drawn, collate
from detrlib.data.coco import CocoDataset
from detrlib.engine.memory import keep_freed_memory
from detrlib.files import write_json

BATCH = 2
OFFICIAL, OWN, NORMALISED = "published transforms", "detrlib", "detrlib, normalised"


def main(out: Path) -> None:
    """Measure, print a table, and write loader.json into `out`. Memory that is freed is kept, as in training."""
    keep_freed_memory()
    with threads(1), tempfile.TemporaryDirectory() as folder:
        table, known = measure(*photographs(Path(folder), 16)), environment("cpu")
    print(table.round(2).to_string(index=False))
    write_json(out / "loader.json", {"environment": known, "results": table.to_dict("records")})


def photographs(folder: Path, count: int, size: tuple[int, int] = (640, 480)) -> tuple[Path, Path]:
    """Images with the detail of photographs, as JPEG of about 80 kB, with a box each: their folder and annotations."""
    draw, images, annotations = np.random.default_rng(0), [], []
    for number in range(1, count + 1):
        picture = np.zeros((size[1], size[0], 3))
        for cells in (3, 12, 48, 192):  # less of what is finer, as in nature
            noise = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            picture += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), dtype=float) / cells**0.5
        picture *= 255 / picture.max()
        name = f"{number}.jpg"
        Image.fromarray(picture.astype(np.uint8)).save(folder / name, quality=90)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        box = [size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder, folder / "annotations.json"


def measure(images: Path, annotations: Path, image_size: int = 800, rounds: int = 5) -> pd.DataFrame:
    """CPU time of one thread for an image, median over rounds through the data, all ways taking turns.

    Returns rows of: recipe, way, ms (of an image), images_per_second, and times, which is how many images that way
    prepares in the time that the published transforms take for one.
    """
    tables = []
    for recipe, train in (("training", True), ("validation", False)):
        dataset = CocoDataset(images, annotations, build_augmentation(image_size, "detr", train))
        ways = {OFFICIAL: official_batch, OWN: own_batch, NORMALISED: lambda *given: own_batch(*given).images}
        passes = {name: _pass(way, dataset) for name, way in ways.items()}
        took = compare(passes, rounds, clock=time.thread_time).value / (len(dataset) // BATCH * BATCH)
        numbers = {"ms": 1e3 * took, "images_per_second": 1 / took, "times": took[OFFICIAL] / took}
        tables.append(pd.DataFrame(numbers).rename_axis("way").reset_index().assign(recipe=recipe))
    return pd.concat(tables)[["recipe", "way", *numbers]]


def _pass(way: Callable[[CocoDataset, Sequence[Drawn]], object], dataset: CocoDataset) -> Callable[[], None]:
    """A pass through the data, batch by batch; the next one draws other sizes and crops, of every way the same."""
    turns = itertools.count()

    def run() -> None:
        turn = next(turns)
        for first in range(0, len(dataset) - BATCH + 1, BATCH):
            way(dataset, [Drawn(index, f"{turn} {index}", f"{turn} {first}") for index in range(first, first + BATCH)])

    return run


def own_batch(dataset: CocoDataset, asked: Sequence[Drawn]) -> Batch:
    """As a `DataLoader` of this library makes it."""
    return collate([dataset[one] for one in asked])


def official_batch(dataset: CocoDataset, asked: Sequence[Drawn]) -> tuple[Tensor, Tensor, list[dict]]:
    """A batch as published code makes it: images [B,3,H,W] float32, normalised, padding [B,H,W], and targets."""
    images, targets = [], []
    for index, *draws in asked:
        image, (boxes, labels) = Image.open(dataset.files[index]).convert("RGB"), dataset.objects(index)
        steps = dataset.transform.draw((image.height, image.width), *draws)
        for step in steps:
            boxes = step.boxes(boxes, (image.height, image.width))
            image = official_step(image, step)
        images.append(functional.normalize(functional.to_tensor(image), MEAN, STD))
        scale = torch.tensor([image.width, image.height] * 2)
        boxes = torch.minimum(boxes.clamp(min=0), scale)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        targets.append({"boxes": xyxy_to_cxcywh(boxes[kept]) / scale, "labels": labels[kept]})
    canvas = [max(image.shape[axis] for image in images) for axis in (1, 2)]
    batch, padding = torch.zeros(len(images), 3, *canvas), torch.ones(len(images), *canvas, dtype=torch.bool)
    for number, image in enumerate(images):
        batch[number, :, : image.shape[1], : image.shape[2]].copy_(image)
        padding[number, : image.shape[1], : image.shape[2]] = False
    return batch, padding, targets


def official_step(image: Image.Image, step: Step) -> Image.Image:
    """A step of the augmentation, by Pillow."""
    if isinstance(step, Flip):
        return functional.hflip(image)
    if isinstance(step, Crop):
        return functional.crop(image, *step)
    return functional.resize(image, list(step))
