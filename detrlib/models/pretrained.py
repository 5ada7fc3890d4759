"""Weights of a backbone, from torchvision or from the files that people have of them, under torchvision's names.

The numbers in both forms of a Swin Transformer mean the same: tables of position biases and the order in which patches
are merged agree.
"""

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from detrlib.errors import WeightsError, fault_of, listed
from detrlib.files import damage, weight_faults

State = dict[str, Tensor]

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
CLASSIFIER = {f"{part}.{kind}" for part in ("fc", "norm", "head") for kind in ("weight", "bias")}


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights, downloaded once. Raises WeightsError with a remedy when there are none."""
    if name not in (*RESNETS, "swin_t"):
        raise WeightsError(f"there are no ImageNet weights for '{name}'; set model.backbone.weights to none or crops")
    try:
        return torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # the latter for a file whose hash is wrong
        raise WeightsError(
            f"could not download the ImageNet weights of {name} ({error}). Offline, set model.backbone.weights to the "
            "path of a downloaded state dict, to 'crops' (pretrained on the data at hand) or to 'none'."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a local file, also an official one; no code in it is run. Raises WeightsError naming it."""
    if not path.is_file():
        raise WeightsError(f"model.backbone.weights: no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        fault = damage(path, ours=False) if zipfile.is_zipfile(path) else ""
    except Exception as error:  # torch has many, whose words tell how to let code in a file run
        if fault_of(error):  # memory may be short
            raise
        fault = "cut short, or no tensors but code, which is not run"
    if fault:
        raise WeightsError(f"{path}: not readable as weights: {fault}; download it again")
    state = backbone_entries(state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: expected a state dict (names to tensors) of a backbone")
    return state


def load_backbone_weights(body: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy a classifier's weights into `body`, leaving out its head and batch counters; anything else must fit.

    Norms of stages, which classifiers have not, stay as they are.
    """
    state = {
        name: value
        for name, value in state.items()
        if name not in CLASSIFIER and not name.endswith("num_batches_tracked")
    }
    own = body.state_dict()
    state = {name: value for name, value in own.items() if re.match(r"norm\d", name)} | state
    faults = weight_faults(own, state)
    if faults:
        raise WeightsError(f"{source}: weights of another backbone: {listed(faults, 4, '; ')}")
    body.load_state_dict(state)


TOKEN_PAIRS = "relative_position_index"  # of a window's tokens: a table in official files, in one row in torchvision
SCRL = "online_network_state_dict"  # where SCRL's files keep the network that others take over
SCRL_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# Parts of names of a Swin Transformer: official, torchvision's, which numbers stages and mergers in one row.
SWIN_NAMES = (
    ("patch_embed.proj.", "features.0.0."),
    ("patch_embed.norm.", "features.0.2."),
    *((f"layers.{stage}.blocks.", f"features.{2 * stage + 1}.") for stage in range(4)),
    *((f"layers.{stage}.downsample.", f"features.{2 * stage + 2}.") for stage in range(3)),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.3."),
)


def renamed(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    """`name` with `before` of each (before, after) replaced by `after`, where it begins a part between dots."""
    for before, after in replacements:
        name = re.sub(rf"(^|(?<=\.)){re.escape(before)}", after, name)
    return name


def backbone_entries(content: dict) -> dict:
    """Weights of a backbone under torchvision's names, from the files that people have of them.

    Knows SCRL's (an encoder with numbered parts), classifiers kept under "model" or "state_dict", and official Swin
    Transformers (whose masks are made anew for every image size); any other content is returned as it is.
    """
    if SCRL in content:
        parts = {name: re.match(r"(?:module\.)?encoder\.(\d+)\.", name) for name in content[SCRL]}
        return {
            f"{SCRL_PARTS[match[1]]}.{name[match.end() :]}": content[SCRL][name]
            for name, match in parts.items()
            if match and match[1] in SCRL_PARTS
        }
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if "patch_embed.proj.weight" not in content:
        return content
    return {
        renamed(name, SWIN_NAMES): value.flatten() if name.endswith(TOKEN_PAIRS) else value
        for name, value in content.items()
        if not name.endswith("attn_mask")
    }
