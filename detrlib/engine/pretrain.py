"""Backbone weights from the training data itself: a classifier of object crops.

The miniature of ImageNet weights, for data and backbones that have none: without it a detection transformer
spends most of a short training on finding out what an edge is. Done once and cached; every run that shares
the data and the backbone shares the weights.
"""

import hashlib
import json
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from detrlib.config import Backbone
from detrlib.config.machine import cache_folder
from detrlib.data import CocoDataset
from detrlib.data.augment import PAPER_SIZE, TRAINING_SIZES, normalised
from detrlib.engine import tracking
from detrlib.files import damage, one_at_a_time, write_checkpoint
from detrlib.models.backbone import build_body, stage_channels

log = logging.getLogger(__name__)

SIDE = 64  # of a crop, pixels of the image as the detector sees it
SMALLEST_SCALE = TRAINING_SIZES[0] / PAPER_SIZE  # of the detector's training: no crop is shrunk further
MOST_CROPS = 20000
SAMPLES = 60_000  # crops seen in all, whatever their number
BATCH = 64
LEARNING_RATE = 3e-3
SEED = 0
TRUNK = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")  # of a body like ResNet's


def backbone_weights(settings: Backbone, dataset: CocoDataset, image_size: int) -> Path:
    """Path of a state dict for `settings.name`, trained now if the cache does not hold it yet.

    image_size: shorter side of the images in training, so that objects are learned at the size they will have.
    """
    with torch.device("meta"):
        body = build_body(settings.name, settings.dilation)
    key = {
        "data": hashlib.sha256(json.dumps(dataset.ground_truth, sort_keys=True).encode()).hexdigest(),
        "backbone": [settings.name, settings.dilation, [list(weight.shape) for weight in body.state_dict().values()]],
        "recipe": [image_size, SIDE, SMALLEST_SCALE, MOST_CROPS, SAMPLES, BATCH, LEARNING_RATE, SEED],
    }
    if dataset.upright:  # other pixels under the same boxes
        key["orientation"] = "exif"
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = cache_folder() / "backbones" / f"{settings.name}-{digest}.pt"
    if not _is_whole(path):
        with one_at_a_time(path):
            if not _is_whole(path):  # otherwise another process has made it meanwhile
                _pretrain(settings, dataset, image_size, path)
    return path


def _is_whole(path: Path) -> bool:
    if fault := path.exists() and damage(path):
        log.warning("%s is damaged and is made anew (%s)", path, fault)
    return fault == ""  # False: there is none


def _pretrain(settings: Backbone, dataset: CocoDataset, image_size: int, path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        body, recalls = train_classifier(settings, dataset, image_size)
    log.info(
        "backbone pretrained on crops: of held-out ones %.3f are recognised, mean over %d classes (a guess: %.3f); "
        "kept in %s",
        *(sum(recalls) / len(recalls), len(recalls), 1 / len(recalls), path),
    )
    write_checkpoint(path, body.state_dict())


def train_classifier(settings: Backbone, dataset: CocoDataset, image_size: int) -> tuple[nn.Module, list[float]]:
    """A backbone trained to tell the classes of crops apart; of crops kept back the share recognised of each class."""
    crops, labels = collect_crops(dataset, image_size)
    body = build_body(settings.name, settings.dilation, norm=nn.BatchNorm2d)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trunk = nn.Sequential(*(getattr(body, part) for part in TRUNK))
    model = nn.Sequential(trunk, _Middle(), nn.Linear(stage_channels(body, 4), dataset.num_classes + 1))
    model.to(device, memory_format=torch.channels_last)
    kept_back = max(1, len(crops) // 20, min(100, len(crops) // 4))  # a twentieth, and of few crops enough to judge by
    held_out = torch.randperm(len(crops)) < kept_back
    train_crops, train_labels = crops[~held_out], labels[~held_out]
    steps = SAMPLES // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in tracking.progress(range(steps), "pretraining the backbone on crops"):
        index = torch.randint(len(train_crops), (BATCH,))
        images = _augment(train_crops[index].to(device)).contiguous(memory_format=torch.channels_last)
        logits = model(images)
        loss = F.cross_entropy(logits, train_labels[index].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return body.cpu(), _recalls(model.eval().to(device), crops[held_out], labels[held_out])


class _Middle(nn.Module):
    """Mean of the middle quarter of a map, where the object is: [B,C,h,w] -> [B,C]."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        return x[..., h // 4 : h - h // 4, w // 4 : w - w // 4].mean((-2, -1))


def collect_crops(dataset: CocoDataset, image_size: int) -> tuple[Tensor, Tensor]:
    """Square crops uint8 [N,3,S,S] around boxes and, one per image, of background; labels [N], background last.

    All are at scales of the detector's training. Background has the scale of an object, which so tells nothing.
    """
    generator = torch.Generator().manual_seed(SEED)
    crops, labels = [], []
    for index in torch.randperm(len(dataset), generator=generator).tolist():
        image = pil_to_tensor(dataset.image(index))
        window = SIDE * min(image.shape[-2:]) / image_size  # pixels of the file
        boxes, classes = dataset.objects(index)  # xyxy pixels, labels
        sides = (1.2 * (boxes[:, 2:] - boxes[:, :2]).amax(1)).clamp(window, window / SMALLEST_SCALE).tolist()
        for box, side, label in zip(boxes, sides, classes.tolist(), strict=True):
            crops.append(_square_crop(image, box, side, generator))
            labels.append(label)
        side = sides[int(torch.randint(len(sides), (), generator=generator))] if sides else window
        background = _background_box(image.shape[-2:], boxes, side / 4, generator)
        if background is not None:
            crops.append(_square_crop(image, background, side, generator))
            labels.append(dataset.num_classes)
        if len(crops) >= MOST_CROPS:
            break
    return torch.stack(crops), torch.tensor(labels)


def _square_crop(image: Tensor, box: Tensor, side: float, generator: torch.Generator) -> Tensor:
    """uint8 [3,H,W] and xyxy box -> uint8 [3,S,S] with the box near its middle, black outside the image.

    Of a box larger than the crop some part is in its middle.
    """
    centre, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    shift = (torch.rand(2, generator=generator) - 0.5) * (size - side / 2).clamp(min=0.2 * side)
    left, top = (centre + shift - side / 2).tolist()
    return resized_crop(image, round(top), round(left), round(side), round(side), [SIDE, SIDE], antialias=True)


def _background_box(size: tuple[int, int], boxes: Tensor, side: float, generator: torch.Generator) -> Tensor | None:
    """A box of the given side that touches no object, or None where ten throws find no room."""
    height, width = size
    for _ in range(10):
        corner = torch.rand(2, generator=generator) * torch.tensor([width - side, height - side])
        box = torch.cat([corner, corner + side])
        if not len(boxes) or not ((box[:2] < boxes[:, 2:]) & (box[2:] > boxes[:, :2])).all(1).any():
            return box
    return None


def _augment(crops: Tensor) -> Tensor:
    """uint8 [B,3,S,S] -> normalised float32, half the batch flipped."""
    images = normalised(crops)
    half = len(images) // 2
    return torch.cat([images[:half], images[half:].flip(-1)])


@torch.no_grad()
def _recalls(model: nn.Module, crops: Tensor, labels: Tensor) -> list[float]:
    """Of every class that is there, the share of its crops that are recognised."""
    device = next(model.parameters()).device
    found = torch.cat([model(normalised(part.to(device))).argmax(1).cpu() for part in crops.split(256)])
    return [(found[labels == label] == label).float().mean().item() for label in labels.unique()]
