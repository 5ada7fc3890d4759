"""Run folders: written whole or not at all, read back as written, turned into tidy tables."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from detrlib import runs
from detrlib.config import load_config
from detrlib.errors import RunError
from detrlib.files import load_checkpoint, load_weights, save_checkpoint, write_atomic, write_json
from detrlib.runs import results as frames

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(error):
    def failing(*arguments, **named):
        raise error

    return failing


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing ---------------------------------------------------------------------------------------------------


def test_atomic_files_are_replaced_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, lambda temporary: temporary.write_text("old"))
    write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and files(path.parent) == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "place, error",
    [
        ((torch, "save"), FULL),
        ((torch, "save"), RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        ((os, "replace"), FULL),
    ],
    ids=["saving", "saving, as torch says it", "renaming"],
)
def test_a_full_disk_leaves_the_old_checkpoint_and_names_the_file(tmp_path, monkeypatch, place, error):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(*place, fail(error))
    with pytest.raises(RunError, match=f"could not write {path}: .*{str(error)[-20:]}.* before is intact"):
        save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path) == {"epoch": 1}
    assert files(tmp_path) == ["last.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    write_json(tmp_path / "results.json", {"AP": 0.5})
    with pytest.raises(RunError, match="No space left on device"):
        write_atomic(tmp_path / "results.json", lambda temporary: Path("/dev/full").write_text("x"))
    assert json.loads((tmp_path / "results.json").read_text()) == {"AP": 0.5}


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", fail(KeyboardInterrupt()))
    assert files(tmp_path) == []


def test_checkpoints_that_are_none(tmp_path):
    with pytest.raises(RunError, match=r"no checkpoint .*last\.pt; has the run finished its first epoch"):
        load_checkpoint(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(RunError, match=r"last\.pt is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "last.pt")
    torch.save({"model": print}, tmp_path / "code.pt")
    with pytest.raises(RunError, match=r"code\.pt is not a checkpoint"):
        load_checkpoint(tmp_path / "code.pt")


def test_weights_of_another_architecture_are_not_half_loaded(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = {"0.weight": torch.ones(4, 2), "0.bias": torch.ones(3), "extra": torch.ones(1), "1.bias": torch.ones(1)}
    with pytest.raises(RunError) as caught:
        load_weights(model, other, tmp_path / "a.pt")
    assert str(caught.value) == (
        f"{tmp_path / 'a.pt'} holds weights of another architecture: missing 1.weight; unexpected extra; "
        "0.weight is (4, 2), the model has (3, 2)"
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- opening ---------------------------------------------------------------------------------------------------


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


# --- metrics ---------------------------------------------------------------------------------------------------


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


def test_truncating_forgets_later_steps_and_a_line_cut_short(tmp_path):
    for step, epoch in ((1, 0), (2, 0), (2, 1), (3, 1)):
        runs.append_metrics(tmp_path, record(step, epoch))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_st')
    runs.truncate_metrics(tmp_path, 2)
    runs.append_metrics(tmp_path, record(3, 2))
    assert runs.read_metrics(tmp_path) == [record(1, 0), record(2, 0), record(2, 1), record(3, 2)]


def test_metrics_and_alphas_as_tidy_tables(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for run_dir in (a, b):
        run_dir.mkdir()
    alphas = {"alpha/decoder_cross.layer_0-head_3": 1.25, "alpha/encoder_self.layer_11-head_0": 1.5}
    runs.append_metrics(a, record(4, 1, **{"train/loss": 2.0}, **alphas))
    runs.append_metrics(b, record(8, 2, **{"train/loss": float("nan"), "val/AP": 0.25}))
    frame = frames.metrics_frame([a, b])
    assert list(frame.columns) == ["run", "global_step", "epoch", "metric", "value"]
    assert frame[frame.metric == "train/loss"].values.tolist() == [["a", 4, 1, "train/loss", 2.0]]
    assert frame[frame.run == "b"].values.tolist() == [["b", 8, 2, "val/AP", 0.25]]
    rows = frames.alpha_frame([a, b])[["run", "epoch", "site", "layer", "head", "value"]].values.tolist()
    assert rows == [["a", 1, "decoder_cross", 0, 3, 1.25], ["a", 1, "encoder_self", 11, 0, 1.5]]
    assert len(frames.alpha_frame([b])) == 0 and len(frames.metrics_frame([])) == 0


# --- results and examples --------------------------------------------------------------------------------------


def results(ap):
    detection = dict.fromkeys(("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"), ap)
    cross = {"gini": [0.2, 0.4], "zeros": [0.0, 0.5]}
    return {"detection": detection, "attention": {"decoder_cross": cross}, "paibb": {"all": 0.75}}


def test_tables_of_finished_runs(tmp_path):
    for name, ap in (("b", 0.5), ("a", 0.25)):
        write_json(tmp_path / name / "results.json", results(ap))
    (tmp_path / "unfinished").mkdir()
    found = [tmp_path / "a", tmp_path / "b"]
    table = frames.results_table(found)
    assert list(table.index) == ["a", "b"] and table.index.name == "run"
    assert table.loc["a"].to_dict() == pytest.approx(
        results(0.25)["detection"] | {"Gini": 0.3, "zeros": 0.25, "PAIBB": 0.75}
    )
    layers = frames.attention_frame(found[:1], "decoder_cross").values.tolist()
    assert layers == [["a", "gini", 0, 0.2], ["a", "gini", 1, 0.4], ["a", "zeros", 0, 0.0], ["a", "zeros", 1, 0.5]]
    assert len(frames.attention_frame(found, "encoder_self")) == 0
    with pytest.raises(RunError, match=r"has no results\.json: not a run, or not finished"):
        frames.results_table([tmp_path / "unfinished"])
