"""Transforms of a few heads, random scores and padded keys for them."""

import torch

from detrlib.attention import AlphaEntmax, Transform, build_transform, reference

HEADS = 3


def make(name: str, alpha: float = 1.3) -> Transform:
    """A transform of HEADS heads; learnable alphas differ from head to head."""
    transform = build_transform(name, HEADS, alpha=alpha, tv_lambda=0.3)
    if isinstance(transform, AlphaEntmax):
        with torch.no_grad():
            transform.pre_alpha.copy_(torch.linspace(-1.5, 2.0, HEADS))
    return transform


def weights_of(transform: Transform, scores: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    """For tvmax the keys are a feature map one cell high."""
    return transform(scores, padding, (1, scores.shape[-1]))


def random_scores(*shape: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def keys_padding() -> torch.Tensor:
    """[2,1,1,7]: keys hidden in the middle of one image and at the end of the other."""
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, [1, 4]] = True
    padding[1, 5:] = True
    return padding[:, None, None]


def by_bisection(scores: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """entmax by its definition, in float64."""
    return reference.entmax(scores.double(), alpha)
