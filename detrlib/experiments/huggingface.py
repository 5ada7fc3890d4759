"""Where attention of detectors of Hugging Face's transformers rests, and how sparse it is, at every site.

    detrlib huggingface facebook/detr-resnet-50 PekingU/rtdetr_r18vd ustc-community/dfine-small-coco --data /data/coco
    detrlib huggingface rt_detr_v2 --pictures photos/ --transforms softmax,sparsemax      a type: random weights
    with use("sparsemax", model, sites="encoder_self"):                   a model of yours with another attention

As trained, all sites are measured in one pass over the images; of any other transform, or with a null key, one site at
a time has it, and is measured. Measures are those of an evaluation (`metrics.accumulate`). Where points are sampled,
zeros and Gini index are over the points of a query, which is what a transform weighs there, sinks over the cells of the
finest level, on which the points are spread out.

Random weights say nothing about scores. Those of every layer are scaled to one standard deviation over the keys, so
that what differs between transforms and sites is their own doing, and the number of keys; trained weights are measured
as they are, unless told otherwise.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn

from detrlib.attention import build_transform
from detrlib.checkpoints.adapted import adapted_source
from detrlib.checkpoints.source import COCO_LABELS, build_source
from detrlib.config import Config, load_config, project_path, replace
from detrlib.config.huggingface import KINDS, source_folder
from detrlib.data import CocoDataset, build_dataset
from detrlib.data.classes import match_classes
from detrlib.data.index import read_columns
from detrlib.data.pictures import Picture, find_pictures, readable, unreadable
from detrlib.engine import tracking
from detrlib.engine.evaluate import autocast, evaluate
from detrlib.engine.predict import Detector
from detrlib.errors import ConfigError, DataError, WeightsError, listed
from detrlib.experiments.transfer import find_data, with_classes
from detrlib.experiments.watched import OF_POINTS, Watched, watched
from detrlib.files import write_json
from detrlib.metrics.accumulate import SITES, AttentionMeasures
from detrlib.models import build_model
from detrlib.models.huggingface_attention import sees_map, sites_of, use
from detrlib.models.huggingface_weights import samples_points
from detrlib.models.outputs import Site

SHARPEN = 4.0  # standard deviation of the scores of random weights
SETTINGS = {"alpha": 1.25, "alpha_init": 1.75, "tv_lambda": 0.1}  # of the command: away from entmax15
OWN = ("softmax", "none")  # transform and null key of transformers' own attention
OF_SINKS = ("weight", "sink", "sink_even", "agreement", "border", "corner", "value_norm", "output_share", "null_mass")
# Of COCO's classes, what RT-DETR of Hugging Face's calls them.
OTHER_NAMES = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant"}
OTHER_NAMES |= {"dining table": "diningtable", "tv": "tvmonitor"}


def open_detector(name: str, size: int = 640, seed: int = 0, device: str | torch.device = "cpu") -> Detector:
    """A detector of transformers: of a type in `KINDS`, with random weights; or from an id or a folder, as trained.

    Args:
        name: a type, an id or a folder.
        size: pixels of the shorter side of pictures, for random weights; trained ones see them as in their training.
        seed: of random weights.
        device: where it is to run.

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
    return Detector(name, model.to(device).eval(), cfg, names, torch.device(device))


