"""Means over a data set from batches, and from several processes, in memory that does not grow with it.

Legend: M measures, L layers, H heads. A head axis of H + 1 holds the mean over heads before the heads.
"""

import torch
from torch import Tensor


class Moments:
    """Count, mean and standard deviation along the first axis of what is added, values that are NaN left out."""

    def __init__(self, *shape: int):
        self.sums = torch.zeros(3, *shape, dtype=torch.float64)  # of ones, values and squares

    def add(self, values: Tensor) -> None:
        """values [N, ...] on the CPU, with axes of `shape` after the first."""
        values = values.double()
        known = ~values.isnan()
        values = values.where(known, 0.0)
        self.sums += torch.stack([known.sum(0).double(), values.sum(0), (values * values).sum(0)])

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, means and standard deviations (of a sample: over N - 1) [...]; NaN where nothing is known."""
        count, total, squares = self.sums
        mean = total / count
        return count, mean, ((squares - total * mean).clamp(min=0) / (count - 1)).sqrt()


def described(names: tuple[str, ...], mean: Tensor, std: Tensor) -> dict:
    """mean and std [M,L,H+1] -> {measure: {"mean": [L], "std": [L], "heads": [L][H]}}."""
    return {
        name: {"mean": plain(m[:, 0]), "std": plain(s[:, 0]), "heads": plain(m[:, 1:])}
        for name, m, s in zip(names, mean, std, strict=True)
    }


def plain(values: Tensor) -> list:
    """Nested lists of numbers, with None for what is not known."""
    return [plain(v) if v.dim() else (None if v.isnan() else v.item()) for v in values]
