"""Official checkpoints: from a file to a model, settings included, and from a model to official names.

    detrlib import detr-r50-e632da11.pth                    what is it?
    detrlib import detr-r50-e632da11.pth --as official-r50
    detrlib evaluate official-r50                                       its AP on COCO

Files of DETR, of its variants with sparse cross-attention, of Conditional DETR, of Deformable DETR and of Sparse DETR
are known. No code in a file is run. Whatever its batch, an image is predicted as the official code predicts it alone.
In a batch that code lets predictions depend on the other images, and so on `evaluate.batch_size`:
`model.compatibility.padding: official` repeats it, and `thesis` for the variants with sparse cross-attention, whose
code favours padding.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detrlib.attention import AlphaEntmax
from detrlib.checkpoints.names import PROFILING, State, official_state, own_state
from detrlib.checkpoints.official import backbone_settings, family_of, settings_of
from detrlib.checkpoints.source import Source, build_source, coco_names, fitting
from detrlib.config import Config, changed_settings, load_config, parse_value, replace
from detrlib.errors import ConfigError, WeightsError, fault_of
from detrlib.files import damage
from detrlib.models.deformable import DeformableDETR
from detrlib.models.pretrained import SCRL

# What the training scripts were told and wrote into their files, and which settings it decides here.
TOLD = {
    "nheads": "model.num_heads",
    "num_queries": "model.num_queries",
    "dropout": "model.dropout",
    "dilation": "model.backbone.dilation",
    "rho": "model.deformable.rho",
    "eff_specific_head": "model.deformable.class_specific_proposals",
    "decoder_act": "model.attention.decoder_cross",
}
OF_PROPOSALS = ("model.deformable.rho", "model.deformable.class_specific_proposals")


@dataclass
class OfficialCheckpoint:
    """What an official file holds."""

    path: Path
    state: State  # under official names
    family: str  # detr, deformable, or sparse
    told: dict[str, Any]  # dotted settings that the training script wrote down
    epoch: int | None


def read_official(path: str | Path) -> OfficialCheckpoint:
    """An official file, on the CPU. Raises WeightsError saying what the file is instead, with a remedy."""
    path = Path(path).expanduser()
    content = read_checkpoint(path)
    if SCRL in content:
        raise WeightsError(f"{path}: SCRL weights of a backbone; give the file as model.backbone.weights")
    state = content.get("model", content)
    entries = state.items() if isinstance(state, dict) else ()
    if not entries or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries):
        raise WeightsError(f"{path}: holds no state dict (names to tensors), neither itself nor under 'model'")
    state = {name: value for name, value in state.items() if not name.endswith(PROFILING)}
    try:
        family = family_of(state)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    arguments = content.get("args", content.get("hyperparams", {})) if state is not content else {}
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    arguments = arguments if isinstance(arguments, Mapping) else {}
    return OfficialCheckpoint(path, state, family, _told(arguments, family), content.get("epoch"))


def read_checkpoint(path: Path) -> dict:
    """What torch has saved in a file; no code in it is run. Raises WeightsError saying what the file is instead."""
    if not path.is_file():
        raise WeightsError(f"no file {path}")
    try:
        # Official files carry the arguments of the training script, which torch would not read without being told.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path) and (fault := damage(path, ours=False)):
            raise OSError(fault)
    except Exception as error:  # torch raises whatever its reader stumbled over
        if fault_of(error):  # memory may be short
            raise
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise WeightsError(
                f"{path}: refused, as reading it would run code: it asks for {foreign[1]}, which weights do not need. "
                "If you trust it, save its state dict anew where it came from"
            ) from None
        kind = "text, perhaps a web page or a Git LFS pointer" if _is_text(path) else "damaged, or cut short"
        raise WeightsError(
            f"{path}: not readable as a checkpoint: {kind} ({path.stat().st_size} bytes); download it again"
        ) from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a checkpoint; expected names to tensors")
    return content


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(64)
    return start.lstrip().startswith((b"<", b"version https")) or (
        bool(start) and start.isascii() and b"\0" not in start
    )


def _told(arguments: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Dotted settings from the arguments of an official training script."""
    told = {
        setting: arguments[name]
        for name, setting in TOLD.items()
        if arguments.get(name) is not None and (setting not in OF_PROPOSALS or family != "detr")
    }
    if not told.get("model.deformable.rho", 1.0):
        del told["model.deformable.rho"]  # 0 was their word for a dense encoder
    return told


