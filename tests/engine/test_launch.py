"""The doors to a training run: a terminal, several processes, torchrun; and what they say when they cannot open."""

import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from detrlib.config import PROJECT, load_config, save_config
from detrlib.engine import children
from detrlib.engine import launch as door
from detrlib.engine.evaluate import evaluate_run
from detrlib.engine.launch import in_processes, launch
from detrlib.engine.loop import train
from detrlib.errors import STOPPED, RunError, Stopped
from detrlib.files import load_checkpoint
from detrlib.runs import load_examples, load_table
from detrlib.runs.folder import load_results
from detrlib.runs.opening import open_run
from detrlib.runs.owner import OWNER

STEPS = 4  # per epoch of a tiny run


SIGNS_OF_A_CRASH = ("Traceback", "terminate called", "Aborted", "Error", "SIGABRT")


def command(*arguments, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=PROJECT,
        env=dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def through_launch(cfg, run_dir, capfd):
    capfd.readouterr()
    results = launch(cfg, run_dir, gpus=0, processes=2)
    printed = "".join(capfd.readouterr())
    assert results == load_results(run_dir)
    return printed


def through_torchrun(cfg, run_dir, capfd):
    open_run(cfg, run_dir)
    done = command("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "detrlib.engine.loop", run_dir)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "classification, by", [("softmax", through_launch), ("sigmoid", through_torchrun)], ids=["softmax", "sigmoid"]
)
def test_two_processes_equal_one(tmp_path, capfd, classification, by, metrics_without_times, tiny_config):
    """With nothing random but the order of images, two halves of a batch must give the gradient of the whole.

    What differs is the order of sums: 1e-5 relative in the losses, and 2e-5 at most, 2e-7 on average, in weights
    that moved by up to 8e-4 (Adam divides by the size of a gradient, so rounding shows most where there is little).
    """
    overrides = {"data.augment": "none", "model.dropout": 0.0, "model.classification": classification}
    cfg = tiny_config(overrides | {"train.lr": 1e-4, "train.lr_backbone": 1e-4})
    one, two = tmp_path / "one", tmp_path / "two"
    alone = train(cfg, one)
    printed = by(cfg, two, capfd)
    assert [sign for sign in SIGNS_OF_A_CRASH if sign in printed] == []
    assert printed.count("epoch   1/2") == printed.count("epoch   2/2") == 1

    records = [[r for r in metrics_without_times(run) if "epoch/loss" in r] for run in (one, two)]
    for first, second in zip(*records, strict=True):
        for name in ("epoch/loss", "epoch/loss_class", "epoch/loss_bbox", "epoch/loss_giou", "epoch/grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-5), name
        for name in ("val/loss_class", "val/loss_bbox", "val/loss_giou"):
            # Weighted so that it does not matter which images shared a batch.
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    states = [load_checkpoint(run / "checkpoints" / "last.pt") for run in (one, two)]
    assert states[0]["global_step"] == states[1]["global_step"] == 2 * STEPS
    for name, weight in states[0]["model"].items():
        difference = (states[1]["model"][name] - weight).abs()
        assert difference.max() < 2e-5 and difference.mean() < 2e-7, name

    # 13 images on two processes: none is counted twice, none is left out.
    found = [json.loads((run / "predictions.json").read_text()) for run in (one, two)]
    counts = [Counter(row["image_id"] for row in rows) for rows in found]
    assert counts[0] == counts[1] and len(counts[0]) == 13
    together = json.loads((two / "results.json").read_text())
    assert together["images"] == alone["images"] == 13
    assert together["paibb"]["pairs"] == alone["paibb"]["pairs"]
    for measure, layers in alone["attention"]["decoder_cross"].items():
        assert together["attention"]["decoder_cross"][measure] == pytest.approx(layers, rel=1e-3), measure


@pytest.mark.slow
def test_two_processes_in_parts_of_a_batch_equal_one(tmp_path, capfd, metrics_without_times, tiny_config):
    """Each has four images of a batch, three of them at a time, and then one."""
    plain = {"data.augment": "none", "model.dropout": 0.0, "train.lr": 1e-4, "train.lr_backbone": 1e-4}
    parts = plain | {"train.micro_batch": 3, "train.checkpoint_activations": True}
    train(tiny_config(plain), tmp_path / "one")
    printed = through_launch(tiny_config(parts), tmp_path / "two", capfd)
    assert [sign for sign in SIGNS_OF_A_CRASH if sign in printed] == []
    assert printed.count("memory: about") == 1 and "in each of 2 processes for 3 images of 64 x 64" in printed
    records = [metrics_without_times(tmp_path / run)[0] for run in ("one", "two")]
    for name in ("loss", "loss_class", "loss_bbox_0", "loss_giou", "cardinality_error", "grad_norm"):
        assert records[1][f"train/{name}"] == pytest.approx(records[0][f"train/{name}"], rel=1e-4), name
    one, two = (load_checkpoint(tmp_path / run / "checkpoints" / "last.pt")["model"] for run in ("one", "two"))
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() < 2e-5, name


SIGNAL_TO_ONE = """
import os, signal
from detrlib.engine import loop

real, steps = loop.train_step, iter(range(9))

def stopping(*given, **settings):
    if next(steps) == 1 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGUSR1)
    return real(*given, **settings)

loop.train_step = stopping
loop.main()
"""


@pytest.mark.slow
def test_two_processes_stop_alike_when_one_gets_a_signal_and_go_on(
    tmp_path, same, capfd, metrics_without_times, tiny_config
):
    """In an epoch with dropout, in parts of a batch, averaged, prepared by workers."""
    chosen = {"train.epochs": 1, "train.ema": 0.9, "train.micro_batch": 3, "data.workers": 1, "data.augment": "detr"}
    cfg, whole, parts = tiny_config(chosen), tmp_path / "whole", tmp_path / "parts"
    through_launch(cfg, whole, capfd)
    open_run(cfg, parts)
    (tmp_path / "stopped.py").write_text(SIGNAL_TO_ONE)
    stopped = command("detrlib.engine.agent", "--standalone", "--nproc-per-node", 2, tmp_path / "stopped.py", parts)
    assert stopped.returncode == STOPPED, stopped.stderr
    assert stopped.stderr.count("at step 2, after epoch 0 of 1 and 2 of 4 updates") == 1
    assert "resuming" in through_launch(cfg, parts, capfd)
    assert metrics_without_times(parts) == metrics_without_times(whole)
    assert same(*(load_checkpoint(run / "checkpoints" / "last.pt") for run in (whole, parts)))
    results, expected = map(load_results, (parts, whole))
    assert {**results, "seconds": 0} == {**expected, "seconds": 0}


@pytest.mark.slow
def test_two_processes_train_a_detector_of_transformers(tmp_path, capfd, huggingface_settings, tiny_config):
    """Every parameter has a gradient, which processes wait for; what they evaluate is the same model."""
    settings = huggingface_settings("d_fine", num_classes=None)["model"]
    kept = {name: getattr(tiny_config(), name).model_dump() for name in ("data", "train")}
    printed = through_launch(load_config(overrides=kept | {"model": settings}), tmp_path / "run", capfd)
    assert [sign for sign in SIGNS_OF_A_CRASH if sign in printed] == []
    assert "from 4 images at a time" in printed  # batch norms see what a process has
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["global_step"] == 2 * STEPS


@pytest.mark.slow
def test_two_processes_start_freeze_and_anneal_alike(tmp_path, capfd, tiny_config, metrics_without_times):
    """What is not trained gets no gradient, which processes must not wait for."""
    train(tiny_config({"train.epochs": 1}), tmp_path / "dense")
    sparse = {"model.attention.decoder_cross": "entmax15", "model.attention.anneal.epochs": 1.5}
    chosen = {"train.start": str(tmp_path / "dense"), "train.freeze": ["backbone", "encoder"]}
    printed = through_launch(tiny_config(sparse | chosen), tmp_path / "sparse", capfd)
    assert [sign for sign in SIGNS_OF_A_CRASH if sign in printed] == [] and printed.count("starts from dense") == 1
    before, after = (
        load_checkpoint(tmp_path / run / "checkpoints" / "last.pt")["model"] for run in ("dense", "sparse")
    )
    moved = {
        name.split(".")[1 if name.startswith("transformer") else 0]
        for name in after
        if not torch.equal(after[name], before[name])
    }
    assert moved == {"input_proj", "decoder", "query_embed", "class_embed", "bbox_embed"}
    alphas = [
        record["alpha/decoder_cross"] for record in metrics_without_times(tmp_path / "sparse") if "train/loss" in record
    ]
    assert alphas[-1] == 1.5 and alphas == sorted(alphas) and len(alphas) == 2 * STEPS


@pytest.mark.slow
def test_the_error_of_a_process_is_in_the_error_of_the_launch(tmp_path, monkeypatch, tiny_config):
    cfg = tiny_config({"train.batch_size": 7})
    monkeypatch.setattr(door, "ready_for_processes", lambda *given, **named: None)  # which finds it before they start
    with pytest.raises(RunError, match=r"train\.batch_size 7") as caught:
        launch(cfg, tmp_path, gpus=0, processes=2)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_a_process_that_breaks_shows_its_last_lines(tmp_path, monkeypatch, tiny_config):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "nonsense")  # what no one foresees
    with pytest.raises(RunError, match="nonsense") as caught:
        launch(tiny_config(), tmp_path, gpus=0, processes=2)
    assert 1 < len(str(caught.value).splitlines()) <= door.TAIL + 1


def test_a_subprocess_that_would_be_refused_is_not_started(tmp_path, monkeypatch, tiny_config):
    monkeypatch.setattr(door, "_torchrun", lambda *arguments: pytest.fail("started"))
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RunError, match="is finished"):
        launch(tiny_config(), tmp_path, gpus=0, processes=2)


