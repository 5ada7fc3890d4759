"""Scores, padded keys and transforms of a few heads; values and samples of three levels for deformable attention."""

import math

import pytest
import torch

from detrlib.attention import AlphaEntmax, Transform, build_transform, reference
from detrlib.attention.deformable import DeformableAttention, Samples

HEADS = 3
SHAPES = [(4, 5), (2, 3), (1, 1)]
TOKENS = sum(h * w for h, w in SHAPES)
SETTINGS = {"embed_dim": 32, "num_heads": 4, "levels": 3, "points": 2}


@pytest.fixture(scope="session")
def make():
    def make(name: str, alpha: float = 1.3, null_key: str = "none") -> Transform:
        """A transform of HEADS heads; what it learns differs from head to head."""
        told = {"tv_lambda": 0.3, "topk": 3, "budget": 1.5, "ssmax_init": 0.5, "sparsegen_lambda": 0.3}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transform = build_transform(name, HEADS, alpha=alpha, null_key=null_key, **told)
        with torch.no_grad():
            if isinstance(transform, AlphaEntmax):
                transform.pre_alpha.copy_(torch.linspace(-1.5, 2.0, HEADS))
            for parameter in transform.parameters():
                parameter += torch.linspace(-0.1, 0.1, HEADS)
            if null_key == "learned":
                transform.null_score.copy_(torch.linspace(-1.0, 2.0, HEADS))
        return transform

    return make


@pytest.fixture(scope="session")
def random_scores():
    def random_scores(*shape: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    return random_scores


@pytest.fixture(scope="session")
def keys_padding():
    def keys_padding() -> torch.Tensor:
        """[2,1,1,7]: keys hidden in the middle of one image and at the end of the other."""
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[0, [1, 4]] = True
        padding[1, 5:] = True
        return padding[:, None, None]

    return keys_padding


@pytest.fixture(scope="session")
def by_bisection():
    def by_bisection(scores: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
        """entmax by its definition, in float64."""
        return reference.entmax(scores.double(), alpha)

    return by_bisection


@pytest.fixture(scope="session")
def draw():
    def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    return draw


@pytest.fixture(scope="session")
def make_samples(draw):
    def make_samples(shapes=SHAPES, images=2, queries=5, heads=3, points=2, dtype=torch.float64) -> Samples:
        """Locations in and around the image, some of them in no cell at all; weights that sum to one."""
        sizes = (images, queries, heads, len(shapes), points)
        locations = 0.5 + 0.5 * draw(*sizes, 2, seed=1)
        weights = draw(*sizes, seed=2).flatten(3).softmax(-1).view(sizes)
        return Samples(locations.to(dtype), weights.to(dtype))

    return make_samples


@pytest.fixture(scope="session")
def by_loops():
    def by_loops(values, shapes, locations, weights):
        """[B,Q,H*D]: over every cell is a tent, one cell wide to each side, whose height at a place is its share."""
        mixed = values.new_zeros(*locations.shape[:3], values.shape[3])
        for b, q, h in torch.cartesian_prod(*(torch.arange(n) for n in locations.shape[:3])).tolist():
            token = 0
            for level, (height, width) in enumerate(shapes):
                for row in range(height):
                    for column in range(width):
                        x, y = locations[b, q, h, level].unbind(-1)  # [P]
                        tent_x = (1 - (x * width - (column + 0.5)).abs()).clamp(min=0)
                        tent_y = (1 - (y * height - (row + 0.5)).abs()).clamp(min=0)
                        mixed[b, q, h] += (weights[b, q, h, level] * tent_x * tent_y).sum() * values[b, token, h]
                        token += 1
        return mixed.flatten(2)

    return by_loops


@pytest.fixture(scope="session")
def make_module():
    def make_module(seed: int = 0, **settings) -> DeformableAttention:
        """With weights in which every query differs; they start at zero."""
        torch.manual_seed(seed)
        module = DeformableAttention(**SETTINGS | settings)
        with torch.no_grad():
            module.sampling_offsets.weight.normal_(std=0.3)
            module.attention_weights.weight.normal_(std=0.3)
            module.attention_weights.bias.normal_()
        return module

    return make_module


@pytest.fixture(scope="session")
def make_batch(draw):
    def make_batch(size: int, queries: int = 6):
        """query [2,Q,32], references [2,Q,3,2 or 4], tokens [2,S,32]; padding [2,S]: the second image is narrower."""
        query, tokens = draw(2, queries, 32, dtype=torch.float32), draw(2, TOKENS, 32, seed=1, dtype=torch.float32)
        references = draw(2, queries, 3, size, seed=2, dtype=torch.float32).sigmoid()
        padding = [torch.arange(w).repeat(h) >= math.ceil(w * 2 / 3) for h, w in SHAPES]
        padding = torch.stack([torch.zeros(TOKENS, dtype=torch.bool), torch.cat(padding)])
        return query, references, tokens, padding

    return make_batch
