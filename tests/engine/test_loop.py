"""Learning, stopping and resuming, and failures that must be named."""

import itertools
import json
import math
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detrlib.config import load_config, replace, save_config
from detrlib.data import batch
from detrlib.engine import loop as training
from detrlib.engine import pace, pretrain, ready
from detrlib.engine.evaluate import evaluate_run, load_model
from detrlib.engine.examples import ValidationImages
from detrlib.engine.loop import train
from detrlib.engine.predict import predict
from detrlib.errors import ConfigError, NonFiniteLoss, RunError, Stopped
from detrlib.experiments.explain import faithfulness_run
from detrlib.experiments.intervene import intervene_run, plan
from detrlib.experiments.interventions import attention_modules
from detrlib.files import load_checkpoint, write_checkpoint
from detrlib.runs.folder import class_names, is_finished, load_results, looking_at

STEPS = 4  # per epoch of a tiny run


@pytest.fixture
def quick_crops(monkeypatch):
    monkeypatch.setattr(pretrain, "SAMPLES", 3 * pretrain.BATCH)


@pytest.mark.parametrize("keeps", [False, True])
def test_alpha_may_be_exempt_from_the_drop(tmp_path, keeps, metrics_without_times, tiny_config):
    overrides = {"model.attention.decoder_cross": "alpha_entmax", "train.lr_drop": 1, "train.alpha_keeps_lr": keeps}
    train(tiny_config(overrides | {"train.warmup_steps": 2}), tmp_path)
    steps = [record for record in metrics_without_times(tmp_path) if "train/loss" in record]
    assert len(steps) == 2 * STEPS
    # A logged rate is that of the next step.
    rest = [2 / 3, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert [record["lr/rest"] for record in steps] == pytest.approx([1e-3 * factor for factor in rest])
    alpha = [1.0] * 2 * STEPS if keeps else rest
    if keeps:
        assert {round(record["lr/alpha"], 9) for record in steps[1:]} == {1e-2}
    else:
        assert [record["lr/alpha"] for record in steps] == pytest.approx([1e-2 * factor for factor in alpha])


# --- learning, stopping, resuming ------------------------------------------------------------------------------


def test_loss_falls_when_a_few_images_are_learned_by_heart(tmp_path, metrics_without_times, tiny_config):
    overrides = {"data.train_limit": 4, "data.val_limit": 4, "data.augment": "none", "train.epochs": 60}
    train(tiny_config(overrides | {"train.eval_every": 60, "model.dropout": 0.0}), tmp_path)
    losses = [record["train/loss"] for record in metrics_without_times(tmp_path) if "train/loss" in record]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]