def test_gpus_and_processes_choose_the_way(tmp_path, monkeypatch, tiny_config):
    """How many GPUs there are is made up; what would be started is recorded."""
    started = []
    monkeypatch.setattr(door, "train", lambda cfg, run_dir: started.append("here"))
    monkeypatch.setattr(door, "_torchrun", lambda module, path, processes, gpus: started.append((processes, gpus)))
    monkeypatch.setattr(door, "load_results", lambda run_dir: None)
    monkeypatch.setattr(door, "open_run", lambda cfg, run_dir: False)
    monkeypatch.setattr(door, "ready_for_processes", lambda *given, **named: None)
    for there, cases in {
        0: {(None, 1): "here", (0, 1): "here", (None, 2): (2, 0), (0, 3): (3, 0)},
        4: {(None, 1): "here", (1, 1): "here", (4, 1): (4, 4), (0, 1): (1, 0), (0, 2): (2, 0)},
    }.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        for (gpus, processes), way in cases.items():
            launch(tiny_config(), tmp_path / "run", gpus, processes)
            assert started.pop() == way, (there, gpus, processes)
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun has started this one
    launch(tiny_config(), tmp_path / "run", gpus=4)
    assert started == ["here"]
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RunError, match="5 GPUs asked for, 4 available; use --gpus 4"):
        launch(tiny_config(), tmp_path / "run", gpus=5)
    with pytest.raises(RunError, match="processes are for the CPU"):
        launch(tiny_config(), tmp_path / "run", gpus=2, processes=2)


