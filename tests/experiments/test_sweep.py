"""Sweeps: what a file asks for, runs side by side, and what is reported when one fails or all are interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from detrlib.config import load_config, save_config
from detrlib.engine.notebooks import is_executed
from detrlib.errors import STOPPED, ConfigError, RunError, Stopped
from detrlib.experiments import sweep
from detrlib.experiments.sweep_file import read_sweep
from detrlib.files import load_checkpoint, write_json
from detrlib.runs import append_metrics
from detrlib.runs.owner import OWNER

CHILD = """
import json, pathlib, sys, time
folder, place = map(pathlib.Path, sys.argv[1:])
print("training", folder.name, flush=True)
if folder.name == "two" and (place / "broken").exists():
    (folder / "07_evaluate.ipynb").write_text('{"metadata": {}, "cells": [{"metadata": {}, "source": "1"}]}')
    raise SystemExit("error: 07_evaluate.ipynb: cell 2 failed")
if (place / "slow").exists():
    time.sleep(60)
(folder / "07_evaluate.ipynb").write_text('{"metadata": {}, "cells": []}')
"""


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Runs that take no time: one called "two" fails as long as the file "broken" exists, all wait for "slow"."""
    executed, real = [], subprocess.Popen

    def popen(command, **options):
        assert command[1:4] == ["-m", "detrlib", "sweep-run"]
        executed.append(command[4].rsplit("/", 1)[1])
        return real([sys.executable, "-c", CHILD, command[4], str(tmp_path)], **options)

    def draw(name, output, parameters):
        executed.append((name, parameters))
        output.write_text('{"cells": []}')
        viewer = Path(parameters["output"]) / "viewer.html"
        viewer.parent.mkdir(exist_ok=True)
        viewer.touch()
        return output

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    monkeypatch.setattr(sweep, "execute_notebook", draw)
    monkeypatch.setattr(sweep, "report_html", lambda notebook, output, title: (output.write_text(title), output)[1])
    return executed


def test_maps_are_shown_of_one_run_of_each_group(tmp_path, monkeypatch):
    names = [str(tmp_path / name) for name in ("a-seed1", "a-seed2", "b-seed1")]
    monkeypatch.setattr(sweep, "execute_notebook", lambda name, path, parameters: (path, parameters["run_names"]))
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda *command, **options: SimpleNamespace(wait=lambda: 0))
    _, drawn = sweep._draw(tmp_path, names, {})
    asked = json.loads((tmp_path / sweep.ASKED).read_text())
    assert drawn == names and asked == {"attention_maps": {"run_names": [names[0], names[2]]}}


def test_a_failing_run_is_reported_with_its_log_and_the_others_finish(sweep_file, stand_ins, tmp_path, capsys):
    path, folder = sweep_file(), tmp_path / "many"
    (tmp_path / "broken").touch()
    with pytest.raises(RunError) as caught:
        sweep.sweep(path, folder, parallel=2)
    assert f"{folder}/two/log.txt: error: 07_evaluate.ipynb: cell 2 failed" in str(caught.value)
    assert sorted(stand_ins) == ["one", "three", "two"]
    executed = [is_executed(folder / name / "07_evaluate.ipynb") for name in ("one", "two", "three")]
    assert executed == [True, False, True]
    assert load_config(folder / "two" / "sweep.yaml").train.epochs == 3

    stand_ins.clear()
    (tmp_path / "broken").unlink()
    capsys.readouterr()
    assert sweep.sweep(path, folder, parallel=2) == folder / "report.html"
    names = [str(folder / name) for name in read_sweep(path).configs]
    figures = ("thesis_figures", {"run_names": names, "output": str(folder / "figures")})
    assert stand_ins == ["two", "many", figures]  # maps and figures side by side
    assert [path.parent for path in folder.rglob("viewer.html")] == [folder], "it stands beside the report"
    assert json.loads((folder / "notebooks.json").read_text()) == {"attention_maps": {"run_names": names}}
    assert "one done  three done  two waiting" in capsys.readouterr().out

    stand_ins.clear()
    assert sweep.sweep(path, folder) == folder / "report.html"
    assert stand_ins == [] and f"all 3 runs are done: {folder / 'report.html'}" in capsys.readouterr().out


