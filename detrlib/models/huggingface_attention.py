"""Our transforms inside detectors of Hugging Face's transformers, and out again.

    with use("sparsemax", model, sites="encoder_self"):
        outputs = model(pixel_values, pixel_mask=pixel_mask, output_attentions=True)

`huggingface_weights` says how a module is changed; here stands which modules, and how all of it is undone. A model in
use is told by nothing but its attention modules, so that two models never meet, whatever they share.
"""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detrlib.attention import TRANSFORMS, Transform, build_transform
from detrlib.attention.transforms import Grid, TVMax
from detrlib.config.huggingface import require_transformers
from detrlib.errors import ConfigError, ModelError, listed
from detrlib.models.huggingface_weights import (
    ByName,
    SeesMap,
    change,
    num_heads,
    original_of,
    samples_points,
    way_of,
)
from detrlib.models.outputs import Site, site_of

MASKED = ("eager", "sdpa")  # implementations whose masks tell padding cell by cell
SITES = get_args(Site)


def sites_of(model: nn.Module) -> dict[Site, list[nn.Module]]:
    """The attention modules of a detector of transformers that `use` can change, by site, first layer to last.

    A site that the model lacks is not there. Deformable attention counts: its keys are sampling points.
    """
    found = {site: [] for site in SITES}
    for path, module in model.named_modules():
        site = site_of(path)
        if site is not None and way_of(module) is not None:
            found[site].append(module)
    return {site: modules for site, modules in found.items() if modules}


class TVMaxOfMap(TVMax):
    """TVMax over the cells of the feature map that another module of the model sees."""

    def __init__(self, tv_lambda: float, source: nn.Module):
        super().__init__(tv_lambda)
        self.__dict__["source"] = source  # not a submodule: its parameters are the model's

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        """As of TVMax, with the grid of the image that is in the model now."""
        return super().weights(scores, self.source.grid)


def sees_map(model: nn.Module, site: Site, module: nn.Module) -> nn.Module | None:
    """The module that sees the feature map whose cells are the keys of attention `module`; None: they are no cells."""
    if site == "decoder_self" or samples_points(module):
        return None
    for part in model.modules():
        if original_of(part).__name__.endswith("AIFILayer") and any(module is inner for inner in part.modules()):
            return part
        if isinstance(projection := getattr(part, "input_projection", None), nn.Conv2d):
            return projection
    return None


class Handle:
    """Transforms in use in a model; `remove()`, or the end of a `with`, makes the model what it was before."""

    def __init__(self, model: nn.Module, new: Iterable[tuple[nn.Module, Transform]]):
        self.model = model
        self._changed = []
        for module, transform in new:
            self._changed.append((module, transform, type(module), getattr(module, "transform", None)))
            module.transform = transform.to(_device(module)).train(module.training)
            change(module, way_of(module))
            if isinstance(transform, TVMaxOfMap):
                source = transform.source
                source.uses = getattr(source, "uses", 0) + 1
                change(source, SeesMap)

    def remove(self) -> None:
        """Take the transforms out again; a second time nothing happens.

        Raises ModelError where a later `use` still lies over this one: remove that first.
        """
        if any(module.transform is not transform for module, transform, *_ in self._changed):
            raise ModelError("another use() of this model came later at the same site: remove that one first")
        for module, transform, before, earlier in self._changed:
            module.__class__ = before
            if earlier is None:
                del module.transform
            else:
                module.transform = earlier.to(_device(module)).train(module.training)
            if isinstance(transform, TVMaxOfMap):
                _leave(transform.source)
        self._changed = []

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *_: Any) -> None:
        self.remove()


def _device(module: nn.Module) -> torch.device:
    return next(parameter.device for name, parameter in module.named_parameters() if not name.startswith("transform."))


def _leave(source: nn.Module) -> None:
    """One transform fewer asks for the grid; after the last, the module is what it was."""
    source.uses -= 1
    if not source.uses:
        source.__class__ = original_of(source)
        source.__dict__.pop("grid", None)
        del source.uses