@pytest.fixture
def command_of_a_long_run(tmp_path, tiny_config):
    """The command that trains a run of many epochs in two processes, and its folder."""
    save_config(tiny_config({"train.epochs": 5000}), tmp_path / "long.yaml")
    return ["detrlib", "train", tmp_path / "long.yaml", "--name", tmp_path / "run", "--processes", 2], tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_launch_reaches_its_processes_which_save(ended, command_of_a_long_run, number):
    command, run_dir = command_of_a_long_run
    code, said = ended(command, number)
    assert code == STOPPED and "Traceback" not in said and "stopped by" in said, said
    last = json.loads((run_dir / "environment.json").read_text())["starts"][-1]
    assert load_checkpoint(run_dir / "checkpoints" / "last.pt")["global_step"] == last["stopped"]
    assert not (run_dir / OWNER).exists()


@pytest.mark.slow
def test_processes_of_a_killed_launch_save_and_leave(ended, command_of_a_long_run):
    command, run_dir = command_of_a_long_run
    ended(command, signal.SIGKILL)
    last = json.loads((run_dir / "environment.json").read_text())["starts"][-1]
    assert load_checkpoint(run_dir / "checkpoints" / "last.pt")["global_step"] == last["stopped"]


FULL_DISK = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print("a step", flush=True)
signal.sigwait([signal.SIGUSR1])
print("error: could not write last.pt", flush=True)
raise SystemExit(1)
"""


def test_a_fault_while_it_is_saved_is_no_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "torchrun", lambda processes: [sys.executable, "-c", FULL_DISK])
    monkeypatch.setattr(door, "print", lambda *_, **named: signal.raise_signal(signal.SIGTERM), raising=False)
    with pytest.raises(RunError, match=r"could not write last\.pt"):
        door._torchrun("a.module", tmp_path, 2, 0)


@pytest.mark.parametrize("nodes, expected", [(1, str(os.getpid())), (2, "None")])
def test_processes_of_this_machine_alone_are_told_whom_to_follow(tmp_path, monkeypatch, capfd, nodes, expected):
    said = f"import os; print('follows', os.environ.get({children.PARENT!r}))"
    monkeypatch.setattr(door, "torchrun", lambda processes: [sys.executable, "-c", said])
    monkeypatch.setattr(door, "node_count", lambda: nodes)
    door._torchrun("a.module", tmp_path, 2, 0)
    assert f"follows {expected}" in capfd.readouterr().out


def test_nodes_of_a_job_share_the_work_where_all_see_it(tmp_path, monkeypatch, tiny_config):
    started = []

    def torchrun(module, path, processes, gpus):
        started.append((path.parent.parent, processes, gpus))
        path.write_bytes(pickle.dumps("their result"))

    monkeypatch.setattr(door, "node_count", lambda: 2)
    monkeypatch.setattr(door, "_torchrun", torchrun)
    save_config(tiny_config(), tmp_path / "config.yaml")
    assert in_processes(print, tmp_path, gpus=0) == "their result" and started == [(tmp_path, 1, 0)]


# What is shared by several processes is what one finds


MEASURED = """
from detrlib.engine.evaluate import evaluate_run
from detrlib.experiments.explain import faithfulness_run
from detrlib.experiments.intervene import measure_plan, prune_order, query_order


