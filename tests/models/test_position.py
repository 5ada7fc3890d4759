"""Encodings of positions, of grids and of boxes."""

import torch

from detrlib.models.position import LearnedPosition, SinePosition, sine_of_boxes


def test_sine_position_by_hand():
    padding = torch.zeros(1, 3, 5, dtype=torch.bool)
    padding[0, 2] = padding[0, :, 4] = True
    found = SinePosition(8, temperature=100.0)(padding)
    assert found.shape == (1, 8, 3, 5)
    for row, column in [(0, 0), (1, 3), (0, 2)]:
        expected = []
        for number, total in [(row + 1, 2), (column + 1, 4)]:
            angle = torch.tensor(2 * torch.pi * number / total)
            expected += [angle.sin(), angle.cos(), (angle / 10).sin(), (angle / 10).cos()]
        torch.testing.assert_close(found[0, :, row, column], torch.stack(expected), rtol=0, atol=1e-5)


def test_centred_positions_line_up_with_boxes():
    grid = SinePosition(16, centred=True)(torch.zeros(1, 4, 5, dtype=torch.bool))
    for row, column in [(0, 0), (3, 1), (2, 4)]:
        boxes = torch.tensor([(column + 0.5) / 5, (row + 0.5) / 4, 0.1, 0.1])
        torch.testing.assert_close(sine_of_boxes(boxes, 8, 10000.0)[:16], grid[0, :, row, column], rtol=0, atol=1e-5)


def test_learned_position():
    position = LearnedPosition(8)
    found = position(torch.zeros(2, 3, 60, dtype=torch.bool))
    assert found.shape == (2, 8, 3, 60)
    columns, rows = position.col_embed.weight, position.row_embed.weight
    torch.testing.assert_close(found[1, :4, 0, 0], columns[0])
    torch.testing.assert_close(found[1, :4, 2, 59], columns[49])
    torch.testing.assert_close(found[1, 4:, 2, 59], rows[2])
    share = 49 / 59  # of the way from the first entry to the second
    torch.testing.assert_close(found[0, :4, 1, 1], columns[0] + share * (columns[1] - columns[0]))
    torch.testing.assert_close(found[0, :4, 0, :50], position(torch.zeros(1, 1, 60, dtype=torch.bool))[0, :4, 0, :50])
    found.sum().backward()
    assert (position.col_embed.weight.grad != 0).all()


def test_learned_position_within_the_table_is_a_lookup():
    position = LearnedPosition(8)
    found = position(torch.zeros(1, 50, 7, dtype=torch.bool))
    torch.testing.assert_close(found[0, :4, 31], position.col_embed.weight[:7].T)
    torch.testing.assert_close(found[0, 4:, :, 6], position.row_embed.weight.T)
