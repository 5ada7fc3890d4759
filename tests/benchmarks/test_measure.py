"""The clock, the count of memory, what is measured against, and the tables made of it."""

import numpy as np
import pandas as pd
import pytest
import torch

from detrlib.attention.tvmax import tvmax
from detrlib.benchmarks import figures as draw
from detrlib.benchmarks import measure as benchmark
from detrlib.benchmarks import rivals as baselines
from detrlib.benchmarks.measure import BOTH, FORWARD, Settings, Shape, compare, peak_memory
from detrlib.benchmarks.rivals import left_out, others, tvmax_by_map

NAMES = ["softmax", "sparsemax", "entmax15", "entmax", "alpha_entmax", "tvmax"]
QUICK = Settings(repeats=1, limit=1.0)


# Measuring


@pytest.fixture
def clock(monkeypatch):
    """Candidates that take the given seconds on a clock of their own, and the order in which they were called."""
    now, calls = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def candidate(name, *seconds):
        left = iter(seconds)

        def run():
            calls.append(name)
            now[0] += next(left)

        return run

    return candidate, calls


def test_candidates_take_turns_and_the_first_turn_does_not_count(clock):
    candidate, calls = clock
    table = compare({"a": candidate("a", 100, 1, 2, 30), "b": candidate("b", 0, 4, 6, 8)}, 3)
    assert calls == ["a", "b"] * 4
    assert table.loc["a"].tolist() == [2, 1.5, 16, 3]
    assert table.loc["b"].tolist() == [6, 5, 7, 3]


def test_a_slow_candidate_stops_at_the_limit_but_is_measured_once(clock):
    candidate, calls = clock
    slow, fast = candidate("slow", 50, 20), candidate("fast", *[1] * 6)
    table = compare({"slow": slow, "fast": fast}, 5, limit=10)
    assert table.repeats.to_dict() == {"slow": 1, "fast": 5}
    assert calls == ["slow", "fast"] * 2 + ["fast"] * 4
    assert table.value["slow"] == 20


def test_peak_memory_is_the_most_held_at_a_time():
    def run():
        a = torch.ones(1000, 500)
        b = torch.ones(1000, 250)
        del a
        return b + 1

    assert 3_000_000 <= peak_memory(run) < 3_010_000
    assert peak_memory(lambda: None) == 0


def test_every_number_has_a_row():
    shapes = {"one": Shape(1, 2, 3, 2, 4), "two": Shape(1, 2, 5, 2, 3)}
    results = benchmark.measure_transforms(NAMES, shapes, QUICK)
    keys = ["case", "transform", "source", "quantity"]
    assert not results.duplicated(keys).any() and (results.value > 0).all()
    own = results[results.source == "detrlib"]
    assert len(own) == len(shapes) * len(NAMES) * 3 and set(own.quantity) == {FORWARD, BOTH, "memory"}
    alone = benchmark.measure_transforms(["softmax", "sparsemax"], {"one": shapes["one"]}, QUICK, compared=False)
    assert set(alone.source) == {"detrlib", "torch"}
    memory = alone[alone.quantity == "memory"].set_index(["transform", "source"]).value
    assert memory["softmax", "torch"] == 2  # weights and gradient


def test_errors_are_small():
    errors = benchmark.measure_accuracy(NAMES, Shape(2, 4, 20, 10, 12), QUICK)
    own = errors[errors.source == "detrlib"].set_index(["case", "transform"]).value
    assert len(own) == 6
    assert own["weights"].max() < 1e-6 and own["alpha gradient", "alpha_entmax"] < 1e-4


def test_training_steps_are_compared_to_softmax():
    steps = benchmark.measure_steps(["alpha_entmax", "tvmax"], "tiny", 64, 1, QUICK)
    table = draw.ratio_table(steps, "step", "softmax")
    assert list(table.index.get_level_values("transform")) == ["softmax", "alpha_entmax", "tvmax"] * 2
    assert table["time / softmax"].xs("softmax", level="transform").tolist() == [1, 1]


