"""A trained model without some of its parts: queries, layers, blocks of attention or feed-forward, sampling points.

    with without_attention(model, "decoder_self", [0]), without_feedforward(model, "encoder"):
        predictions = model(images, padding_mask, need_attention=True)

Contexts like those of `interventions`: they nest in any order, with those too, and leave the model as it was. A block
that is ablated adds exactly nothing to what passes by it. Huetten et al. 2025 ("Detection Transformers Under the
Knife", arXiv 2507.21723) ablate weights: they set the query embedding and the projections of attention to zero, whole
or a random share, in one layer or in ever more from the first on, and measure generalised IoU and F1 of matched boxes.
Their way with queries is `zeroed_queries`; zero projections would leave the biases, which here go too.

Legend: Q queries, E channels, L levels, P points per level and head.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detrlib.attention.deformable import DeformableAttention
from detrlib.errors import ModelError
from detrlib.experiments.interventions import pruned
from detrlib.experiments.parts import (
    Part,
    Stack,
    attention_at,
    chosen_layers,
    exchanged,
    kept_numbers,
    stack_of,
    without,
)
from detrlib.models.deformable import DeformableDETR
from detrlib.models.huggingface import HuggingFaceDetector, points_of
from detrlib.models.huggingface_weights import num_heads, samples_points
from detrlib.models.outputs import Site

OUTPUTS = ("out_proj", "output_proj", "o_proj")  # what attention ends in
EMBEDDINGS = ("query_embed", "query_position_embeddings", "query_refpoint_embeddings")  # of queries that are learned


class Nothing(nn.Module):
    """In place of `linear`, the last one of a block: zeros."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class WithoutSamples(nn.Module):
    """Scores of sampling points [...,H*L*P] of `inner`, minus infinity at those that are `hidden` [L*P]."""

    def __init__(self, inner: nn.Module, hidden: Tensor):
        super().__init__()
        self.inner = inner
        self.register_buffer("hidden", hidden, persistent=False)

    def forward(self, query: Tensor) -> Tensor:
        scores = self.inner(query)
        return scores.unflatten(-1, (-1, len(self.hidden))).masked_fill(self.hidden, -torch.inf).flatten(-2)


# Queries


class Queries(NamedTuple):
    """Where a model has its queries: `owner.name` is their embedding, or which of its proposals become queries."""

    owner: nn.Module
    name: str
    numbers: list[int]  # of those that are there now
    total: int  # in the whole model

    def embedding(self) -> nn.Embedding | None:
        """None where the model proposes them."""
        now = getattr(self.owner, self.name)
        return now if isinstance(now, nn.Embedding) else None

    def places(self, queries: Collection[int]) -> list[int]:
        """Of those asked for that are still there. Raises ModelError for others."""
        if set(queries) - set(range(self.total)):
            raise ModelError(f"queries {sorted(queries)}: the model has {self.total}, numbered from 0")
        return [place for place, number in enumerate(self.numbers) if number in set(queries)]


def queries_of(model: nn.Module) -> Queries:
    """The queries of a model. Raises ModelError where it has no way to leave one out."""
    if isinstance(model, DeformableDETR) and model.two_stage:
        return Queries(model, "ranks", model.ranks or list(range(model.num_queries)), model.num_queries)
    for owner in model.modules():
        for name in EMBEDDINGS:
            if isinstance(now := getattr(owner, name, None), nn.Embedding):
                numbers = kept_numbers(now)
                return Queries(owner, name, numbers, getattr(now, "total", len(numbers)))
    raise ModelError(f"{_kind(model)} chooses its queries itself, so that none of them can be taken away")


@contextmanager
def without_queries(model: nn.Module, queries: Collection[int]) -> Iterator[nn.Module]:
    """A context in which the model was built without some queries: they neither ask, nor are asked, nor detect.

    Queries are numbered from 0: as they were learned, or, where the model proposes them itself, best proposal first.
    Raises ModelError for queries that it lacks, if none would be left, or if it has no way to leave one out.
    """
    own = queries_of(model)
    gone, embedding = own.places(queries), own.embedding()
    kept = [place for place in range(len(own.numbers)) if place not in gone]
    if not kept:
        raise ModelError(f"without queries {sorted(queries)} none of the {own.total} would be left")
    left = [own.numbers[place] for place in kept]
    if embedding is not None:
        left = _with_numbers(embedding.weight.detach()[kept], left, own.total)
    with exchanged(model, [(own.owner, own.name, left)]):
        yield model


