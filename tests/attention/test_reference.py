"""The definition itself: what is computed maximises it, and its ends are what everybody knows."""

import math

import pytest
import torch

from detrlib.attention import entmax as solvers
from detrlib.attention.reference import entmax

HEADS = 3  # of the transforms that `make` gives


ALPHAS = [1.0, 1.01, 1.3, 1.5, 1.8, 2.0]


def objective(p: torch.Tensor, scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """<p, s> + H(p)."""
    if alpha == 1:
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    else:
        entropy = (p - p**alpha).sum(-1) / (alpha * (alpha - 1))
    return (p * scores).sum(-1) + entropy


@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_other_point_of_the_simplex_is_better(alpha, random_scores):
    scores = random_scores(20, 6)
    best = entmax(scores, alpha)
    torch.testing.assert_close(best.sum(-1), torch.ones(20, dtype=torch.float64))
    for distance in (1e-3, 1e-2, 0.1, 1.0):
        for seed in range(10):
            other = torch.rand(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            other = best.lerp(other / other.sum(-1, keepdim=True), distance)
            assert (objective(other, scores, alpha) < objective(best, scores, alpha)).all()


def test_two_keys_by_hand():
    scores = torch.tensor([[0.6, 0.0], [3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(entmax(scores, 2.0), torch.tensor([[0.8, 0.2], [1.0, 0.0]], dtype=torch.float64))
    share = 1 / (1 + math.exp(-0.6))
    torch.testing.assert_close(entmax(scores, 1)[0], torch.tensor([share, 1 - share], dtype=torch.float64))
    assert entmax(scores, 2.0)[1, 1] == 0 < entmax(scores, 1)[1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_near_one_is_softmax(dtype, random_scores):
    scores = random_scores(4, 9).to(dtype)
    weights = entmax(scores, 1)
    assert weights.dtype == entmax(scores, 1.5).dtype == dtype
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(entmax(scores.double(), 1 + 1e-5), weights.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_padding_is_leaving_columns_out(alpha, keys_padding, random_scores):
    scores, padding = random_scores(2, HEADS, 4, 7), keys_padding()
    weights = entmax(scores, alpha, padding)
    for image in range(2):
        kept = ~padding[image, 0, 0]
        torch.testing.assert_close(weights[image][..., kept], entmax(scores[image][..., kept], alpha))
    assert (weights.masked_select(padding) == 0).all()
    assert (entmax(scores, alpha, padding | True) == 0).all()


def test_it_agrees_with_newton(random_scores):
    scores = random_scores(2, HEADS, 5, 200, scale=3.0)
    alphas = torch.tensor([1.1, 1.5, 1.9], dtype=torch.float64)[:, None, None]
    for alpha in (1.05, 1.5, 2.0, alphas):
        torch.testing.assert_close(entmax(scores, alpha), solvers.entmax(scores, alpha), atol=1e-12, rtol=0)
