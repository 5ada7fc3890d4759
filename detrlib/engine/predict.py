"""Any picture through any detector, no annotations needed.

    detected = predict("quickstart/softmax", ["photo.jpg", "holiday/"])
    detected[0].to_frame()

    detrlib predict detr-r50 photo.jpg

Pictures are prepared as those of the run's validation are, so that a picture of its data set gives the detections that
an evaluation gives. Legend: B images, H heads, Q queries, K keys, n detections of a picture.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from detrlib.checkpoints.weights import ELSEWHERE, PUBLISHED
from detrlib.config import Config
from detrlib.data import Batch, collate
from detrlib.data.augment import build_augmentation
from detrlib.data.pictures import SUFFIXES, Picture, are_pictures, find_pictures, readable, unreadable
from detrlib.engine import tracking
from detrlib.engine.evaluate import DETECTIONS_PER_IMAGE, autocast
from detrlib.errors import ConfigError, DataError, ModelError, WeightsError, listed
from detrlib.metrics.sparsity import sparsity
from detrlib.models import Predictions
from detrlib.models.outputs import Site
from detrlib.runs.detected import Detected
from detrlib.runs.examples import Example, cells_of, with_maps
from detrlib.runs.folder import RUNS
from detrlib.runs.sources import build_source, open_source

SCORE = 0.5  # of the detections that are kept
SHOWN = 1024  # pixels of the longer side of a picture that is kept to be drawn
BATCH = 4  # pictures that a model sees at a time
NUMBERS = ("support", "gini", "zeros")  # of `metrics.sparsity`


@dataclass
class Detector:
    """A model in evaluation mode with what is needed to run it on a picture and to read what it says."""

    label: str  # what it is called where several stand side by side
    model: nn.Module
    cfg: Config
    names: Mapping[int, str]  # label -> class; empty: labels are shown as numbers
    device: torch.device

    def batch(self, pictures: Sequence[tuple[Picture, Image.Image, tuple[int, int]]]) -> Batch:
        """Pictures that were read, with their sizes, as an evaluation would give them to this model."""
        transform, samples = build_augmentation(self.cfg.data.image_size), []
        for picture, image, size in pictures:
            none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
            pixels, boxes, labels = transform(image, *none)
            target = {"boxes": boxes, "labels": labels, "image_id": picture.image_id}
            sizes = {"original_size": torch.tensor(size), "size": torch.tensor(pixels.shape[-2:])}
            samples.append((pixels, target | sizes))
        return collate(samples).to(self.device)


def predict(
    model_or_run: str | Path | Detector | tuple[nn.Module, Config, Mapping[int, str]],
    pictures: Any,
    *,
    min_score: float = SCORE,
    attention: bool | Collection[Site] = False,
    batch_size: int = BATCH,
    device: str | None = None,
    checkpoint: str = "last",
    limit: int | None = None,
    progress: bool = True,
) -> list[Detected]:
    """Run a detector on pictures of one's own.

    Args:
        model_or_run: any name of a model that `open_source` knows (a run, "detr-r50", a file, a Hugging Face id), or a
            model with its settings and the names of its classes by label.
        pictures: files, folders, patterns such as "photos/*.jpg", a JSON file that lists images, PIL images, arrays
            [H,W,3] uint8, tensors [3,H,W]; one or several, see `find_pictures`.
        min_score: of the detections that are kept, in 0..1.
        attention: keep the maps of the detections too: True those of decoder_cross, or the sites named.
        batch_size: pictures that the model sees at a time; it changes nothing but the time where padding is exact.
        device: "cpu", "cuda" or another of torch's; None: a GPU where there is one.
        checkpoint: of a run: "last", "best", "epoch-0010" and so on.
        limit: the first pictures only.
        progress: show a bar.

    Returns:
        What is detected in each picture, in their order, see `Detected`; with attention, an `Example` and the sparsity
        of the maps in each.

    Raises:
        DataError: something given is no picture; every such file is named before the model is run.
        RunError, WeightsError: there is no such run, or its weights cannot be read.
        ConfigError: the device is not there, or a score or site is none.
    """
    sites, (chosen, faults) = sites_of(attention), readable(find_pictures(pictures, limit))
    if faults:
        raise DataError(unreadable(faults))
    detector = open_detector(model_or_run, device, checkpoint)
    options = {"min_score": min_score, "sites": sites, "batch_size": batch_size, "progress": progress}
    return [one for (one,) in predict_each([detector], chosen, **options)]


def predict_each(
    detectors: Sequence[Detector],
    pictures: Sequence[Picture],
    *,
    min_score: float = SCORE,
    sites: Collection[Site] = (),
    batch_size: int = BATCH,
    left_out: dict[str, str] | None = None,
    progress: bool = True,
) -> Iterator[tuple[Detected, ...]]:
    """What each of several detectors finds in each picture, picture by picture: nothing is kept in memory.

    left_out: where names of files that turn out not to be readable, and why, are put; None: they raise DataError.
    Otherwise as `predict`.
    """
    if not 0 <= min_score <= 1 or batch_size < 1:
        raise ConfigError(f"min_score {min_score}, batch_size {batch_size}: a score is in 0..1, a batch 1 or more")
    check_sites(detectors, sites)
    with tracking.progress(None, "predicting", progress, total=len(pictures), unit="picture") as bar:
        for first in range(0, len(pictures), batch_size):
            readable = []
            for picture in pictures[first : first + batch_size]:
                try:
                    readable.append((picture, *picture.read()))
                except DataError as error:
                    if left_out is None:
                        raise
                    left_out[picture.name] = str(error).removeprefix(f"{picture.name}: ")
            if readable:
                yield from zip(*(_detected(each, readable, min_score, sites) for each in detectors), strict=True)
            bar.update(min(batch_size, len(pictures) - first))


def open_detector(
    model_or_run: str | Path | Detector | tuple[nn.Module, Config, Mapping[int, str]],
    device: str | None = None,
    checkpoint: str = "last",
) -> Detector:
    """The model of a run, or one that is given with its settings and names, ready on a device. Raises as `predict`."""
    where = chosen_device(device)
    if isinstance(model_or_run, Detector):
        return model_or_run
    if isinstance(model_or_run, str | Path):
        source = open_source(model_or_run, checkpoint)
        label, model, cfg, names = source.label, build_source(source), source.cfg, source.names
    else:
        (model, cfg, names), label = model_or_run, "model"
    return Detector(label, model.to(where).eval(), cfg, names or {}, where)


def open_detectors(names: Sequence[str], device: str | None = None, checkpoint: str = "last") -> list[Detector]:
    """Several models by name, labelled so that none is called as another. Raises as `predict`."""
    detectors = []
    for name in names:
        try:
            detectors.append(open_detector(name, device, checkpoint))
        except WeightsError as error:
            known = os.path.isfile(name) or name in (*PUBLISHED, *ELSEWHERE)
            lost = "" if known else f"; nor is there a picture or a folder {name!r}"
            raise WeightsError(f"{error}{lost}") from None
    labels = [each.label for each in detectors]
    for each, name in zip(detectors, names, strict=True):
        each.label = name if labels.count(each.label) > 1 else each.label
    return detectors


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU where there is one. Raises ConfigError for one that is not there."""
    if name is None:
        return Accelerator().device
    try:
        torch.zeros((), device=name)
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"[.\n]", str(error).strip())[0]
        raise ConfigError(f"device {name!r} is not there ({reason}); cpu always is (device, --device)") from None
    return torch.device(name)


