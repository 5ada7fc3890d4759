"""Run folders: opened, resumed, refused; metrics and tables come back as they were written."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest

from detrlib import runs
from detrlib.config import load_config
from detrlib.data import build_dataset, describe_data
from detrlib.errors import RunError
from detrlib.files import save_checkpoint, write_json
from detrlib.metrics.tables import Table
from detrlib.runs import folder
from detrlib.runs.folder import has_table


def test_names_lie_under_papermill_runs_and_absolute_paths_are_themselves(tmp_path):
    assert runs.run_path("first") == runs.RUNS / "first"
    assert runs.run_path("sweep/first") == runs.RUNS / "sweep" / "first"
    assert runs.run_path("papermill_runs/first") == runs.RUNS / "first"
    assert runs.run_path("papermill_runs_of_may") == runs.RUNS / "papermill_runs_of_may"
    assert runs.run_path(tmp_path) == tmp_path == runs.run_path(str(tmp_path))


def test_opening_a_new_an_unfinished_and_a_finished_run(tmp_path, tiny_config):
    run_dir, cfg = tmp_path / "a" / "run", tiny_config()
    assert runs.open_run(cfg, run_dir) is False
    assert load_config(run_dir / "config.yaml") == cfg
    environment = json.loads((run_dir / "environment.json").read_text())
    assert {"commit", "uncommitted_changes", "python", "packages", "cpu_cores", "gpus"} <= environment.keys()
    assert runs.open_run(cfg, run_dir) is True
    free = {"data.workers": 0, "data.cache": True, "train.log_every": 7, "evaluate.batch_size": 3}
    assert runs.open_run(tiny_config(free | {"train.tracking.wandb": "offline"}), run_dir) is True
    assert runs.open_run(tiny_config(free | {"model.num_classes": 7}), run_dir) is True
    assert runs.open_run(tiny_config({"model.num_classes": 9}), run_dir) is True  # nothing is lost yet
    assert runs.open_run(tiny_config({"model.num_classes": 7}), run_dir) is True
    save_checkpoint(run_dir / "checkpoints" / "last.pt", {})
    with pytest.raises(RunError, match=r"train\.ema was 0\.0, now 0\.5; train\.seed was 42, now 1"):
        runs.open_run(tiny_config({"train.seed": 1, "train.ema": 0.5}), run_dir)
    with pytest.raises(RunError, match=r"model\.num_classes was 7, now 9"):
        runs.open_run(tiny_config({"model.num_classes": 9}), run_dir)
    write_json(run_dir / "results.json", {})
    with pytest.raises(RunError, match="is finished and is not overwritten"):
        runs.open_run(cfg, run_dir)


@pytest.fixture
def begun(tmp_path, write_layout, tiny_config):
    """`begun(layout)`: a run with a checkpoint on data in a folder; returns its folder and `settings(root)`."""

    def begin(layout="coco", **overrides):
        root = write_layout(tmp_path / "here", layout)

        def settings(root, **changed):
            data = {"data.root": str(root)}
            return tiny_config(data | {name.replace("__", "."): value for name, value in (overrides | changed).items()})

        run_dir, cfg = tmp_path / "run", settings(root)
        runs.open_run(cfg, run_dir, describe_data(cfg.data))
        save_checkpoint(run_dir / "checkpoints" / "last.pt", {})
        return run_dir, settings

    return begin


@pytest.mark.parametrize("layout", ["coco", "roboflow", "yolo", "voc"])
def test_the_same_data_under_another_path_resume(begun, tmp_path, layout):
    run_dir, settings = begun(layout)
    shutil.move(tmp_path / "here", tmp_path / "there")
    cfg = settings(tmp_path / "there")
    assert runs.open_run(cfg, run_dir) is True  # opens the data, as a launcher of several processes must
    assert runs.open_run(cfg, run_dir, describe_data(cfg.data)) is True
    assert load_config(run_dir / "config.yaml") == cfg  # where they are found from now on
    with pytest.raises(RunError, match=r"train\.seed was 42, now 1\)"):
        runs.open_run(settings(tmp_path / "there", train__seed=1), run_dir)


def test_other_data_are_refused_by_what_differs(begun, tmp_path):
    run_dir, settings = begun()
    known = (run_dir / "config.yaml").read_bytes()
    path = shutil.copytree(tmp_path / "here", tmp_path / "there") / "annotations" / "instances_train2017.json"
    original = json.loads(path.read_text())
    changed = json.loads(path.read_text())
    for change, words in [
        (lambda: changed["annotations"][0].update(bbox=[4, 6, 20, 17]), r"\(train digest: \w+, now \w+\)"),
        (lambda: changed["annotations"].pop(), r"\(train objects: 3, now 2; train digest: \w+, now \w+\)"),
        (lambda: changed["categories"][0].update(name="lynx"), r"train classes: cat, dog, now lynx, dog"),
        (lambda: changed["images"].pop(), r"train images: 4, now 3"),
    ]:
        change()
        path.write_text(json.dumps(changed))
        with pytest.raises(RunError, match=rf"run was begun with other data .*{words}"):
            runs.open_run(settings(tmp_path / "there"), run_dir)
    assert (run_dir / "config.yaml").read_bytes() == known
    here = tmp_path / "here" / "annotations" / "instances_train2017.json"
    here.write_text(json.dumps(changed))  # under the same path, too
    cfg = settings(tmp_path / "here")
    with pytest.raises(RunError, match=r"other data .*train images: 4, now 3"):
        runs.open_run(cfg, run_dir, describe_data(cfg.data))
    here.write_text(json.dumps(original))
    assert runs.open_run(cfg, run_dir, describe_data(cfg.data)) is True


def test_a_run_that_is_older_than_that_is_told_apart_by_path(begun, tmp_path):
    run_dir, settings = begun()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (run_dir / "data.json").write_text("{}")
    with pytest.raises(RunError, match=r"data\.json is damaged .*delete it"):
        runs.open_run(settings(tmp_path / "there"), run_dir)
    (run_dir / "data.json").unlink()
    with pytest.raises(RunError, match=r"other settings \(data\.root was .*here, now .*there"):
        runs.open_run(settings(tmp_path / "there"), run_dir)
    assert runs.open_run(settings(tmp_path / "here"), run_dir) is True


def test_images_held_out_are_recorded(begun):
    run_dir, settings = begun(data__holdout=0.4)
    recorded = json.loads((run_dir / "data.json").read_text())
    cfg = load_config(run_dir / "config.yaml")
    assert recorded["held_out"] == build_dataset(cfg.data, "val").file_names != []
    with pytest.raises(RunError, match=r"data\.holdout was 0\.4, now 0\.2"):
        runs.open_run(settings(cfg.data.root, data__holdout=0.2), run_dir)


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


@pytest.mark.parametrize("line", ['{"train/loss": 1.0}', "3", '{"global_step": 3}'])
def test_a_line_of_metrics_that_is_no_record_is_named(tmp_path, line):
    runs.append_metrics(tmp_path, record(1, 0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    for read in (runs.read_metrics, lambda run_dir: runs.truncate_metrics(run_dir, 1)):
        with pytest.raises(RunError, match=r"metrics\.jsonl: line 2"):
            read(tmp_path)


def test_truncating_forgets_later_steps_and_a_line_cut_short(tmp_path):
    for step, epoch in ((1, 0), (2, 0), (2, 1), (3, 1)):
        runs.append_metrics(tmp_path, record(step, epoch))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_st')
    runs.truncate_metrics(tmp_path, 2)
    runs.append_metrics(tmp_path, record(3, 2))
    assert runs.read_metrics(tmp_path) == [record(1, 0), record(2, 0), record(2, 1), record(3, 2)]


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
    path = tmp_path / "measures" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut short")
    with pytest.raises(RunError, match=r"sparsity.*detrlib measure"):
        runs.load_table(tmp_path, "sparsity", made_by="detrlib measure")


def test_figures_name_what_made_them(tmp_path):
    write_json(tmp_path / "run" / "environment.json", runs.environment())
    first, run, _ = runs.provenance([tmp_path / "run"], "detrlib notebook").splitlines()
    assert first == "made by detrlib notebook" and run.startswith("run: commit ") and "torch" in run


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


def test_several_runs_are_those_of_the_newest_sweep(finished):
    assert [run_dir.name for run_dir in runs.find_runs()] == ["a", "b-seed2"]
    assert [run_dir.name for run_dir in runs.find_runs(seeds=True)] == ["a", "b-seed2", "b-seed1"]
    assert runs.find_runs(["single", "x"]) == [finished / "single", finished / "x"]
    shutil.rmtree(finished / "sweep")
    assert runs.find_runs() == [finished / "single"]
    assert runs.looking_at(runs.find_runs()).endswith("others: none")


def test_where_no_run_is_finished_the_remedy_is_named(finished):
    shutil.rmtree(finished / "sweep")
    (finished / "single" / "results.json").write_text("{")
    for find in (runs.find_run, runs.find_runs):
        with pytest.raises(RunError, match="make quickstart"):
            find()
