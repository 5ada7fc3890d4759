"""What published models cost by our count, beside the numbers of their papers.

    published_costs()

Published numbers can be derived term by term, since the tools behind them are public (`PUBLISHED` names tool and size):

- DETR's tool also counts elementwise operations, of which those of a softmax matter (`DETR_TOOL`), over the first 100
  validation images of COCO. One image of 850 x 1040 stands in for their mean in Sparse DETR's code; it gives 86 and
  187 G within 1.1 %.
- Sparse DETR's tool is fvcore, which counts 5 for every element of a norm (`FVCORE`) and nothing for a softmax. With
  850 x 1040 it gives the four dense deformable models to 0.05 %. The code of that paper also runs the box heads of the
  decoder twice when boxes are refined, 0.24 G that we do not spend (`again`).
- The sparse models and DETR with Swin-T were counted on another image. By their slope, 7.55 G for 10 % of the tokens,
  it has 4 % fewer tokens: 800 x 1066, the commonest shape of COCO, gives all eleven to 0.05 %. (On 850 x 1040 they
  would cost 3 to 4 % more.) The tool prints the mean over 100 images but returns the count of the last one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from detrlib.config import Config, replace
from detrlib.experiments.costs import ATEN, PUBLISHED_SIZE, count_flops, count_parameters
from detrlib.models import build_model
from detrlib.models.deformable import DeformableDETR

# What the tools behind published tables count for every element of an operation's result.
DETR_TOOL = {ATEN._softmax: 6, ATEN._safe_softmax: 6}  # 5, and 1 for the dropout after it
FVCORE = {ATEN.native_layer_norm: 5, ATEN.native_group_norm: 5}

_FASTER_RCNN = {
    "model.architecture": "faster_rcnn",
    "model.backbone.weights": "none",
    "model.num_classes": 91,
}
_SWIN = {"model.backbone.name": "swin_t"}
_R50 = {"model.backbone.weights": "none", "model.backbone.freeze_stem": True, "model.num_classes": 91}
_DEFORMABLE = _R50 | {
    "model.architecture": "deformable",
    "model.classification": "sigmoid",
    "model.num_queries": 300,
    "model.feedforward_dim": 1024,
}
_TWO_STAGE = _DEFORMABLE | {"model.deformable.refine": True, "model.deformable.two_stage": True}
_EFFICIENT = _TWO_STAGE | {"model.deformable.query_init": "memory", "model.deformable.class_specific_proposals": True}


class Published(NamedTuple):
    """A row of a published table, and how its GFLOPs came about."""

    settings: dict
    parameters: float  # millions
    gflops: float
    tool: Mapping[Any, int]
    size: tuple[int, int] = PUBLISHED_SIZE


_FOUR_THIRDS = (800, 1066)
# Carion et al. 2020, Tab. 1; Roh et al. 2022, Tab. 1. Heads that serve a loss of the encoder alone are not counted.
PUBLISHED = {
    "Faster R-CNN R50-FPN": Published(_FASTER_RCNN, 42.0, 180.0, DETR_TOOL),
    "DETR R50": Published(_R50, 41.0, 86.0, DETR_TOOL),
    "DETR-DC5 R50": Published(_R50 | {"model.backbone.dilation": True}, 41.0, 187.0, DETR_TOOL),
    "Deformable DETR R50": Published(_DEFORMABLE, 39.8, 172.9, FVCORE),
    "Deformable DETR R50, refine, two-stage": Published(_TWO_STAGE, 40.8, 177.3, FVCORE),
} | {
    f"Sparse DETR R50, rho {rho}": Published(
        _EFFICIENT | {"model.deformable.rho": rho}, 40.9, gflops, FVCORE, _FOUR_THIRDS
    )
    for rho, gflops in {0.1: 105.4, 0.2: 112.9, 0.3: 120.5, 0.4: 128.0, 0.5: 135.6}.items()
}
PUBLISHED |= {
    "DETR Swin-T": Published(_R50 | _SWIN, 45.0, 91.6, FVCORE, _FOUR_THIRDS),
    "Deformable DETR Swin-T": Published(_DEFORMABLE | _SWIN, 40.3, 180.4, FVCORE),
    "Deformable DETR Swin-T, refine, two-stage": Published(_TWO_STAGE | _SWIN, 41.3, 184.8, FVCORE),
} | {
    f"Sparse DETR Swin-T, rho {rho}": Published(
        _EFFICIENT | _SWIN | {"model.deformable.rho": rho}, 41.4, gflops, FVCORE, _FOUR_THIRDS
    )
    for rho, gflops in {0.1: 113.4, 0.2: 121.0, 0.3: 128.5, 0.4: 136.1, 0.5: 143.7}.items()
}


def published_model(name: str) -> nn.Module:
    """A model of `PUBLISHED` with sizes only, no weights (on "meta")."""
    with torch.device("meta"):
        return build_model(replace(Config(), PUBLISHED[name].settings).model)


def published_costs() -> pd.DataFrame:
    """Our count beside published numbers, one row per model.

    gflops: what our model spends on an image of `height` x `width`. as_published: the same, counted as the tool behind
    the published number does, with what the published code computes twice; `difference` from `published_gflops` is in
    percent.
    """
    rows = {}
    for name, (_, parameters, gflops, tool, size) in PUBLISHED.items():
        model = published_model(name)
        as_published = (sum(count_flops(model, size, tool).values()) + _again(model)) / 1e9
        rows[name] = {
            "parameters": sum(count for count, _ in count_parameters(model).values()) / 1e6,
            "published_parameters": parameters,
            "height": size[0],
            "width": size[1],
            "gflops": sum(count_flops(model, size).values()) / 1e9,
            "as_published": as_published,
            "published_gflops": gflops,
            "difference": 100 * (as_published / gflops - 1),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _again(model: nn.Module) -> int:
    """Multiply-adds of the decoder's box heads, which the code of Sparse DETR runs a second time when it refines."""
    decoder = model.transformer.decoder if isinstance(model, DeformableDETR) else None
    if decoder is None or not decoder.refine:
        return 0
    weights = [weight for weight in model.bbox_embed[: len(decoder.layers)].parameters() if weight.dim() == 2]
    return model.num_queries * sum(weight.numel() for weight in weights)
