"""TVMax against a generic solver for its dual, finite differences, and leaving padding out."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from detrlib.attention import native
from detrlib.attention.entmax import entmax
from detrlib.attention.tvmax import solve, tv_prox, tvmax

INF = float("inf")


@pytest.fixture
def in_pytorch(monkeypatch):
    """In float32, too, which loops in C would do."""
    monkeypatch.setattr(native, "library", lambda: None)


def random_maps(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hills(*shape: int, scale: float = 2.0) -> Tensor:
    """Maps [...,h,w] that change slowly from cell to cell, like scores of a trained model."""
    noise = random_maps(*shape[:-2], shape[-2] + 8, shape[-1] + 8).flatten(0, -3)
    smooth = torch.nn.functional.avg_pool2d(torch.nn.functional.avg_pool2d(noise[:, None], 5, 1), 5, 1)
    return scale * (smooth / smooth.std()).view(shape)


def image_padding(h: int, w: int) -> Tensor:
    """[2,1,1,h,w], True = padding: to the right and below in one image, below only in the other."""
    padding = torch.zeros(2, 1, 1, h, w, dtype=torch.bool)
    padding[0, ..., w - 2 :] = padding[0, ..., h - 1 :, :] = padding[1, ..., h - 2 :, :] = True
    return padding


def differences(valid: np.ndarray) -> np.ndarray:
    """[E,N]: a row for each pair of neighbouring valid cells."""
    index = np.arange(valid.size).reshape(valid.shape)
    pairs = np.concatenate(
        [np.stack([a.ravel(), b.ravel()], 1) for a, b in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1]))]
    )
    pairs = pairs[valid.ravel()[pairs].all(1)]
    return np.eye(valid.size)[pairs[:, 0]] - np.eye(valid.size)[pairs[:, 1]]


def by_least_squares(maps: Tensor, lam: float) -> Tensor:
    """The proximal step of [...,h,w], float64, from its dual min ||y - D^T u|| with |u| <= lam, by an active-set
    method; cells of -inf are left out."""
    found = []
    for y in maps.double().flatten(0, -3).numpy():
        valid = np.isfinite(y)
        d = differences(valid)
        x = y.ravel().copy()
        y = np.where(valid, y, 0).ravel()
        u = lsq_linear(d.T, y, (-lam, lam), method="bvls", tol=1e-14, max_iter=2000).x
        x[valid.ravel()] = (y - d.T @ u)[valid.ravel()]
        found.append(torch.from_numpy(x).view(maps.shape[-2:]))
    return torch.stack(found).view(maps.shape)


# Values


@pytest.mark.parametrize("lam", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("grid", [(5, 6), (7, 9), (1, 12), (12, 1), (2, 2)])
def test_prox_and_weights_agree_with_a_generic_solver(grid, lam):
    for maps in (random_maps(3, *grid), hills(3, *grid)):
        expected = by_least_squares(maps, lam)
        weights = entmax(expected.flatten(-2), 2.0)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            found = tv_prox(maps.to(dtype), lam)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
            found = tvmax(maps.to(dtype).flatten(-2), grid, lam)
            torch.testing.assert_close(found.double(), weights, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_values_at_other_scales(scale):
    maps = random_maps(4, 6, 7, scale=scale)
    for lam in (0.01, 0.1, 1.0):
        expected = by_least_squares(maps, lam)
        torch.testing.assert_close(tv_prox(maps, lam), expected, rtol=0, atol=1e-9 * scale)
        torch.testing.assert_close(tv_prox(maps.float(), lam).double(), expected, rtol=0, atol=1e-5 * scale)


def test_pytorch_and_loops_in_c_agree(monkeypatch):
    maps = torch.cat([random_maps(20, 8, 9), hills(20, 8, 9)]).float()
    weighting = random_maps(40, 8, 9, seed=1).float()
    maps[3:25, 5:, 2] = maps[11, 0, 0] = -INF  # lanes with the same cells hidden, and others
    both = []
    for library in (native.library(), None):
        monkeypatch.setattr(native, "library", lambda library=library: library)
        leaf = maps.clone().requires_grad_()
        found = tv_prox(leaf, 0.3)
        (found.masked_fill(maps.isneginf(), 0) * weighting).sum().backward()
        both.append((found.detach(), leaf.grad))
    torch.testing.assert_close(both[0][0], both[1][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(both[0][1], both[1][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("lam", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_duality_gap_is_closed_on_maps_of_coco_size(dtype, lam):
    step = torch.arange(38.0).ge(19).double().expand(1, 25, 38)
    tied = random_maps(4, 25, 38, scale=2.0).round()
    maps = torch.cat([random_maps(4, 25, 38), random_maps(2, 25, 38, scale=0.1), hills(4, 25, 38), step, tied])
    maps = maps.to(dtype)
    size = (maps - maps.mean((1, 2), keepdim=True)).flatten(1).norm(dim=1)
    bound = 4e-6 if dtype == torch.float32 else 1e-11
    _, gap = solve(maps, lam)
    assert (gap >= 0).all()
    assert (gap <= 1.001 * (bound * size) ** 2 / 2).all()
    error = (tv_prox(maps, lam) - tv_prox(maps.double(), lam)).abs().max()
    assert error < 1e-5


def test_the_gap_bounds_the_error(monkeypatch):
    monkeypatch.setattr("detrlib.attention.tvmax.ROUNDS", (2,))
    maps = random_maps(6, 6, 7)
    found, gap = solve(maps, 0.7)
    error = (found - by_least_squares(maps, 0.7)).square().sum((1, 2)) / 2
    assert (error <= gap + 1e-12).all()
    assert error.max() > 1e-6  # two sweeps are not enough


def test_rounds_build_on_each_other(monkeypatch):
    monkeypatch.setattr("detrlib.attention.tvmax.ROUNDS", (8,) * 40)
    maps = random_maps(6, 6, 7)
    torch.testing.assert_close(tv_prox(maps, 0.7), by_least_squares(maps, 0.7), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("lam", "sweeps"), [(0.1, 32), (0.3, 64), (1.0, 256), (10.0, 256)])
def test_sweeps_are_few(in_pytorch, monkeypatch, lam, sweeps):
    monkeypatch.setattr("detrlib.attention.tvmax.ROUNDS", (sweeps,))
    maps = random_maps(8, 25, 38).float()
    size = (maps - maps.mean((1, 2), keepdim=True)).flatten(1).norm(dim=1)
    assert (solve(maps, lam)[1] <= 1.001 * (4e-6 * size) ** 2 / 2).all()


def test_without_a_penalty_it_is_sparsemax():
    scores = random_maps(2, 3, 4, 30)
    torch.testing.assert_close(tvmax(scores, (5, 6), 0), entmax(scores, 2.0), rtol=0, atol=1e-12)
    assert not torch.allclose(tvmax(scores, (5, 6), 0.1), entmax(scores, 2.0), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_penalty_gives_the_mean_and_equal_weights(dtype):
    maps = (3 + random_maps(2, 9, 11)).to(dtype)
    mean = maps.mean((1, 2), keepdim=True).expand_as(maps)
    torch.testing.assert_close(tv_prox(maps, 100.0), mean, rtol=0, atol=1e-6)
    weights = tvmax(maps.flatten(1), (9, 11), 100.0)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 99), rtol=0, atol=1e-6)


def test_trivial_maps_stay_what_they_are():
    constant = torch.full((2, 5, 6), 3.7)
    torch.testing.assert_close(tv_prox(constant, 0.1), constant)
    single = random_maps(3, 1, 1)
    torch.testing.assert_close(tv_prox(single, 0.1), single)
    assert tv_prox(torch.zeros(0, 5, 6), 0.1).shape == (0, 5, 6)
    assert tv_prox(torch.zeros(5, 6), 0.1).shape == (5, 6)


def test_neighbours_share_their_weight():
    scores = torch.zeros(4, 5)
    scores[1:3, 1:3] = torch.tensor([[3.0, 3.1], [3.2, 2.9]])
    weights = tvmax(scores.flatten(), (4, 5), 0.2).view(4, 5)
    assert (weights[1:3, 1:3] == 0.25).all()
    assert weights.sum() == 1


@pytest.mark.parametrize("lam", [-0.1, float("nan")])
def test_the_penalty_cannot_be_negative(lam):
    with pytest.raises(ValueError, match="lam"):
        tv_prox(torch.zeros(2, 2), lam)


# Independence of what shares the batch


def test_a_batch_is_its_maps_one_at_a_time():
    maps = torch.cat([random_maps(5, 8, 9), random_maps(5, 8, 9, scale=0.1), hills(5, 8, 9)]).float()
    together = tv_prox(maps.view(3, 5, 8, 9), 0.3).view_as(maps)
    torch.testing.assert_close(together, torch.stack([tv_prox(one, 0.3) for one in maps]), rtol=0, atol=1e-6)


def test_blocks_do_not_show(monkeypatch):
    maps = random_maps(7, 5, 6)
    whole = tv_prox(maps, 0.3)
    monkeypatch.setattr("detrlib.attention.tvmax.BLOCK", 60)
    torch.testing.assert_close(tv_prox(maps, 0.3), whole, rtol=0, atol=1e-10)


# Gradients


@pytest.mark.parametrize("lam", [0.1, 0.4, 5.0])
def test_gradient_is_that_of_finite_differences(lam):
    maps = random_maps(4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: tv_prox(y, lam), maps)
    scores = random_maps(1, 1, 1, 20, scale=0.3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tvmax(z, (4, 5), lam), scores)


def test_gradient_under_padding_is_that_of_finite_differences():
    padding = image_padding(3, 4)
    scores = random_maps(2, 1, 1, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: tv_prox(y, 0.4, ~padding).masked_fill(padding, 0), scores)


def test_gradient_is_the_mean_over_a_patch():
    maps = torch.tensor([[0.0, 0.1, 5.0, 5.1, 0.05]], requires_grad=True)
    weighting = torch.tensor([[1.0, 2.0, 3.0, 5.0, 7.0]])
    (tv_prox(maps, 0.2) * weighting).sum().backward()
    torch.testing.assert_close(maps.grad, torch.tensor([[1.5, 1.5, 4.0, 4.0, 7.0]]))


def test_gradient_reaches_the_scores_through_mixing():
    scores = random_maps(2, 3, 4, 30, scale=0.5, seed=3).requires_grad_()
    value = random_maps(2, 3, 30, 6, seed=1)
    found = torch.autograd.grad((tvmax(scores, (5, 6), 0.1) @ value).square().sum(), scores)[0]
    direction = random_maps(2, 3, 4, 30, seed=2)
    with torch.no_grad():
        high, low = [(tvmax(scores + s * direction, (5, 6), 0.1) @ value).square().sum() for s in (1e-6, -1e-6)]
    torch.testing.assert_close((found * direction).sum(), (high - low) / 2e-6, rtol=1e-6, atol=0)


def test_memory_layout_does_not_matter():
    maps, weighting = random_maps(2, 3, 5, 6).requires_grad_(), random_maps(2, 3, 5, 6, seed=1)
    straight = tv_prox(maps, 0.3)
    expected = torch.autograd.grad((straight * weighting).sum(), maps)[0]
    turned = tv_prox(maps.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), 0.3)
    found = torch.autograd.grad((turned.permute(1, 3, 0, 2) * weighting.permute(1, 3, 0, 2)).sum(), maps)[0]
    torch.testing.assert_close(turned, straight)
    torch.testing.assert_close(found, expected)


# Padding


def masked_tvmax(scores: Tensor, padding: Tensor) -> Tensor:
    """TVMax over 6 x 7 cells, lam 0.3, with padded keys hidden the way `Transform` does it."""
    hidden = padding & ~padding.all(-1, keepdim=True)
    return tvmax(scores.masked_fill(hidden, -INF), (6, 7), 0.3).masked_fill(padding, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_is_cutting_it_off(dtype):
    maps, weighting = random_maps(2, 3, 4, 6, 7).to(dtype), random_maps(2, 3, 4, 6, 7, seed=1).to(dtype)
    padding = image_padding(6, 7)
    padded = maps.clone().requires_grad_()
    found = tv_prox(padded, 0.3, ~padding)
    (found * weighting).sum().backward()
    weights = masked_tvmax(maps.flatten(-2), padding.flatten(-2)).view_as(maps)
    for image, (h, w) in enumerate([(5, 5), (4, 7)]):
        short = maps[image, ..., :h, :w].clone().requires_grad_()
        expected = tv_prox(short, 0.3)
        (expected * weighting[image, ..., :h, :w]).sum().backward()
        torch.testing.assert_close(found[image, ..., :h, :w], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(padded.grad[image, ..., :h, :w], short.grad, rtol=0, atol=1e-5)
        alone = tvmax(short.flatten(-2), (h, w), 0.3).unflatten(-1, (h, w))
        torch.testing.assert_close(weights[image, ..., :h, :w], alone, rtol=0, atol=1e-6)
    outside = padding.expand_as(maps)
    assert torch.equal(found[outside], maps[outside])
    assert (padded.grad[outside] == 0).all()
    assert (weights[outside] == 0).all()


def test_holes_in_the_valid_region_split_it():
    maps = random_maps(3, 6, 7)
    maps[:, 2, :5] = maps[:, 4:, 3] = -INF
    torch.testing.assert_close(tv_prox(maps, 0.5), by_least_squares(maps, 0.5), rtol=0, atol=1e-9)


def test_a_fully_padded_image_is_zero_and_has_no_gradient():
    scores = random_maps(2, 3, 4, 42).float().requires_grad_()
    padding = image_padding(6, 7).flatten(-2)
    padding[0] = True
    weights = masked_tvmax(scores, padding)
    (weights * random_maps(2, 3, 4, 42, seed=1)).sum().backward()
    assert (weights[0] == 0).all()
    assert (scores.grad[0] == 0).all()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1].abs().sum() > 0
    nothing = torch.full((2, 6, 7), -INF)
    assert torch.equal(tv_prox(nothing, 0.3), nothing)


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_broken_scores_end_and_stay_in_their_map(bad):
    maps = random_maps(3, 6, 7).float()
    broken = maps.clone()
    broken[1, 2, 3] = bad
    broken.requires_grad_()
    found = tv_prox(broken, 0.3)
    found.nan_to_num().sum().backward()
    assert not torch.isfinite(found[1]).all()
    torch.testing.assert_close(found[[0, 2]], tv_prox(maps, 0.3)[[0, 2]], rtol=0, atol=1e-6)
