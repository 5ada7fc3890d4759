"""The step that others are compared with: the same work, and where its time goes."""

import pytest
import torch

from detrlib.benchmarks import step


@pytest.fixture(scope="module")
def steps():
    return step.steps_of((96, 64))


def test_others_take_a_step_and_their_losses_are_numbers(steps):
    assert list(steps)[:2] == [step.OURS, "plain PyTorch"]
    losses = {name: run() for name, run in steps.items() if name != step.OURS}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_times_are_compared_with_ours():
    steps = {step.OURS: lambda: torch.ones(10).sum(), "other": lambda: [torch.ones(1000).sum() for _ in range(100)]}
    table = step.times(steps, step.Case((1, 2), 1, 3))
    assert list(table.index) == [("2 x 1 x 2, 1 thread", step.OURS), ("2 x 1 x 2, 1 thread", "other")]
    assert table["time / ours"].iloc[0] == 1
    assert table["repeats"].tolist() == [3, 3]


def test_a_profile_tells_kinds_of_operations_apart(steps):
    shares = step.profile(steps[step.OURS])
    assert sum(shares.values()) == pytest.approx(1)
    assert {"convolution", "linear", "attention", "optimiser", "dropout", "elementwise"} <= set(shares)
    assert shares == dict(sorted(shares.items(), key=lambda item: -item[1]))
