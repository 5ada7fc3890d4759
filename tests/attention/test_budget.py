"""Weights that sum to a budget: compiled rounds, halving, and the entmax library's bisection agree."""

import entmax
import pytest
import torch

from detrlib.attention.budget import _by_halving, budget_sparsemax


@pytest.mark.parametrize("budget", [0.5, 1.0, 2.0, 2.5, 7.0])
@pytest.mark.parametrize("keys", [9, 60, 950])
@pytest.mark.parametrize("scale", [0.01, 2.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_bisection(budget, keys, scale, dtype, random_scores):
    """In double precision by halving, in single, where there is a C compiler, by rounds of Newton's steps."""
    single = random_scores(20, keys, scale=scale).float()  # the same numbers in both
    scores, exact = single.to(dtype).requires_grad_(), single.double().requires_grad_()
    found, expected = budget_sparsemax(scores, budget), entmax.budget_bisect(exact, budget, n_iter=100)
    atol = 1e-9 if dtype == torch.float64 else 2e-6 * max(1, scale)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(_by_halving(scores, budget), found, rtol=0, atol=atol)
    gradient = random_scores(20, keys, seed=1).float()
    (found,), (expected,) = (
        torch.autograd.grad(w, z, gradient.to(w.dtype)) for w, z in ((found, scores), (expected, exact))
    )
    apart = (found.double() - expected.nan_to_num()).abs().amax(-1)  # of a row with a key between in one of them only
    assert (apart > 1e-5).sum() <= (0 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("way", [budget_sparsemax, _by_halving])
def test_fewer_keys_than_the_budget_have_one_each(way, random_scores):
    scores = random_scores(5, 7).float()
    scores[:, 3:] = -torch.inf
    for budget in (3.0, 4.5):
        expected = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]).expand(5, -1)
        torch.testing.assert_close(way(scores, budget), expected)


@pytest.mark.parametrize("way", [budget_sparsemax, _by_halving])
@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
def test_scores_as_low_as_those_of_masks_have_no_weight(way, low):
    scores = torch.tensor([[0.0, low, 0.1, low, low], [0.3, low, low, low, low]])
    torch.testing.assert_close(way(scores, 2.0), (scores >= 0).float())


def test_a_budget_of_one_is_sparsemax(make, random_scores):
    scores = random_scores(2, 3, 5, 60).float()
    torch.testing.assert_close(budget_sparsemax(scores, 1.0), make("sparsemax")(scores), rtol=0, atol=1e-6)


def test_equal_scores_share_equally():
    weights = budget_sparsemax(torch.zeros(3, 10), 2.0)
    torch.testing.assert_close(weights, torch.full((3, 10), 0.2))
    tied = budget_sparsemax(torch.tensor([[5.0, 5.0, 5.0, 0.0]]), 2.0)
    torch.testing.assert_close(tied, torch.tensor([[2 / 3, 2 / 3, 2 / 3, 0.0]]))