VARIANTS = {
    "plain": {},
    "average": {"train.ema": 0.9},
    "bfloat16": {"train.precision": "bfloat16"},
    "average of bfloat16": {"train.precision": "bfloat16", "train.ema": 0.9},
    "alpha and cosine": {
        "model.attention.decoder_cross": "alpha_entmax",
        "train.schedule": "cosine",
        "train.warmup_steps": 5,
        "train.alpha_keeps_lr": True,
    },
    "annealed average": {
        "model.attention": {"decoder_cross": "entmax15", "anneal": {"epochs": 1.5}},
        "train.ema": 0.9,
    },
    "frozen stem": {"model.backbone": {"name": "tiny", "weights": "crops"}},
    "sparse encoder": {
        "model.architecture": "deformable",
        "model.classification": "sigmoid",
        "model.encoder_layers": 2,
        "model.deformable": {"levels": 2, "stages": [4], "refine": True, "two_stage": True, "query_init": "memory"}
        | {"rho": 0.3, "encoder_auxiliary": True},
        "data.augment": "detr",  # images of several sizes, with padding
        "train.precision": "bfloat16",
    },
    "so many updates": {"train.epoch_updates": 5},  # of 8 of the 32 images
    "augmented by workers, sizes by batch": {"data.workers": 1, "data.augment": "detr", "data.scales": "batch"},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_stop_and_resume_equals_an_uninterrupted_run(
    tmp_path, same, interrupt, quick_crops, overrides, metrics_without_times, tiny_config
):
    """By a signal within the first epoch, and killed within the second, which is then repeated."""
    cfg = tiny_config(overrides)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(cfg, whole)
    interrupt(1, signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM at step 2,"):
        train(cfg, parts)
    last = load_checkpoint(parts / "checkpoints" / "last.pt")
    assert (last["epoch"], last["global_step"], last["so_far"]["steps"]) == (0, 2, 2)
    interrupt(expected["global_step"] // 2)  # within the second epoch
    with pytest.raises(KeyboardInterrupt):
        train(cfg, parts)
    assert load_checkpoint(parts / "checkpoints" / "last.pt")["epoch"] == 1
    assert not (parts / "results.json").exists()
    results = train(cfg, parts)
    assert same(*(load_checkpoint(run / "checkpoints" / "last.pt") for run in (whole, parts)))
    assert metrics_without_times(parts) == metrics_without_times(whole)
    assert {**results, "seconds": 0} == {**expected, "seconds": 0}
    assert json.loads((parts / "results.json").read_text())["epoch"] == 2


@pytest.mark.gpu
def test_a_gpu_stops_and_goes_on_too(tmp_path, interrupt, gpu, metrics_without_times, tiny_config):
    """In bfloat16, in as large parts as fit; sums in another order from run to run are not equal bit for bit."""
    cfg = tiny_config({"train.precision": "bfloat16", "train.micro_batch": "auto", "train.lr": 1e-4})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cfg, whole)
    interrupt(STEPS + 1, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(cfg, parts)
    results = train(cfg, parts)
    assert results["global_step"] == 2 * STEPS and "micro_batch.json" in {path.name for path in parts.iterdir()}
    losses, expected = (
        [record["train/loss"] for record in metrics_without_times(run) if "train/loss" in record]
        for run in (parts, whole)
    )
    assert len(losses) == 2 * STEPS and losses == pytest.approx(expected, 0.05)


def test_a_detector_of_transformers_stops_and_goes_on(
    tmp_path, same, interrupt, huggingface_settings, tiny_config, capsys
):
    """Averaged, annealed, in parts of a batch, and without its backbone, whose batch norms stand still too."""
    settings = huggingface_settings("rt_detr_v2", num_classes=None)["model"]
    settings["options"] |= {"freeze_backbone_batch_norms": False}
    settings["attention"] = {"encoder_self": "entmax15", "anneal": {"epochs": 1.5}}
    kept = {"data": tiny_config().data.model_dump(), "train": tiny_config().train.model_dump()}
    kept["train"] |= {"ema": 0.5, "micro_batch": 3, "freeze": ["backbone"]}
    cfg = load_config(overrides=kept | {"model": settings, "evaluate.examples": 1})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(cfg, whole)
    assert "learn means and variances from 3 images at a time" in capsys.readouterr().out
    interrupt(STEPS + 2)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, parts)
    results = train(cfg, parts)
    last = load_checkpoint(whole / "checkpoints" / "last.pt")
    assert same(last, load_checkpoint(parts / "checkpoints" / "last.pt"))
    assert {**results, "seconds": 0} == {**expected, "seconds": 0}
    before = training.initial_model(load_config(whole / "config.yaml")).state_dict()
    moved = {name for name, value in last["model"].items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in moved) and not any("backbone." in name for name in moved)


def test_options_that_contradict_each_other_are_refused_before_pictures_are_read(
    tmp_path, monkeypatch, huggingface_settings, tiny_config
):
    settings = huggingface_settings("rt_detr_v2", num_classes=None)["model"]
    settings["options"] |= {"encode_proj_layers": [7]}
    cfg = load_config(overrides={"data": tiny_config().data.model_dump(), "model": settings})
    monkeypatch.setattr(training, "look_over", None)
    with pytest.raises(ConfigError, match=r"model\.options"):
        train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_where_its_data_have_moved(tmp_path, interrupt, tiny_config, write_layout):
    root = write_layout(tmp_path / "here", "yolo")
    settings = {"train.batch_size": 2, "data.holdout": 0.3, "evaluate.examples": 0}
    expected = train(tiny_config(settings | {"data.root": str(root)}), tmp_path / "whole")
    interrupt(expected["global_step"] - 1)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(settings | {"data.root": str(root)}), tmp_path / "parts")
    root.rename(tmp_path / "there")
    results = train(tiny_config(settings | {"data.root": str(tmp_path / "there")}), tmp_path / "parts")
    assert {**results, "seconds": 0} == {**expected, "seconds": 0}
    recorded = [json.loads((tmp_path / run / "data.json").read_text()) for run in ("whole", "parts")]
    assert recorded[0] == recorded[1] and len(recorded[0]["held_out"]) == results["images"]


def test_a_name_that_torchrun_is_given_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loop", "../elsewhere"])
    with pytest.raises(SystemExit, match=r"error: .*names no run"):
        training.main()


def test_a_run_stopped_in_its_first_epoch_starts_over(tmp_path, interrupt, metrics_without_times, tiny_config):
    cfg = tiny_config()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cfg, whole)
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, parts)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 3, "tra')  # cut short by a crash
    train(cfg, parts)
    assert metrics_without_times(parts) == metrics_without_times(whole)


