"""The clock, the count of memory, and a row for every number."""

import pytest
import torch

from detrlib.benchmarks import measure
from detrlib.benchmarks.figures import ratio_table
from detrlib.benchmarks.measure import BOTH, FORWARD, Settings, Shape, compare, peak_memory
from detrlib.benchmarks.rivals import left_out

NAMES = ["softmax", "sparsemax", "entmax15", "entmax", "alpha_entmax", "tvmax"]
QUICK = Settings(repeats=1, limit=1.0)


@pytest.fixture
def clock(monkeypatch):
    """Candidates that take the given seconds on a clock of their own, and the order in which they were called."""
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

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
    results = measure.measure_transforms(NAMES, shapes, QUICK)
    keys = ["case", "transform", "source", "quantity"]
    assert not results.duplicated(keys).any() and (results.value > 0).all()
    own = results[results.source == "detrlib"]
    assert len(own) == len(shapes) * len(NAMES) * 3 and set(own.quantity) == {FORWARD, BOTH, "memory"}
    alone = measure.measure_transforms(["softmax", "sparsemax"], {"one": shapes["one"]}, QUICK, compared=False)
    assert set(alone.source) == {"detrlib", "torch"}
    memory = alone[alone.quantity == "memory"].set_index(["transform", "source"]).value
    assert memory["softmax", "torch"] == 2  # weights and gradient


def test_errors_are_small():
    errors = measure.measure_accuracy(NAMES, Shape(2, 4, 20, 10, 12), QUICK)
    own = errors[errors.source == "detrlib"].set_index(["case", "transform"]).value
    assert len(own) == 6
    assert own["weights"].max() < 1e-6 and own["alpha gradient", "alpha_entmax"] < 1e-4


def test_training_steps_are_compared_to_softmax():
    steps = measure.measure_steps(["alpha_entmax", "tvmax"], "tiny", 64, 1, QUICK)
    table = ratio_table(steps, "step", "softmax")
    assert list(table.index.get_level_values("transform")) == ["softmax", "alpha_entmax", "tvmax"] * 2
    assert table["time / softmax"].xs("softmax", level="transform").tolist() == [1, 1]


def test_ours_are_measured_again_where_freed_memory_is_kept(monkeypatch):
    told = []
    monkeypatch.setattr(measure, "keep_freed_memory", lambda: told.append(True))
    shapes = {"one": Shape(1, 2, 3, 2, 4)}
    kept = measure.measure_keeping_memory(["softmax", "sparsemax", "tvmax"], shapes, QUICK)
    assert told and set(kept.case) == {"one" + measure.KEPT}
    assert set(zip(kept["transform"], kept.source, strict=True)) == {
        ("softmax", "detrlib"),
        ("softmax", "torch"),
        ("sparsemax", "detrlib"),
    }
    assert measure.measure_keeping_memory(["softmax"], shapes, QUICK._replace(device="cuda")).empty


def test_without_numba_there_are_no_loops(monkeypatch):
    monkeypatch.setattr(measure, "left_out", lambda device: {"numba": "not installed"})
    assert ratio_table(measure.measure_tvmax(Shape(1, 2, 30, 4, 5), 6, QUICK), "tvmax", "detrlib").empty


def test_the_loops_are_scaled_up_to_all_maps(monkeypatch):
    monkeypatch.setattr(measure, "left_out", lambda device: {})  # without numba they are slow, not wrong
    results = measure.measure_tvmax(Shape(1, 2, 30, 4, 5), 6, Settings(repeats=2))
    sources = ["detrlib", "loop, as published", "loop, linear gradient", "loop, linear gradient, accurate"]
    table = ratio_table(results, "tvmax", "detrlib")
    assert list(table.index.get_level_values("source")) == sources
    assert (table["largest error"].astype(float) < 0.1).all()
    errors = results[results.quantity == "error"].set_index("source").value
    assert errors["detrlib"] < 1e-5 and errors["loop, linear gradient, accurate"] < 1e-3


def test_other_implementations_compute_the_same():
    scores = torch.randn(2, 3, 4, 30, generator=torch.Generator().manual_seed(0))
    shape = Shape(2, 3, 4, 5, 6)
    for name in NAMES:
        own, *rest = measure.implementations([name], shape, QUICK)
        assert len(rest) == (0 if name == "tvmax" or (name != "softmax" and "entmax" in left_out("cpu")) else 1)
        for other in rest:
            torch.testing.assert_close(other.apply(scores), own.apply(scores), rtol=0, atol=1e-5)