def attention_passes(
    models: Sequence[str],
    transforms: Sequence[str] = OWN[:1],
    null_keys: Sequence[str] = OWN[1:],
    *,
    pictures: Any = (),
    data: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    sites: Sequence[Site] = SITES,
    sharpen: float | None = None,
    size: int = 640,
    cpu: bool = False,
    batch_size: int = 4,
    keep: Path | None = None,
    progress: bool = False,
    **settings,
) -> list[dict]:
    """Run detectors over images, as trained and with other transforms and null keys, and measure where they look.

    Args:
        models: types in `KINDS`, ids of Hugging Face's, or folders.
        transforms: names; softmax without a null key is the model's own, and measured at all sites at once.
        null_keys: "none", "zero" or "learned", which starts at zero and is not trained here.
        pictures: as of `find_pictures`; with neither these nor data, one image of noise.
        data: a folder of COCO's, or what else `detrlib evaluate --on` takes: AP and PAIBB are measured too.
        split: of the data; default: val2017, or the only one.
        limit: the first images only.
        sites: those measured, of those that a model has.
        sharpen: standard deviation of the scores over the keys, in each layer; default: `SHARPEN` for random weights,
            while trained ones are taken as they are.
        size: pixels along both sides of noise, and along the shorter side of pictures for random weights.
        cpu: stay on the CPU where there is a GPU.
        batch_size: images that a model sees at a time.
        keep: a JSON file of finished passes, written after each: those that stand in it are not repeated.
        progress: show a bar.
        settings: of transforms, such as alpha, as of `use`.

    Returns:
        For each pass what `_pass` says. Where a transform needs a grid that the site has not, or a null key scores that
        are of keys, there is none.

    Raises:
        ConfigError: an unknown transform or site, or a value out of range; or `keep` was made with others.
        WeightsError, DataError: name the model, the data or the picture that cannot be used.
    """
    _check(transforms, null_keys, sites, sharpen, bool(pictures), data, split, settings)
    told = {"data": data and str(data), "split": split, "limit": limit, "pictures": [*map(str, pictures)]}
    told |= {"sharpen": sharpen, "size": size} | settings
    done, asked = {_key(one): one for one in _earlier(keep, told)}, []
    files, faults = readable(find_pictures(pictures or [_noise(size)], limit))
    if faults:
        raise DataError(unreadable(faults))
    accelerator = Accelerator(cpu=cpu)
    for name in tracking.progress(models, "models", progress, unit="model"):
        detector = open_detector(name, size, device=accelerator.device)
        spread = SHARPEN if sharpen is None and name in KINDS else sharpen
        with TemporaryDirectory() as folder:
            cfg = replace(detector.cfg, {"evaluate.batch_size": batch_size})
            cfg = cfg if data is None else _on(detector, cfg, data, split, limit, Path(folder))
            images = files if data is None else build_dataset(cfg.data, "val")
            for transform, null_key, where in _planned(detector.model, transforms, null_keys, sites):
                what = {"model": name, "transform": transform, "null_key": null_key, "changed": where}
                asked.append(_key(what))
                if asked[-1] in done:
                    continue
                change = use(dict.fromkeys(where, transform), detector.model, null_key=null_key, **settings)
                with change, watched(detector.model, where, spread) as at_sites:
                    done[asked[-1]] = what | _pass(detector, cfg, images, at_sites, accelerator, progress)
                if keep:
                    write_json(keep, {"settings": told, "passes": [*done.values()]})
    return [done[key] for key in asked]


def _check(
    transforms: Sequence[str],
    null_keys: Sequence[str],
    sites: Sequence[str],
    sharpen: float | None,
    pictures: bool,
    data: str | Path | None,
    split: str | None,
    settings: Mapping[str, Any],
) -> None:
    """Raise ConfigError naming what is unknown or makes no sense, before a model is opened."""
    try:
        for name, null_key in product(transforms, null_keys):
            build_transform(name, 1, null_key=null_key, **settings)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if wrong := [site for site in sites if site not in SITES]:
        raise ConfigError(f"unknown site {wrong[0]!r}; there are {listed(SITES)}")
    if sharpen is not None and not sharpen > 0:
        raise ConfigError(f"sharpen {sharpen} must be above 0")
    if pictures and data is not None:
        raise ConfigError("give data with objects (--data), or pictures without (--pictures)")
    if split and data is None:
        raise ConfigError(f"split {split} (--split) belongs to data (--data)")


def _key(one: Mapping[str, Any]) -> tuple:
    return one["model"], one["transform"], one["null_key"], *one["changed"]


def _earlier(keep: Path | None, told: Mapping[str, Any]) -> list[dict]:
    """The passes in a file. Raises ConfigError if they were made with other settings, DataError if it is damaged."""
    if keep is None or not keep.exists():
        return []
    try:
        content = json.loads(keep.read_text())
        before, passes = content["settings"], content["passes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{keep}: not readable ({error}); move it away, and the passes are made again") from None
    told = json.loads(json.dumps(told))
    if other := [name for name in {**before, **told} if before.get(name) != told.get(name)]:
        raise ConfigError(
            f"{keep} was made with {other[0]} {before.get(other[0])}, not {told.get(other[0])}; choose another folder "
            "(--out), or move that file away"
        )
    return passes


