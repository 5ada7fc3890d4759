"""Growth: the program runs at small sizes and writes what it says, and exponents are those of power laws."""

import json

import pandas as pd
import pytest

from detrlib.benchmarks import growth, run_program
from detrlib.benchmarks.growth import Sizes, slopes, write_annotations
from detrlib.data.annotations import read_annotations

SMALL = Sizes(
    evaluated=(4, 8), keys=(16, 32), queries=(8, 16), images=(1, 2), annotated=(20, 40), few=4, keys_of=16, repeats=1,
    pixels=64, steps=1,
)  # fmt: skip


def test_exponents_are_those_of_power_laws():
    sizes = [1, 2, 10, 100, 1000]
    rows = [("keys", "a", n, 3 * n**1.5, 7.0) for n in sizes] + [("keys", "b", n, 1 + n, n**2) for n in sizes]
    found = slopes(pd.DataFrame(rows, columns=["against", "series", "size", "seconds", "bytes"]))
    assert found["series"].tolist() == ["a", "b"]
    assert found["seconds"].tolist() == pytest.approx([1.5, 1], abs=0.05)
    assert found["bytes"].tolist() == pytest.approx([0, 2])


def test_a_drawn_file_is_one_of_coco(tmp_path):
    write_annotations(tmp_path / "a.json", 20, points=3)
    content = read_annotations(tmp_path / "a.json")
    assert len(content["images"]) == 20 and len(content["annotations"]) == 146 and len(content["categories"]) == 80


@pytest.mark.slow
def test_the_program_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "Sizes", lambda: SMALL)
    run_program("growth", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "growth.json").read_text())
    series = {(row["against"], row["series"]) for row in written["slopes"]}
    assert len(series) == 3 * len(growth.TRANSFORMS) + 5
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in written["points"])
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"growth_" + row["against"].replace(" ", "_") for row in written["points"]} and len(drawn) == 6
    assert "alpha_entmax" in capsys.readouterr().out and written["environment"]["processor"]
