"""What each parameter learns at: named groups with rates of their own, and the schedule that all follow."""

import math
import re
from collections.abc import Callable

import torch
from torch import nn

from detrlib.config import Train
from detrlib.models import alpha_modules, sampling_projections, transform_modules

FROZEN = {  # by `train.freeze`, names of parameters, those of detectors of transformers included
    "backbone": r"(model\.model\.)?backbone\.",
    "encoder": r"(transformer|model\.model)\.encoder\.",
    "decoder": r"(transformer|model\.model)\.decoder\.(?!class_embed|bbox_embed)",
    # alpha: all that transforms learn
    "all_but_alpha_and_heads": r"(?!.*\.transform\.|(model\.|decoder\.)*(class_|bbox_))",
}


def freeze(model: nn.Module, cfg: Train) -> None:
    """Leave out of training what `train.freeze` names, and the backbone if its rate is zero."""
    parts = [FROZEN[name] for name in cfg.freeze] + ([] if cfg.lr_backbone else [FROZEN["backbone"]])
    for name, parameter in model.named_parameters():
        if any(re.match(part, name) for part in parts):
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, cfg: Train) -> list[dict]:
    """Named optimiser groups, if not empty.

    rest, backbone, projections (to sampling locations); alpha; transforms: all else that these learn, such as scores
    of null keys. The last two are a number for each head: they have far to go, and nothing to decay to.

    What is not to be trained is frozen first, see `freeze`.
    """
    freeze(model, cfg)
    learned = (parameter for module in transform_modules(model).values() for parameter in module.parameters())
    special = dict.fromkeys(map(id, learned), "transforms")
    special |= {id(module.pre_alpha): "alpha" for module in alpha_modules(model).values()}
    special |= {id(parameter): "projections" for parameter in sampling_projections(model)}
    groups = {"rest": [], "backbone": [], "projections": [], "alpha": [], "transforms": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "backbone" if re.match(FROZEN["backbone"], name) else special.get(id(parameter), "rest")
            groups[group].append(parameter)
    settings = {
        "rest": {"lr": cfg.lr},
        "backbone": {"lr": cfg.lr_backbone},
        "projections": {"lr": 0.1 * cfg.lr if cfg.lr_projections is None else cfg.lr_projections},
        "alpha": {"lr": 10 * cfg.lr if cfg.lr_alpha is None else cfg.lr_alpha, "weight_decay": 0.0},
        "transforms": {"lr": 10 * cfg.lr, "weight_decay": 0.0},
    }
    return [{"name": name, "params": params, **settings[name]} for name, params in groups.items() if params]


def build_optimizer(model: nn.Module, cfg: Train) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) for the `parameter_groups` of a model, in one pass over memory."""
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg), weight_decay=cfg.weight_decay, fused=True)
    optimizer.register_load_state_dict_pre_hook(_in_one_pass)
    optimizer.register_load_state_dict_post_hook(_like_parameters)
    return optimizer


def _in_one_pass(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """What is to be loaded, for an optimiser that stays fused: that of an earlier version was not, and says so."""
    return state | {"param_groups": [group | {"fused": True} for group in state["param_groups"]]}


def _like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give what was loaded the strides of its parameter: the fused update takes the numbers as they lie in memory.

    Filters lie otherwise where the run began on another kind of processor, see `models.backbone.trained_layout`.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def lr_factor(step: int, steps_per_epoch: int, cfg: Train) -> float:
    """What the learning rates are multiplied by before update number `step`, counted from 0."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    if cfg.schedule == "step":
        return 0.1 if step >= cfg.lr_drop * steps_per_epoch else 1.0
    if cfg.schedule == "cosine":
        total = max(1, cfg.epochs * steps_per_epoch - cfg.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - cfg.warmup_steps) / total)))
    return 1.0


def lr_factors(optimizer: torch.optim.Optimizer, steps_per_epoch: int, cfg: Train) -> list[Callable[[int], float]]:
    """`lr_factor` for every group of the optimiser, as LambdaLR wants it; alpha's may be exempt from the schedule."""
    exempt = cfg.model_copy(update={"schedule": "constant"})
    keeps = [group["name"] == "alpha" and cfg.alpha_keeps_lr for group in optimizer.param_groups]
    return [
        lambda step, settings=exempt if keep else cfg: lr_factor(step, max(1, steps_per_epoch), settings)
        for keep in keeps
    ]
