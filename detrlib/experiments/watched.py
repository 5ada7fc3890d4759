"""Transforms in use in a detector of transformers, watched: how many keys they see, how sparse sampling points are.

    with use("sparsemax", model, "encoder_self"), watched(model, ["encoder_self"]) as at_sites:
        model(images)
    at_sites["encoder_self"][0].means()                     {"keys": 400.0}, of the first layer

Maps of attention that samples points are over the cells of the image; what is measured here is over the points, which
are what a transform weighs.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from detrlib.attention import Transform
from detrlib.attention.transforms import Grid
from detrlib.metrics.sparsity import sparsity
from detrlib.models.huggingface_attention import sites_of
from detrlib.models.huggingface_weights import samples_points
from detrlib.models.outputs import Site

OF_POINTS = ("zeros", "zeros_relative", "gini")


class Watched(Transform):
    """A transform whose scores are sharpened, if told, and of whose keys, and points, means over images are kept."""

    def __init__(self, inner: Transform, sharpen: float | None, points: bool):
        super().__init__()
        self.inner, self.sharpen, self.points = inner, sharpen, points
        self.sums = torch.zeros(2 + points * len(OF_POINTS), dtype=torch.float64)  # images, keys, measures of points

    def forward(self, scores: Tensor, padding: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """As of the transform."""
        valid = torch.ones_like(scores, dtype=torch.bool) if padding is None else ~padding.expand(scores.shape)
        if self.sharpen is not None:
            scores = scores * (self.sharpen / _spread(scores, valid).clamp(min=1e-12))
        weights = self.inner(scores, padding, grid)
        measured = sparsity(weights.detach()) if self.points else {}
        means = [measured[name].mean() for name in OF_POINTS[: self.points * len(OF_POINTS)]]
        means = torch.stack([valid.sum(-1).float().mean(), *means]).double().cpu()
        self.sums += len(scores) * torch.cat([torch.ones(1), means])
        return weights

    def means(self) -> dict[str, float]:
        """keys, and of sampling points OF_POINTS."""
        return dict(zip(("keys", *OF_POINTS), (self.sums[1:] / self.sums[0]).tolist(), strict=False))


def _spread(scores: Tensor, valid: Tensor) -> Tensor:
    """The standard deviation of scores over the valid keys of a row, all rows of a layer together."""
    mean = (scores * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return (((scores - mean) * valid).square().sum() / valid.sum()).sqrt()


@contextmanager
def watched(
    model: nn.Module, sites: Collection[Site], sharpen: float | None = None
) -> Iterator[dict[Site, list[Watched]]]:
    """A context in which the transforms of these sites, which are in use, are watched: theirs by site, layer by layer.

    sharpen: standard deviation that scores are scaled to; None: they stay as they are.
    """
    modules = [(site, module, module.transform) for site in sites for module in sites_of(model)[site]]
    found = {site: [] for site in sites}
    try:
        for site, module, inner in modules:
            module.transform = Watched(inner, sharpen, samples_points(module))
            found[site].append(module.transform)
        yield found
    finally:
        for _, module, inner in modules:
            module.transform = inner