def measure(run_dir):
    return {
        "explained": faithfulness_run(run_dir, 5, ["raw", "drise", "random"], 3, masks=4, min_score=0.0),
        "orders": (prune_order(run_dir, "decoder_cross", 4), query_order(run_dir, 7)),
        "few": measure_plan(run_dir, 2, transforms=["softmax"]),
        "more": measure_plan(run_dir, 11, alphas=[1.5], sinks=["masked"]),
        "results": evaluate_run(run_dir),
    }
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A function that other processes can import too: evaluations, explanations and interventions of a run."""
    (tmp_path / "measured_by_processes.py").write_text(MEASURED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return importlib.import_module("measured_by_processes").measure


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_config, write_layout):
    """A run whose 13 validation images make five batches, and the folder of its data."""
    root = write_layout(tmp_path_factory.mktemp("shared") / "data", "coco", train=4, val=13)
    settings = {"train.epochs": 1, "train.batch_size": 2, "model.attention.decoder_cross": "entmax15"}
    settings |= {"evaluate.batch_size": 3, "evaluate.store_maps": 7, "evaluate.examples": 4}
    train(tiny_config(settings | {"data.root": str(root)}), root.with_name("one"))
    return root.with_name("one"), root


def near(found, expected, path="results"):
    """Nested values that are equal but for rounding."""
    if isinstance(expected, dict | list):
        keys = expected if isinstance(expected, dict) else range(len(expected))
        assert len(found) == len(expected), path
        for key in keys:
            near(found[key], expected[key], f"{path} {key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), path
    else:
        assert found == expected, path


@pytest.mark.slow
def test_what_several_processes_measure_is_what_one_does(tmp_path, capfd, measure, evaluated):
    """Five batches of 13 images on two processes, then one batch, so that one of them has none.

    What is made of single images, and AP and the loss, are the same bit for bit: it is the same arithmetic, put in the
    same order. Means over images are sums in another order.
    """
    one, two = shutil.copytree(evaluated[0], tmp_path / "one"), shutil.copytree(evaluated[0], tmp_path / "two")
    alone = in_processes(measure, one)
    capfd.readouterr()
    together = in_processes(measure, two, gpus=0, processes=2)
    printed = "".join(capfd.readouterr())
    assert [sign for sign in SIGNS_OF_A_CRASH if sign in printed] == []

    pd.testing.assert_frame_equal(together["explained"], alone["explained"], check_exact=True)
    assert together["orders"] == alone["orders"]
    for name in ("few", "more"):
        exact = ["kind", "layer", "head", "value", "AP", "AP50", "loss", "AP_lost", "AP_lost_low", "AP_lost_high"]
        pd.testing.assert_frame_equal(together[name][exact], alone[name][exact], check_exact=True)
        pd.testing.assert_frame_equal(together[name], alone[name], rtol=1e-6)
    same = ("detection", "floor", "images", "alpha", "names")
    assert {name: together["results"][name] for name in same} == {name: alone["results"][name] for name in same}
    near(together["results"] | {"seconds": 0}, alone["results"] | {"seconds": 0})
    assert load_results(two) == together["results"]
    assert (two / "predictions.json").read_bytes() == (one / "predictions.json").read_bytes()
    assert len(list((two / "measures" / "sinks").iterdir())) == len(list((two / "maps").iterdir())) == 2
    names = ("sparsity", "located", "sinks", "matches", "annotations", "faithfulness", "faithfulness_curves")
    for name in (*names, "interventions"):
        tables = [load_table(run, name) for run in (two, one)]
        pd.testing.assert_frame_equal(*tables, check_exact=name in names, rtol=1e-6)
    examples = [load_examples(run) for run in (two, one)]
    assert len(examples[0]) == 4
    for first, second in zip(*examples, strict=True):
        assert np.array_equal(first.maps(), second.maps()) and np.array_equal(first.boxes, second.boxes)
    assert examples[0][0].stored.images == examples[1][0].stored.images
    assert len(examples[0][0].stored.images) == 7


@pytest.mark.slow
def test_the_fault_that_one_process_meets_ends_all_in_one_line(tmp_path, capfd, evaluated):
    """A picture of the second batch is damaged; the process that has the others waits for what is found in it."""
    (damaged,) = shutil.copytree(evaluated[1], tmp_path / "data").rglob("val4.png")
    damaged.write_bytes(b"half a picture")
    moved = {"data.root": str(tmp_path / "data")}
    capfd.readouterr()
    with pytest.raises(RunError, match=r"2 processes failed: .*val4\.png") as caught:
        in_processes(evaluate_run, evaluated[0], overrides=moved, gpus=0, processes=2)
    assert len(str(caught.value).splitlines()) == 1
    printed = "".join(capfd.readouterr())
    assert [sign for sign in (*SIGNS_OF_A_CRASH, "error") if sign in printed] == []


def test_what_other_processes_cannot_import_is_refused(tmp_path, tiny_config):
    open_run(tiny_config(), tmp_path)
    with pytest.raises(RunError, match="need code that they can import"):
        in_processes(lambda run_dir: None, tmp_path, gpus=0, processes=2)
    with pytest.raises(RunError, match=r"nothing has no config\.yaml"):
        in_processes(print, tmp_path / "nothing", gpus=0, processes=2)


def test_what_a_signal_ends_in_several_processes_is_not_asked_to_start_again(tmp_path, monkeypatch, tiny_config):
    """It would begin anew, and a job be put back in the queue for ever."""
    save_config(tiny_config(), tmp_path / "config.yaml")

    def stopped(*_):
        raise Stopped("stopped by SIGUSR1; the same command goes on where it can")

    monkeypatch.setattr(door, "_torchrun", stopped)
    with pytest.raises(RunError, match="SIGUSR1, and begins anew"):
        in_processes(print, tmp_path, gpus=0, processes=2)
