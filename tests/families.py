"""Small models of the families, and parts of them, that several test files build.

Legend: B images, L levels, S tokens of all levels.
"""

import torch
from small import small
from torch import nn

from detrlib.models.backbone import FeatureMap
from detrlib.models.position import SinePosition
from detrlib.models.pyramid import flattened

SITES = ("encoder_self", "decoder_self", "decoder_cross")
BACKBONES = {
    "tiny": ({"name": "tiny"}, 8),
    "resnet18": ({"name": "resnet18"}, 32),
    "resnet50-dilated": ({"name": "resnet50", "dilation": True}, 16),
}
REFINE = {"refine": True}
TWO_STAGE = REFINE | {"two_stage": True}
EFFICIENT = TWO_STAGE | {"query_init": "memory", "class_specific_proposals": True}
SPARSE = EFFICIENT | {"rho": 0.3, "encoder_auxiliary": True}
VARIANTS = {"plain": {}, "refine": REFINE, "two-stage": TWO_STAGE, "efficient": EFFICIENT, "sparse": SPARSE}
TINY = {"levels": 2, "stages": [1, 4], "encoder_points": 3, "decoder_points": 2}
SIZES, CANVAS = [(70, 101), (128, 64), (97, 160)], (128, 160)
R50 = {"name": "resnet50", "weights": "none", "freeze_stem": True}


def everywhere(transform: str) -> dict[str, str]:
    """Settings of a transform at all sites where it can stand."""
    return {site: transform for site in SITES if (site, transform) != ("decoder_self", "tvmax")}


def deformable(variant: str = "plain", options: dict | None = None, **settings) -> nn.Module:
    """A small model of a variant: stages of stride 4 and 8 of the tiny backbone."""
    options = TINY | VARIANTS[variant] | (options or {})
    encoder_layers = 3 if options.get("encoder_auxiliary") else 2
    defaults = {"architecture": "deformable", "classification": "sigmoid", "encoder_layers": encoder_layers}
    return small(**defaults | {"decoder_layers": 4, "deformable": options} | settings)


def pyramid_of(*maps: torch.Tensor):
    """A pyramid of zeros over paddings [B,h,w]."""
    levels = [FeatureMap(torch.zeros(len(padding), 8, *padding.shape[1:]), padding) for padding in maps]
    return flattened(levels, SinePosition(8, centred=True), torch.arange(len(maps) * 8.0).view(len(maps), 8))


def half_padded() -> torch.Tensor:
    """[2,4,8]: the second image covers the left half and the upper three rows."""
    padding = torch.zeros(2, 4, 8, dtype=torch.bool)
    padding[1, :, 4:] = padding[1, 3:] = True
    return padding


def transformers_backbone_name(name: str) -> str:
    """torchvision's name of a ResNet parameter -> the name in `transformers`."""
    *place, kind = name.split(".")
    names = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    if len(place) == 1:
        path = f"embedder.embedder.{names[place[0][:-1]]}"
    else:
        path = f"encoder.stages.{int(place[0][-1]) - 1}.layers.{place[1]}."
        layer = place[2]
        if layer == "downsample":
            path += f"shortcut.{names[place[3]]}"
        else:
            path += f"layer.{int(layer[-1]) - 1}.{names[layer[:-1]]}"
    return f"backbone.model.{path}.{kind}"