def sites_of(attention: bool | Collection[str]) -> tuple[Site, ...]:
    """The sites meant by `attention`; decoder_cross is among them where any is. Raises ConfigError for others."""
    if attention is False or attention is None:
        return ()
    sites = () if attention is True else (attention,) if isinstance(attention, str) else tuple(attention)
    if unknown := [site for site in sites if site not in get_args(Site)]:
        raise ConfigError(f"attention: no site {unknown[0]!r}; there are {', '.join(get_args(Site))}")
    return tuple(dict.fromkeys(("decoder_cross", *sites)))


def check_sites(detectors: Sequence[Detector], sites: Collection[Site]) -> None:
    """Raise ModelError naming the detector that has no attention at one of the sites."""
    for each in detectors:
        if "encoder_self" in sites and not each.cfg.model.encoder_layers:
            raise ModelError(f"{each.label}: model.encoder_layers is 0, it has no encoder_self; choose another site")


def check_view(detectors: Sequence[Detector], site: Site, layer: int, head: int | Literal["mean"]) -> None:
    """Raise ModelError naming the detector that has no map of this layer (from 0, or from the end) and head."""
    check_sites(detectors, [site])
    for each in detectors:
        model = each.cfg.model
        layers = model.encoder_layers if site == "encoder_self" else model.decoder_layers
        if site == "encoder_self" and not model.cells_ask:
            raise ModelError(f"{each.label}: what asks in its encoder are no cells of the picture; draw decoder_cross")
        if not -layers <= layer < layers:
            raise ModelError(f"{each.label}: no layer {layer} at {site}; there are 0 to {layers - 1}, or -1")
        if head != "mean" and not 0 <= head < model.num_heads:
            raise ModelError(f"{each.label}: no head {head}; there are 0 to {model.num_heads - 1}, or mean")


