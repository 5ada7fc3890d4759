"""Official models: their settings, what is published of them, the names in their files, and small ones of each kind."""

import argparse

import torch
from small import small
from torch import nn

from detrlib.config import Config, replace
from detrlib.models import build_model

OFFICIAL_BACKBONE = {
    "model.backbone.weights": "none",
    "model.backbone.freeze_stem": True,
    "model.backbone.mask_padding": False,
}
COCO = {"model.num_classes": 91} | OFFICIAL_BACKBONE
DEFORMABLE = COCO | {
    "model.architecture": "deformable",
    "model.classification": "sigmoid",
    "model.num_queries": 300,
    "model.feedforward_dim": 1024,
}
TWO_STAGE = DEFORMABLE | {"model.deformable.refine": True, "model.deformable.two_stage": True}
EFFICIENT = TWO_STAGE | {
    "model.deformable.query_init": "memory",
    "model.deformable.class_specific_proposals": True,
}
SPARSE = EFFICIENT | {
    "model.deformable.rho": 0.1,
    "model.deformable.encoder_auxiliary": True,
    "model.deformable.token_scores": "official",
    "model.deformable.dam": "official",
}
SWIN = {"model.backbone.name": "swin_t"}
THESIS = COCO | {"model.norm": "pre", "model.attention.padding": "add_one"}
ALPHA = THESIS | {"model.attention.decoder_cross": "alpha_entmax", "model.attention.alpha_clamped": True}

# settings, entries of the official file, trainable parameters, and what the file cannot tell
MODELS = {
    "detr-r50": (COCO, 458, 41_302_368, {}),
    "detr-r50-dc5": (COCO | {"model.backbone.dilation": True}, 458, 41_302_368, {"model.backbone.dilation": True}),
    "detr-r101": (COCO | {"model.backbone.name": "resnet101"}, None, 60_242_272, {}),
    "detr-r18": (COCO | {"model.backbone.name": "resnet18"}, None, 28_686_688, {}),
    "detr-pre-norm": (COCO | {"model.norm": "pre"}, 460, 41_302_880, {}),
    "detr-learned-position": (COCO | {"model.position": "learned"}, 460, 41_315_168, {}),
    "thesis-alpha": (ALPHA, 466, 41_302_928, {}),
    "deformable": (DEFORMABLE, 561, 39_847_265, {}),
    "deformable-refine": (DEFORMABLE | {"model.deformable.refine": True}, 597, 40_627_260, {}),
    "deformable-two-stage": (TWO_STAGE, 630, 40_959_129, {}),
    "deformable-single-scale": (DEFORMABLE | {"model.deformable.levels": 1}, None, 33_844_193, {}),
    "efficient": (EFFICIENT, None, 40_827_289, {}),
    "sparse": (SPARSE, 760, 41_714_805, {"model.deformable.rho": 0.1}),
    "detr-swin-t": (COCO | SWIN, None, 44_957_444, {}),
    "deformable-swin-t": (DEFORMABLE | SWIN, None, 40_308_613, {}),
    "deformable-swin-t-two-stage": (TWO_STAGE | SWIN, None, 41_420_477, {}),
    "sparse-swin-t": (SPARSE | SWIN, 682, 42_176_153, {"model.deformable.rho": 0.1}),
}


def without_memory(settings: dict) -> nn.Module:
    with torch.device("meta"):
        return build_model(replace(Config(), settings).model)


# Names


def both(*modules: str) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def official_detr_names(pre_norm: bool = False, learned_position: bool = False) -> set[str]:
    """Entries of an official DETR R50 checkpoint."""

    def norm(module: str) -> list[str]:
        return [*both(module), f"{module}.running_mean", f"{module}.running_var"]

    def attention(module: str) -> list[str]:
        return [f"{module}.in_proj_weight", f"{module}.in_proj_bias", *both(f"{module}.out_proj")]

    names = ["query_embed.weight", *both("class_embed", *(f"bbox_embed.layers.{i}" for i in range(3)))]
    names += both("input_proj", "transformer.decoder.norm")
    for i in range(6):
        encoder, decoder = f"transformer.encoder.layers.{i}", f"transformer.decoder.layers.{i}"
        names += attention(f"{encoder}.self_attn")
        names += both(*(f"{encoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2")))
        names += attention(f"{decoder}.self_attn") + attention(f"{decoder}.multihead_attn")
        names += both(*(f"{decoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2", "norm3")))
    body = "backbone.0.body"
    names += [f"{body}.conv1.weight", *norm(f"{body}.bn1")]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            place = f"{body}.layer{stage}.{block}"
            for i in (1, 2, 3):
                names += [f"{place}.conv{i}.weight", *norm(f"{place}.bn{i}")]
        names += [f"{body}.layer{stage}.0.downsample.0.weight", *norm(f"{body}.layer{stage}.0.downsample.1")]
    if pre_norm:
        names += both("transformer.encoder.norm")
    if learned_position:
        names += ["backbone.1.row_embed.weight", "backbone.1.col_embed.weight"]
    assert len(names) == len(set(names))
    return set(names)


