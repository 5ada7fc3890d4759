"""A trained model with another attention: transforms swapped, alphas fixed, heads pruned, its weights as they were.

A site (encoder_self, decoder_self, decoder_cross) is different within a context, and exactly what it was after it, also
when an exception ends it. Contexts nest in any order (`contextlib.ExitStack`): heads that are pruned stay so when a
transform is swapped.

    with pruned(model, "decoder_cross", {0: [1, 3]}), fixed_alpha(model, "decoder_cross", 1.25):
        predictions = model(images, padding_mask, need_attention=True)

Legend: B images, L layers of a site, H heads, Q queries, K keys. Layers and heads are numbered from 0.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from detrlib.attention import AlphaEntmax, Transform, build_transform
from detrlib.attention.entmax import LEAST_ALPHA
from detrlib.attention.transforms import Entmax, Grid, Softmax, TVMax
from detrlib.errors import ModelError
from detrlib.models.huggingface import HuggingFaceDetector
from detrlib.models.huggingface_attention import sites_of
from detrlib.models.huggingface_weights import num_heads
from detrlib.models.outputs import Site

ADDRESSES = {  # of attention modules: in the layers of the encoder or decoder, under this name
    "encoder_self": ("encoder", "self_attn"),
    "decoder_self": ("decoder", "self_attn"),
    "decoder_cross": ("decoder", "multihead_attn"),
}


class ByHead(Transform):
    """Heads of one layer with a transform each, or None: they have no weights, which prunes them."""

    def __init__(self, by_head: Sequence[Transform | None], padding_adds_one: bool):
        super().__init__()
        self.by_head = list(by_head)
        self.transforms = nn.ModuleList(dict.fromkeys(own for own in by_head if own is not None))
        self.heads = [[head for head, own in enumerate(by_head) if own is one] for one in self.transforms]
        self.padding_adds_one = padding_adds_one  # of those that may take the place of the pruned ones

    def forward(self, scores: Tensor, padding: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """As `Transform.forward`; padding is that of the keys, the same for all heads."""
        padding = None if padding is None else padding[:, :1]
        weights = torch.zeros_like(scores, dtype=torch.promote_types(scores.dtype, torch.float32))
        for transform, heads in zip(self.transforms, self.heads, strict=True):
            if any(True for _ in transform.parameters()):  # one for each head, perhaps: it must see them all
                weights[:, heads] = transform(scores, padding, grid)[:, heads]
            else:
                weights[:, heads] = transform(scores[:, heads], padding, grid)
        return weights

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def attention_modules(model: nn.Module, site: Site) -> list[nn.Module]:
    """The attention modules of a site, first layer to last, each with a `transform`.

    Raises ModelError where no keys are scored.
    """
    if site not in ADDRESSES:
        raise ModelError(f"unknown site '{site}'; there are {', '.join(ADDRESSES)}")
    part, name = ADDRESSES[site]
    if isinstance(model, HuggingFaceDetector):
        modules = sites_of(model).get(site, [])
    else:
        modules = [getattr(layer, name, None) for layer in getattr(model.transformer, part).layers]
    if not modules:
        raise ModelError(f"the model has no {part} layers, so there is nothing to change at {site}")
    if not all(isinstance(getattr(module, "transform", None), Transform) for module in modules):
        raise ModelError(
            f"{site} of this model is deformable attention: it samples points and has no scores to transform; "
            "use decoder_self"
        )
    return modules


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
    modules = attention_modules(model, site)
    shape = len(modules), num_heads(modules[0])
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
def _changed(
    model: nn.Module, site: Site, change: Callable[[int, nn.Module], Transform], layers: Collection[int] | None
) -> Iterator[None]:
    """A context in which `change(layer, module)` is the transform of the attention modules of the layers."""
    modules = attention_modules(model, site)
    layers = range(len(modules)) if layers is None else sorted(set(layers))
    if set(layers) - set(range(len(modules))):
        raise ModelError(f"layers {list(layers)} at {site}: the model has {len(modules)}, numbered from 0")
    new = {layer: change(layer, modules[layer]) for layer in layers}  # all of them made before one takes effect
    old = {layer: modules[layer].transform for layer in layers}
    try:
        for layer, transform in new.items():
            _use(modules[layer], transform)
        yield
    finally:
        for layer, transform in old.items():
            _use(modules[layer], transform)


def _use(module: nn.Module, transform: Transform) -> None:
    """Let a module use a transform. It may have moved to another device while it used another one."""
    module.transform = transform.to(next(module.parameters()).device).train(module.training)


def _with_heads(module: nn.Module, new: Sequence[Transform | None], heads: Collection[int] | None) -> Transform:
    """The transform of a module with that of `new` for each of `heads`; None in it prunes, and pruned ones stay so."""
    now, count = module.transform, num_heads(module)
    chosen = set(range(count) if heads is None else heads)
    if chosen - set(range(count)):
        raise ModelError(f"heads {sorted(chosen)}: a layer has {count}, numbered from 0")
    by_head = list(now.by_head) if isinstance(now, ByHead) else [now] * count
    for head in chosen:
        if by_head[head] is not None:
            by_head[head] = new[head]
    for transform in filter(None, new):
        transform.padding_adds_one = now.padding_adds_one
    return by_head[0] if by_head[0] and len(set(by_head)) == 1 else ByHead(by_head, now.padding_adds_one)


def _null_score(transform: Transform) -> float | nn.Parameter | None:
    """That of the null key which a layer was trained with."""
    by_head = transform.by_head if isinstance(transform, ByHead) else [transform]
    return next((own.null_score for own in by_head if own is not None), None)


def learned_alphas(model: nn.Module, site: Site) -> Tensor:
    """[L,H] alphas that the model has learned at a site. Raises ModelError where it has not."""
    transforms = [module.transform for module in attention_modules(model, site)]
    if not all(isinstance(transform, AlphaEntmax) for transform in transforms):
        raise ModelError(f"the model has learned no alphas at {site}; that needs alpha_entmax in training")
    return torch.stack([transform.alpha.detach() for transform in transforms])
