"""Run folders: opened, resumed, refused; metrics and tables come back as they were written."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest

from detrlib import runs
from detrlib.errors import RunError
from detrlib.files import write_json
from detrlib.metrics.tables import Table, write_table
from detrlib.runs import folder
from detrlib.runs.folder import has_table


def test_names_lie_under_papermill_runs_and_absolute_paths_are_themselves(tmp_path):
    assert runs.run_path("first") == runs.RUNS / "first"
    assert runs.run_path("sweep/first") == runs.RUNS / "sweep" / "first"
    assert runs.run_path("papermill_runs/first") == runs.RUNS / "first"
    assert runs.run_path("papermill_runs_of_may") == runs.RUNS / "papermill_runs_of_may"
    assert runs.run_path(tmp_path) == tmp_path == runs.run_path(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "/", "papermill_runs", "..", "../x", "a/../../x", "papermill_runs/../x", "/tmp/a/../x"),
        *("a\nb", "a\tb", "a\0b", "\x1b[31m", "a\u2028b", "-rf", "a/-b", "~", "~/x", " a", "a ", "a/ b"),
        *("x" * 300, "a/" + "é" * 101, "configs", "configs/x", "pictures/x", "study", "a/checkpoints", "README.md"),
        *("README.md/x", str(runs.RUNS.parent), None, True, 1.5, ["a"]),
    ],
    ids=repr,
)
def test_what_cannot_be_the_name_of_a_run_is_refused_in_one_line(name):
    with pytest.raises(RunError, match="names no run") as caught:
        runs.run_path(name)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "name", ["lr:1e-4", "a$b$c", "实验", "a b", "x" * 200, "study/where/a", ".a", "{a}", "a#b?c=%d"]
)
def test_what_a_file_system_takes_is_a_name(name):
    assert runs.run_path(name) == runs.RUNS / name


def test_a_number_is_a_name_as_papermill_hands_it_over():
    assert runs.run_path(2024) == runs.find_run(2024) == runs.RUNS / "2024"


def test_a_name_that_is_a_file_s_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=f"{tmp_path / 'file'} is a file"):
            runs.run_path(name)


def record(step, epoch, **values):
    return {"global_step": step, "epoch": epoch} | values


def test_metrics_survive_a_line_cut_short_and_numbers_that_are_none(tmp_path):
    runs.append_metrics(tmp_path, record(1, 0, loss=float("nan"), other=float("inf")))
    runs.append_metrics(tmp_path, record(2, 0, loss=0.5))
    whole = [record(1, 0, loss=None, other=None), record(2, 0, loss=0.5)]
    assert runs.read_metrics(tmp_path) == whole
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 3, "lo')
    assert runs.read_metrics(tmp_path) == whole
    assert runs.read_metrics(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    "line", [b'{"train/loss": 1.0}', b"3", b'{"global_step": "3", "epoch": "1"}', b'{"gl\x8f', b"\0" * 9]
)
def test_a_damaged_line_of_metrics_is_lost_and_no_other(tmp_path, caplog, line):
    runs.append_metrics(tmp_path, record(1, 0))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    runs.append_metrics(tmp_path, record(2, 0))
    assert runs.read_metrics(tmp_path) == [record(1, 0), record(2, 0)]
    assert "metrics.jsonl: what line 2 said is lost" in caplog.text
    runs.truncate_metrics(tmp_path, 2, 9)
    caplog.clear()
    assert runs.read_metrics(tmp_path) == [record(1, 0), record(2, 0)] and not caplog.text


def test_truncating_forgets_later_steps_and_a_line_cut_short(tmp_path):
    for step, epoch in ((1, 0), (2, 0), (2, 1), (3, 1)):
        runs.append_metrics(tmp_path, record(step, epoch))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_st')
    runs.truncate_metrics(tmp_path, 2, 9)
    runs.append_metrics(tmp_path, record(3, 2))
    assert runs.read_metrics(tmp_path) == [record(1, 0), record(2, 0), record(2, 1), record(3, 2)]


def test_commands_in_messages_can_be_typed_whatever_a_run_is_called():
    with pytest.raises(RunError, match=r"detrlib evaluate 'my study/a run'$"):
        runs.load_table(folder.RUNS / "my study" / "a run", "sparsity")
    with pytest.raises(RunError, match=r"detrlib intervene a-run$"):
        runs.load_table(folder.RUNS / "a-run", "interventions", "detrlib intervene")


def test_tables_are_files_or_folders_of_parts(tmp_path):
    frame = pd.DataFrame({"image_id": [1, 2], "gini": [0.5, 0.25]})
    assert not has_table(tmp_path, "sparsity")
    with pytest.raises(RunError, match=r"sparsity\.parquet.*detrlib evaluate"):
        runs.load_table(tmp_path, "sparsity")
    runs.save_tables(tmp_path, {"sparsity": frame})
    pd.testing.assert_frame_equal(runs.load_table(tmp_path, "sparsity"), frame)
    parts = [Table(tmp_path / "measures" / "sparsity", {"image_id": "int64"}, {}, part, 2) for part in (0, 1)]
    for part, table in enumerate(parts):
        table.add({"image_id": np.array([part])})
    pd.testing.assert_frame_equal(runs.load_table(tmp_path, "sparsity"), frame)  # until a part is there
    parts[0].close()
    with pytest.raises(RunError, match="sparsity holds"):
        runs.load_table(tmp_path, "sparsity")
    parts[1].close()
    assert has_table(tmp_path, "sparsity")
    assert runs.load_table(tmp_path, "sparsity").to_dict("list") == {"image_id": [0, 1]}


@pytest.mark.parametrize("file", ["sparsity.parquet", "sparsity/part-00000-of-00001.parquet"])
def test_a_damaged_table_is_named_with_what_makes_it(tmp_path, file):
    path, values = tmp_path / "measures" / file, np.random.default_rng(0).random(500)
    write_table(path, pd.DataFrame({"value": values}))
    changed = bytearray(path.read_bytes())
    changed[changed.index(values[100:200].tobytes()) + 9] ^= 1  # as of a number
    for content in (b"cut short", changed):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"sparsity.*detrlib measure"):
            runs.load_table(tmp_path, "sparsity", made_by="detrlib measure")


def test_figures_name_what_made_them(tmp_path):
    write_json(tmp_path / "run" / "environment.json", runs.environment())
    first, run, _ = runs.provenance([tmp_path / "run"], "detrlib notebook").splitlines()
    assert first == "made by detrlib notebook" and run.startswith("run: commit ") and "torch" in run
    (tmp_path / "run" / "environment.json").write_text('{"commit": "a\x8f')
    with pytest.raises(RunError, match=r"environment\.json is damaged .*; delete it"):
        runs.provenance([tmp_path / "run"], "detrlib notebook")
    (tmp_path / "run" / "environment.json").unlink()
    assert "not known" in runs.provenance([tmp_path / "run"], "detrlib notebook")


def test_without_git_nothing_is_said_of_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("detrlib.runs.opening.PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    known = runs.environment()
    assert known["commit"] is None and known["uncommitted_changes"] is None
    write_json(tmp_path / "run" / "environment.json", known, checksum=True)
    assert "commit not known" in runs.provenance([tmp_path / "run"], "detrlib notebook")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Runs of a folder of their own, the newest last: a sweep of three, one for itself, and others not finished."""
    monkeypatch.setattr(folder, "RUNS", tmp_path)
    for age, name in enumerate(["single", "sweep/b-seed1", "sweep/b-seed2", "sweep/a", "begun", "imported"]):
        write_json(tmp_path / name / "checkpoints" / "last.pt", {})
        os.utime(tmp_path / name / "checkpoints" / "last.pt", (1e9 + 60 * age,) * 2)
        results = {"imported": "x"} if name == "imported" else {"detection": {"AP": 0.5}}
        if name != "begun":
            write_json(tmp_path / name / "results.json", results)
    write_json(tmp_path / "sweep" / "a" / "test2017" / "results.json", {"detection": {}})
    return tmp_path


