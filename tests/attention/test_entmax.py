"""Exact entmax: values and gradients against slow computations of another kind, at the ends of its range too."""

import pytest
import torch
from entmax import entmax_bisect

from detrlib.attention.entmax import entmax

ALPHAS = [1.01, 1.05, 1.2, 1.5, 1.8, 2.0]
SCALES = [0.1, 1.0, 10.0]


def rows(keys: int, scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(6, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(scores, alpha, upstream):
    """Of scores and of alpha, a number per row."""
    scores = scores.clone().requires_grad_()
    alpha = torch.full((len(scores), 1), alpha, dtype=scores.dtype, requires_grad=True)
    entmax(scores, alpha).backward(upstream)
    return scores.grad, alpha.grad


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("keys", [3, 950])  # the long rows leave keys out, the short ones do not
def test_weights_in_float32_are_those_of_float64(keys, alpha, scale, by_bisection):
    scores = rows(keys, scale)
    torch.testing.assert_close(entmax(scores.float(), alpha).double(), by_bisection(scores, alpha), atol=5e-7, rtol=0)


def test_steps_do_not_end_before_the_root(by_bisection):
    """Between 1.5 and 2 a small step does not mean that the root is near."""
    hard = torch.tensor([-0.36588633, -0.30654293, -0.26329598, 0.31967798, 0.04227265])
    torch.testing.assert_close(entmax(hard, 1.99).double(), by_bisection(hard, 1.99), atol=5e-7, rtol=0)
    for alpha in (1.6, 1.9, 1.95, 1.99, 1.999):
        for keys in (5, 20):
            scores = torch.randn(20_000, keys, generator=torch.Generator().manual_seed(keys))
            torch.testing.assert_close(entmax(scores, alpha).double(), by_bisection(scores, alpha), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1 + 1e-8, 2.5, float("nan")])
def test_other_alphas_are_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        entmax(rows(7, 1.0), alpha)
    for of_rows in (torch.tensor(alpha), torch.tensor([[1.5]] * 5 + [[alpha]], requires_grad=True)):
        with pytest.raises(ValueError, match="alpha"):
            entmax(rows(7, 1.0), of_rows.double())


def test_both_ends_of_the_range_are_in_it():
    for dtype in (torch.float32, torch.float64):
        scores, alphas = rows(7, 1.0).to(dtype), torch.tensor([[1 + 1e-6], [2.0]] * 3, dtype=dtype)
        torch.testing.assert_close(entmax(scores, alphas)[1::2], entmax(scores[1::2], 2.0), rtol=0, atol=1e-5)
        torch.testing.assert_close(entmax(scores, alphas)[::2], scores[::2].softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", SCALES)
def test_weights_in_float64_keep_its_digits(alpha, scale, by_bisection):
    scores = rows(300, scale)
    torch.testing.assert_close(entmax(scores, alpha), by_bisection(scores, alpha), atol=1e-13, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("beyond", [1e-3, 1e-5, 1e-6])
def test_alpha_near_one_is_softmax(beyond, scale):
    scores = rows(300, scale).float()
    difference = (entmax(scores, 1 + beyond) - scores.softmax(-1)).abs().max()
    assert difference < 50 * beyond + 5e-7


@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.7, 1.95])
def test_gradient_of_alpha_is_that_of_finite_differences(alpha, by_bisection):
    scores, upstream, step = rows(300, 2.0), rows(300, 1.0, seed=1), 1e-5
    rise = (by_bisection(scores, alpha + step) - by_bisection(scores, alpha - step)) / (2 * step)
    expected = (rise * upstream).sum(-1, keepdim=True)
    torch.testing.assert_close(gradients(scores, alpha, upstream)[1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.1, 1.3, 1.7])
def test_gradients_are_those_of_the_entmax_library(alpha):
    scores, upstream = rows(300, 2.0), rows(300, 1.0, seed=1)
    x = scores.clone().requires_grad_()
    a = torch.full((len(scores), 1), alpha, dtype=torch.float64, requires_grad=True)
    entmax_bisect(x, a, n_iter=100).backward(upstream)
    to_scores, to_alpha = gradients(scores, alpha, upstream)
    torch.testing.assert_close(to_scores, x.grad, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(to_alpha, a.grad, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.5, 1.9])
@pytest.mark.parametrize("keys", [3, 950])
def test_gradient_of_alpha_survives_float32(keys, alpha):
    scores, upstream = rows(keys, 2.0), rows(keys, 1.0, seed=1)
    _, expected = gradients(scores, alpha, upstream)
    _, single = gradients(scores.float(), alpha, upstream.float())
    # The gradient of a head: rows have both signs, so the error is compared with the sizes that were added.
    assert (single.double() - expected).abs().sum() < 1e-4 * expected.abs().sum()


@pytest.mark.parametrize("alpha", [1.0001, 1.005])
def test_gradient_of_alpha_does_not_cancel_near_one(alpha):
    """There it is p (<L^2> - L^2) / 2 with L = log p, which a quotient of small differences would lose."""
    scores, upstream = rows(50, 1.0), rows(50, 1.0, seed=1)
    p = scores.softmax(-1)
    spread = p.log() ** 2
    limit = p * ((p * spread).sum(-1, keepdim=True) - spread) / 2
    _, single = gradients(scores.float(), alpha, upstream.float())
    torch.testing.assert_close(
        single.double(), (limit * upstream).sum(-1, keepdim=True), rtol=0.05, atol=0.005
    )  # the limit
    _, expected = gradients(scores, alpha, upstream)
    torch.testing.assert_close(single.double(), expected, rtol=2e-3, atol=1e-4)  # the same in float64


def test_alpha_may_differ_from_row_to_row(by_bisection):
    scores, alphas = rows(40, 2.0), torch.tensor([1.1, 1.1, 1.9, 1.5, 1.5, 1.2], dtype=torch.float64)
    together = entmax(scores, alphas[:, None])
    for row, alpha, weights in zip(scores, alphas.tolist(), together, strict=True):
        torch.testing.assert_close(weights, by_bisection(row[None], alpha)[0], atol=1e-12, rtol=0)


def test_scores_need_not_lie_in_order():
    scores = rows(50, 2.0)
    upstream = rows(50, 1.0, seed=1)
    turned, back = scores.T.contiguous().T, upstream.T.contiguous().T
    for mine, theirs in zip(gradients(turned, 1.3, back), gradients(scores, 1.3, upstream), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("keys", [4, 400])
def test_what_is_not_a_number_stays_visible_and_in_its_row(alpha, keys):
    scores = rows(keys, 2.0)
    scores[2, 1] = torch.nan
    weights = entmax(scores, alpha)
    assert weights[2].isnan().any()
    assert not weights[[0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 5), (3, 1), (2, 0)])
def test_empty_and_single_keys(alpha, shape):
    scores = torch.randn(*shape, requires_grad=True)
    weights = entmax(scores, alpha)
    weights.sum().backward()
    assert weights.shape == scores.shape
    assert (weights.sum(-1) - 1).abs().max() < 1e-6 if weights.numel() else True
    assert scores.grad.abs().sum() < 1e-6