def models_and_pictures(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The words of a command told apart: names of models, and pictures.

    Raises ConfigError for a word that may be both, or where there is none of one kind.
    """
    models, pictures = [], []
    for word in dict.fromkeys(words):
        if not word.strip():  # would be the working directory
            raise ConfigError("one of the models and pictures is an empty text; is a variable of the shell not set?")
        path, run = Path(word), os.path.isfile(RUNS / word / "config.yaml") and not word.startswith(".")
        model = any(os.path.isfile(path / name) for name in ("config.yaml", "config.json"))  # a run, or Hugging Face's
        picture = not model and (are_pictures(word) or path.suffix.lower() in SUFFIXES)
        if picture and (run or word in (*PUBLISHED, *ELSEWHERE)):
            other = f"{RUNS.name}/{word} for the run" if run else "rename it for the published weights"
            raise ConfigError(f"{word!r} may be pictures or a model: write ./{word} for the pictures, {other}")
        (pictures if picture else models).append(word)
    if not models or not pictures:
        missing = "no model is named" if not models else f"no pictures are named beside {listed(models)}"
        raise ConfigError(f"{missing}; name both: detrlib predict detr-r50 photo.jpg")
    return models, pictures


@torch.no_grad()
def _detected(
    detector: Detector,
    pictures: Sequence[tuple[Picture, Image.Image, tuple[int, int]]],
    min_score: float,
    sites: Collection[Site],
) -> list[Detected]:
    """What a detector finds in a batch of pictures."""
    batch, results = detector.batch(pictures), []
    with autocast(detector.cfg.train.precision, detector.device):
        predictions = detector.model(batch.images, batch.padding_mask, need_attention=tuple(sites))
    sizes = torch.stack([target["original_size"] for target in batch.targets])
    each = predictions.detections(sizes, DETECTIONS_PER_IMAGE)
    for index, ((picture, image, size), own) in enumerate(zip(pictures, each, strict=True)):
        # Labels between two category ids can be predicted, but name no category.
        named = [not detector.names or label in detector.names for label in own.labels.tolist()]
        kept = (own.scores >= min_score) & torch.tensor(named, dtype=torch.bool, device=own.scores.device)
        boxes, scores, labels, queries = (
            getattr(own, name)[kept].cpu().numpy() for name in ("boxes", "scores", "labels", "queries")
        )
        names = [detector.names.get(label, str(label)) for label in labels.tolist()]
        one = Detected(
            picture.name, picture.image_id, size, boxes, scores, labels, names, queries, picture, detector.names
        )
        if sites:
            one.example = _example(one, image, batch, predictions, index, sites)
            one.sparsity = sparsity_of(predictions, index, sites, own.queries[kept])
        results.append(one)
    return results


def _example(
    detected: Detected, image: Image.Image, batch: Batch, predictions: Predictions, index: int, sites: Collection[Site]
) -> Example:
    """A picture as an example without annotated objects, with the maps of its detections."""
    shown = image.copy()
    shown.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    pixels = np.asarray(shown)
    example = Example(
        image_id=detected.image_id,
        image=pixels,
        true_boxes=np.zeros((0, 4), dtype=np.float32),
        true_labels=np.zeros(0, dtype=np.int64),
        boxes=detected.boxes_in(pixels),
        labels=detected.labels,
        scores=detected.scores,
        matched=np.full(len(detected), -1),
        queries=detected.queries,
        extent=cells_of(batch, predictions.attention, index).numpy(),
    )
    return with_maps(example, predictions, sites, index)


def sparsity_of(predictions: Predictions, index: int, sites: Collection[Site], queries: Tensor) -> pd.DataFrame:
    """How sparse the attention to one picture is, as an evaluation measures it.

    Returns:
        A row per site, layer (from 0) and choice of rows ("all", and of the decoder "detected": `queries` [n]): means
        over rows and heads of support (keys with weight), gini, zeros (share of exact zeros), and the number of keys.
    """
    maps, rows = predictions.attention, []
    padding = maps.key_padding
    for site in sites:
        for layer, weights in enumerate(getattr(maps, site)):
            own = weights[index].float()  # [H,Q,K]
            valid = None if site == "decoder_self" or padding is None else ~padding[index]
            measured = sparsity(own, valid)
            keys = own.shape[-1] if valid is None else int(valid.sum())
            choices = {"all": slice(None), "detected": queries}
            if site == "encoder_self":  # rows of padding do not count
                choices = {"all": slice(None) if valid is None or len(valid) != own.shape[1] else valid}
            for name, choice in choices.items():
                values = {number: measured[number][:, choice].mean().item() for number in NUMBERS}
                rows.append({"site": site, "layer": layer, "queries": name, "keys": keys, **values})
    return pd.DataFrame(rows)
