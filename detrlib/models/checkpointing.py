"""Activation checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost").

A layer keeps its input alone, and the backward pass computes what lies within it again: a third more work, for memory
of one layer at a time. Its dropout is drawn again with the same result.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from detrlib.errors import ConfigError

PARTS = {"backbone": "backbone", "encoder": "transformer.encoder"}  # by name in settings: modules that obey `recompute`


def checkpoint_activations(model: nn.Module, parts: bool | Collection[str]) -> None:
    """From now on let these parts of a model, or all of `PARTS`, compute activations again when it is trained.

    Raises ConfigError where the model has no such part.
    """
    for name in PARTS if parts is True else parts or ():
        module = dict(model.named_modules()).get(PARTS[name])
        if not hasattr(module, "recompute"):
            raise ConfigError(
                f"train.checkpoint_activations: this model has no {name} with layers of its own; leave it out"
            )
        module.recompute = True


def call(layer: Callable, *given: Any, again: bool) -> Any:
    """layer(*given); `again`: the backward pass is to call it once more, instead of keeping what lies within."""
    return checkpoint(layer, *given, use_reentrant=False) if again else layer(*given)
