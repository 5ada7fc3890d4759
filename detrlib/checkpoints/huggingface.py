"""Models in the layout of Hugging Face transformers: a folder with config.json and weights, in and out.

Names and numbers are translated to official ones and back, so that everything else is done for both alike (`files`).
transformers itself is not needed, and no code from a folder is run.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from detrlib.checkpoints.files import OfficialCheckpoint, export_official, read_checkpoint, translated_source
from detrlib.checkpoints.huggingface_names import OLDER, THEIR_BODY, pairs_of, translated
from detrlib.checkpoints.names import State
from detrlib.checkpoints.official import family_of
from detrlib.checkpoints.source import Source, build_source, read_tensors, write_tensors
from detrlib.config import Config, Deformable, flat_settings
from detrlib.config.huggingface import PREPROCESSOR, RESNETS, WEIGHTS, read_json
from detrlib.data.augment import LONGEST, MEAN, PAPER_SIZE, STD
from detrlib.data.classes import names_by_label
from detrlib.errors import WeightsError
from detrlib.files import write_json

# model_type there: family of names, and class of models
FAMILIES = {
    "detr": ("detr", "DetrForObjectDetection"),
    "conditional_detr": ("conditional", "ConditionalDetrForObjectDetection"),
    "deformable_detr": ("deformable", "DeformableDetrForObjectDetection"),
}

# What models of transformers always are.
ONLY = {
    "model.norm": "post",
    "model.queries": "learned",
    "model.classification": "softmax",
    "model.position_temperature": 10000.0,
    "model.attention.encoder_self": "softmax",
    "model.attention.decoder_self": "softmax",
    "model.attention.decoder_cross": "softmax",
    "model.attention.null_key": "none",
    "model.attention.gate": "none",
    "model.attention.differential": False,
    "model.polling.ratio": None,
    "model.registers": 0,
    "model.deformable.rho": 1.0,
    "model.deformable.query_init": "position",
    "model.deformable.class_specific_proposals": False,
    "model.deformable.encoder_auxiliary": False,
    "model.backbone.dilation": False,  # which its own ResNets have not
}
CONDITIONAL = {"model.queries": "conditional", "model.classification": "sigmoid"}  # but of Conditional DETR
PROJECTION = re.compile(r"(.+_attn\.)([qkv])_proj\.(weight|bias)")


# In


def huggingface_source(folder: Path, overrides: Mapping[str, Any] | None = None) -> Source:
    """What a folder of Hugging Face's is to this library. Raises as `read_huggingface` and `load_official`."""
    checkpoint, names = read_huggingface(folder)
    return replace(translated_source(checkpoint, folder.name, overrides), names=names)


def read_huggingface(folder: Path) -> tuple[OfficialCheckpoint, dict[int, str] | None]:
    """What a folder holds, under official names, and the names of its classes by label, if it knows them.

    Raises WeightsError naming the file that is missing, damaged, or of a model that this library has not.
    """
    path, config = folder / "config.json", read_json(folder / "config.json")
    family, _ = FAMILIES.get(config.get("model_type"), (None, None))
    if family is None:
        known = ", ".join(FAMILIES)
        raise WeightsError(f"{path}: model_type is {config.get('model_type')!r}; of Hugging Face's, {known} are known")
    _check(path, config)
    weights, state = read_weights(folder)
    state = _official(state, family, weights)
    if config.get("with_box_refine") and not config.get("two_stage"):
        for layer in range(config.get("decoder_layers", 6)):  # saved once where all layers' are one
            for kind in ("weight", "bias"):
                state.setdefault(f"class_embed.{layer}.{kind}", state[f"class_embed.0.{kind}"])
    return OfficialCheckpoint(weights, state, family_of(state), _told(folder, config), None), class_names(path, config)


def _check(path: Path, config: Mapping[str, Any]) -> None:
    """Raise WeightsError for settings that give other numbers than this library's models."""
    body = config.get("backbone_config") or {}
    if not isinstance(body, dict):
        raise WeightsError(f"{path}: backbone_config is {body!r:.80}; expected settings of a backbone")
    expected = (
        ("activation_function", config.get("activation_function", "relu"), ("relu",)),
        ("backbone_config.hidden_act", body.get("hidden_act", "relu"), ("relu",)),
        ("backbone_config.downsample_in_first_stage", body.get("downsample_in_first_stage", False), (False,)),
        ("backbone_config.downsample_in_bottleneck", body.get("downsample_in_bottleneck", False), (False,)),
        ("encoder_attention_heads", config.get("encoder_attention_heads"), (config.get("decoder_attention_heads"),)),
    )
    for name, value, possible in expected:
        if value not in possible:
            raise WeightsError(f"{path}: {name} is {value!r}; models here have {possible[0]!r}")


