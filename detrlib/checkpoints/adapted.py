"""Detectors of transformers that stay as they are (`models.huggingface`): from a folder of Hugging Face's, and back.

transformers reads and writes them, names of its older versions included. What it would ask timm for, the ResNets of
early DETR, is given to its own.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from detrlib.checkpoints.huggingface import class_names, preprocessor, read_weights
from detrlib.checkpoints.huggingface_names import BODY, RESNET, THEIR_BODY, translated
from detrlib.checkpoints.names import State
from detrlib.checkpoints.source import Source, build_source
from detrlib.config import load_config
from detrlib.config.attention import SiteName
from detrlib.config.huggingface import PREPROCESSOR, SQUARE, complete, read_json
from detrlib.errors import ConfigError, WeightsError, listed
from detrlib.files import write_json
from detrlib.models.build import build_model

logger = logging.getLogger(__name__)
TIMM_BODY = f"{THEIR_BODY}_backbone."  # beside THEIR_BODY alone, in older files
FROM_OURS = tuple((ours, theirs) for theirs, ours in RESNET)


def adapted_source(folder: Path, overrides: Mapping[str, Any] | None = None) -> Source:
    """What a folder of Hugging Face's is to this library, the model as transformers has it.

    Args:
        folder: with config.json and weights.
        overrides: dotted settings, such as {"data.image_size": 640}.

    Raises:
        WeightsError: names the file that is missing, damaged, incomplete, or of a model of another kind.
        ConfigError: transformers is not there, or `overrides` make no sense.
    """
    path, config = folder / "config.json", read_json(folder / "config.json")
    options = complete(str(folder), None, {})
    settings = {"model.architecture": "huggingface", "model.type": options.pop("type")}
    settings |= {f"model.options.{name}": value for name, value in options.items()}
    # transformers has two classes where nothing is said, and COCO's 91 in early files of DETR.
    settings["model.num_classes"] = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    settings |= _sizes(folder)
    if settings["model.type"] != "detr":
        settings |= {"loss.cost_class": 2.0, "loss.weight_class": 2.0}  # of focal losses
    cfg = load_config(overrides={"data.root": "data/coco"} | settings | dict(overrides or {}))
    weights = read_weights(folder)
    return Source(folder.name, cfg, _state(cfg, *weights), class_names(path, config), weights[0])


def _sizes(folder: Path) -> dict[str, int]:
    """Sizes of images, as they were prepared for the model."""
    size = read_json(folder / PREPROCESSOR).get("size") if (folder / PREPROCESSOR).is_file() else None
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    shorter, square = size.get("shortest_edge"), size.get("height")
    both = {"data.image_size": shorter or square, "model.square": square if square == size.get("width") else None}
    return {name: value for name, value in both.items() if value}


def _state(cfg: Any, path: Path, state: State) -> State:
    """The entries of a file under the names of today, of which transformers knows the older ones."""
    theirs = build_model(cfg.model).model
    unused = re.compile(r".*denoising_class_embed|.*conv_encoder.*num_batches_tracked")  # see models.huggingface
    state = {_without_timm(name): value for name, value in state.items() if not unused.match(name)}
    try:
        loaded, found = type(theirs).from_pretrained(
            None, config=theirs.config, state_dict=state, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{path}: does not fit its config.json: {' '.join(str(error).split())[:300]}") from None
    if missing := sorted(name for name in found["missing_keys"] if not name.endswith("num_batches_tracked")):
        raise WeightsError(f"{path}: does not fit its config.json, or is cut short: it has no {listed(missing, 4)}")
    return {f"model.{name}": value for name, value in loaded.state_dict().items()}


def _without_timm(name: str) -> str:
    """The name of an entry in transformers' own ResNet, of one that is timm's."""
    for body in (TIMM_BODY, THEIR_BODY):
        if name.startswith(body) and not name.startswith((f"{body}embedder.", f"{body}encoder.")):
            return translated(BODY + name.removeprefix(body), FROM_OURS)
    return name


def write_adapted(source: Source, folder: Path) -> None:
    """Write a folder that `from_pretrained` of transformers loads. Transforms are put in again by `use`.

    Raises ConfigError where some have learned, of which transformers keeps nothing.
    """
    theirs, model = build_source(source).model, source.cfg.model
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    if learned := [name for name in state if ".transform." in name]:
        raise ConfigError(f"transformers keeps no {learned[0]}, which was learned; write a .safetensors file instead")
    names = source.names or {label: f"LABEL_{label}" for label in range(model.num_classes)}
    theirs.config.id2label = {label: names.get(label, "N/A") for label in range(model.num_classes)}
    theirs.config.label2id = {name: label for label, name in theirs.config.id2label.items()}
    theirs.save_pretrained(folder)
    prepared = preprocessor(source.cfg)
    if model.kind in SQUARE:
        size = {"height": model.square, "width": model.square}
        prepared |= {"image_processor_type": "RTDetrImageProcessor", "size": size, "do_normalize": False}
    write_json(folder / PREPROCESSOR, prepared)
    used = {site: model.transform_at(site) for site in get_args(SiteName)}
    used = {site: name for site, name in used.items() if name not in ("softmax", "deformable")}
    used |= {f"null_key at {site}": key for site in get_args(SiteName) if (key := model.null_key_at(site)) != "none"}
    if used:
        logger.warning("transformers has softmax only: after from_pretrained, put in %s by huggingface.use", used)