def test_the_average_is_judged_rather_than_the_weights(tmp_path, same, tiny_config):
    """Also in bfloat16, where a copy of the model must not go on calling the original."""
    results = train(tiny_config({"train.ema": 0.999999, "train.precision": "bfloat16"}), tmp_path)
    state = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert state["averaged_steps"] == 2 * STEPS
    assert not same(state["average"], state["model"])
    assert evaluate_run(tmp_path)["attention"] == results["attention"]
    write_checkpoint(tmp_path / "checkpoints" / "raw.pt", state | {"average": None})
    assert evaluate_run(tmp_path, "raw")["attention"] != results["attention"]


def test_precision_may_change_from_run_to_run_in_one_process(tmp_path, metrics_without_times, tiny_config):
    logits = {}
    for precision in ("float32", "bfloat16", "float32"):
        cfg = tiny_config({"train.precision": precision, "train.epochs": 1})
        run_dir = tmp_path / f"{precision}-{len(logits)}"
        train(cfg, run_dir)
        logits[run_dir.name] = metrics_without_times(run_dir)[0]["train/loss"]
    first, low, second = logits.values()
    assert first == second != low
    assert low == pytest.approx(first, rel=0.05)


def test_best_is_the_epoch_with_the_best_ap(tmp_path, same, monkeypatch, tiny_config):
    scores = iter([0.2, 0.5, 0.3, 0.5])
    validate = training.Trainer._validate
    monkeypatch.setattr(training.Trainer, "_validate", lambda self: validate(self) | {"detection/AP": next(scores)})
    train(tiny_config({"train.epochs": 4, "train.keep_every": 2}), tmp_path)
    folder = tmp_path / "checkpoints"
    names = sorted(path.stem for path in folder.iterdir())
    assert names == ["best", "epoch-0002", "epoch-0004", "last", "previous"]
    best, second, last = (load_checkpoint(folder / f"{name}.pt") for name in ("best", "epoch-0002", "last"))
    assert best["epoch"] == 2 and same(best["model"], second["model"])
    assert last["epoch"] == 4 and last["best"] == 0.5


def test_validation_every_few_epochs_and_always_at_the_end(tmp_path, metrics_without_times, tiny_config):
    train(tiny_config({"train.epochs": 3, "train.eval_every": 2}), tmp_path)
    judged = [r["epoch"] for r in metrics_without_times(tmp_path) if "detection/AP" in r]
    assert judged == [2, 3]


# --- the GPU that there is -------------------------------------------------------------------------------------


