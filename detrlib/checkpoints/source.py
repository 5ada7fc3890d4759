"""Weights as this library has them, wherever they come from: with the settings of their model and names of classes."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from detrlib.checkpoints.names import State
from detrlib.config import Config
from detrlib.errors import WeightsError, listed
from detrlib.files import load_weights, weight_faults, write_atomic
from detrlib.models.build import build_model, set_alphas

CHECKSUM = "detrlib.crc32"  # among the metadata of a safetensors file
COCO_LABELS = 91  # category ids of COCO run to 90, eleven of them without a class


@dataclass(frozen=True)
class Source:
    """Weights of a model and what is needed to build and to use it; made by `runs.sources.open_source`."""

    label: str  # a short name, for figures
    cfg: Config
    state: State  # under the names of this library
    names: dict[int, str] | None  # label -> name of its class; None: not known
    path: Path  # the file, for messages
    epoch: int = 0  # how long it was trained


def build_source(source: Source) -> nn.Module:
    """The model of a source with its weights, on the CPU, in evaluation mode, alphas that are annealed as they were.

    Raises RunError naming the file if its weights are of another architecture than its settings.
    """
    model = _without_memory(source)  # random weights would only be overwritten
    if next(model.parameters()).is_meta:
        model = model.to_empty(device="cpu")
    load_weights(model, source.state, source.path)
    set_alphas(model, source.cfg.model.annealed_alphas(source.epoch))
    return model.eval()


def write_tensors(path: Path, state: State, metadata: Mapping[str, str]) -> None:
    """A safetensors file with a checksum among its metadata, written atomically."""
    told = {**metadata, CHECKSUM: _checksum(state, metadata)}
    write_atomic(path, lambda temporary: save_file(state, temporary, told))


def read_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """Entries and metadata of a safetensors file. Raises WeightsError naming it when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged, or cut short ({error}); download it again") from None
    known = metadata.pop(CHECKSUM, None)
    if known not in (None, _checksum(state, metadata)):
        raise WeightsError(f"{path}: damaged: it does not hold what was written; export or download it again")
    return state, metadata


def _checksum(state: State, metadata: Mapping[str, str]) -> str:
    crc = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(state):
        entry = state[name]
        crc = zlib.crc32(f"{name} {entry.dtype} {list(entry.shape)}".encode(), crc)
        crc = zlib.crc32(entry.contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def fitting(source: Source, what: str) -> Source:
    """The same source. Raises WeightsError, in which it is `what`, if its weights and settings do not fit."""
    faults = weight_faults(_without_memory(source).state_dict(), source.state)
    if faults:
        raise WeightsError(f"{source.path}: does not fit {what} of its sizes: {listed(faults, 4, '; ')}")
    return source


def _without_memory(source: Source) -> nn.Module:
    """The model of a source; those of transformers are built as they are, since they compute some of what they hold."""
    with torch.device("cpu" if source.cfg.model.architecture == "huggingface" else "meta"):
        return build_model(source.cfg.model, backbone_weights="none")


def coco_names(num_classes: int | None) -> dict[int, str] | None:
    """Names of COCO's classes by category id, for models that have as many labels as COCO's ids; None for others."""
    if num_classes != COCO_LABELS:
        return None
    names = torchvision.models.get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"]
    return {label: name for label, name in enumerate(names) if label and name != "N/A"}
