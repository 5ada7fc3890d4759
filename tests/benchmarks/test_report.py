"""Rows that are on the disk at once, and tables of them."""

import json

from detrlib.benchmarks import report


def test_rows_are_read_as_they_were_added_and_what_was_cut_short_is_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert report.read(path, "a") == []
    rows = [{"case": "x", "ms": 1.5}, {"case": "y", "fault": "no"}]
    for row in rows:
        report.append(path, "a", row)
        report.append(path, "b", {"case": "z"})
    with path.open("a") as file:
        file.write('{"part": "a", "case": "unfini')
    assert report.read(path, "a") == rows


def test_tables_have_all_columns_and_name_what_is_wrong(tmp_path):
    rows = [{"case": "a|b", "error": 0.00012345, "ok": True}, {"case": "c", "images": 12345.6, "ok": False}]
    assert report.table(rows).splitlines() == [
        "| case | error | ok | images |",
        "| --- | --- | --- | --- |",
        "| a/b | 0.000123 | yes | – |",
        "| c | – | **NO** | 12346 |",
    ]
    report.write(tmp_path, "gpu", {"device": "tiny"}, [{"part": "Rows", "seconds": 3.2, "rows": rows}])
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["rows"] == rows
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("device: tiny") and "## Rows (3 s)" in text and report.table(rows) in text


def test_a_fault_is_one_line():
    assert report.fault(ValueError("first\nsecond")) == "ValueError: first"