@contextmanager
def zeroed_queries(model: nn.Module, queries: Collection[int]) -> Iterator[nn.Module]:
    """A context in which the embedding of some queries is zero, so that all of them ask and detect alike.

    Raises as `without_queries`, and where queries have no embedding.
    """
    own = queries_of(model)
    if (embedding := own.embedding()) is None:
        raise ModelError("this model proposes its queries, they have no embedding that could be zero")
    weight = embedding.weight.detach().clone()
    weight[own.places(queries)] = 0.0
    with exchanged(model, [(own.owner, own.name, _with_numbers(weight, own.numbers, own.total))]):
        yield model


def _with_numbers(weight: Tensor, numbers: list[int], total: int) -> nn.Embedding:
    """An embedding whose rows know the numbers they had."""
    rows = nn.Embedding.from_pretrained(weight, freeze=False)
    rows.numbers, rows.total = numbers, total
    return rows


# Layers


@contextmanager
def without_layers(model: nn.Module, part: Part, layers: Collection[int]) -> Iterator[nn.Module]:
    """A context in which the encoder or decoder was built without some layers; heads of their own go with them.

    What follows gets what came before. Where the first decoder layer has no content to look by, that is now the next.
    Raises ModelError for layers that the model lacks, and where it cannot do without one of them.
    """
    stack = stack_of(model, part)
    gone = chosen_layers(stack, layers, part)
    places = [place for place, number in enumerate(stack.numbers()) if number in gone]
    if part == "decoder":
        _check_decoder(model, stack, places)
    with exchanged(model, [(*stack, without(stack.layers(), places)), *_without_heads(model, stack, part, places)]):
        yield model


def _check_decoder(model: nn.Module, stack: Stack, places: Collection[int]) -> None:
    """Raise ModelError where no layer would be left, or what is left could not run."""
    kept = [layer for place, layer in enumerate(stack.layers()) if place not in places]
    if not kept:
        raise ModelError(f"layers {places} at decoder: a decoder without layers detects nothing")
    if hasattr(stack.parent, "lqe_layers"):
        raise ModelError(f"{_kind(model)} corrects the boxes of its first decoder layer by all the others: none can go")
    # Conditional DETR of transformers: the first layer alone can take positions of queries, and the first one must.
    if getattr(getattr(kept[0], "encoder_attn", None), "q_pos_proj", 0) is None:
        raise ModelError(f"layers {places} at decoder: {_kind(model)} cannot do without its first")


def _without_heads(model: nn.Module, stack: Stack, part: Part, places: Collection[int]) -> list[tuple]:
    """Changes of what belongs to the layers besides: a head for each of them, or their number noted somewhere."""
    count, changes = len(stack.layers()), []
    if part == "decoder" and isinstance(getattr(stack.parent, "num_layers", None), int):
        changes.append((stack.parent, "num_layers", count - len(places)))
    for owner in model.modules():
        for name in ("class_embed", "bbox_embed"):
            heads = getattr(owner, name, None)
            if not isinstance(heads, nn.ModuleList) or len(heads) < count:
                continue
            gone = places
            if part == "encoder":  # its heads are of all layers but the last, and stand behind the others
                if not getattr(model, "encoder_auxiliary", False):
                    continue
                first = len(heads) - (count - 1)
                last = [place for place in range(count) if place not in places][-1:]
                gone = [first + place for place in {*places, *last} if place < count - 1]
            changes.append((owner, name, without(heads, gone)))
    return changes


# Blocks