def _noise(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def _on(
    detector: Detector, cfg: Config, data: str | Path, split: str | None, limit: int | None, folder: Path
) -> Config:
    """Settings with other data for validation, whose classes are those of the detector with the same name.

    One that has no names, such as random weights, is taken to know category ids. Raises DataError where no class is
    known to it.
    """
    images, annotations = find_data(project_path(data), None, split, "val2017")
    content = read_columns(annotations).content()
    theirs, ours = {category["name"] for category in content["categories"]}, set(detector.names.values())
    names = {
        name: other for name, other in OTHER_NAMES.items() if name in theirs and name not in ours and other in ours
    }
    known, largest = cfg.model.num_classes, max(category["id"] for category in content["categories"])
    if not ours and largest >= known:
        raise DataError(
            f"{annotations}: category id {largest}; {detector.label} has no names, and knows 0 to {known - 1}"
        )
    try:
        match = match_classes(content, detector.names, names, by_id=not ours)
    except DataError as error:
        raise DataError(f"{annotations}: {error}; or take them as pictures alone (--pictures)") from None
    return replace(with_classes(cfg, images, content, match, folder / "annotations.json"), {"data.val_limit": limit})


def _planned(
    model: nn.Module, transforms: Sequence[str], null_keys: Sequence[str], sites: Sequence[Site]
) -> Iterator[tuple[str, str, list[Site]]]:
    """Transform, null key and the sites that have them, of each pass."""
    there = {site: modules[0] for site, modules in sites_of(model).items() if site in sites}
    for transform, null_key in product(transforms, null_keys):
        if (transform, null_key) == OWN:
            yield transform, null_key, [*there]
            continue
        for site, module in there.items():
            no_grid = transform == "tvmax" and sees_map(model, site, module) is None
            no_keys = null_key != "none" and samples_points(module)
            if not (no_grid or no_keys):
                yield transform, null_key, [site]


@torch.no_grad()
def _pass(
    detector: Detector,
    cfg: Config,
    images: CocoDataset | Sequence[Picture],
    at_sites: Mapping[Site, Sequence[Watched]],
    accelerator: Accelerator,
    progress: bool,
) -> dict:
    """One pass over images, of a model whose transforms are watched.

    Returns:
        images, seconds; detection: AP and AP50, and paibb: as of `localisation` in results.json, both None for
        pictures; sites -> keys, number of them; points: OF_POINTS over sampling points, or None; sparsity, over all
        queries, and sinks, as in results.json.
    """
    start, sites = time.perf_counter(), list(at_sites)
    if isinstance(images, CocoDataset):
        results = evaluate(detector.model, images, cfg, accelerator, sites=sites, progress=progress)[0]
    else:
        looks, size, nobody = AttentionMeasures(cfg, sites=sites), cfg.evaluate.batch_size, torch.zeros(0).long()
        for first in range(0, len(images), size):
            batch = detector.batch([(one, *one.read()) for one in images[first : first + size]])
            with autocast(cfg.train.precision, detector.device):
                predictions = detector.model(batch.images, batch.padding_mask, need_attention=looks.sites)
            looks.add(predictions, batch, [(nobody, nobody)] * len(batch.targets))
        results = looks.summary({})
    of_sites = {}
    for site, transforms in at_sites.items():
        means = pd.DataFrame([one.means() for one in transforms]).mean().to_dict()
        of_sites[site] = {"keys": means.pop("keys"), "points": means or None}
        of_sites[site] |= {"sparsity": results["sparsity"][site]["all"], "sinks": results["sinks"][site]}
    found = results.get("detection")
    return {
        "images": len(images),
        "seconds": round(time.perf_counter() - start, 2),
        "detection": found and {name: found[name] for name in ("AP", "AP50")},
        "localisation": results["localisation"]["all"] if found else None,
        "sites": of_sites,
    }


def attention_table(passes: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What passes say as a table: means over layers, heads, queries and images.

    Returns:
        A row for each model, site, transform and null key: columns model, site, transform, null_key, images, keys (how
        many a query could see), zeros, zeros_relative, gini (see `metrics.sparsity`), OF_SINKS (see `metrics.sinks`),
        and of data with objects, of the last layer, paibb and paibb_without_sink, where the site is decoder_cross, and
        AP, AP50. Missing where not known.
    """
    rows = []
    for one in passes:
        for site, found in one["sites"].items():
            row = {name: one[name] for name in ("model", "transform", "null_key", "images")}
            row |= {"site": site, "keys": found["keys"]}
            row |= {name: _mean(found["sparsity"][name]["mean"]) for name in OF_POINTS} | (found["points"] or {})
            row |= {name: _mean(found["sinks"][name]["mean"]) for name in OF_SINKS}
            if one["localisation"] and site == "decoder_cross":
                row |= {name: one["localisation"][name]["mean"][-1] for name in ("paibb", "paibb_without_sink")}
            rows.append(row | {name: value for name, value in (one["detection"] or {}).items() if value >= 0})
    first = ["model", "site", "transform", "null_key", "images", "keys", *OF_POINTS, *OF_SINKS]
    return pd.DataFrame(rows, columns=[*first, "paibb", "paibb_without_sink", "AP", "AP50"])


def page(table: pd.DataFrame) -> pd.DataFrame:
    """An `attention_table` for a page, by model: what is known, and differs, of the columns that say most."""
    left_out = {"images", "zeros_relative", "sink_even", "corner", "AP50"}
    left_out |= {name for name in ("transform", "null_key") if table[name].nunique() == 1}
    return table.drop(columns=[*left_out]).dropna(axis="columns", how="all").set_index("model")


def _mean(layers: Sequence[float | None]) -> float:
    return pd.Series(layers, dtype=float).mean()
