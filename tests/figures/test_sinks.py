"""Where heads rest, drawn: most first, at the place and with the share of images that the tables say."""

import numpy as np
import pandas as pd
import pytest

from detrlib.figures.sinks import shares_of_images, sink_cells, sink_weights
from detrlib.metrics.sinks import MEASURES


@pytest.fixture
def table():
    """Two images, one layer, two heads: head 1 rests on the last of 2 x 4 cells in both, head 0 on another in each."""
    rows = []
    for image, cell in enumerate([(0, 1), (1, 0)]):
        for head, (row, column) in enumerate([cell, (1, 3)]):
            where = {"row": row, "column": column, "rows": 2, "columns": 4}
            values = dict.fromkeys(MEASURES, 0.5) | {"weight": (0.1, 0.6)[head]}
            rows.append({"run": "one", "image_id": 7 - image, "site": "decoder_cross", "layer": 0, "head": head})
            rows[-1] |= where | values
    return pd.DataFrame(rows)


def test_heads_are_drawn_in_order_with_their_places(table, titles):
    drawn = sink_cells(table)
    assert titles(drawn)[:2] == ["layer 1, head 2: 0.60", "layer 1, head 1: 0.10"]
    assert [axes.get_xlabel() for axes in drawn.axes[:2]] == ["100%, value 0.50", "50%, value 0.50"]
    shares = shares_of_images(table)
    assert shares.shape == (1, 2, 64, 64)
    expected = np.zeros((2, 64, 64))
    expected[0, :32, 16:32] = expected[0, 32:, :16] = 0.5
    expected[1, 32:, 48:] = 1.0
    assert np.array_equal(shares[0], expected)
    drawn_shares = drawn.axes[0].images[0].get_array()
    assert np.array_equal(drawn_shares.filled(0), expected[1]) and drawn_shares.mask.sum() == 64 * 64 - 32 * 16
    assert len(sink_cells(table, most=1).axes) == 2  # and the bar


def test_what_has_no_cells_says_so(table, texts):
    assert "queries" in texts(sink_cells(table, "decoder_self"))[0]
    assert "encoder_self were not measured" in texts(sink_cells(table, "encoder_self"))[0]
    assert "not measured" in texts(sink_weights(pd.DataFrame(columns=["run", "site"])))[0]


def test_weights_of_heads_fall_and_hollow_ones_have_no_place_of_their_own():
    weights, agreement = [0.1, 0.7, 0.4], [0.9, 0.2, 0.5]
    frame = pd.DataFrame({"run": "one", "site": "decoder_cross", "weight": weights, "agreement": agreement})
    (axes,) = sink_weights(frame.assign(threshold=0.25)).axes
    line, limit = axes.get_lines()
    assert line.get_ydata().tolist() == [0.7, 0.4, 0.1] and limit.get_ydata()[0] == 0.25
    filled, hollow = axes.collections
    assert filled.get_offsets().tolist() == [[2, 0.4], [3, 0.1]] and hollow.get_offsets().tolist() == [[1, 0.7]]