def test_a_batch_in_parts_is_the_same_training(tmp_path, capsys, monkeypatch, metrics_without_times, tiny_config):
    """What differs is the order of sums, of which Adam makes most where a gradient is nearly zero."""
    monkeypatch.setattr(pace, "FIRST", STEPS - 1)
    plain = {"model.dropout": 0.0, "data.augment": "detr", "train.lr": 1e-4, "train.lr_backbone": 1e-4}
    parts = plain | {"train.micro_batch": 3, "train.checkpoint_activations": ["backbone", "encoder"]}
    for name, overrides in (("whole", plain), ("parts", parts)):
        train(tiny_config(overrides), tmp_path / name)
        printed = capsys.readouterr().out
        assert printed.count("memory: ") == printed.count("time: about") == 1
        assert f"for {3 if name == 'parts' else 8} images of 100 x 100 pixels" in printed
    whole, parted = (metrics_without_times(tmp_path / name) for name in ("whole", "parts"))
    for name in ("train/loss", "train/class_error", "train/cardinality_error", "train/grad_norm"):
        assert [row.get(name) for row in parted[:3]] == pytest.approx([row.get(name) for row in whole[:3]], rel=1e-3)
    one, two = (load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("whole", "parts"))
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() < 2e-5, name


def test_a_run_may_go_on_in_other_parts(tmp_path, interrupt, tiny_config):
    interrupt(STEPS)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), tmp_path)
    assert train(tiny_config({"train.micro_batch": 4, "train.checkpoint_activations": True}), tmp_path)["epoch"] == 2


def test_a_gpu_that_is_too_small_is_named_with_the_remedy(tmp_path, monkeypatch, tiny_config):
    def too_large(*given, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "train_step", too_large)
    with pytest.raises(RunError, match=r"for 8 images in a batch of 64 x 64 pixels at step 0; set train.micro_batch"):
        train(tiny_config(), tmp_path)


def test_epochs_of_so_many_updates_keep_the_units_of_the_schedule(tmp_path, capsys, metrics_without_times, tiny_config):
    overrides = {"train.epoch_updates": 5, "train.lr_drop": 1, "train.eval_every": 2, "train.warmup_steps": 2}
    results = train(tiny_config(overrides | {"train.epochs": 3}), tmp_path)
    records = metrics_without_times(tmp_path)
    rates = [record["lr/rest"] for record in records if "train/loss" in record]
    assert rates == pytest.approx([1e-3 * x for x in (2 / 3, 1, 1, 1, 0.1, *[0.1] * 10)])
    assert [r["global_step"] for r in records if "detection/AP" in r] == [10, 15] and results["global_step"] == 15
    out = capsys.readouterr().out
    assert "15 updates in all" in out and "15 updates (3.8 passes)" in out


def test_the_floor_stands_beside_ap_and_signs_of_collapse_are_said_late_and_once(
    tmp_path, monkeypatch, capsys, tiny_config
):
    results = train(tiny_config(), tmp_path / "run")
    assert 0 < results["floor"]["AP"] < 0.5 and results["floor"]["images"] == 13
    floor = f"AP {results['floor']['AP']:.3f}"
    said = capsys.readouterr().out
    assert (
        floor in said.partition("epoch")[0] and "the floor: fixed boxes, which never look at the image, reach" in said
    )
    monkeypatch.setattr(training, "signs_of_collapse", lambda results: {"AP": "low"} if "spread" in results else {})
    train(tiny_config({"train.epochs": 6}), tmp_path / "long")
    lines = [line for line in capsys.readouterr().out.splitlines() if line == "warning: low" or line[:5] == "epoch"]
    assert [number for number, line in enumerate(lines) if line == "warning: low"] == [
        2,
        7,
    ]  # after two, and at the end


# --- from dense to sparse --------------------------------------------------------------------------------------