def official_config(checkpoint: OfficialCheckpoint, overrides: Mapping[str, Any] | None = None) -> Config:
    """The settings of an official model; `overrides` (dotted) win over what the file shows or says."""
    overrides = {name: parse_value(value) for name, value in (overrides or {}).items()}
    told = checkpoint.told | {name: value for name, value in overrides.items() if name.startswith("model.")}
    try:
        settings = settings_of(checkpoint.state, told)
    except WeightsError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from None
    if settings.get("model.classification") == "sigmoid":
        settings |= {"loss.cost_class": 2.0, "loss.weight_class": 2.0}
    try:
        return replace(load_config(overrides={"data.root": "data/coco", "data.clip": "training"}), settings | overrides)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from None


def official_source(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Source:
    """What an official file is to this library. Raises as `load_official`."""
    checkpoint = read_official(path)
    source = translated_source(checkpoint, checkpoint.path.stem, overrides)
    return replace_fields(source, names=coco_names(source.cfg.model.num_classes))


def translated_source(checkpoint: OfficialCheckpoint, label: str, overrides: Mapping[str, Any] | None = None) -> Source:
    """Entries under official names under those of this library, with the settings of their model."""
    cfg, state = official_config(checkpoint, overrides), own_state(checkpoint.state)
    source = Source(label, cfg, state, None, checkpoint.path, checkpoint.epoch or 0)
    return fitting(source, f"a {checkpoint.family} model")


def load_official(path: str | Path, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of an official file with its weights, on the CPU, in evaluation mode.

        model = load_official("detr-r50-dc5.pth", {"model.backbone.dilation": True})

    Raises WeightsError if the file is no official checkpoint or does not fit its settings, ConfigError for
    `overrides` that make no sense.
    """
    return build_source(official_source(path, overrides))


def export_official(model: nn.Module) -> State:
    """The weights of a model under official names, heads of the deformable family repeated as official files have them.

    Raises WeightsError for models that the official code has not: anchor queries, other backbones, learnable alpha
    elsewhere than in cross-attention. Alphas of a model that does not clamp them are expressed as clamped ones.
    """
    own = {name: value.detach() for name, value in model.state_dict().items()}
    strange = [
        name for name in own if re.search(r"expected_size|self_attn\.transform|\.transform\.(?!pre_alpha)", name)
    ]
    if strange:
        raise WeightsError(f"the official code has no part like {strange[0]}; write a .safetensors file instead")
    for name, module in model.named_modules():
        if isinstance(module, AlphaEntmax) and not module.clamped:
            own[f"{name}.pre_alpha"] = torch.logit(module.alpha.detach() - 1)
    if not isinstance(model, DeformableDETR):
        state = official_state(own)
    else:
        decoder = model.transformer.decoder
        heads = len(model.transformer.encoder.layers) - 1 if model.encoder_auxiliary else 0
        state = official_state(own, decoder.refine, len(decoder.layers), heads)
    try:
        backbone_settings(state)
    except WeightsError as error:
        raise WeightsError(f"model.backbone.name: {error}; write a .safetensors file instead") from None
    return state


def describe(source: Source) -> str:
    """In words, what weights are of, and the settings of their model."""
    model = build_source(source)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    family = source.cfg.model.architecture
    found = f"{family}, {len(source.state)} entries, {trained:,} parameters, all but a frozen stem's"
    return "\n".join([found, *(f"{name}: {value}" for name, value in changed_settings(source.cfg, Config()).items())])
