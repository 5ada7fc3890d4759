"""What official files call the entries of a model, and what this library calls them. Names and tensors only.

`NAMES` is the one table, read in both directions; what is not in it has the same name on both sides. Heads, which
official files of the deformable family register in several places, are registered once here.
"""

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from detrlib.errors import WeightsError
from detrlib.models.pretrained import SWIN_NAMES, TOKEN_PAIRS, renamed

State = dict[str, Tensor]

# Parts of names: official, ours.
NAMES = (
    ("backbone.0.body.", "backbone.body."),
    ("backbone.1.", "position."),
    ("multihead_attn.pre_alpha", "multihead_attn.transform.pre_alpha"),
    *SWIN_NAMES,
)
# Of Conditional DETR's decoder; in that of DETR the last row is not so.
CONDITIONAL = (
    *(
        (f"{letters}_{theirs}_proj.", f"{attention}.{ours}.")
        for letters, attention in (("sa", "self_attn"), ("ca", "multihead_attn"))
        for theirs, ours in (
            ("qcontent", "query_content"),
            ("qpos", "query_position"),
            ("qpos_sine", "query_spatial"),
            ("kcontent", "key_content"),
            ("kpos", "key_position"),
            ("v", "value"),
        )
    ),
    ("query_scale.", "content_scale."),
    ("ref_point_head.", "reference_point."),
    ("cross_attn.out_proj.", "multihead_attn.out_proj."),
)
PROFILING = ("total_params", "total_ops", "num_batches_tracked")  # counters that tools left in official files
HEAD = re.compile(r"(?P<place>(?:transformer\.(?:encoder|decoder)\.)?)(?P<kind>class|bbox)_embed\.(?P<number>\d+)\.")


def own_name(official: str) -> str:
    """The name in this library of an official entry."""
    return renamed(official, (*NAMES, *CONDITIONAL))


def official_name(own: str, conditional: bool = False) -> str:
    """The official name of an entry of this library, or of one of Conditional DETR."""
    return renamed(own, [(ours, theirs) for theirs, ours in (*NAMES, *(CONDITIONAL if conditional else ()))])


def own_state(official: Mapping[str, Tensor]) -> State:
    """Entries under the names of this library, every head once. Raises WeightsError where copies of one differ."""
    refined = refines(official)
    heads = [match for _, match in _heads(official)]
    of_encoder = {int(match["number"]) for match in heads if "encoder" in match["place"]}
    # The encoder's heads are the last of all, which are numbered across decoder and encoder.
    before = 1 + max((int(match["number"]) for match in heads), default=-1) - len(of_encoder)

    def once(match: re.Match) -> str:
        number = int(match["number"]) + (before if "encoder" in match["place"] else 0)
        return f"{match['kind']}_embed.{number if refined else 0}."

    state = {}
    for name, value in official.items():
        if name.endswith(PROFILING):
            continue
        own = own_name(HEAD.sub(once, name))
        value = value.flatten() if name.endswith(TOKEN_PAIRS) else value
        if not _same(state.setdefault(own, value), value):
            raise WeightsError(f"{name} and {own} are one head in the official model, but differ in this file")
    return state


def official_state(own: Mapping[str, Tensor], refine: bool = False, layers: int = 0, encoder_heads: int = 0) -> State:
    """Entries under official names, heads in every place where official models of the deformable family have them.

    refine: each of `layers` decoder layers has heads of its own; otherwise all share one, and files repeat it.
    encoder_heads: the last of the heads are those of encoder layers.
    """
    total = 1 + max((int(match["number"]) for _, match in _heads(own)), default=-1)
    conditional = any(name.startswith("transformer.decoder.reference_point.") for name in own)
    state = {}
    for name, value in own.items():
        value = value.unflatten(0, (math.isqrt(len(value)), -1)) if name.endswith(TOKEN_PAIRS) else value
        places, head = [official_name(name, conditional)], HEAD.match(name)
        if head:
            kind, number, rest = head["kind"], int(head["number"]), name[head.end() :]
            if not refine:
                places = [f"{kind}_embed.{layer}.{rest}" for layer in range(layers)]
            elif kind == "bbox" or total > layers:  # the decoder knows the class heads of models with two stages alone
                places.append(f"transformer.decoder.{name}")
            if refine and number >= total - encoder_heads:
                places.append(f"transformer.encoder.{kind}_embed.{number - (total - encoder_heads)}.{rest}")
        state |= dict.fromkeys(places, value)
    return state


def refines(state: Mapping[str, Tensor]) -> bool:
    """Whether every decoder layer has heads of its own, so that boxes are refined from layer to layer.

    Models with two stages do; in others the decoder knows the box heads, or they differ.
    """
    if "transformer.pos_trans.weight" in state or any(name.startswith("transformer.decoder.bbox") for name in state):
        return True
    first = {}
    return not all(
        _same(first.setdefault((match["kind"], name[match.end() :]), state[name]), state[name])
        for name, match in _heads(state)
    )


def _heads(state: Mapping[str, Tensor]) -> Iterator[tuple[str, re.Match]]:
    """The entries of heads that have a number."""
    return ((name, match) for name in state if (match := HEAD.match(name)))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or have the same content; those without content ("meta") count as the same."""
    return a is b or (a.shape == b.shape and (a.is_meta or torch.equal(a, b)))
