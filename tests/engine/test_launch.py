"""The doors to a training run: a terminal, several processes, torchrun; and what they say when they cannot open."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from tiny import STEPS, metrics_without_times, tiny_config

from detrlib.config import PROJECT, save_config
from detrlib.engine import launch as door
from detrlib.engine.launch import launch
from detrlib.engine.loop import train
from detrlib.errors import RunError
from detrlib.files import load_checkpoint
from detrlib.runs.folder import open_run

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
    assert results == json.loads((run_dir / "results.json").read_text())
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
def test_two_processes_equal_one(tmp_path, capfd, classification, by):
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
def test_the_error_of_a_process_is_in_the_error_of_the_launch(tmp_path):
    cfg = tiny_config({"train.batch_size": 7})
    with pytest.raises(RunError, match="2 processes of torchrun failed with code 1") as caught:
        launch(cfg, tmp_path, gpus=0, processes=2)
    assert "ConfigError: train.batch_size 7 is not a multiple of the 2 processes" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= door.TAIL + 1


def test_a_subprocess_that_would_be_refused_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "_torchrun", lambda *arguments: pytest.fail("started"))
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RunError, match="is finished"):
        launch(tiny_config(), tmp_path, gpus=0, processes=2)


def test_gpus_and_processes_choose_the_way(tmp_path, monkeypatch):
    """How many GPUs there are is made up; what would be started is recorded."""
    started = []
    monkeypatch.setattr(door, "train", lambda cfg, run_dir: started.append("here"))
    monkeypatch.setattr(door, "_torchrun", lambda run_dir, processes, gpus: started.append((processes, gpus)))
    monkeypatch.setattr(door, "load_results", lambda run_dir: None)
    monkeypatch.setattr(door, "open_run", lambda cfg, run_dir: False)
    for there, cases in {
        0: {(None, 1): "here", (0, 1): "here", (None, 2): (2, 0), (0, 3): (3, 0)},
        4: {(None, 1): "here", (1, 1): "here", (4, 1): (4, 4), (0, 1): (1, 0), (0, 2): (2, 0)},
    }.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        for (gpus, processes), way in cases.items():
            launch(tiny_config(), tmp_path / "run", gpus, processes)
            assert started.pop() == way, (there, gpus, processes)
    with pytest.raises(RunError, match="5 GPUs asked for, 4 found; use --gpus 4"):
        launch(tiny_config(), tmp_path / "run", gpus=5)
    with pytest.raises(RunError, match="processes are for training on the CPU"):
        launch(tiny_config(), tmp_path / "run", gpus=2, processes=2)


# --- the command line ------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    save_config(tiny_config(), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


def run_main(monkeypatch, *arguments):
    """What the command line ends with: its exit code or message."""
    monkeypatch.setattr(sys, "argv", ["launch", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        door.main()
    return caught.value.code


def test_from_the_terminal_to_the_end(tmp_path, config):
    run_dir = tmp_path / "nested" / "run"
    done = command(
        "detrlib.engine.launch", config, "--run-name", run_dir, "--set", "train.epochs=3", "--set", "train.lr=1e-4"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:11] for line in lines] == ["epoch   1/3", "epoch   2/3", "epoch   3/3", lines[-1][:11]]
    assert all("loss" in line and "AP50" in line and "min left" in line for line in lines[:3])
    assert lines[-1].startswith("AP 0.") and lines[-1].endswith(str(run_dir))
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert metrics_without_times(run_dir)[0]["lr/rest"] == 1e-4
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]


def test_gpus_that_are_not_there_end_the_command_with_a_clear_error(tmp_path, config):
    done = command("detrlib.engine.launch", config, "--run-name", tmp_path / "run", "--gpus", 2)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: 2 GPUs asked for, 0 found; use --gpus 0 (0 trains on the CPU)"
    assert not (tmp_path / "run").exists()


def test_malformed_and_unknown_settings(tmp_path, config, monkeypatch, capsys):
    name = ("--run-name", tmp_path / "run")
    assert run_main(monkeypatch, config, *name, "--set", "train.epochs") == 2
    assert "--set train.epochs: expected name=value" in capsys.readouterr().err
    unknown = run_main(monkeypatch, config, *name, "--set", "train.epoch=3")
    assert unknown == "error: an override: unknown setting 'train.epoch'; did you mean 'train.epochs'?"
    wrong = run_main(monkeypatch, config, *name, "--set", "train.epochs=many")
    assert wrong.startswith("error: ") and "train.epochs" in wrong and "'many'" in wrong
    assert "'[1' is not valid YAML" in run_main(monkeypatch, config, *name, "--set", "train.epochs=[1")
    missing = run_main(monkeypatch, config.with_name("tony.yaml"), *name)
    assert "no such config file; did you mean tiny.yaml?" in missing
    assert run_main(monkeypatch, config) == 2  # no run name
    assert not (tmp_path / "run").exists()


def test_an_interrupt_ends_the_command_quietly(tmp_path, config, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(door, "launch", interrupted)
    assert run_main(monkeypatch, config, "--run-name", tmp_path / "run") == 130


def test_the_command_names_data_that_is_not_there(tmp_path, config, monkeypatch):
    message = run_main(monkeypatch, config, "--run-name", tmp_path / "run", "--set", f"data.root={tmp_path}/nowhere")
    assert message.startswith(f"error: no {tmp_path}/nowhere/train2017")