def test_annealed_alphas_are_logged_judged_by_and_arrive(tmp_path, metrics_without_times, tiny_config):
    """Steps of an epoch are fewer than the epochs of annealing times them, so that alpha arrives within one."""
    anneal = {"model.attention.anneal": {"epochs": 1.5, "start": 1.0, "sites": ["decoder_cross"]}}
    sites = {"model.attention.decoder_cross": "sparsemax", "model.attention.decoder_self": "entmax15"}
    results = train(tiny_config(sites | anneal | {"train.keep_every": 1}), tmp_path)
    records = metrics_without_times(tmp_path)
    alphas = [record["alpha/decoder_cross"] for record in records if "train/loss" in record]
    assert alphas == pytest.approx([1 + min(1, step / (1.5 * STEPS)) for step in range(1, 2 * STEPS + 1)])
    assert alphas[-1] == 2.0 and not any("alpha/decoder_self" in record for record in records)

    halfway = load_model(tmp_path, "epoch-0001")
    found = [module.transform.alpha for module in attention_modules(halfway, "decoder_cross")]
    assert found == pytest.approx([1 + 1 / 1.5] * 2)
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt")["epoch"] == 2
    plain = load_config(
        tmp_path / "config.yaml", {"model.attention.anneal": {"epochs": 0, "start": 1.01, "sites": None}}
    )
    save_config(plain, tmp_path / "config.yaml")
    again = evaluate_run(tmp_path)
    assert {**again, "seconds": 0} == {**results, "seconds": 0}


# --- what must be refused, or named ----------------------------------------------------------------------------


def test_a_loss_that_is_no_number_is_named_and_kept(tmp_path, monkeypatch, tiny_config):
    real, steps = training.train_step, itertools.count()

    def poisoned(model, *given, **settings):
        if next(steps) == STEPS + 1:
            torch.nn.init.constant_(next(model.parameters()), math.nan)
        return real(model, *given, **settings)

    monkeypatch.setattr(training, "train_step", poisoned)
    with pytest.raises(NonFiniteLoss, match=rf"loss is nan at step {STEPS + 1} \(epoch 2.*'rest': 0.001") as caught:
        train(tiny_config(), tmp_path)
    assert f"train.start: {tmp_path}" in str(caught.value)
    state = load_checkpoint(tmp_path / "failure-0.pt")
    assert len(set(state["image_ids"])) == 8 and str(state["image_ids"]) in str(caught.value)
    assert str(tmp_path / "failure-0.pt") in str(caught.value)
    images, _, targets = state["batch"]
    assert images.shape == (8, 3, 64, 64) and [t["image_id"] for t in targets] == state["image_ids"]
    assert state["learning_rates"] == {"rest": 1e-3, "backbone": 1e-3}
    monkeypatch.setattr(training, "train_step", real)
    advised = {"train.start": str(tmp_path), "train.lr": 1e-4, "train.warmup_steps": 2, "train.epochs": 1}
    assert train(tiny_config(advised), tmp_path / "advised")["epoch"] == 1
    assert train(tiny_config(), tmp_path)["epoch"] == 2  # resumes from the last complete epoch


def test_a_compiled_run_has_plain_names_and_goes_on_without(tmp_path, monkeypatch, interrupt, tiny_config):
    """And with it where it began without. (Graphs run as they are here: C++ would take a minute.)"""
    compile_in_place, compiled = torch.nn.Module.compile, []

    def compile_quickly(model):
        compiled.append(model)
        compile_in_place(model, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    monkeypatch.setattr(ready, "require_compiler", lambda device: None)
    settings = {"train.ema": 0.9, "model.dropout": 0.0}
    plain = train(tiny_config(settings), tmp_path / "plain")
    for name, first, then in (("off", True, False), ("on", False, True)):
        interrupt(STEPS + 2)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(settings | {"train.compile": first}), tmp_path / name)
        results = train(tiny_config(settings | {"train.compile": then}), tmp_path / name)
        assert results["detection"]["AP"] == pytest.approx(plain["detection"]["AP"], abs=0.02)
        one, two = (load_checkpoint(tmp_path / run / "checkpoints" / "last.pt") for run in ("plain", name))
        for weights in ("model", "average"):
            assert one[weights].keys() == two[weights].keys()
    assert len(compiled) == 4  # weights and their average, in two runs