def read_weights(folder: Path) -> tuple[Path, State]:
    """The file of weights in a folder, and its entries. Raises WeightsError where it is missing or damaged."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"{folder}: has neither {' nor '.join(WEIGHTS)}")
    return path, _entries(path)


def _entries(path: Path) -> State:
    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    return read_tensors(path)[0]


def _official(state: State, family: str, path: Path) -> State:
    """Entries under official names; what projects queries, keys and values of an attention is one matrix there."""
    pairs = pairs_of(family, resnet=any(name.startswith(f"{THEIR_BODY}embedder.") for name in state))
    state = {translated(translated(name, OLDER), pairs): value for name, value in state.items()}
    for name in list(state):
        if name.startswith(("transformer.decoder.class_", "transformer.decoder.bbox_")):
            state.setdefault(name.removeprefix("transformer.decoder."), state[name])  # saved once where two share it
    official: State = {}
    for name, value in state.items():
        if not (parts := PROJECTION.fullmatch(name)):
            official[name] = value
            continue
        place, _, kind = parts.groups()
        names = [f"{place}{letter}_proj.{kind}" for letter in "qkv"]
        if missing := [name for name in names if name not in state]:
            raise WeightsError(f"{path}: an incomplete file: it has no {missing[0]}")
        official.setdefault(f"{place}in_proj_{kind}", torch.cat([state[name] for name in names]))
    return official


def _told(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings that entries do not show."""
    queries = "two_stage_num_proposals" if config.get("two_stage") else "num_queries"
    dilation = config.get("dilation") or (config.get("backbone_config") or {}).get("output_stride") == 16
    told = {
        "model.num_heads": config.get("encoder_attention_heads"),
        "model.num_queries": config.get(queries),
        "model.dropout": config.get("dropout"),
        "model.backbone.dilation": bool(dilation),
    }
    if (folder / PREPROCESSOR).is_file():
        size = read_json(folder / PREPROCESSOR).get("size")
        told["data.image_size"] = size.get("shortest_edge") if isinstance(size, dict) else size
    return {name: value for name, value in told.items() if value is not None}


def class_names(path: Path, config: Mapping[str, Any]) -> dict[int, str] | None:
    """Names of classes by label, unless they are numbered only; labels without a class are called N/A there."""
    names = names_by_label(config.get("id2label", {}), path)
    if all(name == f"LABEL_{label}" for label, name in names.items()):
        return None
    return {label: name for label, name in names.items() if name != "N/A"}


# Out


def write_huggingface(source: Source, folder: Path) -> None:
    """Write a folder that `from_pretrained` of transformers loads: config.json, weights, and how images are prepared.

    Raises WeightsError naming the setting for models that transformers has not.
    """
    config = their_config(source)
    model = build_source(source)
    family, _ = FAMILIES[config["model_type"]]
    pairs = [(official, theirs) for theirs, official in pairs_of(family)]
    state: State = {}
    for name, value in export_official(model).items():
        name, value = translated(name, pairs), value.clone().contiguous()  # a head that has two names is saved twice
        if "in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        else:
            state[name] = value
    write_tensors(folder / WEIGHTS[0], state, {"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / PREPROCESSOR, preprocessor(source.cfg))


def their_config(source: Source) -> dict[str, Any]:
    """What config.json says of a model. Raises WeightsError naming the setting that no model of transformers has."""
    settings, model = flat_settings(source.cfg), source.cfg.model
    deformable = model.architecture == "deformable"
    conditional = not deformable and model.queries == "conditional"
    for name, value in (ONLY | CONDITIONAL if conditional else ONLY).items():
        if settings.get(name, value) != value:
            raise WeightsError(
                f"transformers has no model with {name} {settings[name]}, only with {value}; write a .safetensors file"
            )
    if model.backbone.name not in RESNETS:
        raise WeightsError(
            f"model.backbone.name {model.backbone.name} is not written for transformers, only {', '.join(RESNETS)}; "
            "write a .safetensors file"
        )
    kind = "conditional_detr" if conditional else "deformable_detr" if deformable else "detr"
    stages = model.deformable.backbone_stages() if deformable else (4,)
    layer, widths, depths = RESNETS[model.backbone.name]
    names = source.names or {label: f"LABEL_{label}" for label in range(model.num_classes)}
    labels = {label: names.get(label, "N/A") for label in range(model.num_classes)}
    config = {
        "model_type": kind,
        "architectures": [FAMILIES[kind][1]],
        "d_model": model.hidden_dim,
        "encoder_layers": model.encoder_layers,
        "decoder_layers": model.decoder_layers,
        "encoder_attention_heads": model.num_heads,
        "decoder_attention_heads": model.num_heads,
        "encoder_ffn_dim": model.feedforward_dim,
        "decoder_ffn_dim": model.feedforward_dim,
        "num_queries": model.num_queries,
        "dropout": model.dropout,
        "attention_dropout": model.dropout,
        "position_embedding_type": model.position,
        "use_timm_backbone": False,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 64,
            "layer_type": layer,
            "hidden_sizes": widths,
            "depths": depths,
            "out_features": [f"stage{stage}" for stage in stages],
        },
        "id2label": {str(label): name for label, name in labels.items()},
        "label2id": {name: label for label, name in labels.items()},
    }
    return config | (_sampling(model) if deformable else {})


def _sampling(model: Deformable) -> dict[str, Any]:
    chosen = model.deformable
    return {
        "num_feature_levels": chosen.levels,
        "encoder_n_points": chosen.encoder_points,
        "decoder_n_points": chosen.decoder_points,
        "with_box_refine": chosen.refine,
        "two_stage": chosen.two_stage,
        "two_stage_num_proposals": model.num_queries,
        "tie_word_embeddings": not chosen.refine,  # whether layers share their heads
    }


def preprocessor(cfg: Config) -> dict[str, Any]:
    """How images are prepared, as transformers' image processors read it."""
    size = cfg.data.image_size
    return {
        "image_processor_type": "DetrImageProcessor",
        "size": {"shortest_edge": size, "longest_edge": round(LONGEST * size / PAPER_SIZE)},
        "image_mean": MEAN,
        "image_std": STD,
    }
