"""Official models: their settings and what is published of them; small ones of each kind, and files of them."""

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

from detrlib.checkpoints.source import Source
from detrlib.config import Config, replace
from detrlib.models import build_model

OFFICIAL_BACKBONE = {
    "model.backbone.weights": "none",
    "model.backbone.freeze_stem": True,
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
    "model.deformable.dam": "official",
}
SWIN = {"model.backbone.name": "swin_t"}
THESIS = COCO | {"model.norm": "pre"}
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

# Small models with every number its own
R18 = {"name": "resnet18", "weights": "none", "freeze_stem": True}
CHOICES = {
    "detr": {},
    "detr-pre-norm": {"norm": "pre"},
    "detr-learned": {"position": "learned"},
    "conditional": {"queries": "conditional", "classification": "sigmoid"},
    "alpha": {"attention": {"decoder_cross": "alpha_entmax", "alpha_clamped": True}},
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
        "dam": "official",
    },
}
CHOICES |= {
    name: {"architecture": "deformable", "classification": "sigmoid", "deformable": chosen, "num_queries": 7}
    for name, chosen in FAMILY.items()
}
SMALL = {
    "model.backbone": {"name": "resnet18", "weights": "none", "freeze_stem": True},
    "model.hidden_dim": 32,
    "model.num_heads": 4,
    "model.encoder_layers": 2,
    "model.decoder_layers": 3,
    "model.feedforward_dim": 48,
    "model.num_queries": 7,
    "model.num_classes": 5,
    "model.dropout": 0.2,
    "data.image_size": 640,
}
CLASSES = {1: "cat", 2: "dog", 4: "cup"}
TOLD = {
    "model.num_heads": 4,
    "model.dropout": 0.1,
}


@pytest.fixture(params=MODELS)
def published(request):
    """Settings of a published model, entries of its file, its trainable parameters, and what the file cannot tell."""
    return MODELS[request.param]


@pytest.fixture(scope="session")
def source_of(randomise):
    def source_of(chosen: dict, names: dict | None = CLASSES) -> Source:
        """Random weights of a small model with `chosen` settings, whose queries differ."""
        torch.manual_seed(0)
        cfg = replace(Config(), SMALL | chosen)
        model = build_model(cfg.model)
        randomise(model)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "query_" in name:
                    value.mul_(5)
        return Source("small", cfg, model.state_dict(), names, Path("small.pt"), 12)

    return source_of


@pytest.fixture(scope="session")
def without_memory():
    def without_memory(model: str | dict) -> nn.Module:
        """A model at full size, by its name or settings, without memory behind its parameters."""
        with torch.device("meta"):
            return build_model(replace(Config(), MODELS[model][0] if isinstance(model, str) else model).model)

    return without_memory


@pytest.fixture(scope="session")
def of_small(small):
    def of_small(name: str) -> tuple[nn.Module, dict]:
        """A small official-style model, and what its file would not tell."""
        told = dict(TOLD)
        if name in ("two-stage", "efficient", "sparse"):
            told["model.num_queries"] = 7
        if name == "sparse":
            told["model.deformable.rho"] = 0.3
        return small(backbone=R18, **CHOICES[name]), told

    return of_small


@pytest.fixture(params=CHOICES)
def every_small(request, of_small):
    """A small official-style model of every kind, and what its file would not tell."""
    return of_small(request.param)


@pytest.fixture(scope="session")
def official_file():
    def official_file(path, state: dict, **arguments):
        torch.save(
            {"model": state, "epoch": 3, "args": argparse.Namespace(**arguments), "optimizer": {"state": {}}}, path
        )
        return path

    return official_file
