"""Compiled loops against the solver in float64, alone and in threads; and machines on which they cannot be compiled."""

import logging

import pytest
import torch

from detrlib.attention import native
from detrlib.attention.entmax import entmax
from detrlib.attention.newton import differentiate, solve

ALPHAS = [1.01, 1.1, 1.3, 1.5, 1.7, 1.99, 2.0]


@pytest.fixture
def compiled():
    native.library.cache_clear()
    if native.library() is None:
        pytest.skip("no C compiler")
    yield
    native.library.cache_clear()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A machine on which nothing is compiled yet."""
    monkeypatch.setenv("DETRLIB_CACHE", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "compiled"
    native.library.cache_clear()


def draw(rows: int, keys: int, scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, keys, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 256, 949])  # whole blocks, and a shorter last one
def test_weights_and_gradients_are_those_of_float64(compiled, keys, alpha):
    for scale in (0.1, 2.0, 20.0):
        x, g = draw(40, keys, scale), draw(40, keys, 1.0, seed=1)
        x[3, 1:] = -torch.inf
        weights = native.entmax_rows(x, alpha)
        torch.testing.assert_close(weights.double(), solve(x.double(), alpha), rtol=0, atol=1e-6)
        p, learned = weights.double(), alpha < 2
        expected, slope = differentiate(p, g.double(), alpha, learned)
        found, own_slope = native.entmax_rows_backward(weights, g, alpha, learned)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
        if learned:  # rows have both signs, so errors are compared with the sizes that were added
            sizes = (p * g.double().abs() * (1 + p.clamp(min=1e-30).log() ** 2)).sum(-1)
            assert ((own_slope.double() - slope[:, 0]).abs() <= 1e-5 * sizes + 1e-7).all()


def test_padding_is_as_if_the_columns_were_not_there(compiled):
    x = draw(8, 100, 2.0)
    hidden = torch.rand(100, generator=torch.Generator().manual_seed(3)) < 0.5
    for alpha in ALPHAS:
        weights = native.entmax_rows(x.masked_fill(hidden, -torch.inf), alpha)
        assert not weights[:, hidden].any()
        torch.testing.assert_close(weights[:, ~hidden], native.entmax_rows(x[:, ~hidden].contiguous(), alpha))


def test_every_row_may_have_its_alpha_and_every_thread_its_rows(compiled, monkeypatch):
    x, g = draw(37, 300, 2.0), draw(37, 300, 1.0, seed=1)
    alphas = torch.linspace(1.05, 1.95, 37)
    weights = native.entmax_rows(x, alphas)
    to_scores, to_alphas = native.entmax_rows_backward(weights, g, alphas, True)
    for row in (0, 17, 36):
        alone = native.entmax_rows(x[row : row + 1], alphas[row].item())
        torch.testing.assert_close(alone, weights[row : row + 1])
    monkeypatch.setattr(native, "SCORES_OF_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert torch.equal(native.entmax_rows(x, alphas), weights)
    for mine, theirs in zip(native.entmax_rows_backward(weights, g, alphas, True), (to_scores, to_alphas), strict=True):
        assert torch.equal(mine, theirs)


def test_maps_are_alone_in_their_lane_and_in_every_thread(compiled, monkeypatch):
    maps = draw(37, 56, 1.0).view(37, 7, 8)
    hidden = torch.zeros(37, 7, 8, dtype=torch.bool)
    hidden[20:, 5:, 1:] = hidden[33, 0, 3] = True
    prox, patches, gap = together = native.tv_prox_maps(maps, hidden, 0.4)
    assert torch.equal(prox[hidden], maps[hidden])
    assert torch.equal(prox.flatten(1).gather(1, patches.long()), prox.flatten(1))  # exactly tied
    assert (gap >= 0).all()
    for m in (0, 19, 20, 33, 36):
        alone = native.tv_prox_maps(maps[m : m + 1], hidden[m : m + 1], 0.4)
        assert all(torch.equal(one[0], all_of_them[m]) for one, all_of_them in zip(alone, together, strict=True))
    g = draw(37, 56, 1.0, seed=1)
    gradient = native.tv_prox_gradient(g, hidden.flatten(1), patches)
    assert not gradient[hidden.flatten(1)].any()
    torch.testing.assert_close(gradient.sum(1), g.masked_fill(hidden.flatten(1), 0).sum(1), rtol=0, atol=1e-5)
    monkeypatch.setattr(native, "SCORES_OF_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    in_threads = native.tv_prox_maps(maps, hidden, 0.4)
    assert all(torch.equal(one, other) for one, other in zip(in_threads, together, strict=True))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_stay_so(compiled, wrong):
    x = draw(3, 40, 1.0)
    x[1, 7] = wrong
    for alpha in (1.3, 1.5, 2.0):
        weights = native.entmax_rows(x, alpha)
        assert weights[1].isnan().all()
        assert not weights[[0, 2]].isnan().any()
        assert native.entmax_rows_backward(weights, torch.ones_like(x), alpha)[0][1].isnan().any()


def test_no_rows_have_no_weights(compiled):
    none = torch.empty(0, 40)
    assert native.entmax_rows(none, 1.5).shape == native.budget_rows(none, 2.0).shape == none.shape


def test_they_take_over_in_float32_only(compiled):
    x = draw(2, 30, 1.0)
    assert native.supported(x, 1.5)
    assert native.supported(x, torch.tensor([1.01, 2.0]))
    assert not native.supported(x.double(), 1.5)
    assert not native.supported(x, 1.005)
    assert not native.supported(x, torch.tensor([1.005, 2.0]))


def test_what_is_compiled_is_compiled_once(compiled, elsewhere):
    assert native.library()
    (built,) = elsewhere.iterdir()
    made = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library()
    assert built.stat().st_mtime_ns == made


def test_a_compiler_may_be_named_with_arguments(compiled, elsewhere, monkeypatch):
    monkeypatch.setenv("CC", "env cc")
    assert native.library()
    assert len(list(elsewhere.iterdir())) == 1


@pytest.mark.parametrize("compiler", ["", "no-such-compiler", "false"])
def test_a_machine_without_a_compiler_computes_the_same(elsewhere, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CC", compiler)
    caplog.set_level(logging.INFO, "detrlib")
    x = draw(6, 50, 2.0)
    weights = entmax(x, 1.5)
    torch.testing.assert_close(weights.double(), solve(x.double(), 1.5), rtol=0, atol=1e-6)
    assert len(caplog.records) == 1
    assert "compile" in caplog.text
