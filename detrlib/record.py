"""What single images leave in the run folder while an evaluation streams by: examples, and their attention maps.

Legend: B images, H heads, Q queries, n maps of a head, h x w the key grid.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from detrlib.boxes import cxcywh_to_xyxy, to_pixels
from detrlib.config import Config
from detrlib.data import Batch
from detrlib.data.augment import denormalise
from detrlib.matcher import Match
from detrlib.models import AttentionMaps, Predictions
from detrlib.models.outputs import Site
from detrlib.runs import Detected, clear_examples, save_example
from detrlib.store import MapWriter, Packed, clear_maps, pack

EXAMPLE_SCORE = 0.3  # queries more confident than this are kept in an example, matched ones always


class Recorder:
    """What the first images of a data set leave in the run folder while they stream by: examples and attention maps."""

    def __init__(self, cfg: Config, total: int, accelerator: Accelerator, run_dir: Path, maps: MapWriter):
        settings = cfg.evaluate
        self.examples = settings.examples
        self.images = total if settings.store_maps == "all" else max(settings.store_maps, settings.examples)
        self.wanted = settings.store_sites
        self.run_dir, self.maps = run_dir, maps
        self.next, self.step = accelerator.process_index, accelerator.num_processes  # numbers in the data set

    def _numbers(self, batch: Batch) -> range:
        """The numbers in the data set of those images of the next batch that are stored."""
        end = self.next + self.step * len(batch.targets)
        return range(self.next, min(end, self.images), self.step)

    def sites(self, batch: Batch) -> tuple[str, ...]:
        """The sites whose maps are needed of the next batch."""
        return self.wanted if self._numbers(batch) else ()

    def add(self, batch: Batch, predictions: Predictions, pairs: list[Match]) -> None:
        """Store what is wanted of the next batch."""
        numbers = self._numbers(batch)
        self.next += self.step * len(batch.targets)
        packed = {site: _packed(predictions, site, len(numbers)) for site in self.wanted if numbers}
        for index, number in enumerate(numbers):
            sites = {site: [layer[index] for layer in layers] for site, layers in packed.items()}
            extent = _extent(batch, predictions.attention, index).tolist()
            self.maps.add(batch.targets[index]["image_id"], extent, sites)
            if number < self.examples:
                save_example(self.run_dir, make_detected(batch, predictions, pairs, index))


@contextmanager
def recorder(cfg: Config, total: int, accelerator: Accelerator, run_dir: Path | None) -> Iterator[Recorder | None]:
    """A recorder into `run_dir`, None without one; what an earlier evaluation has left, of other images, is removed."""
    if run_dir is None:
        yield None
        return
    if accelerator.is_main_process:
        clear_examples(run_dir)
        clear_maps(run_dir)
    accelerator.wait_for_everyone()
    with MapWriter(run_dir, accelerator.process_index, accelerator.num_processes) as maps:
        yield Recorder(cfg, total, accelerator, run_dir, maps)


def _packed(predictions: Predictions, site: Site, images: int) -> list[list[Packed]]:
    """Maps of the first images of a batch for the store, layer by layer: one dense layer at a time is in memory."""
    maps = predictions.attention
    layers = []
    for layer in range(len(getattr(maps, site))):
        weights = getattr(maps, site)[layer] if site == "decoder_self" else maps.as_images(site, layer)
        layers.append([pack(_valid(weights[i], i, site, predictions).float().cpu().numpy()) for i in range(images)])
    return layers


def _valid(weights: Tensor, image: int, site: Site, predictions: Predictions) -> Tensor:
    """Maps [H,n,h,w] of one image without padding: neither as keys nor, where cells ask in the encoder, as queries."""
    if site == "decoder_self":
        return weights
    grid = predictions.attention.grid
    rows, columns = predictions.attention.valid_grid(image)
    cells_ask = predictions.tokens is None and predictions.polled is None and weights.shape[1] == grid[0] * grid[1]
    if site == "encoder_self" and cells_ask:
        weights = weights.unflatten(1, grid)[:, :rows, :columns].flatten(1, 2)
    return weights[..., :rows, :columns]


def make_detected(batch: Batch, predictions: Predictions, pairs: list[Match], index: int) -> Detected:
    """Image number `index` of a batch with its confident and matched queries."""
    target = batch.targets[index]
    size = target["size"]
    height, width = size.tolist()
    scores, labels = predictions.class_scores()[index].max(-1)  # [Q]
    matched = torch.full_like(labels, -1)
    query, box = pairs[index]
    matched[query] = box
    order = scores.argsort(descending=True)
    order = order[(scores[order] > EXAMPLE_SCORE) | (matched[order] >= 0)]

    def pixels(boxes: Tensor) -> Tensor:
        return to_pixels(cxcywh_to_xyxy(boxes.float()), size)

    values = {
        "image": picture(batch.images[index, :, :height, :width]),
        "true_boxes": pixels(target["boxes"]),
        "true_labels": target["labels"],
        "boxes": pixels(predictions.boxes[index, order]),
        "labels": labels[order],
        "scores": scores[order],
        "matched": matched[order],
        "extent": _extent(batch, predictions.attention, index),
        "queries": order,
    }
    return Detected(target["image_id"], **{name: value.cpu().numpy() for name, value in values.items()})


def _extent(batch: Batch, maps: AttentionMaps, index: int) -> Tensor:
    """[2], height and width of an image in cells of the key grid."""
    stride = torch.tensor([s / g for s, g in zip(batch.images.shape[-2:], maps.grid, strict=True)])
    return batch.targets[index]["size"].cpu() / stride


def picture(image: Tensor) -> Tensor:
    """Normalised [3,H,W] -> uint8 [H,W,3]."""
    return (denormalise(image.float()) * 255).round().to(torch.uint8).permute(1, 2, 0)
