"""Published GFLOPs and parameters are derived from our counts, to the last printed digit where the tool is fvcore."""

import pytest

from detrlib.benchmarks.published import PUBLISHED, TOOLS, published_costs, published_model
from detrlib.experiments.costs import count_flops, count_parameters


def gflops(name: str, **options) -> float:
    return sum(count_flops(published_model(name), **options).values()) / 1e9


@pytest.fixture(scope="module")
def table():
    return published_costs()


def test_published_gflops_of_fvcore_are_derived_exactly(table):
    """To the last published digit: what is left is the rounding to 0.1 G."""
    rows = table[PUBLISHED.tool == "fvcore"]
    assert len(rows) == 15
    assert (rows.as_published - rows.published_gflops).abs().max() < 0.1


def test_published_gflops_of_detr(table):
    rows = table[PUBLISHED.tool == "detr"]
    assert rows.difference.abs().max() < 1.5
    assert table.drop(index=rows.index).difference.abs().max() < 0.1  # percent


def test_interpolation_and_norms_by_hand():
    """Four corners for each channel of each sample; five for each element of a norm."""
    name = "Deformable DETR R50"
    tokens, queries = 107 * 130 + 54 * 65 + 27 * 33 + 14 * 17, 300
    layers = {"encoder": 6 * (tokens * 4 * 4 * 256 * 4), "decoder": 6 * (queries * 4 * 4 * 256 * 4)}
    plain, with_norms = (
        count_flops(published_model(name)),
        count_flops(published_model(name), elementwise=TOOLS["fvcore"]),
    )
    linear = 256 * (256 + 128 + 256 + 256 + 2 * 1024)
    assert plain["encoder"] == 6 * tokens * linear + layers["encoder"]
    assert with_norms["encoder"] - plain["encoder"] == 6 * 2 * 5 * tokens * 256
    assert with_norms["decoder"] - plain["decoder"] == 6 * 3 * 5 * queries * 256
    assert with_norms["input projection"] - plain["input projection"] == 5 * tokens * 256


def test_scores_of_dc5_by_hand():
    """Six encoder layers of 8 x 3510 x 3510 scores, six of 8 x 100 x 3510, six of 8 x 100 x 100."""
    keys = 54 * 65
    difference = gflops("DETR-DC5 R50", elementwise=TOOLS["detr"]) - gflops("DETR-DC5 R50")
    assert difference == pytest.approx(6 * 6 * 8 * (keys * keys + 100 * keys + 100 * 100) / 1e9, rel=1e-6)


def test_costs_of_sparse_detr_are_linear_in_kept_tokens():
    names = [f"Sparse DETR R50, rho 0.{tenth}" for tenth in (1, 3, 5)]
    counts = [count_flops(published_model(name)) for name in names]
    tokens = 107 * 130 + 54 * 65 + 27 * 33 + 14 * 17
    # Offsets, weights, output and the feed-forward network are of kept tokens, values of all.
    per_token, value = 256 * (256 + 128 + 256 + 2 * 1024) + 256 * 4 * 4 * 4, 256 * 256
    for count, rho in zip(counts, (0.1, 0.3, 0.5), strict=True):
        assert count["encoder"] == 6 * ((int(tokens * rho) + 1) * per_token + tokens * value)
        assert {k: v for k, v in count.items() if k != "encoder"} == {
            k: v for k, v in counts[0].items() if k != "encoder"
        }


@pytest.mark.parametrize("name", PUBLISHED.index)
def test_published_parameters(name):
    trained = sum(count for count, _ in count_parameters(published_model(name)).values())
    assert trained / 1e6 == pytest.approx(PUBLISHED.parameters[name], rel=0.015)


def test_models_can_be_named():
    assert list(published_costs(["DETR R50"]).index) == ["DETR R50"]