def test_sweeps_that_share_a_folder_train_a_common_run_once(sweep_file, stand_ins, tmp_path):
    folder = tmp_path / "shared"
    sweep.sweep(sweep_file(folder="any", runs={"one": None, "two": None}), folder)
    path = sweep_file(folder="any", runs={"one": None, "three": None}, report={"resamples": 9})
    path = path.rename(tmp_path / "others.yaml")
    stand_ins.clear()
    assert sweep.sweep(path, folder) == folder / "others" / "report.html"
    names, figures = [str(folder / name) for name in ("one", "three")], str(folder / "others" / "figures")
    drawn = ("thesis_figures", {"resamples": 9, "run_names": names, "output": figures})
    assert stand_ins == ["three", "others", drawn]
    assert (folder / "many" / "report.html").exists()


def test_a_run_waits_for_the_one_it_starts_from(sweep_file, stand_ins, tmp_path):
    folder = tmp_path / "many"
    runs = {"last": {"train.start": f"{folder}/next"}, "next": {"train.start": f"{folder}/one"}, "one": None}
    sweep.sweep(sweep_file(runs=runs), folder, parallel=3)
    assert stand_ins[:3] == ["one", "next", "last"]
    circle = tmp_path / "circle"
    runs = {"three": {"train.start": f"{circle}/four"}, "four": {"train.start": f"{circle}/three"}}
    with pytest.raises(ConfigError, match="four"):
        sweep.sweep(sweep_file(runs=runs), circle)


@pytest.mark.parametrize(("start", "pretrained"), [(None, ["tiny"]), ("other-run", [])])
def test_a_backbone_is_pretrained_for_runs_that_begin_with_it(start, pretrained, tiny_config, monkeypatch):
    asked, cfg = [], tiny_config({"model.backbone.weights": "crops", "train.start": start})
    monkeypatch.setattr(sweep, "open_splits", lambda data: {"train": None})
    monkeypatch.setattr(sweep, "look_over", lambda splits, check: None)
    monkeypatch.setattr(sweep, "backbone_weights", lambda backbone, *_: asked.append(backbone.name))
    sweep._prepare([SimpleNamespace(cfg=cfg, finished=finished) for finished in (True, False)])
    assert asked == pretrained


def test_runs_of_earlier_versions_count_as_finished(sweep_file, stand_ins, tmp_path):
    """Their notebook of evaluation had another number."""
    for name in ("one", "two", "three"):
        (tmp_path / "many" / name).mkdir(parents=True)
        (tmp_path / "many" / name / "06_evaluate.ipynb").write_text('{"metadata": {}, "cells": []}')
    sweep.sweep(sweep_file(), tmp_path / "many")
    assert stand_ins[0] == "many" and stand_ins[1][0] == "thesis_figures"


def test_a_run_that_was_interrupted_and_evaluated_by_hand_is_not_done(tmp_path):
    (tmp_path / "07_evaluate.ipynb").write_text('{"metadata": {}, "cells": []}')
    job = sweep.Job(tmp_path, load_config(), {})
    write_json(tmp_path / "results.json", {"unfinished": "epoch 1 of 2"})
    assert not job.finished
    write_json(tmp_path / "results.json", {})
    assert job.finished


