"""Triton kernels for rows against the plain PyTorch they replace, computed in float64, and where kernels are used.

That they compile for a GPU is tested without one, in a process of its own that runs `compile_kernels.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detrlib import attention
from detrlib.attention import entmax as solvers
from detrlib.attention import mixing
from detrlib.attention.entmax import entmax

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# NumPy warns about what is no number, where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


# Rows


@pytest.fixture(scope="session")
def check_rows(close, gradients, grows, random, rows):
    def check_rows(x: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
        """Compare weights and gradients with those of `solvers`; give back the weights."""
        learned = isinstance(alpha, torch.Tensor)
        inputs = grows(x, alpha)
        expected = entmax(inputs[0], inputs[1][:, None] if learned else alpha)
        weighting = random(*x.shape, seed=1)
        wanted = gradients(expected, weighting.double(), inputs)
        weights = rows.entmax_rows(x, alpha)
        to_scores, to_alpha = rows.entmax_rows_backward(weights, weighting, alpha, need_alpha=learned)
        assert weights.dtype == to_scores.dtype == torch.float32
        close(weights, expected)
        close(to_scores, wanted[0])
        if learned:
            close(to_alpha, wanted[1], atol=1e-4, rtol=1e-4)
        else:
            assert to_alpha is None
        return weights

    return check_rows


@pytest.mark.parametrize("shape", [(9, 1), (11, 7), (3, 64), (5, 300)])
def test_rows_are_those_of_the_solver(alpha, shape, check_rows, random, spread):
    check_rows(random(*shape, scale=2), spread(alpha, shape[0]))


def test_rows_longer_than_a_block(alpha, monkeypatch, check_rows, random, rows, spread):
    monkeypatch.setattr(rows, "LONGEST", 64)
    monkeypatch.setattr(rows, "BLOCK", 32)
    x = random(3, 110, scale=2)
    x[0, 35:] = x[1, :96] = float("-inf")
    check_rows(x, spread(alpha, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [950, 15000, 40000])
def test_rows_at_their_real_size(alpha, length, check_rows, random, spread):
    check_rows(random(70, length, scale=2), spread(alpha, 70))


def test_masked_keys_get_nothing(alpha, check_rows, random, spread):
    x, alpha = random(4, 20, scale=2), spread(alpha, 4)
    x[0, 3:9] = x[1, 0] = x[2, 1:] = float("-inf")
    weights = check_rows(x, alpha)
    assert (weights[x.isinf()] == 0).all()


@pytest.mark.parametrize("longest", [64, 16])
def test_a_row_without_keys_is_zero_and_has_no_gradient(alpha, longest, monkeypatch, close, random, rows, spread):
    monkeypatch.setattr(rows, "LONGEST", longest)
    monkeypatch.setattr(rows, "BLOCK", 16)
    x, alpha = random(3, 20), spread(alpha, 3)
    x[1] = float("-inf")
    weights = rows.entmax_rows(x, alpha)
    to_scores, to_alpha = rows.entmax_rows_backward(weights, random(3, 20, seed=1), alpha, need_alpha=True)
    close(weights.sum(1), torch.tensor([1.0, 0.0, 1.0], device=DEVICE))
    assert (weights[1] == 0).all()
    assert (to_scores[1] == 0).all()
    assert to_alpha[1] == 0
    assert to_scores[[0, 2]].abs().amax(1).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_computed_in_float32(dtype, close, random, rows):
    x = random(4, 50, scale=2).to(dtype)
    weights = rows.entmax_rows(x, 1.3)
    assert weights.dtype == torch.float32
    close(weights, entmax(x.double(), 1.3))
    rounded = rows.entmax_rows(x, 1.3, dtype)
    assert rounded.dtype == dtype
    close(rounded, weights, atol=4e-3)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("longest", [64, 4])
def test_the_last_step_is_small_enough_where_the_curvature_has_no_bound(
    longest, learned, monkeypatch, by_bisection, close, hard, rows
):
    """A step of a thousandth of the last digits can still leave an error of 5e-6 between alpha = 1.5 and 2."""
    monkeypatch.setattr(rows, "LONGEST", longest)
    monkeypatch.setattr(rows, "BLOCK", 4)
    alpha = torch.tensor([1.99], device=DEVICE) if learned else 1.99
    close(rows.entmax_rows(hard, alpha), by_bisection(hard, 1.99), atol=2e-7)


def test_short_rows_with_alpha_near_2(monkeypatch, by_bisection, close, rows):
    monkeypatch.setattr(rows, "TILE", 1)  # a row for itself: none goes on because a neighbour does
    generator = torch.Generator().manual_seed(371)  # has a row that an earlier stop gets wrong
    x = torch.randn(200, 20, generator=generator)
    x[torch.arange(20) >= torch.randint(5, 21, (200, 1), generator=generator)] = float("-inf")
    alpha = 1.9 + 0.099 * torch.rand(200, generator=generator)
    x, alpha = x.to(DEVICE), alpha.to(DEVICE)
    close(rows.entmax_rows(x, alpha), by_bisection(x, alpha.double()[:, None]), atol=5e-7)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.01])
def test_rows_sum_to_one_at_every_scale(scale, alpha, close, random, rows):
    weights = rows.entmax_rows(random(4, 700, scale=scale), alpha)
    assert (weights >= 0).all()
    close(weights.sum(1), torch.ones(4, device=DEVICE), atol=1e-5)


@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.3])
@pytest.mark.parametrize("longest", [64, 16])
def test_a_score_that_is_no_number_shows(longest, alpha, monkeypatch, random, rows):
    monkeypatch.setattr(rows, "LONGEST", longest)
    monkeypatch.setattr(rows, "BLOCK", 16)
    x = random(3, 20)
    x[1, 4] = float("nan")
    weights = rows.entmax_rows(x, alpha)
    assert weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()


def test_rows_that_are_not_contiguous_and_no_rows_at_all(random, rows):
    x = random(20, 6, scale=2).T
    torch.testing.assert_close(rows.entmax_rows(x, 1.5), rows.entmax_rows(x.contiguous(), 1.5))
    assert rows.entmax_rows(random(0, 5), 1.5).shape == (0, 5)
    assert rows.entmax_rows_backward(random(0, 5), random(0, 5), 1.5)[0].shape == (0, 5)


# What is taken, and what is not


@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "alpha_entmax"])
def test_transforms_and_layers_go_through_the_kernels_where_they_apply(name, monkeypatch, close, flash, random, rows):
    """The same layer three times: as it is, with the row kernels, with the fused one."""
    torch.manual_seed(0)
    layer = attention.MultiheadAttention(32, 2, attention.build_transform(name, 2)).to(DEVICE)
    query, key = random(2, 5, 32), random(2, 9, 32, seed=1)
    padding = torch.arange(9, device=DEVICE) >= torch.tensor([[9], [6]], device=DEVICE)
    used = []

    def run():
        output, _ = layer(query, key, key, padding)
        return [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    def spy(module, function):
        real = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *inputs: (used.append(function), real(*inputs))[1])

    monkeypatch.setattr(solvers, "_kernels", lambda *inputs: None)
    plain = run()
    for function in ("entmax_rows", "entmax_rows_backward"):
        spy(rows, function)
    monkeypatch.setattr(solvers, "_kernels", lambda *inputs: rows)
    by_rows = run()
    assert used == ["entmax_rows", "entmax_rows_backward"]
    spy(flash, "sparse_attention")
    monkeypatch.setattr(mixing, "FUSED_KEYS", 9)
    monkeypatch.setattr(mixing, "_flash", lambda: flash)
    monkeypatch.setattr(mixing, "_fused", lambda *inputs: True)
    fused = run()
    assert used[2:] == ["sparse_attention"]
    for expected, *found in zip(plain, by_rows, fused, strict=True):
        for one in found:
            close(one, expected, atol=1e-4, rtol=1e-3)


def test_nothing_is_supported_without_a_gpu(flash, rows):
    assert not rows.supported(torch.zeros(2, 3))
    assert not flash.attention_supported(*torch.zeros(3, 1, 1, 2, 8))


def test_double_precision_is_refused(flash, random, rows):
    x = random(2, 3).double()
    with pytest.raises(TypeError, match="float64"):
        rows.entmax_rows(x, 1.5)
    with pytest.raises(TypeError, match="float64"):
        flash.sparse_attention(x[None, None], x[None, None], x[None, None], 1.5)


def test_mixed_precision_is_refused(flash, random):
    x = random(1, 1, 2, 8)
    with pytest.raises(TypeError, match="differ"):
        flash.sparse_attention(x, x.bfloat16(), x, 1.5)


# Compilation


@pytest.mark.skipif("nvidia" not in triton.backends.backends, reason="this Triton has no NVIDIA backend")
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = str(Path(__file__).with_name("compile_kernels.py"))
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
