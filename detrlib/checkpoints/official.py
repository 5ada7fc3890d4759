"""What a state dict with official names is of: its family, and the settings of its model.

Legend: entries are the names and tensors of a state dict, "told" are settings that they do not show.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from detrlib.checkpoints.names import refines
from detrlib.config.model import DeformableOptions
from detrlib.errors import WeightsError
from detrlib.models.swin import DEPTHS, WIDTHS

BODY = "backbone.0.body."
RESNETS = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50", (True, 23): "resnet101"}
PRE_ALPHA = "transformer.decoder.layers.0.multihead_attn.pre_alpha"

# Entries that give away files of another kind: what it is, and what to do.
FOREIGN = (
    (r"detr\.", "a panoptic DETR", "its masks are not part of this library; take the file of the box model"),
    (r"linear_class\.|row_embed$", "the small demonstration of DETR", "take the file of the full model, detr-r50"),
    (
        r"model\.(backbone|encoder|decoder)\.",
        "a file of the transformers package",
        "take the official file of the same model",
    ),
    (r"(conv1|layer1|patch_embed|features)\.", "a backbone alone", "give it as model.backbone.weights"),
    (
        r".*\b(refpoint_embed)\b",
        "a file of DAB-DETR or a relative",
        "this model is not known here",
    ),
    (r".*\b(label_enc|tgt_embed)\b", "a file of DINO or DN-DETR", "this model is not known here"),
    (
        r"(roi_heads|rpn|bbox_head|neck|proposal_generator)\.",
        "another detector",
        "evaluate its detections: detrlib evaluate NAME --predictions FILE.json --data CONFIG",
    ),
    (r"backbone\.body\.", "a file of this library itself", "load the run with detrlib.engine.evaluate.load_model"),
)


def family_of(state: Mapping[str, Tensor]) -> str:
    """The family of a file by the names of its entries: "detr", "deformable" or "sparse".

    Raises WeightsError naming anything else.
    """
    if "transformer.enc_mask_predictor.layer2.4.weight" in state:
        return "sparse"
    if "transformer.level_embed" in state:
        return "deformable"
    for pattern, what, remedy in FOREIGN:
        hit = next((name for name in state if re.match(pattern, name)), None)
        if hit:
            raise WeightsError(f"this is {what} (it has {hit}); {remedy}")
    if any(name.startswith("transformer.decoder.") for name in state):
        return "detr"
    raise WeightsError(f"this is no DETR, Deformable DETR or Sparse DETR: {', '.join(list(state)[:3])}, ...")


def settings_of(state: Mapping[str, Tensor], told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Dotted settings of the model whose official entries are given, by their names and shapes.

    told: settings that entries do not show, and which are taken as they are: number of heads (8 unless told), dilation
    (DC5 has the same entries), of Sparse DETR `model.deformable.rho`, of two-stage models the number of queries (300).
    Raises WeightsError for entries of other models, or where one that must be there is missing.
    """
    told = dict(told or {})
    family = family_of(state)
    settings = {
        **backbone_settings(state),
        "model.architecture": "detr" if family == "detr" else "deformable",
        "model.encoder_layers": _count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        "model.decoder_layers": _count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        "model.hidden_dim": _shape(state, "transformer.decoder.layers.0.linear1.weight")[1],
        "model.feedforward_dim": _shape(state, "transformer.decoder.layers.0.linear1.weight")[0],
        "model.position": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        "model.num_heads": len(state[PRE_ALPHA]) if PRE_ALPHA in state else 8,
    }
    settings |= _detr_settings(state) if family == "detr" else _deformable_settings(state, told, settings)
    return settings | told


def _detr_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    settings = {
        "model.norm": "pre" if "transformer.encoder.norm.weight" in state else "post",
        "model.num_queries": _shape(state, "query_embed.weight")[0],
        "model.num_classes": _shape(state, "class_embed.weight")[0] - 1,  # the last is no-object
    }
    if "transformer.decoder.ref_point_head.layers.0.weight" in state:
        settings |= {
            "model.queries": "conditional",
            "model.classification": "sigmoid",
            "model.num_classes": _shape(state, "class_embed.weight")[0],
        }
    if PRE_ALPHA in state:
        settings |= {"model.attention.decoder_cross": "alpha_entmax", "model.compatibility.alpha_clamped": True}
    return settings


