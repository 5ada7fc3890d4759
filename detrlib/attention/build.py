"""Transforms by name."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrlib.attention.family import (
    ASEntmax,
    Budget,
    Normmax,
    ReLU,
    Sigmoid,
    Softpick,
    Sparsegen,
    SSMax,
    TopK,
)
from detrlib.attention.transforms import AlphaEntmax, Entmax, Entmax15, Softmax, Sparsemax, Transform, TVMax


class TransformSettings(NamedTuple):
    """What transforms can be told; each takes what it needs."""

    num_heads: int
    null_key: str = "none"  # of any: see `NULL_KEYS`
    alpha: float = 1.5  # of entmax and asentmax
    alpha_init: float | str | Tensor = 1.5  # of alpha_entmax, as its `initial`
    alpha_clamped: bool = False  # of alpha_entmax
    tv_lambda: float = 0.1  # of tvmax: half of the alpha of the published code
    sparsegen_lambda: float = 0.5
    ssmax_init: float = 0.168  # of ssmax, as its `initial`
    normmax_alpha: float = 2.0
    budget: float = 2.0
    topk: int = 64


TRANSFORMS = {
    "softmax": lambda settings: Softmax(),
    "sparsemax": lambda settings: Sparsemax(),
    "entmax15": lambda settings: Entmax15(),
    "entmax": lambda settings: Entmax(settings.alpha),
    "alpha_entmax": lambda settings: AlphaEntmax(settings.num_heads, settings.alpha_init, settings.alpha_clamped),
    "tvmax": lambda settings: TVMax(settings.tv_lambda),
    "normmax": lambda settings: Normmax(settings.normmax_alpha),
    "budget": lambda settings: Budget(settings.budget),
    "sparsegen": lambda settings: Sparsegen(settings.sparsegen_lambda),
    "ssmax": lambda settings: SSMax(settings.num_heads, settings.ssmax_init),
    "asentmax": lambda settings: ASEntmax(settings.num_heads, settings.alpha),
    "softpick": lambda settings: Softpick(),
    "topk": lambda settings: TopK(settings.topk),
    "sigmoid": lambda settings: Sigmoid(),
    "relu": lambda settings: ReLU(),
}

# The score of a null key where training starts; "learned" starts as "zero".
NULL_KEYS = {
    "none": lambda num_heads: None,
    "zero": lambda num_heads: 0.0,
    "learned": lambda num_heads: nn.Parameter(torch.zeros(num_heads)),
}


def build_transform(name: str, num_heads: int, **settings) -> Transform:
    """The transform called `name`, freshly initialised; `settings` as in `TransformSettings`.

    Raises ValueError listing the names there are.
    """
    for setting, value in settings.items():
        if setting not in TransformSettings._fields:
            known = ", ".join(TransformSettings._fields[1:])
            raise ValueError(f"unknown setting '{setting}' of transforms; there are {known}")
        kind = TransformSettings.__annotations__[setting]
        if not isinstance(value, int | kind):
            raise ValueError(f"{setting} {value!r}: expected {getattr(kind, '__name__', kind)}")
    told = TransformSettings(num_heads, **settings)
    for what, found, known in (("attention transform", name, TRANSFORMS), ("null_key", told.null_key, NULL_KEYS)):
        if found not in known:
            raise ValueError(f"unknown {what} '{found}'; there are {', '.join(known)}")
    transform = TRANSFORMS[name](told)
    transform.null_score = NULL_KEYS[told.null_key](num_heads)
    return transform
