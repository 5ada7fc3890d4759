"""How an attention module of transformers is made to take its weights from a transform of ours.

Such a module turns scores into weights in one of two ways, and is met where it is:

    by name         it looks up a function in transformers' `AttentionInterface` and hands it query, key, value and
                    mask: it finds `attention`, here, which asks the module for its transform
    by softmax      it calls softmax itself (DAB-DETR, and deformable attention over the sampling points of a query):
                    while its `forward` runs, that one call is answered by its transform

A module in use has a submodule `transform`, and for its class a subclass of what it was, as torch.nn.utils.parametrize
does it. Parameters, their names and hooks stay; neither the config, which models share, nor anything of the process
changes but for one name in `AttentionInterface`. Masks are those that the model makes anyway: to change its attention
by that name for the whole model would need a mask function of the same name, or padding would be attended to.

Legend: B images, H heads, Q queries, K keys, D channels per head, P sampling points of all levels.
"""

import functools
import inspect
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detrlib.attention import Mixing
from detrlib.errors import ModelError

NAME = "detrlib"  # of `attention` in transformers' AttentionInterface
HEADS = ("n_heads", "num_heads", "num_attention_heads", "attention_heads")  # what modules call their number of heads


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with the transform of a module, as transformers asks for it.

    Args:
        module: whose `transform` it is.
        query: [B,H,Q,D].
        key: [B,H,K,D].
        value: [B,H,K,V].
        attention_mask: broadcastable to [B,H,Q,K]: True for keys that are seen, or numbers added to the scores, the
            lowest of their type or -inf for keys that are not. None: all are seen.
        scaling: of the scores; default: D^-0.5.
        dropout: share of the weights that are set to zero in training.

    Returns:
        Mixed values [B,Q,H,V], and weights [B,H,Q,K] before dropout: where the layer looks. Where the module
        `returns_values`, as those of a `HuggingFaceDetector`, the weights together with the values: `Mixing`.
    """
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    hidden = None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = ~attention_mask
    elif attention_mask is not None:
        hidden = _hidden(attention_mask)
        scores = scores + attention_mask.masked_fill(hidden, 0.0)
    weights = module.transform(scores, hidden)
    mixed = F.dropout(weights, dropout, module.training).to(value.dtype) @ value
    looks = Mixing(weights, value) if getattr(module, "returns_values", False) else weights
    return mixed.transpose(1, 2).contiguous(), looks


def _hidden(additive: Tensor) -> Tensor:
    """Where a mask of numbers, or scores that one was added to, hide a key."""
    return additive <= torch.finfo(additive.dtype).min / 2


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


class _Config:
    """The config of a module, but for the name of its attention function."""

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    @property
    def _attn_implementation(self) -> str:
        _register()  # here, so that a model read from a file finds the function too
        return NAME


class _Softmax(TorchFunctionMode):
    """Answers the one call of softmax in a module by its transform, and notes what the weights are multiplied with."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls, self.values = module, 0, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (F.softmax, torch.softmax, Tensor.softmax):
            if self.calls and self.values is None and func in (torch.matmul, torch.bmm):
                self.values = args[1]  # [B,H,K,V], or with images and heads in one axis
            return func(*args, **kwargs or {})
        self.calls += 1
        if self.calls > 1:
            self.refuse()
        return self.weights(*args, **kwargs or {})

    def weights(
        self, scores: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Weights over the last axis, in the shape and type in which softmax would return them."""
        scores, transform = scores if dtype is None else scores.to(dtype), self.module.transform
        if samples_points(self.module):  # [B,Q,H,P]: heads come after queries, and all points are valid
            return transform(scores.transpose(1, 2)).transpose(1, 2).to(scores.dtype).contiguous()
        by_head = scores.view(-1, num_heads(self.module), *scores.shape[-2:])  # some have images and heads in one axis
        hidden = _hidden(by_head)
        return transform(by_head.masked_fill(hidden, 0.0), hidden).to(scores.dtype).view(scores.shape)

    def refuse(self) -> NoReturn:
        """Stop rather than guess which numbers are attention weights."""
        raise ModelError(
            f"{type(self.module).__name__} of this transformers calls softmax {self.calls or 'no'} times where once "
            "was expected, so that its attention cannot be changed"
        )


class _InUse:
    """What the subclasses share: they can be copied and pickled, though they are made on the fly."""

    def __reduce__(self):
        return _blank, (self.way, self.original), self.__dict__


class ByName(_InUse):
    """A module that looks up its attention function, and finds ours."""

    @property
    def config(self) -> _Config:
        """Its own config, but for that name."""
        return _Config(self.__dict__["config"])


class BySoftmax(_InUse):
    """A module whose call of softmax is answered by its transform."""

    def forward(self, *args, **kwargs):
        """As of the class it was."""
        with _Softmax(self) as softmax:
            outputs = super().forward(*args, **kwargs)
        if not softmax.calls:
            softmax.refuse()
        if getattr(self, "returns_values", False) and isinstance(weights := outputs[1], Tensor):
            values = softmax.values.reshape(-1, num_heads(self), *softmax.values.shape[-2:])
            return outputs[0], Mixing(weights.reshape(*values.shape[:2], *weights.shape[-2:]), values), *outputs[2:]
        return outputs


class SeesMap(_InUse):
    """A module whose first input is the feature map [B,C,h,w] that attention sees as h * w keys; it notes the grid."""

    def forward(self, features: Tensor, *args, **kwargs):
        """As of the class it was."""
        self.grid = tuple(features.shape[-2:])
        return super().forward(features, *args, **kwargs)


@functools.cache
def _subclass(way: type[_InUse], original: type[nn.Module]) -> type[nn.Module]:
    own = {"way": way, "original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (way, original), own)


def _blank(way: type[_InUse], original: type[nn.Module]) -> nn.Module:
    """A module in use, before its state is copied or unpickled into it."""
    return object.__new__(_subclass(way, original))


def change(module: nn.Module, way: type[_InUse]) -> None:
    """Let a module be in use, in this way, under the name of its class."""
    if not isinstance(module, way):
        module.__class__ = _subclass(way, type(module))


def original_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module when it is not in use."""
    return vars(type(module)).get("original", type(module))


def way_of(module: nn.Module) -> type[_InUse] | None:
    """How an attention module can be changed, told from the names that its code uses; None: not, or it is none."""
    if "Attention" not in type(module).__name__:
        return None
    codes = (getattr(inspect.unwrap(vars(kind).get("forward")), "__code__", None) for kind in type(module).__mro__)
    names = {name for code in codes if code is not None for name in code.co_names}
    if "ALL_ATTENTION_FUNCTIONS" in names:
        return ByName
    return BySoftmax if "softmax" in names else None


def samples_points(module: nn.Module) -> bool:
    """Whether attention is deformable: its keys are sampling points."""
    return hasattr(module, "sampling_offsets")


def num_heads(module: nn.Module) -> int:
    """The number of heads of an attention module."""
    for name in HEADS:
        if hasattr(module, name):
            return getattr(module, name)
    return module.o_proj.in_features // module.head_dim


def points_of(module: nn.Module, levels: int) -> list[int]:
    """Sampling points of every level, per head, which types of models note in different ways."""
    for name in ("num_points_list", "n_points_list"):
        if hasattr(module, name):
            return list(getattr(module, name))
    return [module.n_points] * levels
