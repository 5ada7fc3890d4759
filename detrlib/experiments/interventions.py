"""A trained model with another attention: transforms swapped, alphas fixed, heads pruned, sinks taken away.

A site (encoder_self, decoder_self, decoder_cross) is different within a context, and exactly what it was after it, also
when an exception ends it. Contexts nest in any order (`contextlib.ExitStack`): heads that are pruned stay so when a
transform is swapped.

    with pruned(model, "decoder_cross", {0: [1, 3]}), fixed_alpha(model, "decoder_cross", 1.25):
        predictions = model(images, padding_mask, need_attention=True)

Legend: B images, L layers of a site, H heads, Q queries, K keys. Layers and heads are numbered from 0.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrlib.attention import AlphaEntmax, Transform, build_transform
from detrlib.attention.entmax import LEAST_ALPHA
from detrlib.attention.transforms import Entmax, Grid, Softmax, TVMax
from detrlib.errors import ModelError
from detrlib.experiments.parts import attention_modules, chosen_layers, exchanged, scored_at, stack_of
from detrlib.metrics.sinks import received
from detrlib.models.huggingface import HuggingFaceDetector
from detrlib.models.huggingface_weights import num_heads
from detrlib.models.outputs import Site

How = Literal["masked", "zeroed"]  # the sink is no key any more, or its value is zero


class ByHead(Transform):
    """Heads of one layer with a transform each, or None: they have no weights, which prunes them."""

    def __init__(self, by_head: Sequence[Transform | None], padding_adds_one: bool):
        super().__init__()
        self.by_head = list(by_head)
        self.transforms = nn.ModuleList(dict.fromkeys(own for own in by_head if own is not None))
        self.heads = [[head for head, own in enumerate(by_head) if own is one] for one in self.transforms]
        self.padding_adds_one = padding_adds_one  # of those that may take the place of the pruned ones

    def forward(self, scores: Tensor, padding: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """As `Transform.forward`."""
        weights = torch.zeros_like(scores, dtype=torch.promote_types(scores.dtype, torch.float32))
        for transform, heads in zip(self.transforms, self.heads, strict=True):
            if any(True for _ in transform.parameters()):  # one for each head, perhaps: it must see them all
                weights[:, heads] = transform(scores, padding, grid)[:, heads]
            else:
                own = padding if padding is None or padding.shape[1] == 1 else padding[:, heads]
                weights[:, heads] = transform(scores[:, heads], own, grid)
        return weights

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class WithoutSink(Transform):
    """Weights of `inner` without those of the sink, in every image and head: of the key that receives most of them.

    masked: the sink is no key any more, and its weight goes to the others. zeroed: it is lost, as if the value of the
    sink were zero, so that rows sum to less.

    heads: in which; None: in all. cells_ask: queries are the keys, padded ones among them do not count; the last
    `registers` of both are no cells, and no sinks.
    """

    by_row = False

    def __init__(self, inner: Transform, how: How, heads: Collection[int] | None, cells_ask: bool, registers: int):
        super().__init__()
        self.inner, self.how, self.heads = inner, how, heads
        self.cells_ask, self.registers, self.padding_adds_one = cells_ask, registers, inner.padding_adds_one

    def forward(self, scores: Tensor, padding: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """As `Transform.forward`."""
        weights = self.inner(scores, padding, grid)
        sink = self._sink(weights, padding)  # [B,H,1,K]
        if self.how == "masked":
            if padding is None or not self.padding_adds_one:
                weights = self.inner(scores, sink if padding is None else sink | padding, grid)
            else:
                weights = self.inner(scores.masked_fill(sink, -torch.inf), padding, grid)
        return weights.masked_fill(sink, 0.0)

    def _sink(self, weights: Tensor, padding: Tensor | None) -> Tensor:
        """[B,H,1,K], True for one key."""
        images, heads, queries, keys = weights.shape
        valid = weights.new_ones(images, keys)
        if padding is not None:
            valid = valid.masked_fill(padding.all(1).all(1), 0.0)
        valid[:, keys - self.registers :] = 0.0
        rows = valid if self.cells_ask else weights.new_ones(images, queries)
        best = received(weights.abs(), rows, valid)[0].argmax(-1)  # [B,H]
        chosen = torch.ones(heads, dtype=torch.bool, device=weights.device)
        if self.heads is not None:
            chosen = chosen & torch.tensor([head in self.heads for head in range(heads)], device=weights.device)
        return (F.one_hot(best, keys).bool() & chosen[:, None])[:, :, None]

    def extra_repr(self) -> str:
        return f"how={self.how}, heads={self.heads}"


@contextmanager
def swapped(
    model: nn.Module,
    site: Site,
    transform: str,
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
    **settings,
) -> Iterator[nn.Module]:
    """A context in which `site` uses another transform, in all layers and heads or in those given.

    transform: a name, with `settings` as of `build_transform`. Padded keys are treated as the model was trained, and
    its null key stays, unless settings name one. Raises ModelError for layers or heads that the model lacks and for
    tvmax at decoder_self, and for an unknown name.
    """

    def change(layer: int, module: nn.Module) -> Transform:
        try:
            with torch.random.fork_rng(devices=[]):  # what a transform draws is the same every time
                torch.default_generator.manual_seed(layer)
                new = build_transform(transform, num_heads(module), **settings)
        except ValueError as error:
            raise ModelError(str(error)) from None
        if "null_key" not in settings:
            new.null_score = _null_score(module.transform)
        if isinstance(new, TVMax) and site == "decoder_self":
            raise ModelError("tvmax needs keys that form a grid: use it at encoder_self or decoder_cross")
        if isinstance(new, TVMax) and isinstance(model, HuggingFaceDetector):
            raise ModelError(
                "tvmax needs a grid, which a model of transformers notes for it when it is built with tvmax"
            )
        if isinstance(new, TVMax) and getattr(model.transformer.encoder, "poll", None) is not None:
            raise ModelError("tvmax needs keys that form a grid: those of a model that polls do not")
        return _with_heads(module, [new] * num_heads(module), heads)

    with _changed(model, site, change, layers):
        yield model


@contextmanager
def fixed_alpha(
    model: nn.Module,
    site: Site,
    alpha: float | Sequence | Tensor,
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
) -> Iterator[nn.Module]:
    """A context in which `site` is entmax with `alpha`, in all layers and heads or in those given.

    alpha: from 1, exactly softmax, to 2, exactly sparsemax; one number, [H], or [L,H]. Raises ModelError for
    another shape or value, and as `swapped`.
    """
    modules = scored_at(model, site)
    shape = stack_of(model, site.partition("_")[0]).total(), num_heads(next(iter(modules.values())))
    values = torch.as_tensor(alpha, dtype=torch.float64).detach().cpu()
    if values.shape not in ((), shape[1:], shape):
        raise ModelError(
            f"alpha has shape {list(values.shape)}; give one number, one per head [{shape[1]}], or {list(shape)}"
        )
    for value in values.flatten().tolist():
        if not (value == 1 or LEAST_ALPHA <= value <= 2):
            raise ModelError(f"alpha {value} must lie between 1 (softmax) and 2 (sparsemax)")
    values = values.expand(shape)

    def change(layer: int, module: nn.Module) -> Transform:
        by_alpha = {value: Softmax() if value == 1 else Entmax(value) for value in values[layer].unique().tolist()}
        for transform in by_alpha.values():
            transform.null_score = _null_score(module.transform)
        return _with_heads(module, [by_alpha[value] for value in values[layer].tolist()], heads)

    with _changed(model, site, change, layers):
        yield model


@contextmanager
def pruned(model: nn.Module, site: Site, heads: Mapping[int, Collection[int]]) -> Iterator[nn.Module]:
    """A context without the `heads` of each layer, {layer: heads}: their weights are zero, so they add nothing to the
    output, as if their columns of `out_proj.weight` were zero (Michel et al. 2019, Eq. 2). Raises as `swapped`.
    """

    def change(layer: int, module: nn.Module) -> Transform:
        return _with_heads(module, [None] * num_heads(module), heads[layer])

    with _changed(model, site, change, heads):
        yield model


@contextmanager
def without_sinks(
    model: nn.Module,
    site: Site,
    how: How = "masked",
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
) -> Iterator[nn.Module]:
    """A context without the sink of every image, layer and head: the key with the largest mean weight over queries.

    masked: the key is removed before the transform, which shares its weight out among the others. zeroed: the value of
    the key is zero, which takes what it contributes and nothing else. Which key it is follows from the weights that
    there would be (`metrics.sinks.received`); within a context of its own kind, that is the second best.

    Weights that are returned have none for the sink. Raises as `swapped`, and for differential attention.
    """
    if how not in get_args(How):
        raise ModelError(f"unknown way '{how}' to remove a sink; there are {', '.join(get_args(How))}")
    encoder = getattr(getattr(model, "transformer", None), "encoder", None)
    registers = getattr(encoder, "registers", None) if site == "encoder_self" else None

    def change(layer: int, module: nn.Module) -> Transform:
        if getattr(module, "difference", None) is not None:
            raise ModelError(f"{site} of this model is differential: a head has two maps, and no sink in common")
        chosen = None if heads is None else _checked_heads(module, heads)
        count = 0 if registers is None else len(registers)
        return WithoutSink(module.transform, how, chosen, site == "encoder_self", count)

    with _changed(model, site, change, layers):
        yield model


@contextmanager
def _changed(
    model: nn.Module, site: Site, change: Callable[[int, nn.Module], Transform], layers: Collection[int] | None
) -> Iterator[None]:
    """A context in which `change(layer, module)` is the transform of the attention modules of the layers."""
    modules = scored_at(model, site)
    layers = chosen_layers(stack_of(model, site.partition("_")[0]), layers, site)
    new = {layer: change(layer, modules[layer]) for layer in layers}  # all of them made before one takes effect
    with exchanged(model, [(modules[layer], "transform", transform) for layer, transform in new.items()]):
        yield


def _with_heads(
    module: nn.Module, new: Sequence[Transform | None], heads: Collection[int] | None, now: Transform | None = None
) -> Transform:
    """The transform of a module, or that which is `now`, with that of `new` for each of `heads`.

    None in it prunes, and pruned ones stay so. So do heads without their sinks.
    """
    now, count = module.transform if now is None else now, num_heads(module)
    if isinstance(now, WithoutSink):
        inner = _with_heads(module, new, heads, now.inner)
        return WithoutSink(inner, now.how, now.heads, now.cells_ask, now.registers)
    by_head = list(now.by_head) if isinstance(now, ByHead) else [now] * count
    for head in _checked_heads(module, range(count) if heads is None else heads):
        if by_head[head] is not None:
            by_head[head] = new[head]
    for transform in filter(None, new):
        transform.padding_adds_one = now.padding_adds_one
    return by_head[0] if by_head[0] and len(set(by_head)) == 1 else ByHead(by_head, now.padding_adds_one)


def _checked_heads(module: nn.Module, heads: Collection[int]) -> set[int]:
    """Raises ModelError for heads that a module lacks."""
    if set(heads) - set(range(count := num_heads(module))):
        raise ModelError(f"heads {sorted(set(heads))}: a layer has {count}, numbered from 0")
    return set(heads)


def _null_score(transform: Transform) -> float | nn.Parameter | None:
    """That of the null key which a layer was trained with."""
    while isinstance(transform, WithoutSink):
        transform = transform.inner
    by_head = transform.by_head if isinstance(transform, ByHead) else [transform]
    return next((own.null_score for own in by_head if own is not None), None)


def learned_alphas(model: nn.Module, site: Site) -> Tensor:
    """[L,H] alphas that the model has learned at a site. Raises ModelError where it has not."""
    transforms = [module.transform for module in attention_modules(model, site)]
    if not all(isinstance(transform, AlphaEntmax) for transform in transforms):
        raise ModelError(f"the model has learned no alphas at {site}; that needs alpha_entmax in training")
    return torch.stack([transform.alpha.detach() for transform in transforms])