def test_the_newest_finished_run_is_found_in_sweeps_too(finished):
    assert runs.find_run() == finished / "sweep" / "a" and runs.find_run("other") == finished / "other"
    names = [runs.run_name(run_dir) for run_dir in folder.finished_runs()]
    assert names == ["sweep/a", "sweep/b-seed2", "sweep/b-seed1", "single"]
    said = runs.looking_at([runs.find_run()])
    assert said.startswith("looking at sweep/a (finished 2001-09-")
    assert said.endswith("others: sweep/b-seed2, sweep/b-seed1, single")


def test_of_a_name_that_no_run_has_the_one_that_is_meant_is_named(finished):
    for name in ("single", "sweep/a"):
        (finished / name / "config.yaml").touch()
    with pytest.raises(RunError, match="there is no run sinlge; did you mean single"):
        runs.find_runs(["sweep/a", "sinlge"])
    with pytest.raises(RunError, match="a folder of runs: sweep/a"):
        runs.run_config(finished / "sweep")
    with pytest.raises(RunError, match="there is no run else; correct the name"):
        runs.find_runs(["else"])


def test_several_runs_are_those_of_the_newest_sweep(finished):
    assert [run_dir.name for run_dir in runs.find_runs()] == ["a", "b-seed2"]
    assert [run_dir.name for run_dir in runs.find_runs(seeds=True)] == ["a", "b-seed2", "b-seed1"]
    assert runs.find_runs(["single", "sweep/a"]) == [finished / "single", finished / "sweep" / "a"]
    shutil.rmtree(finished / "sweep")
    assert runs.find_runs() == [finished / "single"]
    assert runs.looking_at(runs.find_runs()).endswith("others: none")


def test_where_no_run_is_finished_the_remedy_is_named(finished):
    shutil.rmtree(finished / "sweep")
    (finished / "single" / "results.json").write_text("{")
    for find in (runs.find_run, runs.find_runs):
        with pytest.raises(RunError, match="make quickstart"):
            find()
