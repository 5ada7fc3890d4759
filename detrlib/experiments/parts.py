"""Where the parts of a model are that interventions change: its layers, their attention, and what each ends in.

A part is exchanged within a context (`exchanged`), and the very part that was there is back after it. Layers have the
numbers that they had before any was left out, so that contexts nest in any order.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import nn

from detrlib.attention import Transform
from detrlib.errors import ModelError
from detrlib.models.huggingface import HuggingFaceDetector
from detrlib.models.huggingface_attention import sites_of
from detrlib.models.outputs import Site, site_of

Part = Literal["encoder", "decoder"]
ADDRESSES = {  # of attention modules: in the layers of the encoder or decoder, under one of these names
    "encoder_self": ("encoder", "self_attn"),
    "decoder_self": ("decoder", "self_attn"),
    "decoder_cross": ("decoder", "multihead_attn", "cross_attn"),
}
LAYER = re.compile(r"(.*)\.(layers?)\.\d+\.\w+(?:\.\w+)?")  # of attention in models of transformers


class Stack(NamedTuple):
    """The layers of an encoder or decoder, as a list of a module."""

    parent: nn.Module
    name: str  # of the list in its parent

    def layers(self) -> nn.ModuleList:
        """Those that are there now, first to last."""
        return getattr(self.parent, self.name)

    def numbers(self) -> list[int]:
        """Their numbers in the whole model."""
        return kept_numbers(self.layers())

    def total(self) -> int:
        """How many there were in the whole model."""
        return getattr(self.layers(), "total", len(self.layers()))


def kept_numbers(part: nn.Module) -> list[int]:
    """The numbers that the layers of a list, or the rows of an embedding, had before some were left out."""
    return getattr(part, "numbers", None) or list(range(len(part.weight if hasattr(part, "weight") else part)))


def stack_of(model: nn.Module, part: Part) -> Stack:
    """The layers of the encoder or decoder. Raises ModelError for an unknown part, or where there are none."""
    if part not in ("encoder", "decoder"):
        raise ModelError(f"unknown part '{part}'; there are encoder and decoder")
    if isinstance(model, HuggingFaceDetector):
        paths = [path for path, _ in model.named_modules() if (site_of(path) or "").startswith(part)]
        places = list(dict.fromkeys(LAYER.fullmatch(path).groups() for path in paths))
        if len(places) > 1:
            raise ModelError(f"the model has {len(places)} {part}s, whose layers have no numbers in common")
        stack = [Stack(model.get_submodule(parent), name) for parent, name in places]
    else:
        stack = [Stack(getattr(model.transformer, part), "layers")]
    if not stack or not len(stack[0].layers()):
        raise ModelError(f"the model has no {part} layers, so there is nothing to change there")
    return stack[0]


def attention_at(model: nn.Module, site: Site) -> dict[int, nn.Module]:
    """The attention modules of a site by number of their layer, be they scored or sampled.

    Raises ModelError for an unknown site, or where there is none.
    """
    if site not in ADDRESSES:
        raise ModelError(f"unknown site '{site}'; there are {', '.join(ADDRESSES)}")
    part, *names = ADDRESSES[site]
    stack = stack_of(model, part)
    if isinstance(model, HuggingFaceDetector):
        modules = sites_of(model).get(site, [])
    else:
        modules = [getattr(layer, name) for layer in stack.layers() for name in names if hasattr(layer, name)]
    if len(modules) != len(stack.layers()):
        raise ModelError(f"the attention of this model at {site} is of a kind that cannot be changed")
    return dict(zip(stack.numbers(), modules, strict=True))


def scored_at(model: nn.Module, site: Site) -> dict[int, nn.Module]:
    """Those of `attention_at`, all of which have a `transform`. Raises ModelError where no keys are scored."""
    modules = attention_at(model, site)
    if not all(isinstance(getattr(module, "transform", None), Transform) for module in modules.values()):
        raise ModelError(
            f"{site} of this model is deformable attention: it samples points and has no scores to transform; "
            "use decoder_self"
        )
    return modules


def attention_modules(model: nn.Module, site: Site) -> list[nn.Module]:
    """The attention modules of a site, first layer to last, each with a `transform`.

    Raises ModelError where no keys are scored.
    """
    return list(scored_at(model, site).values())


def chosen_layers(stack: Stack, layers: Collection[int] | None, where: str) -> list[int]:
    """Numbers of the layers asked for that are still there; None: of all. Raises ModelError for others."""
    there = stack.numbers()
    if layers is None:
        return there
    if set(layers) - set(range(stack.total())):
        raise ModelError(f"layers {sorted(set(layers))} at {where}: the model has {stack.total()}, numbered from 0")
    return sorted(set(layers) & set(there))


def without(parts: nn.ModuleList, places: Collection[int]) -> nn.ModuleList:
    """The list without those at some places; the others know their numbers."""
    kept = [place for place in range(len(parts)) if place not in places]
    numbers, shorter = kept_numbers(parts), nn.ModuleList(parts[place] for place in kept)
    shorter.numbers, shorter.total = [numbers[place] for place in kept], getattr(parts, "total", len(parts))
    return shorter


@contextmanager
def exchanged(model: nn.Module, changes: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[nn.Module]:
    """A context in which attributes (owner, name, value) of modules have another value.

    A module goes where the model is, and into its mode, when it comes in and when it comes back: the model may have
    moved meanwhile.
    """

    def put(values: Sequence[tuple[nn.Module, str, Any]]) -> None:
        device = next(model.parameters()).device
        for owner, name, value in values:
            setattr(owner, name, value.to(device).train(model.training) if isinstance(value, nn.Module) else value)

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        put(changes)
        yield model
    finally:
        put(before[::-1])
