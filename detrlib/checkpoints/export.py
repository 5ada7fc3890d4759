"""A model in a file or folder of its own, for other programs or for this one.

detrlib export my-run model.safetensors     names of this library; settings and names of classes stand in the file
detrlib export my-run model.pth             as the official code writes and reads
detrlib export my-run model/                as Hugging Face's transformers writes and reads
detrlib export my-run model.pt2             a program that runs without this library, see program.py; or model.onnx
"""

import json
import math
from pathlib import Path
from typing import Literal, get_args

from detrlib.checkpoints.adapted import write_adapted
from detrlib.checkpoints.files import TOLD, OfficialCheckpoint, export_official, official_config
from detrlib.checkpoints.huggingface import write_huggingface
from detrlib.checkpoints.official import family_of
from detrlib.checkpoints.program import write_onnx, write_program
from detrlib.checkpoints.source import Source, build_source, fitting, read_tensors, write_tensors
from detrlib.config import flat_settings, load_config
from detrlib.config.attention import OF_TRANSFORMS, SiteName
from detrlib.data.classes import names_by_label
from detrlib.errors import ConfigError, WeightsError
from detrlib.files import write_checkpoint

Layout = Literal["safetensors", "official", "huggingface", "program", "onnx"]
BY_SUFFIX: dict[str, Layout] = {
    ".safetensors": "safetensors",
    ".pth": "official",
    ".pt": "official",
    "": "huggingface",
    ".pt2": "program",
    ".onnx": "onnx",
}
# Settings that an official file need not tell: they change no prediction of an image alone, or its entries show them.
UNTOLD = (
    *("model.backbone.weights", "model.backbone.freeze_stem", "model.compatibility"),
    *("model.attention.alpha_init", "model.attention.anneal", "model.deformable.stages"),
)
SETTINGS, NAMES, EPOCH = "detrlib.settings", "detrlib.names", "detrlib.epoch"  # in the metadata of a file


def export(source: Source, path: Path, layout: Layout | None = None) -> Path:
    """Write weights for others.

    Args:
        source: see `runs.sources.open_source`.
        path: a file, or a folder for Hugging Face's layout; must not be there yet.
        layout: "safetensors", "official", "huggingface", "program" or "onnx"; None: by the suffix, see `BY_SUFFIX`.

    Returns:
        `path`.

    Raises:
        ConfigError: the suffix says nothing, or packages for ONNX are missing.
        WeightsError: there is something at `path`, or others have no such model; names the setting.
        RunError: the file cannot be written.
    """
    layout = layout or BY_SUFFIX.get(path.suffix)
    if layout is None:
        known = ", ".join(suffix for suffix in BY_SUFFIX if suffix)
        raise ConfigError(
            f"{path}: no layout is known by the suffix {path.suffix}; use {known}, a folder, or one of "
            f"--format {', '.join(get_args(Layout))}"
        )
    if path.exists():
        raise WeightsError(f"{path} is there already; choose another name, or delete it")
    if source.cfg.model.architecture == "huggingface" and layout == "official":
        raise WeightsError(
            f"{path}: official code has no model of transformers'; give a folder, or a .safetensors file"
        )
    theirs = write_adapted if source.cfg.model.architecture == "huggingface" else write_huggingface
    write = {"safetensors": write_own, "official": write_official, "huggingface": theirs}
    write = (write | {"program": write_program, "onnx": write_onnx})[layout]
    write(source, path)
    return path


def write_own(source: Source, path: Path) -> None:
    """A safetensors file with the names of this library, whose metadata hold settings and names of classes."""
    # Heads that layers of some models share have several names.
    state = {name: value.clone().contiguous() for name, value in build_source(source).state_dict().items()}
    metadata = {"format": "pt", SETTINGS: json.dumps(source.cfg.model_dump(mode="json")), EPOCH: str(source.epoch)}
    if source.names:
        metadata[NAMES] = json.dumps(source.names)
    write_tensors(path, state, metadata)


def read_own(path: Path) -> Source:
    """What `write_own` has written. Raises WeightsError naming a file that is damaged, or another program's."""
    state, metadata = read_tensors(path)
    if SETTINGS not in metadata:
        raise WeightsError(
            f"{path}: names no settings of its model, as files of detrlib export do; of Hugging Face's, give the "
            "folder, in which config.json stands beside it"
        )
    try:
        cfg = load_config(overrides=dict(json.loads(metadata[SETTINGS])))
        names = names_by_label(json.loads(metadata.get(NAMES, "{}")), path) or None
        epoch = int(metadata.get(EPOCH, cfg.train.epochs))  # alphas that are annealed follow from it
    except (ValueError, TypeError) as error:  # of JSON, and of ours those of settings and names
        raise WeightsError(
            f"{path}: the settings or names of classes in it are no such ({error}); export it again"
        ) from None
    return fitting(Source(path.stem, cfg, state, names, path, epoch), "a model")


def write_official(source: Source, path: Path) -> None:
    """A file with official names under "model" and, as the training scripts leave them, arguments under "args".

    Raises WeightsError naming the setting that neither of them tells, so that the file would be read as another model.
    """
    now, aims = (source.cfg.model.annealed_alphas(epoch) for epoch in (source.epoch, math.inf))
    if now != aims:
        raise WeightsError(
            f"an official file does not tell alphas on their way (model.attention.anneal), after epoch {source.epoch} "
            f"{now}; export a later checkpoint, or write a .safetensors file instead"
        )
    settings = flat_settings(source.cfg)
    arguments = {name: settings[setting] for name, setting in TOLD.items() if setting in settings}
    if arguments.get("rho") == 1:
        arguments["rho"] = 0.0  # their word for a dense encoder
    state = {name: value.contiguous() for name, value in export_official(build_source(source)).items()}
    told = {setting: settings[setting] for name, setting in TOLD.items() if name in arguments}
    read = flat_settings(official_config(OfficialCheckpoint(path, state, family_of(state), told, source.epoch)))
    used = {source.cfg.model.transform_at(site) for site in get_args(SiteName)}
    unused = [f"model.attention.{name}" for name, transforms in OF_TRANSFORMS.items() if not transforms & used]
    for name, value in settings.items():
        if name.startswith("model.") and not name.startswith((*UNTOLD, *unused)) and read.get(name) != value:
            raise WeightsError(f"an official file does not tell {name} {value}; write a .safetensors file instead")
    write_checkpoint(path, {"model": state, "epoch": source.epoch, "args": arguments})
