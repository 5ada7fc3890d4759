"""What official files call the entries of a model, and what this library calls them. Names and tensors only.

Official names are kept but for four things: the backbone has no number (`backbone.0.body` is `backbone.body`,
`backbone.1` is `position`), a Swin Transformer in it has the names of torchvision, `pre_alpha` belongs to the transform
of an attention, and a head that official files of the deformable family register in several places is registered once.
The numbers in both forms of a Swin Transformer mean the same: tables of position biases and the order in which patches
are merged agree. Entries of torchvision's Faster R-CNN have its names of today, which older files (that of version 1 is
one) spell without the places of convolutions within blocks.
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from detrlib.errors import WeightsError
from detrlib.models.pretrained import PAIRS, official_swin_name, swin_name

State = dict[str, Tensor]

PREFIXES = (("backbone.0.body.", "backbone.body."), ("backbone.1.", "position."))
OLD_PYRAMID = re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$")
OLD_PROPOSALS = re.compile(r"rpn\.head\.conv\.(weight|bias)$")
PROFILING = ("total_params", "total_ops", "num_batches_tracked")  # counters that tools left in official files
HEAD = re.compile(r"(?P<place>(?:transformer\.(?:encoder|decoder)\.)?)(?P<kind>class|bbox)_embed\.(?P<number>\d+)\.")
DECODER_BOXES = "transformer.decoder.bbox_embed."


def own_name(official: str) -> str:
    """The name in this library of an official entry."""
    for theirs, ours in PREFIXES:
        if official.startswith(theirs):
            return ours + swin_name(official.removeprefix(theirs))
    modern = OLD_PROPOSALS.sub(r"rpn.head.conv.0.0.\1", OLD_PYRAMID.sub(r"\1.0.\2", official))
    return re.sub(r"multihead_attn\.pre_alpha$", "multihead_attn.transform.pre_alpha", modern)


def official_name(own: str) -> str:
    """The official name of an entry of this library."""
    for theirs, ours in PREFIXES:
        if own.startswith(ours):
            return theirs + official_swin_name(own.removeprefix(ours))
    return own.replace(".transform.pre_alpha", ".pre_alpha")


def own_state(official: Mapping[str, Tensor]) -> State:
    """Entries under the names of this library, every head once. Raises WeightsError where copies of one differ."""
    plain = {
        own_name(name): value.flatten() if name.endswith(PAIRS) else value
        for name, value in official.items()
        if not name.endswith(PROFILING)
    }
    state = _without_copies(plain)
    if refines(plain):
        return state
    return {HEAD.sub(lambda match: f"{match['kind']}_embed.0.", name): value for name, value in state.items()}


def official_state(own: Mapping[str, Tensor], refine: bool = False, layers: int = 0, encoder_heads: int = 0) -> State:
    """Entries under official names, heads in every place where official models of the deformable family have them.

    refine: each of `layers` decoder layers has heads of its own; otherwise all share one, and files repeat it.
    encoder_heads: the last of the heads are those of encoder layers.
    """
    state = {
        official_name(name): value.unflatten(0, (math.isqrt(len(value)), -1)) if name.endswith(PAIRS) else value
        for name, value in own.items()
    }
    heads = _numbered_heads(state)
    if not heads:
        return state
    if not refine:
        return state | {
            HEAD.sub(rf"{match['kind']}_embed.{number}.", name): state[name]
            for name, match in heads.items()
            for number in range(layers)
        }
    total = 1 + max(int(match["number"]) for match in heads.values())
    for name, match in heads.items():
        rest, number, kind = name.removeprefix(match[0]), int(match["number"]), match["kind"]
        if kind == "bbox" or total > layers:  # the decoder knows the class heads of models with two stages alone
            state[f"transformer.decoder.{kind}_embed.{number}.{rest}"] = state[name]
        if number >= total - encoder_heads:
            place = number - (total - encoder_heads)
            state[f"transformer.encoder.{kind}_embed.{place}.{rest}"] = state[name]
    return state


def refines(state: Mapping[str, Tensor]) -> bool:
    """Whether every decoder layer has heads of its own, so that boxes are refined from layer to layer.

    Models with two stages do; in others the decoder knows the box heads, or they differ.
    """
    if "transformer.pos_trans.weight" in state or any(name.startswith(DECODER_BOXES) for name in state):
        return True
    heads = _numbered_heads(state)
    first = {match["kind"] + name.removeprefix(match[0]): state[name] for name, match in heads.items()}
    return not all(
        _same(state[name], first[match["kind"] + name.removeprefix(match[0])]) for name, match in heads.items()
    )


def _numbered_heads(state: Iterable[str]) -> dict[str, re.Match]:
    matches = {name: HEAD.match(name) for name in state}
    return {name: match for name, match in matches.items() if match}


def _without_copies(state: State) -> State:
    """Heads of the decoder and of the encoder are entries of the one list of heads; files may hold either or both."""
    heads = _numbered_heads(state)
    encoder = {int(match["number"]) for match in heads.values() if "encoder" in match["place"]}
    total = 1 + max((int(match["number"]) for match in heads.values()), default=-1)
    kept = {name: value for name, value in state.items() if name not in heads}
    for name, match in heads.items():
        number = int(match["number"])
        if "encoder" in match["place"]:
            number += total - len(encoder)
        rest = name.removeprefix(match[0])
        first = f"{match['kind']}_embed.{number}.{rest}"
        if first in kept and not _same(kept[first], state[name]):
            raise WeightsError(f"{name} and {first} are one head in the official model, but differ in this file")
        kept.setdefault(first, state[name])
    return kept


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or have the same content; those without content ("meta") count as the same."""
    return a is b or (a.shape == b.shape and (a.is_meta or torch.equal(a, b)))
