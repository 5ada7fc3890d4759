"""Changes of a trained model that can be measured, each with the names under which its results are kept.

How a model is changed, and for how long, is said in `interventions` and `ablations`; an `Intervention` of your own
needs no more than a context. Whatever is changed, Gini and zeros are measured at one site, and where that is changed
itself, at the same.

Legend: L layers of a site, H heads, Q queries, all numbered from 0.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import nn

from detrlib.errors import ModelError
from detrlib.experiments.ablations import (
    points_of_levels,
    queries_of,
    without_attention,
    without_feedforward,
    without_layers,
    without_queries,
    without_samples,
    zeroed_queries,
)
from detrlib.experiments.interventions import How, fixed_alpha, learned_alphas, pruned, swapped, without_sinks
from detrlib.experiments.parts import Part, attention_at, attention_modules, stack_of
from detrlib.models.huggingface_weights import num_heads, samples_points
from detrlib.models.outputs import Site

logger = logging.getLogger(__name__)

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of the queries that are ablated together
DRAWS = 3  # of so many queries at random


@dataclass(frozen=True)
class Intervention:
    """One row of results. `enter(model)` is a context in which the model is different."""

    # none, transform, alpha, learned_alpha, head (a single one pruned), heads (that one and those before), sink; and of
    # what is taken out queries (so many of them), embeddings (their zeroed ones), query, layer, attention, feedforward,
    # level, point
    kind: str
    site: Site  # where attention is changed, and where Gini and zeros are measured
    enter: Callable[[nn.Module], AbstractContextManager]
    # Name of the transform, alpha, "mean" or "shuffled", number of heads pruned, "masked" or "zeroed"; share of the
    # queries and which, number of the query, "encoder" or "decoder", site, site and number of the level or point
    value: str = ""
    layer: int | None = None  # None: all
    head: int | None = None  # None: all


def swaps(site: Site, names: Iterable[str], layer: int | None = None, **settings) -> list[Intervention]:
    """Each transform of `names` in turn, in all layers or in one; `settings` as of `build_transform`."""
    layers = None if layer is None else [layer]
    return [
        Intervention(
            "transform", site, partial(swapped, site=site, transform=name, layers=layers, **settings), name, layer
        )
        for name in names
    ]


def fixed_alphas(site: Site, alphas: Iterable[float], layer: int | None = None) -> list[Intervention]:
    """entmax with each alpha in turn, the same for all heads, in all layers or in one."""
    layers = None if layer is None else [layer]
    return [
        Intervention("alpha", site, partial(fixed_alpha, site=site, alpha=alpha, layers=layers), f"{alpha:g}", layer)
        for alpha in alphas
    ]


def rearranged_alphas(model: nn.Module, site: Site, seed: int = 0) -> list[Intervention]:
    """Learned alphas replaced by their mean, and shuffled among the heads of each layer."""
    alphas = learned_alphas(model, site)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in alphas])
    choices = {"mean": alphas.mean().item(), "shuffled": shuffled}
    return [
        Intervention("learned_alpha", site, partial(fixed_alpha, site=site, alpha=alpha), name)
        for name, alpha in choices.items()
    ]


def single_heads(model: nn.Module, site: Site) -> list[Intervention]:
    """Every head pruned alone (Michel et al. 2019, "Are Sixteen Heads Really Better than One?", Sec. 3.2)."""
    heads = [(layer, head) for layer, m in enumerate(attention_modules(model, site)) for head in range(num_heads(m))]
    return [
        Intervention("head", site, partial(pruned, site=site, heads={layer: [head]}), "pruned", layer, head)
        for layer, head in heads
    ]


def gradual(site: Site, order: Sequence[tuple[int, int]]) -> list[Intervention]:
    """Heads (layer, head) pruned one after the other in the given order (Sec. 4 there)."""
    steps = []
    for count, (layer, head) in enumerate(order, start=1):
        gone = {one: [other for at, other in order[:count] if at == one] for one, _ in order[:count]}
        steps.append(Intervention("heads", site, partial(pruned, site=site, heads=gone), str(count), layer, head))
    return steps


# Sinks


def sinks_away(model: nn.Module, site: Site, ways: Iterable[How]) -> list[Intervention]:
    """The sinks of all heads away in each of `ways`, masked or zeroed: in all layers, then in every layer alone."""
    layers = [None, *stack_of(model, site.partition("_")[0]).numbers()]
    return [
        Intervention("sink", site, partial(without_sinks, site=site, how=how, layers=_only(layer)), how, layer)
        for how in ways
        for layer in (layers if len(layers) > 2 else layers[:1])
    ]


# Parts taken out


def query_shares(
    order: Sequence[int], site: Site, zeroed: bool = False, shares: Iterable[float] = SHARES, seed: int = 0
) -> list[Intervention]:
    """Ever more of the queries gone: the first of `order`, the last of it, and so many at random, `DRAWS` times.

    order: all queries, the least confident first. zeroed: their embeddings are zero instead (kind "embeddings").
    """
    context, kind = (zeroed_queries, "embeddings") if zeroed else (without_queries, "queries")
    generator, planned = torch.Generator().manual_seed(seed), []
    for share in shares:
        count = min(max(round(share * len(order)), 1), len(order) - 1)
        drawn = {f"draw {n}": torch.randperm(len(order), generator=generator).tolist() for n in range(1, DRAWS + 1)}
        for how, queries in {"least confident": order, "most confident": order[::-1], **drawn}.items():
            enter = partial(context, queries=queries[:count])
            planned.append(Intervention(kind, site, enter, f"{count / len(order):.2f} {how}"))
    return planned


def single_queries(model: nn.Module, site: Site) -> list[Intervention]:
    """Every query gone alone."""
    return [
        Intervention("query", site, partial(without_queries, queries=[query]), str(query))
        for query in queries_of(model).numbers
    ]


def single_layers(model: nn.Module, site: Site) -> list[Intervention]:
    """Every layer of encoder and decoder gone alone."""
    return [
        Intervention("layer", site, partial(without_layers, part=part, layers=[layer]), part, layer)
        for part, layer in _layers(model)
    ]


def feedforward_blocks(model: nn.Module, site: Site) -> list[Intervention]:
    """Every feed-forward block of encoder and decoder gone alone."""
    return [
        Intervention("feedforward", site, partial(without_feedforward, part=part, layers=[layer]), part, layer)
        for part, layer in _layers(model)
    ]


def attention_sites(model: nn.Module, site: Site) -> list[Intervention]:
    """All attention of every site gone, and that of every layer alone."""
    return [
        Intervention("attention", site, partial(without_attention, site=own, layers=_only(layer)), own, layer)
        for own, layers in _sites(model).items()
        for layer in (None, *(layers if len(layers) > 1 else ()))
    ]


def sampling_levels(model: nn.Module, site: Site) -> list[Intervention]:
    """Every level gone alone, of all layers of a site where points are sampled."""
    return _samples(model, site, "level")


def sampling_points(model: nn.Module, site: Site) -> list[Intervention]:
    """Likewise every point, the one of that number in every level."""
    return _samples(model, site, "point")


def _samples(model: nn.Module, site: Site, kind: str) -> list[Intervention]:
    planned = []
    for own in _sites(model):
        module = next(iter(attention_at(model, own).values()))
        counts = points_of_levels(module) if samples_points(module) else []
        for number in range(len(counts) if kind == "level" else max(counts, default=0)):
            enter = partial(without_samples, site=own, **{f"{kind}s": [number]})
            planned.append(Intervention(kind, site, enter, f"{own} {number}"))
    if not planned:
        raise ModelError(f"no attention of this model samples points, so that there are no {kind}s to ablate")
    return planned


ABLATIONS = {  # by the names that `plan` takes, but for queries, whose order must be known
    "single_queries": single_queries,
    "layers": single_layers,
    "sites": attention_sites,
    "feedforward": feedforward_blocks,
    "levels": sampling_levels,
    "points": sampling_points,
}
OF_QUERIES = ("queries", "embeddings")


def possible(model: nn.Module, planned: Iterable[Intervention]) -> list[Intervention]:
    """Those that the model can do without; a message says why others are left out. Raises ModelError where none is."""
    left, reasons = [], {}
    for one in planned:
        try:
            with one.enter(model):
                left.append(one)
        except ModelError as error:
            reasons[str(error)] = error
    if not left and reasons:
        raise next(iter(reasons.values()))
    for reason in reasons:
        logger.info("left out: %s", reason)
    return left


def _only(layer: int | None) -> list[int] | None:
    return None if layer is None else [layer]


def _layers(model: nn.Module) -> list[tuple[Part, int]]:
    """Every layer of encoder and decoder."""
    layers = []
    for part in get_args(Part):
        try:
            layers += [(part, number) for number in stack_of(model, part).numbers()]
        except ModelError:  # there are none
            continue
    return layers


def _sites(model: nn.Module) -> dict[Site, list[int]]:
    """The layers of every site that the model has."""
    parts = dict.fromkeys(part for part, _ in _layers(model))
    sites = [site for site in get_args(Site) if site.partition("_")[0] in parts]
    return {site: list(attention_at(model, site)) for site in sites}