def use(
    transforms: str | Mapping[Site, str],
    model: nn.Module,
    sites: Site | Iterable[Site] | None = None,
    **settings: float | str,
) -> Handle:
    """Put transforms into a detector of transformers: DETR, RT-DETR, D-FINE, and what else attends as they do.

    Softmax at every site gives what the model's own "eager" attention gives. Padded keys get exactly zero weight, and
    rows of nothing else are zero. `output_attentions=True` returns the weights. A later use at the same site takes the
    place of an earlier one until it is removed. Copies and pickles of the model keep the transforms, and a learnable
    alpha is a parameter of the model: `...transform.pre_alpha` of each attention module, see `alpha_modules`.

    Args:
        transforms: the name of one, or names by site: {"encoder_self": "entmax15", "decoder_cross": "alpha_entmax"}.
        model: of transformers, or a module that holds one.
        sites: where one transform goes: encoder_self, decoder_self, decoder_cross; default: wherever the model can.
            At deformable attention, such as decoder_cross of RT-DETR, the keys are the sampling points of a query.
        settings: of transforms, as of `build_transform`: null_key of any, "zero" or "learned"; alpha of entmax,
            alpha_init of alpha_entmax, tv_lambda of tvmax, which needs keys that are cells of one feature map, ...

    Returns:
        A handle that takes the transforms out again, also as a context.

    Raises:
        ConfigError: an unknown transform or site, or a value out of range; transformers is missing or too old.
        ModelError: the model has no such site, no grid there, or no attention that can be changed.
    """
    require_transformers()
    chosen = _chosen(transforms, model, sites)
    modules = sites_of(model)
    new = [(m, _build(name, model, site, m, settings)) for site, name in chosen.items() for m in modules[site]]
    if isinstance(model, DistributedDataParallel) and (own := [t for _, t in new if [*t.parameters()]]):
        added = next(name for name, _ in own[0].named_parameters())
        raise ModelError(f"{added} is learned: use it before the model is wrapped for several processes")
    return Handle(model, new)


def _chosen(transforms: str | Mapping[Site, str], model: nn.Module, sites: Any) -> dict[Site, str]:
    """The transform of each site, all of them names and sites that there are."""
    there = sites_of(model)
    if not there:
        raise ModelError(f"{type(model).__name__} has no attention that takes transformers' attention interface")
    if isinstance(transforms, Mapping):
        if sites is not None:
            raise ConfigError("sites: the names by site already say where")
        chosen = dict(transforms)
    else:
        chosen = dict.fromkeys([sites] if isinstance(sites, str) else there if sites is None else sites, transforms)
    for site, name in chosen.items():
        if site not in SITES:
            raise ConfigError(f"unknown site {site!r}; there are {listed(SITES)}")
        if not isinstance(name, str) or name not in TRANSFORMS:
            raise ConfigError(f"unknown attention transform {name!r}; there are {listed(TRANSFORMS)}")
        if site not in there:
            raise ModelError(f"{type(model).__name__} has no attention at {site}; it has {listed(there)}")
        for module in there[site]:
            if way_of(module) is ByName and (own := vars(module)["config"]._attn_implementation) not in MASKED:
                raise ModelError(
                    f"{type(model).__name__} attends by {own}, whose masks do not tell padding cell by cell: load it "
                    "with attn_implementation='eager'"
                )
    return chosen


def _build(name: str, model: nn.Module, site: Site, module: nn.Module, settings: dict[str, Any]) -> Transform:
    """The transform called `name` for one attention module."""
    try:
        transform = build_transform(name, num_heads(module), **settings)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if transform.null_score is not None and samples_points(module):
        raise ModelError(f"null_key: {site} of {type(model).__name__} samples points and scores no keys; leave it out")
    if not isinstance(transform, TVMax):
        return transform
    source = sees_map(model, site, module)
    if source is None:
        raise ModelError(f"tvmax needs keys that form a grid; those at {site} of {type(model).__name__} do not")
    own = TVMaxOfMap(transform.tv_lambda, source)
    own.null_score = transform.null_score
    return own
