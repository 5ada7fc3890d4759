"""The solvers of entmax against each other: where few keys matter, where most do, and in a fixed number of steps."""

import itertools
import math

import pytest
import torch

from detrlib.attention import newton
from detrlib.attention.newton import differentiate, differentiate_rows, in_fixed_steps, solve, support

ALPHAS = [1.02, 1.2, 1.5, 1.9, 2.0]


def scores_of(rows: int, keys: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(keys))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("keys", [64, 65, 300, 950, 1777])  # segments of one length, and a shorter last one
def test_looking_for_few_keys_changes_nothing(monkeypatch, keys, alpha):
    """Neither the weights nor the gradients, whether or not these are told where the weights are."""
    x = scores_of(12, keys)
    x[3, keys // 2 :] = -torch.inf  # padding
    x[4] *= 0.01  # a row in which most keys have weight
    g, alphas = scores_of(12, keys + 1)[:, :keys].contiguous(), torch.full((12, 1), min(alpha, 1.99)).double()
    for of_rows in (alpha, alphas):
        learned = isinstance(of_rows, torch.Tensor)
        weights, index, counts = solve(x, of_rows)
        told = ((index, counts), support(weights, of_rows))
        slopes = [differentiate(weights, g, of_rows, learned, *where) for where in told]
        with monkeypatch.context() as patch:
            patch.setattr(newton, "SHORT", 10**9)
            patch.setattr(newton, "SHORT_OF_PRODUCTS", 10**9)
            expected, none, _ = solve(x, of_rows)
        assert not len(none)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
        for found in slopes:
            for mine, theirs in zip(found, differentiate_rows(weights, g, of_rows, learned), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_the_keys_that_are_worked_on_are_few_and_all_that_have_weight():
    x = scores_of(40, 950)
    weights, index, counts = solve(x, 1.5)
    mask = torch.zeros_like(weights, dtype=torch.bool)
    mask.view(-1)[index] = True
    assert torch.equal(mask.sum(-1), counts)
    assert not weights[~mask].any()
    assert counts.min() > 0
    assert counts.max() < 100
    assert (solve(0.01 * x, 1.5)[2] == 0).all()  # all keys have weight: nothing to be gained


@pytest.mark.parametrize("part", [1, 2000, 10**9])
def test_parts_change_nothing(monkeypatch, part):
    x = scores_of(9, 600)
    expected = solve(x, 1.3)
    monkeypatch.setattr(newton, "PART", part)
    for mine, theirs in zip(solve(x, 1.3), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_steps_are_enough(dtype, alpha):
    """Also where each step drops few keys: distances that grow geometrically, and one key far above many equal ones."""
    distances = -torch.logspace(-7, 2, 3000).double()
    steep = torch.cat([torch.zeros(1).double(), torch.full((50,), -0.99 / max(alpha - 1, 0.1)).double()])
    for x in (distances, steep, scores_of(20, 3000), scores_of(20, 3000, 0.1), scores_of(3, 1)):
        found = in_fixed_steps(x.to(dtype), alpha).double()
        expected = solve(x.to(dtype).double().reshape(-1, x.shape[-1]), alpha)[0].view_as(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_excess_times_its_slope_falls_to_a_quarter_with_each_step(alpha):
    """What the number of steps is proven by, in numbers."""
    c, z, s = 1 / (alpha - 1), (alpha - 1) * (x := -torch.logspace(-7, 2, 3000).double() - 1e-7), 0.0
    assert len(x) ** (2 / c) / 4 ** newton.FIXED_STEPS[torch.float32] < torch.finfo(torch.float32).eps
    products = []
    for _ in range(5):
        u = (1 + z - s).clamp(min=0)
        norm = (u**c).sum() ** (1 / c)
        slope = (u ** (c - 1))[u > 0].sum() * norm ** (1 - c)
        assert 1 - 1e-9 <= slope <= len(x) ** (1 / c) * (1 + 1e-9)
        products.append(float((norm - 1) * slope))
        s += float((norm - 1) / slope)
    assert all(new <= old / 4 + 1e-9 for old, new in itertools.pairwise(products))
    assert math.isfinite(s)