def official_deformable_names(refine: bool = False, two_stage: bool = False, sparse: bool = False) -> set[str]:
    """Entries of an official file of Deformable DETR R50; `sparse`: of Sparse DETR with auxiliary encoder heads."""
    names = {name for name in official_detr_names() if name.startswith("backbone")} | {"transformer.level_embed"}
    for i in range(4):
        names |= both(f"input_proj.{i}.0", f"input_proj.{i}.1")
    deformable = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    for i in range(6):
        encoder, decoder = f"transformer.encoder.layers.{i}", f"transformer.decoder.layers.{i}"
        names |= both(*(f"{encoder}.self_attn.{part}" for part in deformable))
        names |= both(*(f"{decoder}.cross_attn.{part}" for part in deformable))
        names |= both(*(f"{encoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2")))
        names |= both(*(f"{decoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2", "norm3")))
        names |= {f"{decoder}.self_attn.in_proj_weight", f"{decoder}.self_attn.in_proj_bias"}
        names |= both(f"{decoder}.self_attn.out_proj")

    def heads(kind: str, place: str, count: int) -> set[str]:
        parts = [""] if kind == "class" else [f".layers.{j}" for j in range(3)]
        return both(*(f"{place}{kind}_embed.{i}{part}" for i in range(count) for part in parts))

    count = 6 + two_stage + 5 * sparse
    names |= heads("class", "", count) | heads("bbox", "", count)
    if refine:
        names |= heads("bbox", "transformer.decoder.", count)
    if two_stage:
        names |= heads("class", "transformer.decoder.", count)
        names |= both(*(f"transformer.{part}" for part in ("enc_output", "enc_output_norm")))
        names |= both("transformer.pos_trans", "transformer.pos_trans_norm")
    else:
        names |= both("transformer.reference_points") | {"query_embed.weight"}
    if sparse:
        names |= heads("class", "transformer.encoder.", 5) | heads("bbox", "transformer.encoder.", 5)
        scoring = "transformer.enc_mask_predictor"
        names |= both(*(f"{scoring}.{part}" for part in ("layer1.0", "layer1.1", "layer2.0", "layer2.2", "layer2.4")))
    return names


def official_swin_names() -> set[str]:
    """Entries of an official Swin-T without its classifier and masks: 181."""
    names = both("patch_embed.proj", "patch_embed.norm")
    for stage, depth in enumerate((2, 2, 6, 2)):
        for place in (f"layers.{stage}.blocks.{i}" for i in range(depth)):
            names |= both(*(f"{place}.{part}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj")))
            names |= both(f"{place}.mlp.fc1", f"{place}.mlp.fc2")
            names |= {f"{place}.attn.relative_position_bias_table", f"{place}.attn.relative_position_index"}
        if stage < 3:
            place = f"layers.{stage}.downsample"
            names |= both(f"{place}.norm") | {f"{place}.reduction.weight"}
    assert len(names) == 181
    return names


# Small models with every number its own, and files of them


R18 = {"name": "resnet18", "weights": "none", "freeze_stem": True, "mask_padding": False}
CHOICES = {
    "detr": {},
    "detr-pre-norm": {"norm": "pre"},
    "detr-learned": {"position": "learned"},
    "alpha": {"attention": {"decoder_cross": "alpha_entmax", "alpha_clamped": True, "padding": "add_one"}},
}
FAMILY = {
    "plain": {"levels": 3, "encoder_points": 2, "decoder_points": 3},
    "one-level": {"levels": 1},
    "refine": {"levels": 2, "refine": True},
    "two-stage": {"levels": 4, "refine": True, "two_stage": True},
    "efficient": {"refine": True, "two_stage": True, "query_init": "memory", "class_specific_proposals": True},
    "sparse": {
        "refine": True,
        "two_stage": True,
        "query_init": "memory",
        "class_specific_proposals": True,
        "encoder_auxiliary": True,
        "rho": 0.3,
        "token_scores": "official",
        "dam": "official",
    },
}
CHOICES |= {
    name: {"architecture": "deformable", "classification": "sigmoid", "deformable": chosen, "num_queries": 7}
    for name, chosen in FAMILY.items()
}
TOLD = {
    "model.num_heads": 4,
    "model.dropout": 0.1,
}


def of_small(name: str) -> tuple[nn.Module, dict]:
    """A small official-style model, and what its file would not tell."""
    told = dict(TOLD)
    if name in ("two-stage", "efficient", "sparse"):
        told["model.num_queries"] = 7
    if name == "sparse":
        told["model.deformable.rho"] = 0.3
    return small(backbone=R18, **CHOICES[name]), told


def official_file(path, state: dict, **arguments):
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(**arguments), "optimizer": {"state": {}}}, path)
    return path