def test_a_machine_without_a_compiler_is_named_first(tmp_path, monkeypatch, tiny_config):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"train\.compile: .*g\+\+"):
        train(tiny_config({"train.compile": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"train\.compile: .*anneal"):
        tiny_config({"train.compile": True, "model.attention": {"decoder_cross": "entmax", "anneal": {"epochs": 1}}})


def test_a_finished_run_and_other_settings_are_refused(tmp_path, interrupt, tiny_config):
    interrupt(STEPS)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), tmp_path)
    with pytest.raises(RunError, match=r"train.lr was 0.001, now 0.0005"):
        train(tiny_config({"train.lr": 5e-4}), tmp_path)
    train(tiny_config({"train.log_every": 3, "data.cache": True}), tmp_path)  # of no consequence for the result
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(RunError, match="is finished and is not overwritten"):
        train(tiny_config(), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_too_few_classes_are_refused_before_anything_is_written(tmp_path, tiny_config):
    with pytest.raises(ConfigError, match=r"num_classes 6 is too small: .*instances_train2017.json needs 7 \(largest"):
        train(tiny_config({"model.num_classes": 6}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    cfg = tiny_config({"model.num_classes": 5, "data.contiguous": True})
    with pytest.raises(ConfigError, match=r"model.num_classes 5 is too small.*needs 6$"):
        train(cfg, tmp_path / "run")


def test_workers_without_room_in_shared_memory_are_refused_before_data_are_read(tmp_path, monkeypatch, tiny_config):
    monkeypatch.setattr(batch, "SHARED", tmp_path)
    monkeypatch.setattr(batch.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
    monkeypatch.setattr(ready, "open_splits", None)
    for batch_size in ("train.batch_size", "evaluate.batch_size"):
        with pytest.raises(ConfigError, match=r"data\.workers: 2, but .* --shm-size"):
            train(tiny_config({"data.workers": 2, batch_size: 400}), tmp_path / "run")


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch, tiny_config):
    monkeypatch.setattr(training.Accelerator, "num_processes", 3)
    with pytest.raises(ConfigError, match=r"train.batch_size 8 is not a multiple of the 3 processes"):
        train(tiny_config(), tmp_path)


def test_a_checkpoint_of_another_architecture_is_named(tmp_path, interrupt, tiny_config):
    cfg = tiny_config()
    interrupt(STEPS)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, tmp_path)
    other = replace(cfg, {"model.hidden_dim": 16})
    save_config(other, tmp_path / "config.yaml")  # otherwise the other setting itself is refused
    with pytest.raises(RunError, match=r"last\.pt holds weights that do not fit this architecture: .*the model has \("):
        train(other, tmp_path)


def test_a_run_that_was_interrupted_is_measured_explained_and_gone_on_with(tmp_path, interrupt, tiny_config, caplog):
    cfg = tiny_config({"train.epochs": 2})
    interrupt(STEPS + 2)  # within the second epoch
    with pytest.raises(KeyboardInterrupt):
        train(cfg, tmp_path)
    assert not is_finished(tmp_path) and "circle" in class_names(tmp_path).values()
    with pytest.raises(RunError, match=r"detrlib evaluate .* --checkpoint best"):
        load_results(tmp_path)
    assert predict(tmp_path, np.zeros((64, 64, 3), np.uint8), min_score=0)[0].classes == class_names(tmp_path)
    assert "unfinished" in caplog.text and "epoch 1 of 2" in caplog.text
    results = evaluate_run(tmp_path, "best")
    assert results["unfinished"] == "epoch 1 of 2" and load_results(tmp_path) == results
    assert "unfinished: epoch 1 of 2" in looking_at([tmp_path])
    assert not faithfulness_run(tmp_path, 2, ["box", "random"], 2, min_score=0).empty
    assert set(intervene_run(tmp_path, plan(tmp_path, transforms=["softmax"]), 2)["kind"]) == {"none", "transform"}
    assert ValidationImages(tmp_path)[next(iter(ValidationImages(tmp_path)))].sites
    assert "unfinished" not in train(cfg, tmp_path) and is_finished(tmp_path)
    (tmp_path / "results.json").unlink()  # as is said to whom it is damaged
    assert "unfinished" not in evaluate_run(tmp_path)
    with pytest.raises(RunError, match="is finished"):
        train(cfg, tmp_path)
