"""Settings of several sections that must go together; what a section can say alone stands in its own fields."""

from typing import TYPE_CHECKING

from detrlib.config.huggingface import SQUARE

if TYPE_CHECKING:
    from detrlib.config.settings import Config


def disagreement(cfg: "Config") -> str | None:
    """In words, which settings do not go together, and the remedy; None: they do."""
    model, theirs = cfg.model, cfg.model.architecture == "huggingface"
    if "encoder_self" in cfg.evaluate.store_sites and not theirs and not model.encoder_layers:
        return "evaluate.store_sites: model.encoder_layers is 0, there is no encoder_self to store; leave it out"
    for name in ("freeze", "checkpoint_activations"):
        parts = getattr(cfg.train, name)
        if isinstance(parts, tuple) and "encoder" in parts and not model.encoder_layers:
            return f"train.{name}: model.encoder_layers is 0, there is no encoder; leave it out"
    if (needed := model.attention.anneal.epochs) > cfg.train.epochs:
        return (
            f"model.attention.anneal.epochs {needed} is more than train.epochs {cfg.train.epochs}: alpha would not "
            "arrive; lower it, or train longer"
        )
    if cfg.train.compile and model.attention.anneal.epochs:
        return "train.compile: with model.attention.anneal every step would be compiled anew; leave one of them out"
    own_heads = f"model.type {model.type}" if theirs and model.type in SQUARE else ""
    if model.architecture == "deformable" and model.deformable.refine:
        own_heads = "model.deformable.refine"
    if own_heads and not cfg.loss.auxiliary:
        return (
            f"loss.auxiliary: with {own_heads} every layer has heads of its own, which learn from its own loss only; "
            "set it to true"
        )
    return None
