"""What single images leave in the run folder while an evaluation streams by: examples, and their attention maps.

Legend: B images, H heads, Q queries, n maps of a head, h x w the key grid.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from detrlib.boxes import cxcywh_to_xyxy, to_pixels
from detrlib.config import Config
from detrlib.data import Batch
from detrlib.errors import RunError, in_one_line
from detrlib.files import write_atomic
from detrlib.losses.matcher import Match
from detrlib.models import AttentionMaps, Predictions
from detrlib.models.outputs import Site, cell_side
from detrlib.runs.folder import load_results
from detrlib.runs.maps import AttentionStore, MapWriter, Packed, clear_maps, pack

EXAMPLE_SCORE = 0.3  # queries more confident than this are kept in an example, matched ones always


@dataclass
class Example:
    """One image as the model saw it, what the model detected in it, and where it looked for it.

    Boxes are xyxy in pixels of `image`; n confident or matched queries, best first.
    """

    image_id: int
    image: np.ndarray  # [H,W,3] uint8
    true_boxes: np.ndarray  # [T,4]
    true_labels: np.ndarray  # [T]
    boxes: np.ndarray  # [n,4]
    labels: np.ndarray  # [n]
    scores: np.ndarray  # [n]
    matched: np.ndarray  # [n] index of the true box the query was matched to, or -1
    queries: np.ndarray  # [n] their numbers in the model, and in the attention store
    extent: np.ndarray  # [2] height and width of the image in cells of the map, <= (h, w)
    stored: AttentionStore | Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)  # maps, or by site
    means: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)  # by site, where maps are in memory

    @property
    def sites(self) -> list[str]:
        """The sites whose maps are stored."""
        return self.stored.sites(self.image_id) if isinstance(self.stored, AttentionStore) else list(self.stored)

    def shape(self, site: str = "decoder_cross") -> tuple[int, ...]:
        """The shape of `maps(site)`; no map is read for it."""
        self._check(site)
        if not isinstance(self.stored, AttentionStore):
            return self.stored[site].shape
        layers, heads, queries, *keys = self.stored.shape(self.image_id, site)
        return (layers, heads, queries if site == "encoder_self" else len(self.queries), *keys)

    def maps(self, site: str = "decoder_cross", layer: int | None = None) -> np.ndarray:
        """Attention maps of this image, read from disk; of weights that have signs the magnitudes.

        Args:
            site: one of `sites`.
            layer: one layer, negative from the end; None: all.

        Returns:
            Of one layer: decoder_cross [H,n,h,w], decoder_self [H,n,Q], encoder_self [H,h*w,h,w]; of all [L,H,...].
            The queries of encoder_self are the cells of the grid, row by row; of encoders with several levels, or
            that drop or pool tokens, all their tokens.

        Raises:
            RunError: the site is not stored.
        """
        self._check(site)
        if not isinstance(self.stored, AttentionStore):
            return np.abs(self.stored[site] if layer is None else self.stored[site][layer])
        queries = None if site == "encoder_self" else self.queries
        maps = self.stored.maps(self.image_id, site, layer, queries=queries)
        return np.abs(maps if layer is None else maps[0])

    def received(self, site: str, layer: int) -> np.ndarray:
        """The weight that every key gets, mean over all queries: [H,h,w], of decoder_self [H,Q].

        Rows that sum to more than one count as shares of their sum, as in `metrics.sinks`. Raises RunError as `maps`.
        """
        self._check(site)
        if site in self.means:
            return self.means[site][layer]
        if site == "encoder_self" or not isinstance(self.stored, AttentionStore):
            return _received(self.maps(site, layer))
        return _received(np.abs(self.stored.maps(self.image_id, site, layer)[0]))

    def extent_of(self, maps: np.ndarray) -> np.ndarray:
        """[2], height and width of the image in cells of maps [...,h,w] of a site.

        An encoder that sees every image as a square has cells of its own, which cover the image exactly.
        """
        own = maps.shape[-2:] == tuple(np.ceil(self.extent))
        return self.extent if own else np.array(maps.shape[-2:], dtype=float)

    def _check(self, site: str) -> None:
        if site not in self.sites:
            raise RunError(
                f"maps of {site} are not stored of image {self.image_id}, only of {', '.join(self.sites)}; "
                "add it to evaluate.store_sites and evaluate again"
            )


class Recorder:
    """What the first images of a data set leave in the run folder while they stream by: examples and attention maps."""

    def __init__(self, cfg: Config, total: int, run_dir: Path, maps: MapWriter):
        settings = cfg.evaluate
        self.examples = settings.examples
        self.images = total if settings.store_maps == "all" else max(settings.store_maps, settings.examples)
        self.wanted = settings.store_sites
        self.run_dir, self.maps = run_dir, maps

    def sites(self, first: int) -> tuple[str, ...]:
        """The sites whose maps are needed of a batch, whose first image has this number in the data set."""
        return self.wanted if first < self.images else ()

    def add(self, first: int, batch: Batch, predictions: Predictions, indices: list[Match]) -> None:
        """Store what is wanted of a batch, whose first image has this number in the data set."""
        numbers = range(first, min(first + len(batch.targets), self.images))
        wanted = [site for site in self.wanted if numbers and getattr(predictions.attention, site)]
        packed = {site: _packed(predictions, site, len(numbers)) for site in wanted}
        for index, number in enumerate(numbers):
            sites = {site: [layer[index] for layer in layers] for site, layers in packed.items()}
            extent = cells_of(batch, predictions.attention, index).tolist()
            self.maps.add(batch.targets[index]["image_id"], extent, sites)
            if number < self.examples:
                save_example(self.run_dir, make_example(batch, predictions, indices, index))


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
        yield Recorder(cfg, total, run_dir, maps)


def with_maps(example: Example, predictions: Predictions, sites: Iterable[Site], index: int = 0) -> Example:
    """The example of image number `index` of a batch with its maps in memory instead of a store."""
    maps, means = {}, {}
    for site in sites:
        if not (count := len(getattr(predictions.attention, site))):  # an encoder without layers
            continue
        layers = [_valid(_weights(predictions, site, layer)[index], index, site, predictions) for layer in range(count)]
        whole = torch.stack(layers).float().cpu().numpy()  # [L,H,Q,h,w]
        maps[site] = whole if site == "encoder_self" else whole[:, :, example.queries]
        means[site] = np.stack([_received(np.abs(weights)) for weights in whole])
    return replace(example, stored=maps, means=means)


def _received(maps: np.ndarray) -> np.ndarray:
    """Means over queries of maps [H,n,...]."""
    total = maps.sum(tuple(range(2, maps.ndim)), keepdims=True)
    return (maps / np.maximum(total, 1)).mean(1)


def _weights(predictions: Predictions, site: Site, layer: int) -> Tensor:
    """Maps [B,H,Q,h,w] of one layer, of decoder_self [B,H,Q,Q]."""
    maps = predictions.attention
    return getattr(maps, site)[layer] if site == "decoder_self" else maps.as_images(site, layer)


def _packed(predictions: Predictions, site: Site, images: int) -> list[list[Packed]]:
    """Maps of the first images of a batch for the store, layer by layer: one dense layer at a time is in memory."""
    layers = []
    for layer in range(len(getattr(predictions.attention, site))):
        weights = _weights(predictions, site, layer)
        layers.append([pack(_valid(weights[i], i, site, predictions).float().cpu().numpy()) for i in range(images)])
    return layers


def _valid(weights: Tensor, image: int, site: Site, predictions: Predictions) -> Tensor:
    """Maps [H,n,h,w] of one image without padding: neither as keys nor, where cells ask in the encoder, as queries."""
    if site == "decoder_self":
        return weights
    grid = predictions.attention.grid_at(site)
    rows, columns = predictions.attention.valid_grid(image, site)
    cells_ask = predictions.tokens is None and predictions.polled is None and weights.shape[1] == grid[0] * grid[1]
    if site == "encoder_self" and cells_ask:
        weights = weights.unflatten(1, grid)[:, :rows, :columns].flatten(1, 2)
    return weights[..., :rows, :columns]


def make_example(batch: Batch, predictions: Predictions, indices: list[Match], index: int) -> Example:
    """Image number `index` of a batch with its confident and matched queries."""
    target = batch.targets[index]
    size = target["size"]
    height, width = size.tolist()
    scores, labels = predictions.class_scores()[index].max(-1)  # [Q]
    matched = torch.full_like(labels, -1)
    query, box = indices[index]
    matched[query] = box
    order = scores.argsort(descending=True)
    order = order[(scores[order] > EXAMPLE_SCORE) | (matched[order] >= 0)]

    def pixels(boxes: Tensor) -> Tensor:
        return to_pixels(cxcywh_to_xyxy(boxes.float()), size)

    values = {
        "image": batch.pixels[index, :, :height, :width].permute(1, 2, 0),
        "true_boxes": pixels(target["boxes"]),
        "true_labels": target["labels"],
        "boxes": pixels(predictions.boxes[index, order]),
        "labels": labels[order],
        "scores": scores[order],
        "matched": matched[order],
        "extent": cells_of(batch, predictions.attention, index),
        "queries": order,
    }
    return Example(target["image_id"], **{name: value.cpu().numpy() for name, value in values.items()})


def cells_of(batch: Batch, maps: AttentionMaps, index: int) -> Tensor:
    """[2], height and width of an image in cells of the key grid."""
    return batch.targets[index]["size"].cpu() / cell_side(batch.pixels.shape[-2:], maps.grid)


def save_example(run_dir: Path, example: Example) -> None:
    """The picture and detections of one example as examples/<image id>.npz; its maps are for the attention store."""
    names = (entry.name for entry in fields(example) if entry.name not in ("stored", "means"))
    values = {name: getattr(example, name) for name in names}

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **values)

    write_atomic(run_dir / "examples" / f"{example.image_id:012d}.npz", write)


def load_examples(run_dir: Path) -> list[Example]:
    """The stored examples of a run, by image id; none where the model has no attention to show.

    Raises RunError when there should be some, or their maps are missing.
    """
    paths = sorted((run_dir / "examples").glob("*.npz"))
    if not paths and not _lacks_attention(run_dir):
        raise RunError(f"{run_dir} holds no examples; evaluate it first (notebook 07_evaluate)")
    store = AttentionStore(run_dir) if paths else None
    return [_load_example(path, store) for path in paths]


def _load_example(path: Path, store: AttentionStore) -> Example:
    try:
        with np.load(path) as file:
            values = {name: file[name] for name in file.files}
        if "queries" in values:
            example = Example(int(values.pop("image_id")), **values, stored=store)
    except Exception as error:  # zipfile, zlib and numpy have many
        raise RunError(f"{path} is damaged ({in_one_line(error)}); evaluate the run again") from error
    if "queries" not in values:
        raise RunError(f"{path} was written before examples named their queries; evaluate the run again")
    store.sites(example.image_id)  # raises where maps of it are not there
    return example


def _lacks_attention(run_dir: Path) -> bool:
    """Whether a run is evaluated, and its model has no attention."""
    results = load_results(run_dir) if (run_dir / "results.json").exists() else {}
    return "detection" in results and "attention" not in results


def clear_examples(run_dir: Path) -> None:
    """Remove stored examples: those of an earlier evaluation may be of other images."""
    for path in (run_dir / "examples").glob("*.npz"):
        path.unlink()
