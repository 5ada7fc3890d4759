"""What the transforms are measured against computes the same, or as accurately as published."""

import pytest
import torch

from detrlib.attention.tvmax import tvmax
from detrlib.benchmarks import rivals
from detrlib.benchmarks.rivals import left_out, others, tvmax_by_map

NAMES = ["softmax", "sparsemax", "entmax15", "entmax", "alpha_entmax", "tvmax"]


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("lam", [0.05, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("grid", [(5, 6), (1, 9), (9, 1)])
def test_the_loop_over_maps_agrees_with_ours(grid, lam, search):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, grid[0] * grid[1])
    scores = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    gradient = torch.randn(shape, dtype=torch.float64, generator=generator)
    ours = tvmax(scores, grid, lam)
    theirs = tvmax_by_map(scores, grid, lam, iterations=5000, tolerance=1e-13, digits=8, search=search)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-9)
    (expected,) = torch.autograd.grad(ours, scores, gradient)
    (found,) = torch.autograd.grad(theirs, scores, gradient)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_as_published_the_loop_is_accurate_to_a_hundredth():
    scores = torch.randn(4, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tvmax_by_map(scores, (8, 10), 0.1), tvmax(scores, (8, 10), 0.1), rtol=0, atol=2e-2)


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(rivals, "package_version", lambda name: None)
    assert left_out("cuda") == dict.fromkeys(("entmax", "numba", "adasplash"), "not installed")
    assert left_out("cpu")["adasplash"] == "needs a GPU"
    assert [found.source for name in NAMES for found in others(name, 1.25, torch.ones(2))] == ["torch"]
