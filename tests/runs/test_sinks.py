"""Sinks of saved runs as tables."""

import json

import numpy as np
import pytest

from detrlib.errors import RunError
from detrlib.metrics.sinks import MEASURES
from detrlib.runs.sinks import COLUMNS, resting_most, sinks_frame, sinks_table


@pytest.fixture
def run_dir(tmp_path):
    """A run whose decoder has two layers of two heads; values are not known at decoder_self."""
    heads = np.arange(4).reshape(2, 2) / 10
    sinks = {}
    for site in ("decoder_self", "decoder_cross"):
        sinks[site] = {name: {"mean": [0, 0], "heads": heads.tolist()} for name in (*MEASURES, "agreement")}
        sinks[site] |= {"place": [[[0.1, 0.9], None], [[0.5, 0.5]] * 2], "does": [["nothing", None]] * 2}
    sinks["decoder_self"]["border"]["heads"] = [[None, None]] * 2
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"sinks": sinks}))
    return folder


def test_heads_are_rows(run_dir):
    frame = sinks_frame([run_dir])
    assert list(frame.columns) == COLUMNS and len(frame) == 8
    cross = sinks_frame([run_dir], "decoder_cross")
    assert cross[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert cross.weight.tolist() == [0.0, 0.1, 0.2, 0.3] and cross.does.tolist() == ["nothing", None] * 2
    assert cross[["y", "x"]].iloc[0].tolist() == [0.1, 0.9] and cross.y.isna().tolist() == [False, True, False, False]
    assert frame[frame.site == "decoder_self"].border.isna().all() and frame.border.dtype == float


def test_heads_that_rest_most_come_first(run_dir):
    table = resting_most(sinks_frame([run_dir], "decoder_cross"), 2)
    assert table[["layer", "head", "weight"]].to_numpy().tolist() == [[2, 2, 0.3], [2, 1, 0.2]]
    assert "run" not in table and "value_norm" in table


def test_runs_without_sinks_have_no_rows(run_dir):
    (run_dir / "results.json").write_text(json.dumps({"detection": {}}))
    assert sinks_frame([run_dir]).empty and sinks_frame([], "decoder_cross").empty
    assert sinks_frame([run_dir], "encoder_self").empty
    with pytest.raises(RunError, match="sinks"):
        sinks_table([run_dir])