def _deformable_settings(
    state: Mapping[str, Tensor], told: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    levels = _shape(state, "transformer.level_embed")[0]
    heads = told.get("model.num_heads", known["model.num_heads"])
    if type(heads) is not int or heads < 1:
        raise WeightsError(f"model.num_heads is {heads!r}; it must be a whole number from 1")
    two_stage = "transformer.pos_trans.weight" in state
    from_memory = two_stage and _shape(state, "transformer.pos_trans.weight")[0] == known["model.hidden_dim"]
    projections = range(_count(state, r"input_proj\.(\d+)\."))
    of_stages = sum(_shape(state, f"input_proj.{number}.0.weight")[2:] == (1, 1) for number in projections)
    stages, usual = (2, 3, 4)[-of_stages:], DeformableOptions(levels=levels).backbone_stages()
    settings = {
        "model.classification": "sigmoid",
        "model.num_classes": _shape(state, "class_embed.0.weight")[0],
        "model.num_queries": 300 if two_stage else _shape(state, "query_embed.weight")[0],
        "model.deformable.levels": levels,
        "model.deformable.stages": None if stages == usual else list(stages),
        "model.deformable.refine": refines(state),
        "model.deformable.two_stage": two_stage,
        "model.deformable.query_init": "memory" if from_memory else "position",
        "model.deformable.class_specific_proposals": from_memory,
        "model.deformable.encoder_auxiliary": _count(state, r"class_embed\.(\d+)\.")
        > known["model.decoder_layers"] + 1,
    }
    for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        if known[f"model.{part}_layers"]:
            offsets = _shape(state, f"transformer.{part}.layers.0.{attention}.sampling_offsets.bias")[0]
            settings[f"model.deformable.{part}_points"] = offsets // (2 * heads * levels)
    if "transformer.enc_mask_predictor.layer2.4.weight" in state:
        if "model.deformable.rho" not in told:
            raise WeightsError(
                "a Sparse DETR whose share of kept tokens is not written in the file; say it: model.deformable.rho=0.3"
            )
        settings["model.compatibility.dam"] = "official"
    return settings


def backbone_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Dotted settings of the backbone. Raises WeightsError if it is none that this library has."""
    body = re.escape(BODY)
    if f"{BODY}patch_embed.proj.weight" in state:
        depths = tuple(_count(state, rf"{body}layers\.{stage}\.blocks\.(\d+)\.") for stage in range(len(DEPTHS)))
        width = _shape(state, f"{BODY}patch_embed.proj.weight")[0]
        if (depths, width) != (DEPTHS, WIDTHS[0]):
            raise WeightsError(
                f"its backbone is a Swin Transformer, but not Swin-T (blocks {depths}, {width} channels)"
            )
        name = "swin_t"
    else:
        bottleneck = f"{BODY}layer1.0.conv3.weight" in state
        blocks = _count(state, rf"{body}layer3\.(\d+)\.")
        if (bottleneck, blocks) not in RESNETS:
            raise WeightsError(
                f"its backbone is none of {', '.join(RESNETS.values())}, swin_t (third stage of {blocks} blocks)"
            )
        name = RESNETS[bottleneck, blocks]
    return {
        "model.backbone.name": name,
        "model.backbone.weights": "none",  # they are in the file
        "model.backbone.freeze_stem": True,
    }


def _count(state: Iterable[str], pattern: str) -> int:
    """How many numbers, from 0, the first group of `pattern` takes at the beginning of names."""
    return 1 + max((int(match[1]) for match in (re.match(pattern, name) for name in state) if match), default=-1)


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise WeightsError(f"an incomplete checkpoint: it has no {name}")
    return tuple(state[name].shape)
