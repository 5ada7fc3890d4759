"""What is measured of training on a GPU, here with tiny models on the CPU."""

import warnings
from itertools import islice

import pytest
import torch

from detrlib.benchmarks import training


def test_steps_are_measured_beside_those_of_transformers(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(training, "PRECISIONS", ("bfloat16",))
    rows = list(training.time_steps("cpu"))
    assert [(row["model"], row["source"]) for row in rows] == [
        (name, source) for name in ("detr-r50", "deformable-r50") for source in ("detrlib", "transformers")
    ]
    for row in rows:
        assert row["images/s"] == pytest.approx(2000 / row["step [ms]"]) and row["memory [GiB]"] > 0, row


def test_a_model_that_cannot_be_made_is_a_row_too():
    assert training.measured({"model": "x"}, lambda: 1 / 0, "cpu") == {
        "model": "x",
        "fault": "ZeroDivisionError: division by zero",
    }


def test_the_price_of_sparsity_is_that_beside_softmax():
    rows = list(islice(training.time_sparsity("cpu"), 3))
    assert [row["transform"] for row in rows] == ["sparsemax", "entmax15", "alpha_entmax"]
    for row in rows:
        assert row["step / softmax"] == pytest.approx(row["step [ms]"] / row["softmax [ms]"])


def test_compiled_steps_say_how_long_the_first_took():
    (row,) = islice(training.time_compiled("cpu"), 1)
    assert row["first step [s]"] > row["step [ms]"] / 1000


def test_parts_of_a_batch_are_looked_for():
    rows = list(training.largest_parts("cpu"))
    assert {row["images at a time"] for row in rows} == {training.WHOLE}  # on a CPU all of it
    assert rows[0]["of pixels"] == "1250 x 1250"  # crops beside each other: see `largest_canvas`


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_waits_are_counted_where_they_are(monkeypatch):
    def step():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("of something else", UserWarning, stacklevel=1)

    monkeypatch.setattr(training, "ours", lambda *given: step)
    row = next(training.count_waits("cpu"))
    line = step.__code__.co_firstlineno + 2
    assert row == {"model": "detr-r50", "waits": 2, "where": f"test_training.py:{line} x 2"}


def test_every_config_can_be_stepped():
    for name in training.MODELS:
        assert training.ours(name, "cpu", "float32")()["loss"].isfinite()


def test_tf32_is_asked_for_and_given_back():
    before = torch.get_float32_matmul_precision()
    with training.rounding("TF32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
