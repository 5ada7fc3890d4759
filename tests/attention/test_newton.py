"""The solvers of entmax against each other: in as many steps as it takes, and in a fixed number."""

import itertools
import math

import pytest
import torch

from detrlib.attention import newton
from detrlib.attention.newton import in_fixed_steps, solve

ALPHAS = [1.02, 1.2, 1.5, 1.9, 2.0]


def scores_of(rows: int, keys: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(keys))


@pytest.mark.parametrize("block", [1, 2000, 10**9])
def test_blocks_change_nothing(monkeypatch, block):
    x, alphas = scores_of(9, 600), torch.linspace(1.1, 1.9, 9).double()[:, None]
    expected = solve(x, alphas)
    monkeypatch.setattr(newton, "BLOCK", block)
    torch.testing.assert_close(solve(x, alphas), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_steps_are_enough(dtype, alpha):
    """Also where each step drops few keys: distances that grow geometrically, and one key far above many equal ones."""
    distances = -torch.logspace(-7, 2, 3000).double()
    steep = torch.cat([torch.zeros(1).double(), torch.full((50,), -0.99 / max(alpha - 1, 0.1)).double()])
    for x in (distances, steep, scores_of(20, 3000), scores_of(20, 3000, 0.1), scores_of(3, 1)):
        found = in_fixed_steps(x.to(dtype), alpha).double()
        expected = solve(x.to(dtype).double().reshape(-1, x.shape[-1]), alpha).view_as(x)
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
