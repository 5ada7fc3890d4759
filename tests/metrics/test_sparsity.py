"""Sparsity of attention weights: exact values, independent computations, and what must not matter."""

import math

import numpy as np
import pytest
import torch

from detrlib.metrics import sparsity as module
from detrlib.metrics.sparsity import MEASURES, OF_SHAPE, entropy, gini, sparsity, zeros_ratio

METRICS_OF_WEIGHTS = [gini, zeros_ratio, entropy]


def sparse_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows that sum to one, about half of whose entries are exact zeros."""
    raw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).relu() + 1e-8 * torch.eye(shape[-1])[0]
    return raw / raw.sum(-1, keepdim=True)


def test_uniform_and_one_hot():
    uniform, one_hot = torch.full((50,), 1 / 50), torch.eye(50)[17]
    assert gini(uniform).item() == pytest.approx(0, abs=1e-6)
    assert gini(one_hot).item() == pytest.approx(1 - 1 / 50)
    assert (zeros_ratio(uniform).item(), zeros_ratio(one_hot).item()) == (0, pytest.approx(49 / 50))
    assert [sparsity(weights)["support"].item() for weights in (uniform, one_hot)] == [50, 1]
    assert (entropy(uniform).item(), entropy(one_hot).item()) == (pytest.approx(np.log(50)), 0)


@pytest.mark.parametrize("padded", [False, True])
def test_signs_do_not_matter(padded):
    """Weights of differential attention may be negative: magnitudes are measured, and exact zeros stay zeros."""
    weights = sparse_weights(4, 6, 30)
    signed = weights * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).sign()
    valid = torch.arange(30) < 25 if padded else None
    for name, found in sparsity(signed, valid).items():
        torch.testing.assert_close(found, sparsity(weights, valid)[name])
    assert (signed < 0).any() and torch.equal(signed.abs(), weights)  # what is measured is left as it was


def test_gini_is_the_mean_difference_of_pairs():
    weights = sparse_weights(3, 4, 37)
    pairs = (weights[..., :, None] - weights[..., None, :]).abs().sum((-1, -2))
    keys = weights.shape[-1]
    over_pairs = pairs / (2 * (keys**2 - keys) * weights.mean(-1))
    torch.testing.assert_close(gini(weights) * keys / (keys - 1), over_pairs)


def test_gini_of_known_distributions():
    """1/3 for the uniform and 1/2 for the exponential distribution, at their mid-quantiles."""
    quantiles = (torch.arange(1000) + 0.5) / 1000
    assert gini(quantiles).item() == pytest.approx(1 / 3, abs=1e-3)
    assert gini(-torch.log1p(-quantiles)).item() == pytest.approx(1 / 2, abs=1e-3)


@pytest.mark.parametrize("metric", METRICS_OF_WEIGHTS)
def test_padding_is_dropping_the_columns(metric):
    weights = sparse_weights(2, 3, 5, 20)
    valid = torch.arange(20) % 3 != 1
    valid = torch.stack([valid, valid.flip(0)])[:, None, None]  # [B, 1, 1, K], another mask for each image
    filled = weights.masked_fill(~valid, 0.7)  # what padded keys hold must not matter
    for image in range(2):
        dropped = metric(weights[image][..., valid[image, 0, 0]])
        torch.testing.assert_close(metric(filled, valid)[image], dropped)


@pytest.mark.parametrize("metric", METRICS_OF_WEIGHTS)
def test_scale_and_order_do_not_matter(metric):
    weights = sparse_weights(4, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(metric(3 * weights[:, order]), metric(weights))


@pytest.mark.parametrize("metric", METRICS_OF_WEIGHTS)
def test_rows_without_weight_or_keys(metric):
    weights = torch.stack([torch.zeros(6), torch.full((6,), 1 / 6)])
    nothing_valid = torch.tensor([[True] * 6, [False] * 6])
    expected = 1.0 if metric is zeros_ratio else 0.0  # a row of zeros does consist of zeros
    assert metric(weights, nothing_valid).tolist() == [expected, 0]
    assert metric(weights.half()).dtype == torch.float32


def test_zeros_ratio_threshold_is_inclusive():
    weights = torch.tensor([0.0, 1e-6, 1e-3, 0.999])
    ratios = [zeros_ratio(weights, threshold=threshold).item() for threshold in (0, 1e-6, 1e-3)]
    assert ratios == [0.25, 0.5, 0.75]


# All in one go


def one_row(weights: np.ndarray, threshold: float, share: float) -> list[float]:
    """The measures of the valid weights of one row by their definitions, in float64."""
    keys, weights = len(weights), np.sort(weights.astype(np.float64))
    total = weights.sum()
    gini = 1 - 2 * sum(c / total * (keys - k + 0.5) / keys for k, c in enumerate(weights, start=1))
    zeros = [np.mean(weights <= limit) for limit in (0, threshold, share / keys)]
    positive = weights[weights > 0] / total
    return [gini, *zeros, len(positive), -(positive * np.log(positive)).sum(), total, 0]


@pytest.mark.parametrize("chunk", [1, 100, 2**22], ids=["row by row", "some rows", "all at once"])
def test_all_measures_are_those_of_each_row(chunk, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", chunk)
    weights = sparse_weights(2, 3, 5, 37)
    valid = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    valid[0, ..., 30:] = False
    threshold, share = 0.02, 0.5
    found = sparsity(weights.masked_fill(~valid, 0.3), valid, threshold, share)
    assert tuple(found) == MEASURES
    for place in np.ndindex(2, 3, 5):
        row = weights[place][valid[place[0], 0, 0]].numpy()
        assert [found[name][place].item() for name in MEASURES] == pytest.approx(
            one_row(row, threshold, share), rel=1e-5, abs=1e-6
        )
    assert (found["zeros"] < found["zeros_thresholded"]).any() and (found["zeros"] < found["zeros_relative"]).any()


def test_mass_counts_in_zeros_and_not_in_the_shape():
    """Rows that sum to a half, to nothing and to three, as beside a null key or of sigmoid."""
    weights = sparse_weights(4, 30)
    factors = torch.tensor([1.0, 0.5, 0.0, 3.0])
    found, before = sparsity(weights * factors[:, None], threshold=0.01), sparsity(weights, threshold=0.01)
    torch.testing.assert_close(found["mass"], factors * before["mass"])
    assert found["empty"].tolist() == [0, 0, 1, 0]
    some = factors > 0
    for name in (*OF_SHAPE, "zeros", "support"):
        torch.testing.assert_close(found[name][some], before[name][some])
    assert [found[name][2].item() for name in (*OF_SHAPE, "zeros", "support")] == [0, 0, 1, 0]
    assert found["zeros_thresholded"][1] >= before["zeros_thresholded"][1]


def test_all_measures_are_those_of_the_single_functions():
    weights, valid = sparse_weights(4, 6, 50), torch.arange(50) < 41
    given = weights.clone()
    found = sparsity(weights, valid, threshold=1e-2)
    sparsity(weights)
    assert torch.equal(weights, given)  # sorted elsewhere
    alone = [gini(weights, valid), zeros_ratio(weights, valid), zeros_ratio(weights, valid, 1e-2)]
    for name, expected in zip(("gini", "zeros", "zeros_thresholded"), alone, strict=True):
        assert torch.equal(found[name], expected)
    assert torch.equal(found["entropy"], entropy(weights, valid))


def test_dropping_columns_is_padding_for_all_measures():
    weights, valid = sparse_weights(3, 4, 30), torch.arange(30) % 4 != 2
    padded, dropped = sparsity(weights.masked_fill(~valid, 0.4), valid), sparsity(weights[..., valid])
    for name in MEASURES:
        torch.testing.assert_close(padded[name], dropped[name])


def test_exact_values():
    """Uniform and one-hot rows; the two have the least and the most that K = 50 keys allow."""
    found = sparsity(torch.stack([torch.full((50,), 1 / 50), torch.eye(50)[17]]))
    assert found["gini"].tolist() == pytest.approx([0, 1 - 1 / 50], abs=1e-6)
    assert found["support"].tolist() == [50, 1]
    assert found["entropy"].tolist() == pytest.approx([math.log(50), 0], abs=1e-6)
    for name in ("zeros", "zeros_thresholded", "zeros_relative"):
        assert found[name].tolist() == pytest.approx([0, 49 / 50])


def test_the_relative_threshold_does_not_depend_on_the_resolution():
    """Twice as many keys with half the weight each: the same distribution, and the same share of zeros."""
    coarse = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).mul(4).softmax(-1)
    fine = coarse.repeat_interleave(2, -1) / 2
    few, many = (sparsity(weights, threshold=1e-3, share=40 * 1e-3) for weights in (coarse, fine))
    assert torch.equal(few["zeros_relative"], many["zeros_relative"])
    assert torch.equal(few["zeros_relative"], few["zeros_thresholded"])
    assert (many["zeros_thresholded"] > few["zeros_thresholded"]).any()


def test_order_of_the_transforms_in_untrained_models(padded_batch, small):
    """softmax < alpha-entmax < entmax15 < sparsemax in Gini index, and softmax has no zeros."""
    images, padding = padded_batch((70, 101), (128, 64), canvas=(128, 160))
    ginis = []
    for name in ("softmax", "alpha_entmax", "entmax15", "sparsemax"):
        model = small(attention={"decoder_cross": name, "alpha_init": 1.25})
        with torch.no_grad():
            maps = model(images, padding, need_attention=("decoder_cross",)).attention
        layers = [sparsity(weights, ~maps.key_padding[:, None, None]) for weights in maps.decoder_cross]
        ginis.append([layer["gini"].mean().item() for layer in layers])
        assert all((layer["zeros"] == 0).all() for layer in layers) == (name == "softmax")
    assert (np.diff(ginis, axis=0) > 0).all()
