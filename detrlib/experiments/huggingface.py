"""Our transforms in detectors of Hugging Face's transformers: how sparse their attention becomes, at every site.

    with use("sparsemax", model, sites="encoder_self"):                 a model of yours with another attention
    detrlib huggingface                                                 DETR, RT-DETR v2 and D-FINE, with random weights
    detrlib huggingface PekingU/rtdetr_v2_r18vd --pictures photos/      weights by id or folder, on pictures

Random weights say nothing about scores. Those of every layer are scaled to one standard deviation over the keys, so
that what differs between transforms and sites is their own doing, and the number of keys; trained weights are measured
as they are, unless told otherwise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from detrlib.attention import TRANSFORMS, Transform, build_transform
from detrlib.attention.transforms import Grid
from detrlib.checkpoints.adapted import adapted_source
from detrlib.checkpoints.source import COCO_LABELS, build_source
from detrlib.config import load_config
from detrlib.config.huggingface import KINDS, source_folder
from detrlib.data.pictures import Picture, find_pictures, readable
from detrlib.engine.predict import Detector
from detrlib.errors import ConfigError, WeightsError, listed
from detrlib.metrics.sparsity import sparsity
from detrlib.models import build_model
from detrlib.models.huggingface_attention import sees_map, sites_of, use
from detrlib.models.huggingface_weights import samples_points
from detrlib.models.outputs import Site

SHARPEN = 4.0  # standard deviation of the scores of random weights
SETTINGS = {"alpha": 1.25, "alpha_init": 1.75, "tv_lambda": 0.1}  # of the command: away from entmax15
MEASURES = ("zeros", "gini")


def open_detector(name: str, size: int = 640, seed: int = 0) -> Detector:
    """A detector of transformers: of a type in `KINDS`, with random weights; or from an id or a folder, as trained.

    Args:
        name: a type, an id or a folder.
        size: pixels of the shorter side of pictures, for random weights; trained ones see them as in their training.
        seed: of random weights.

    Raises:
        ConfigError: transformers is missing or too old.
        WeightsError: names what cannot be opened.
    """
    if name in KINDS:
        settings = {"architecture": "huggingface", "type": name, "num_classes": COCO_LABELS, "square": size}
        cfg = load_config(overrides={"model": settings, "data.image_size": size})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build_model(cfg.model)
            for module in model.modules():
                if samples_points(module):  # points are weighed alike before training
                    nn.init.xavier_uniform_(module.attention_weights.weight)
        names = {}
    elif "/" not in name and not Path(name).is_dir():
        raise WeightsError(f"{name}: neither a folder, nor an id such as PekingU/rtdetr_v2_r18vd, nor {listed(KINDS)}")
    else:
        source = adapted_source(source_folder(name, weights=True))
        cfg, model, names = source.cfg, build_source(source), source.names or {}
    return Detector(name, model.eval(), cfg, names, torch.device("cpu"))


class _Measured(Transform):
    """A transform whose scores are sharpened, if told, and whose weights are measured."""

    def __init__(self, inner: Transform, sharpen: float | None):
        super().__init__()
        self.inner, self.sharpen = inner, sharpen
        self.rows = []

    def forward(self, scores: Tensor, padding: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """As of the transform."""
        valid = torch.ones_like(scores, dtype=torch.bool) if padding is None else ~padding.expand(scores.shape)
        if self.sharpen is not None:
            scores = scores * (self.sharpen / _spread(scores, valid).clamp(min=1e-12))
        weights = self.inner(scores, padding, grid)
        measured = sparsity(weights.detach(), valid)
        self.rows.append(
            {"keys": valid.sum(-1).float().mean().item()} | {name: measured[name].mean().item() for name in MEASURES}
        )
        return weights


def _spread(scores: Tensor, valid: Tensor) -> Tensor:
    """The standard deviation of scores over the valid keys of a row, all rows of a layer together."""
    mean = (scores * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return (((scores - mean) * valid).square().sum() / valid.sum()).sqrt()


@torch.no_grad()
def measure(
    model: nn.Module, inputs: dict[str, Tensor], transform: str, site: Site, sharpen: float | None = None, **settings
) -> dict[str, float]:
    """Keys, zeros and Gini index of the weights at one site under a transform: means over layers, heads and queries.

    The other sites stay as they are. inputs: of the model, such as images, or pixel_values and pixel_mask where it is
    one of transformers itself. settings and faults as of `use`.
    """
    with use(transform, model, site, **settings):
        modules = sites_of(model)[site]
        kept = [module.transform for module in modules]
        measured = [_Measured(inner, sharpen) for inner in kept]
        try:
            for module, one in zip(modules, measured, strict=True):
                module.transform = one
            model(**inputs)
        finally:
            for module, inner in zip(modules, kept, strict=True):
                module.transform = inner
    return pd.DataFrame([row for one in measured for row in one.rows]).mean().to_dict()


def sparsity_table(
    models: Sequence[str],
    transforms: Sequence[str] = tuple(TRANSFORMS),
    pictures: Any = (),
    sharpen: float | None = None,
    size: int = 640,
    progress: bool = False,
    **settings,
) -> pd.DataFrame:
    """Zeros and Gini index of the attention of detectors at every site that they have, under each transform.

    Args:
        models: types in `KINDS`, ids of Hugging Face's, or folders.
        transforms: names; one of each is put into one site at a time.
        pictures: as of `find_pictures`; none: one image of noise.
        sharpen: standard deviation of the scores over the keys, in each layer; default: `SHARPEN` for random weights,
            while trained ones are taken as they are.
        size: pixels along both sides of noise, and along the shorter side of pictures for random weights.
        progress: show a bar.
        settings: of transforms, such as alpha, as of `use`.

    Returns:
        A row for each model, site and transform: columns model, site, transform, keys (how many a query could see),
        zeros, gini. Where a transform needs a grid that the site has not, both are missing.

    Raises:
        ConfigError: an unknown transform, or a value out of range.
        WeightsError, DataError: name the model or the picture that cannot be used.
    """
    try:
        for name in transforms:
            build_transform(name, 1, **settings)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if sharpen is not None and not sharpen > 0:
        raise ConfigError(f"sharpen {sharpen} must be above 0")
    files = readable(find_pictures(pictures))[0] if pictures else []
    rows = []
    for name in tqdm(models, desc="measuring", unit="model", disable=not progress or None):
        detector = open_detector(name, size)
        model, batches = detector.model, _batches(detector, files, size)
        spread = SHARPEN if sharpen is None and name in KINDS else sharpen
        for site, modules in sites_of(model).items():
            grid = sees_map(model, site, modules[0]) is not None
            for transform in transforms:
                measurable = batches if grid or transform != "tvmax" else []
                found = [measure(model, batch, transform, site, spread, **settings) for batch in measurable]
                means = pd.DataFrame(found).mean().to_dict()
                rows.append({"model": name, "site": site, "transform": transform} | means)
    return pd.DataFrame(rows, columns=["model", "site", "transform", "keys", *MEASURES])


def _batches(detector: Detector, pictures: Sequence[Picture], size: int) -> list[dict[str, Tensor]]:
    """Inputs of a model, one image at a time: pictures as its evaluation prepares them, or noise."""
    if not pictures:
        return [{"images": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))}]
    return [{"images": detector.batch([(picture, *picture.read())]).images} for picture in pictures]


def wide_table(table: pd.DataFrame) -> pd.DataFrame:
    """A `sparsity_table` for a page: rows for each measure, model and site, a column for each transform."""
    keys = table.groupby(["model", "site"])["keys"].transform("mean").round().astype(int)
    named = ["model", "site", "keys", "measure"]
    long = table.assign(keys=keys).melt([*named[:-1], "transform"], list(MEASURES), "measure")
    wide = long.set_index([*named, "transform"])["value"].unstack(sort=False)
    return wide.rename_axis(columns=None).reset_index(named[1:])
