"""Tables and figures of measurements show every number, and targets are checked against what was measured."""

import numpy as np
import pandas as pd
import pytest

from detrlib.benchmarks import figures as draw
from detrlib.benchmarks.measure import BOTH, FORWARD, KEPT, NO_ROWS


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


def test_errors_by_transform_and_source(results):
    assert draw.error_table(results).loc[("weights", "sparsemax"), "detrlib"] == "2.0e-06"


def test_tables_of_nothing_are_empty():
    tables = draw.transform_table(NO_ROWS), draw.ratio_table(NO_ROWS, "tvmax", "detrlib"), draw.error_table(NO_ROWS)
    assert all(table.empty for table in tables)


def test_results_are_saved_with_tables_figures_and_where_they_come_from(results, tmp_path):
    kept = results[results.benchmark == "transform"].assign(case="encoder" + KEPT)
    known = {"processor": "a CPU", "device": "cpu", "threads": 1}
    names = draw.save_results(pd.concat([results, kept]), tmp_path / "benchmarks", known)
    figures = {f"{name}.{kind}" for name in ("transform_times", "step_ratios") for kind in ("pdf", "png", "txt")}
    assert set(names) == {"benchmarks.csv", "environment.json", "tables.md"} | figures
    assert len(pd.read_csv(tmp_path / "benchmarks" / "benchmarks.csv")) == len(results) + len(kept)
    text = (tmp_path / "benchmarks" / "tables.md").read_text()
    assert "## Transforms" in text and KEPT in text and "## TVMax" not in text  # nothing was measured of it
    assert "a CPU, cpu, 1 threads" in (tmp_path / "benchmarks" / "step_ratios.txt").read_text()