@contextmanager
def without_attention(model: nn.Module, site: Site, layers: Collection[int] | None = None) -> Iterator[nn.Module]:
    """A context in which attention at a site adds nothing, in all layers or in those given.

    Weights over keys are zero, as those of pruned heads are; samples are where they were. Raises ModelError for a site
    or layers that the model lacks, and where attention ends in no projection of its own.
    """
    modules = attention_at(model, site)
    chosen = chosen_layers(stack_of(model, site.partition("_")[0]), layers, site)
    changes = []
    for layer in chosen:
        name = next((name for name in OUTPUTS if hasattr(modules[layer], name)), None)
        if name is None:
            raise ModelError(f"attention at {site} of {_kind(model)} ends in no projection that could be left out")
        changes.append((modules[layer], name, Nothing(getattr(modules[layer], name))))
    scored = not any(samples_points(module) for module in modules.values())
    heads = {layer: range(num_heads(modules[layer])) for layer in chosen}
    with pruned(model, site, heads) if scored else nullcontext(), exchanged(model, changes):
        yield model


@contextmanager
def without_feedforward(model: nn.Module, part: Part, layers: Collection[int] | None = None) -> Iterator[nn.Module]:
    """A context in which the feed-forward blocks of the encoder or decoder add nothing, in all layers or those given.

    Raises ModelError for layers that the model lacks.
    """
    stack = stack_of(model, part)
    by_number = dict(zip(stack.numbers(), stack.layers(), strict=True))
    changes = []
    for layer in chosen_layers(stack, layers, part):
        owner, name = _feedforward(by_number[layer])
        changes.append((owner, name, Nothing(getattr(owner, name))))
    with exchanged(model, changes):
        yield model


def _feedforward(layer: nn.Module) -> tuple[nn.Module, str]:
    """The last projection of the feed-forward block of a layer."""
    owner = getattr(layer, "mlp", layer)
    if isinstance(own := getattr(owner, "layers", None), nn.ModuleList):
        return own, str(len(own) - 1)
    for name in ("linear2", "fc2"):
        if hasattr(owner, name):
            return owner, name
    raise ModelError(f"{type(layer).__name__} has no feed-forward block that could be left out")


# Samples


@contextmanager
def without_samples(
    model: nn.Module,
    site: Site,
    levels: Collection[int] = (),
    points: Collection[int] = (),
    layers: Collection[int] | None = None,
) -> Iterator[nn.Module]:
    """A context in which deformable attention has no points in some levels, or lacks some points of every level.

    Their scores are hidden, so that the weights of the others sum to one. Raises ModelError where keys are scored, for
    levels, points or layers that the model lacks, and if none were left.
    """
    modules = attention_at(model, site)
    changes = []
    for layer in chosen_layers(stack_of(model, site.partition("_")[0]), layers, site):
        module = modules[layer]
        if not samples_points(module):
            raise ModelError(f"{site} of this model scores keys and samples no points; mask or prune there")
        counts = points_of_levels(module)
        for name, asked, most in (("levels", levels, len(counts)), ("points", points, max(counts))):
            if set(asked) - set(range(most)):
                raise ModelError(f"{name} {sorted(asked)} at {site}: the model has {most}, numbered from 0")
        hidden = [level in levels or point in points for level, n in enumerate(counts) for point in range(n)]
        hidden = torch.tensor(hidden, device=next(module.parameters()).device)
        inner, before = module.attention_weights, torch.zeros_like(hidden)
        while isinstance(inner, WithoutSamples):  # of contexts around this one
            inner, before = inner.inner, before | inner.hidden
        if (hidden | before).all():
            raise ModelError(f"{site}: without levels {list(levels)} and points {list(points)} none is left to sample")
        changes.append((module, "attention_weights", WithoutSamples(module.attention_weights, hidden)))
    with exchanged(model, changes):
        yield model


def points_of_levels(module: nn.Module) -> list[int]:
    """How many points deformable attention has in each level, per head."""
    if isinstance(module, DeformableAttention):
        return [module.points] * module.levels
    return points_of(module, module.n_levels)


def _kind(model: nn.Module) -> str:
    return type(model.model if isinstance(model, HuggingFaceDetector) else model).__name__
