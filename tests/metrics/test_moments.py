"""Means of what streams by."""

import pytest
import torch

from detrlib.metrics.moments import Moments, described


def test_moments_leave_out_what_is_not_known():
    values = torch.tensor([[1.0, 5.0], [2.0, torch.nan], [4.0, torch.nan]])
    moments = Moments(2)
    for part in values.split([2, 1]):
        moments.add(part)
    count, mean, std = moments.results()
    assert count.tolist() == [3, 1]
    assert mean.tolist() == pytest.approx([7 / 3, 5])
    assert std[0].item() == pytest.approx(values[:, 0].std().item())
    assert std[1].isnan()


def test_what_is_not_known_is_described_as_nothing():
    mean = torch.tensor([[[1.0, 0.5, 1.5]], [[torch.nan, 2.0, torch.nan]]])  # [M,L,H+1]
    found = described(("one", "other"), mean, mean)
    assert found["one"] == {"mean": [1.0], "std": [1.0], "heads": [[0.5, 1.5]]}
    assert found["other"] == {"mean": [None], "std": [None], "heads": [[2.0, None]]}
