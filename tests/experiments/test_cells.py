"""Maps over cells made of pixels and of levels; what boxes and noise become is shown by `test_attribution`."""

import numpy as np
import pytest
import torch

from detrlib.experiments.cells import cell_means, covered, spread


def test_means_of_cells_against_a_loop():
    values = torch.rand(2, 24, 32, generator=torch.Generator().manual_seed(0))
    means = cell_means(values, (19, 26), (3, 4))
    for (row, column), found in np.ndenumerate(means[1].numpy()):
        inside = values[1, row * 8 : min(row * 8 + 8, 19), column * 8 : min(column * 8 + 8, 26)]
        assert found == pytest.approx(inside.mean().item(), abs=1e-6)
    padded = cell_means(values, (16, 9), (3, 4))
    assert (padded[:, 2] == 0).all() and (padded[:, :, 2:] == 0).all() and (padded[:, :2, :2] > 0).all()


def test_intervals_cover_cells_by_their_share():
    shares = covered(torch.tensor([0.5, 3.0]), torch.tensor([2.25, 3.0]), 4)
    assert shares.tolist() == [[0.5, 1.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("shape", "sides", "inside", "grid"),
    [
        ((4, 5), (1, 1), (4, 5), (4, 5)),  # the grid itself
        ((3, 3), (2, 2), (5, 6), (5, 6)),  # the last row reaches beyond the image
        ((2, 2), (4, 4), (5, 6), (8, 8)),  # and beyond the padding
        ((4, 4), (1.5, 1.75), (6, 7), (6, 8)),  # of a square that the image was resized to
        ((8, 8), (0.75, 0.75), (6, 6), (6, 6)),  # finer than the grid
    ],
)
def test_levels_are_spread_by_area_and_keep_their_sum(shape, sides, inside, grid):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fine = 12  # parts of a cell, each of which belongs to one cell of the level
    expected = torch.zeros(grid, dtype=torch.float64)
    rows, columns = (
        torch.div((torch.arange(n * fine) + 0.5) / fine, side, rounding_mode="floor").long()
        for n, side in zip(inside, sides, strict=True)
    )
    counts = torch.zeros(shape, dtype=torch.float64)
    counts.index_put_((rows[:, None], columns), torch.ones(1, dtype=torch.float64), accumulate=True)
    parts = (values / counts)[rows[:, None], columns]
    expected[: inside[0], : inside[1]] = parts.unflatten(1, (-1, fine)).unflatten(0, (-1, fine)).sum((1, 3))
    found = spread(values, sides, inside, grid)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(), values.sum())


def test_cells_of_padding_alone_give_nothing():
    values = torch.ones(4, 4)
    found = spread(values, (2, 2), (3, 8), (8, 8))
    assert found.sum() == pytest.approx(8.0) and (found[3:] == 0).all()  # two rows of the level, four are padding