def test_a_run_that_was_measured_otherwise_is_named(tmp_path):
    cfg = load_config(overrides={"evaluate.sites": ["decoder_cross", "encoder_self"]})
    job = sweep.Job(tmp_path, cfg, {"explained_images": 20})

    def executed(parameters, **settings):
        asked = cfg.evaluate.model_dump(mode="json") | settings
        write_json(tmp_path / "results.json", {"evaluate": {n: v for n, v in asked.items() if n != "sink_lead"}})
        write_json(tmp_path / "07_evaluate.ipynb", {"metadata": {"papermill": {"parameters": parameters}}, "cells": []})
        return sweep._measured_otherwise(job)

    assert executed({"explained_images": 20, "run_name": "a"}, batch_size=7) == ""
    told = executed({"explained_images": 5, "alphas": [1]}, sites=["decoder_cross"])
    assert told.split("; ") == [
        "evaluate.sites=['decoder_cross'], not ['decoder_cross', 'encoder_self']",
        "explained_images=5, not 20",
        "alphas=[1], not None",
    ]


def test_threads_that_the_user_has_set_win(sweep_file, stand_ins, tmp_path, monkeypatch):
    given, begin = [], sweep.subprocess.Popen

    def popen(command, **options):
        given.append(options.get("env", os.environ)["OMP_NUM_THREADS"])
        return begin(command, **options)

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    sweep.sweep(sweep_file(), tmp_path / "many", parallel=1)
    assert given == ["7"] * 4  # three runs, and the maps of all


def test_no_more_runs_than_slots_work_at_a_time(sweep_file, stand_ins, tmp_path, monkeypatch):
    """Each has the GPUs, or the share of the cores, of its slot."""
    real, busy, seen = sweep.subprocess.Popen, [], []

    def popen(command, **options):
        busy[:] = [child for child in busy if child.poll() is None]
        busy.append(real(command, **options))
        seen.append((len(busy), options.get("env", os.environ)["CUDA_VISIBLE_DEVICES"]))
        return busy[-1]

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    runs = {str(number): None for number in range(6)}
    sweep.sweep(sweep_file(runs=runs), tmp_path / "many", parallel=2)
    *seen, (_, everything) = seen
    assert everything == "4,5,6,7"  # when maps are drawn
    assert len(seen) == 6 and max(count for count, _ in seen) <= 2
    assert {gpus for _, gpus in seen} == {"4,6", "5,7"}


def test_an_interrupt_ends_all_runs(sweep_file, stand_ins, tmp_path, monkeypatch):
    children, real = [], sweep.subprocess.Popen
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda *a, **k: (children.append(real(*a, **k)), children[-1])[1])
    (tmp_path / "slow").touch()

    def interrupted(left, timeout):
        while len(children) < 2:
            time.sleep(0.05)
        monkeypatch.setattr(sweep, "wait", lambda left, timeout: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "wait", interrupted)
    with pytest.raises(Stopped):
        sweep.sweep(sweep_file(), tmp_path / "many", parallel=2)
    assert len(children) == 2 and all(child.returncode for child in children)