def test_the_loops_are_scaled_up_to_all_maps():
    results = benchmark.measure_tvmax(Shape(1, 2, 30, 4, 5), 6, Settings(repeats=2))
    sources = ["detrlib", "loop, as published", "loop, linear gradient", "loop, linear gradient, accurate"]
    assert list(draw.ratio_table(results, "tvmax", "detrlib").index.get_level_values("source")) == sources
    errors = results[results.quantity == "error"].set_index("source").value
    assert errors["detrlib"] < 1e-5 and errors["loop, linear gradient, accurate"] < 1e-3


# What is measured against


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


def test_other_implementations_compute_the_same():
    scores = torch.randn(2, 3, 4, 30, generator=torch.Generator().manual_seed(0))
    shape = Shape(2, 3, 4, 5, 6)
    for name in NAMES:
        own, *rest = benchmark.implementations([name], shape, QUICK)
        assert len(rest) == (0 if name == "tvmax" or (name != "softmax" and "entmax" in left_out("cpu")) else 1)
        for other in rest:
            torch.testing.assert_close(other.apply(scores), own.apply(scores), rtol=0, atol=1e-5)


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(baselines, "package_version", lambda name: None)
    assert left_out("cuda") == dict.fromkeys(("entmax", "numba", "adasplash"), "not installed")
    assert left_out("cpu")["adasplash"] == "needs a GPU"
    assert [found.source for name in NAMES for found in others(name, 1.25, torch.ones(2))] == ["torch"]


# Tables and figures


@pytest.fixture
def results():
    """Both passes of sparsemax take 2 s beside 1 s of softmax and 12 s of the entmax library; no accuracy of alpha."""
    seconds = {("softmax", "torch"): 1, ("sparsemax", "detrlib"): 2, ("sparsemax", "entmax"): 12}
    rows = [
        ("transform", "encoder", *who, quantity, unit, value)
        for who, both in seconds.items()
        for quantity, unit, value in ((FORWARD, "s", both / 4), (BOTH, "s", both), ("memory", "maps", 3.0))
    ]
    rows.append(("accuracy", "weights", "sparsemax", "detrlib", "error", "", 2e-6))
    steps = {"softmax": 1.0, "sparsemax": 1.04}
    rows += [("step", "decoder_cross", name, "detrlib", "step", "s", value) for name, value in steps.items()]
    columns = ["benchmark", "case", "transform", "source", "quantity", "unit", "value"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(low=table.value * 0.9, high=table.value * 1.1, repeats=3)


def test_the_table_of_transforms(results):
    table = draw.transform_table(results)
    assert list(table.index) == [
        ("encoder", *who) for who in results[["transform", "source"]].to_numpy()[:9:3].tolist()
    ]
    row = table.loc["encoder", "sparsemax", "detrlib"]
    assert row.tolist() == [500, 2000, 2, 6, 3]
    assert np.isnan(table[draw.TO_LIBRARY].iloc[0])


def test_targets_are_checked_against_what_was_measured(results):
    targets = draw.check_targets(results)
    met = {name: (row.measured, row.met) for name, row in targets.iterrows()}
    assert met["sparsemax: entmax library / time, every shape"] == ("6", "yes")
    assert met["entmax15: entmax library / time, every shape"] == ("–", "not measured")
    assert met["sparsemax: time / softmax, encoder"] == ("2", "yes")
    assert met["largest error of a weight"] == ("2e-06", "no")
    assert met["step with sparsemax at decoder_cross / softmax"] == ("1.04", "yes")


def test_figures_show_every_number(results):
    times = draw.transform_times(results)
    assert [axes.get_title(loc="left") for axes in times.axes] == ["encoder", ""]
    shown = [line.get_xdata()[0] for line in times.axes[1].lines if line.get_marker() != "None"]
    assert shown == [1000, 2000, 12000]
    steps = draw.step_ratios(results)
    assert [round(bar.get_height(), 2) for bar in steps.axes[0].patches] == [1, 1.04]
