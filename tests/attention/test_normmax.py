"""Normmax by the root of an entmax, against the bisection of the entmax library."""

import entmax
import pytest
import torch

from detrlib.attention.normmax import normmax


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("keys", [7, 60, 950])
def test_values_and_gradients_are_those_of_bisection(alpha, keys, random_scores):
    scores, gradient = random_scores(2, 3, 4, keys).requires_grad_(), random_scores(2, 3, 4, keys, seed=1)
    found, expected = normmax(scores, alpha), entmax.normmax_bisect(scores, alpha, n_iter=100)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    found, expected = (torch.autograd.grad(weights, scores, gradient)[0] for weights in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("scale", [0.1, 2.0, 100.0])
def test_single_precision_is_as_good_as_it_can_be(alpha, scale, random_scores):
    """Compiled, where there is a C compiler."""
    scores, gradient = random_scores(20, 950, scale=scale).float().requires_grad_(), random_scores(20, 950, seed=1)
    exact = scores.detach().double().requires_grad_()
    found, expected = normmax(scores, alpha), normmax(exact, alpha)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    (found,), (expected,) = (
        torch.autograd.grad(w, z, gradient.to(w.dtype)) for w, z in ((found, scores), (expected, exact))
    )
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("alpha", [20.0, 1000.0])
def test_gradients_of_many_keys_that_are_nearly_equal_are_right(alpha, random_scores):
    """As where training starts: powers of their weights are far beyond single precision."""
    scores, gradient = random_scores(3, 300, scale=1e-3).float(), random_scores(3, 300, seed=1)
    found, expected = (
        torch.autograd.grad(normmax(z.requires_grad_(), alpha), z, gradient.to(z.dtype))[0].double()
        for z in (scores.clone(), scores.double())
    )
    step = 1e-7 * gradient
    by_differences = (normmax(scores.double() + step, alpha) - normmax(scores.double() - step, alpha)) / 2e-7
    torch.testing.assert_close((expected * gradient).sum(-1), (by_differences * gradient).sum(-1), rtol=1e-3, atol=0)
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("alpha", [1.5, 2.0, 5.0])
def test_gradients_are_those_of_finite_differences(alpha, random_scores):
    assert torch.autograd.gradcheck(lambda z: normmax(z, alpha), random_scores(4, 7, scale=1.0).requires_grad_())


def test_the_few_keys_that_are_kept_are_nearly_equal(random_scores):
    """Sec. 3.2 there: as alpha grows, weights become uniform over their support."""
    weights = [normmax(random_scores(50, 60), alpha) for alpha in (2.0, 5.0, 100.0)]
    spread = [(w.amax(-1) * (w > 0).sum(-1)).mean() for w in weights]  # 1 where all are equal
    assert spread[0] > spread[1] > spread[2]
    torch.testing.assert_close(spread[2], torch.ones((), dtype=torch.float64), rtol=0, atol=0.02)