def test_an_interrupt_while_figures_are_drawn_ends_the_drawing_of_maps(tmp_path, monkeypatch):
    maps = subprocess.Popen(["sleep", "600"], start_new_session=True)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.subprocess, "Popen", lambda *_, **__: maps)
    monkeypatch.setattr(sweep, "execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep._draw(tmp_path, ["one"], {})
    assert maps.returncode


def test_a_run_that_is_worked_on_elsewhere_is_named_before_anything_starts(sweep_file, stand_ins, tmp_path):
    said = {"host": "other", "boot": "b", "process": 7, "started": 0.0, "job": None, "restarts": 0}
    write_json(tmp_path / "many" / "two" / OWNER, said)
    with pytest.raises(RunError, match=r"many/two is in use by process 7 on other"):
        sweep.sweep(sweep_file(), tmp_path / "many")
    assert stand_ins == [] and not (tmp_path / "many" / "one").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_trainings_of_a_sweep_save_and_leave_with_it(ended, sweep_file, tiny_config, tmp_path, number):
    save_config(tiny_config({"train.epochs": 5000}), tmp_path / "base.yaml")
    path = sweep_file(base="base.yaml", overrides={}, runs={"one": None, "two": None})
    code, said = ended(["detrlib", "sweep", path, "--name", tmp_path / "many", "--parallel", 2], number)
    assert number == signal.SIGKILL or (code == STOPPED and "Traceback" not in said), said
    begun = list((tmp_path / "many").glob("*/environment.json"))
    assert begun
    for environment in begun:
        last = json.loads(environment.read_text())["starts"][-1]
        if "stopped" in last:  # it had begun its first step
            checkpoint = environment.parent / "checkpoints" / "last.pt"
            assert load_checkpoint(checkpoint)["global_step"] == last["stopped"]
    assert any("stopped" in json.loads(path.read_text())["starts"][-1] for path in begun)


def test_training_that_is_done_is_not_asked_for_again(tmp_path):
    job, name = sweep.Job(tmp_path, load_config(), {"num_examples": 2}), {"run_name": str(tmp_path), "gpus": 3}
    evaluated = {"evaluate": {"num_examples": 2} | name}
    trained = {"train": {"config": str(tmp_path / "sweep.yaml")} | name}
    assert sweep._asked(job, 3) == trained | evaluated
    (tmp_path / "results.json").write_text("{}")
    assert sweep._asked(job, 3) == evaluated


def test_updates_of_an_epoch_may_be_given(tmp_path, tiny_config):
    cfg = tiny_config({"train.epochs": 3, "train.epoch_updates": 7})
    assert sweep.Job(tmp_path, cfg, {})._steps == 21


def test_a_run_that_cannot_be_started_ends_the_sweep(sweep_file, stand_ins, tmp_path, monkeypatch):
    """Those that wait for its place end with it."""

    def full(path, content):
        raise RunError(f"could not write {path}")

    monkeypatch.setattr(sweep, "write_json", full)
    with pytest.raises(RunError, match=r"one|two|three"):
        sweep.sweep(sweep_file(), tmp_path / "many", parallel=1)


def test_the_time_left_is_said_for_the_whole_sweep(tmp_path, capsys, monkeypatch):
    """One of two runs, one at a time, has done half of its steps, a quarter of them in 50 seconds."""
    jobs = [sweep.Job(tmp_path / name, load_config(), {}) for name in ("one", "two")]
    monkeypatch.setattr(sweep.Job, "_steps", 200)
    clock, bar = [0.0], sweep.tqdm(total=1, disable=True)
    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock[0])
    assert not sweep._report(jobs, 1, 0.0, bar)
    assert "one waiting  two waiting  (0 of 2 runs done, estimating the time left)" in capsys.readouterr().out
    jobs[0].course.started, jobs[0].process = 0.0, "a process"
    (tmp_path / "one").mkdir()
    for clock[0], step in ((20.0, 0), (70.0, 50), (120.0, 100)):
        append_metrics(tmp_path / "one", {"global_step": step, "epoch": 0, "extra/iter_time": 1.0})
        assert sweep._report(jobs, 1, 0.0, bar) == (step > 0)
    # 100 s more and an end like the start of 20 s, 20 + 200 + 20 s of the other, 6 x 20 s of figures.
    assert (
        "[02:00] one  50%  two waiting  (0 of 2 runs done, about 8 min left with all figures)"
        in capsys.readouterr().out
    )


def test_of_many_runs_a_line_names_those_under_way_and_failed(tmp_path, capsys):
    jobs = [sweep.Job(tmp_path / f"run-{number}", load_config(), {}) for number in range(sweep.MANY + 1)]
    jobs[3].process, jobs[5].failed, jobs[5].course.over = "a process", True, True
    sweep._report(jobs, 1, sweep.time.monotonic(), sweep.tqdm(total=1, disable=True))
    assert capsys.readouterr().out.startswith("[00:00] run-3 starting  run-5 failed  (1 of 9 runs done,")
