"""The command line: every command from its words to what it shows and writes, and faults in one line each."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from typer.testing import CliRunner

from detrlib import __main__ as commands
from detrlib import benchmarks
from detrlib.checkpoints.files import export_official
from detrlib.commands import values_in
from detrlib.config import PROJECT, load_config, replace, save_config
from detrlib.data import build_dataset
from detrlib.data.shapes import shapes_folder
from detrlib.engine import launch as door
from detrlib.engine import notebooks
from detrlib.engine.loop import train
from detrlib.errors import ConfigError, DetrlibError
from detrlib.experiments import cluster
from detrlib.experiments import sweep as sweeps
from detrlib.runs.results import interventions_frame


def detrlib(*words):
    """What a command shows, in this process."""
    done = CliRunner().invoke(commands.app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def refused(*words, code=1):
    """The line in which a command ends that cannot be done."""
    done = CliRunner().invoke(commands.app, [*map(str, words)])
    assert isinstance(done.exception, SystemExit) and done.exit_code == code, done.output or repr(done.exception)
    (line,) = [line for line in done.output.splitlines() if line.lower().startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "door",
    [
        ["train", "papermill_runs/configs/shapes.yaml", "--name"],
        *(["evaluate"], ["explain"], ["intervene"]),
        ["import", "detr-r50", "--as"],
        ["sweep", "papermill_runs/configs/quickstart.yaml", "--name"],
    ],
    ids=lambda door: door[0],
)
def test_no_door_takes_a_name_that_is_none(door):
    for name in ("", "..", "a\nb", "x" * 300, "configs", "README.md"):
        assert "names no run" in refused(*door, name), name


def test_models_of_a_name_that_nothing_has_are_one_line(tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (9, 9)).save(picture)
    for name in ("x" * 300, "a\nb", "../none"):
        for words in (["predict", name, picture], ["export", name, tmp_path / "out.safetensors"]):
            assert name[:7].replace("\n", r"\n") in refused(*words)


def in_a_process(*words):
    return subprocess.run(
        [sys.executable, "-m", "detrlib", *map(str, words)],
        cwd=PROJECT,
        env=dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def config(tmp_path, tiny_config):
    save_config(tiny_config(), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config):
    """A finished run with learned alphas."""
    folder = tmp_path_factory.mktemp("runs") / "alpha_entmax-run"
    train(tiny_config({"model.attention.decoder_cross": "alpha_entmax", "train.epochs": 1}), folder)
    return folder


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of it that may be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


# --- train -----------------------------------------------------------------------------------------------------


def test_from_the_terminal_to_the_end(tmp_path, config, metrics_without_times):
    run_dir = tmp_path / "nested" / "run"
    done = in_a_process("train", config, "--name", run_dir, "--set", "train.epochs=3", "train.lr=1e-4")
    assert done.returncode == 0, done.stderr
    said, lines = done.stdout, done.stdout.splitlines()
    order = [said.index(part) for part in ("data: ", "memory: ", "the floor: ", "updates in all", "epoch   1/3")]
    assert order == sorted(order)  # as the head of engine/loop.py has it
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line[:11] for line in epochs] == ["epoch   1/3", "epoch   2/3", "epoch   3/3"]
    assert all("loss" in line and "AP50" in line for line in epochs)
    assert [" left" in line for line in epochs] == [True, True, False]
    assert lines[-3].startswith("best epoch: ") and f"detrlib evaluate {run_dir} --checkpoint best" in lines[-3]
    assert lines[-2].startswith("AP 0.") and lines[-2].endswith(str(run_dir))
    assert lines[-1].endswith(f": {run_dir / 'viewer.html'}") and (run_dir / "viewer.html").stat().st_size > 10_000
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert metrics_without_times(run_dir)[0]["lr/rest"] == 1e-4
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]


def test_a_fault_in_a_process_is_one_line_and_a_code(tmp_path, config):
    done = in_a_process("train", config, "--name", tmp_path / "run", "--gpus", 2)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "--gpus 0" in line
    assert not (tmp_path / "run").exists()


def test_settings_that_are_none(tmp_path, config):
    name = ("--name", tmp_path / "run")
    for setting, words in {
        "train.epochs": "--set train.epochs",
        "train.epoch=3": "'train.epochs'",
        "train.epochs=many": "train.epochs",
        "train.epochs=[1": "YAML",
        f"data.root={tmp_path}/nowhere": f"{tmp_path}/nowhere",
    }.items():
        assert words in refused("train", config, *name, "--set", setting)
    assert "'train.epoch'" in refused("train", config, *name, "--set", "train.lr=1e-4", "train.epoch=3")
    assert "train.lr=1e-4" in refused("train", config, *name, "--set", "train.lr", "1e-4")
    assert "tiny.yaml" in refused("train", config.with_name("tony.yaml"), *name)
    assert "--name" in refused("train", config, code=2)
    assert "sweep" in refused("train", "papermill_runs/configs/quickstart.yaml", *name)
    assert not (tmp_path / "run").exists()


def test_pairs_follow_one_option_or_each_has_its_own():
    for words, meant in {
        "--set a=1 b=2 --name x": "--set a=1 --set b=2 --name x",
        "--set a=1 config.yaml --set b=-2 c=d=e": "--set a=1 config.yaml --set b=-2 --set c=d=e",
        "--map a=b c=d -p e=f g=h": "--map a=b --map c=d -p e=f -p g=h",
        "--name a=b c=d": "--name a=b c=d",
    }.items():
        assert commands.repeated(words.split()) == meant.split()
    with pytest.raises(ConfigError, match="-p run_name=first"):
        commands.repeated(["-p", "run_name", "first"])


def test_runs_that_cannot_be_written(tmp_path, config, trained):
    assert str(trained) in refused("train", config, "--name", trained)  # finished
    assert "tiny.yaml" in refused("train", config, "--name", config)
    assert "names no run" in refused("train", config, "--name", "")
    assert "/proc/run cannot be written" in refused("train", config, "--name", "/proc/run")


def test_an_interrupt_ends_a_command_quietly(tmp_path, config, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(door, "launch", interrupted)
    done = CliRunner().invoke(commands.app, ["train", str(config), "--name", str(tmp_path / "run")])
    assert done.exit_code == 130 and "interrupted" in done.output


def test_the_loop_under_torchrun_speaks_in_one_line_too(tmp_path):
    words = ["-m", "detrlib.engine.loop", str(tmp_path / "none")]
    done = subprocess.run([sys.executable, *words], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(door.FAULT) and "config.yaml" in line


# --- what needs a finished run ---------------------------------------------------------------------------------


def test_evaluate(run_dir):
    shown = detrlib("evaluate", run_dir, "--checkpoint", "untrained", "--set", "evaluate.paibb=thesis")
    assert shown.startswith("AP ") and "AR_100" in shown and "AP_large –" in shown  # 64 pixels: none is large
    results = json.loads((run_dir / "untrained" / "results.json").read_text())
    assert results["evaluate"]["paibb"] == "thesis" and results["epoch"] == 0
    assert f"browser: {run_dir / 'untrained' / 'viewer.html'}" in shown
    detrlib("evaluate", run_dir, "--split", "train2017")
    assert json.loads((run_dir / "train2017" / "results.json").read_text())["images"] == 32


def test_evaluate_on_other_data(run_dir, tmp_path):
    """The run's own pictures, with other names for some of its classes."""
    data = load_config(run_dir / "config.yaml").data
    folder = build_dataset(data, "val").annotations_path.parents[1]
    content = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    for category in content["categories"][:2]:
        category["name"] = f"their {category['name']}"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    (tmp_path / "val2017").symlink_to(folder / "val2017")
    first, second = (category["name"] for category in content["categories"][:2])
    words = ["evaluate", run_dir, "--on", tmp_path, "--as", "elsewhere", "--map", f"{first}={first.split()[1]}"]
    shown = detrlib(*words, "--map", f"{second}=")
    assert f"{first} = {first.split()[1]}" in shown and second in shown
    assert (run_dir / "elsewhere" / "results.json").exists()
    assert "--map disc" in refused(*words, "--map", "disc")


@pytest.fixture
def photos(tmp_path):
    """Two pictures, one of them under a name that is markup."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "<img src=x onerror=alert(1)>.png"):
        Image.effect_noise((90, 50), 60).save(folder / name)
    return folder


def test_predict(run_dir, photos, tmp_path):
    out = tmp_path / "out"
    words = ["predict", run_dir, photos, "--score", 0.01, "--out", out]
    shown = detrlib(*words)
    assert shown.splitlines()[0].startswith("run: ") and shown.splitlines()[-1] == str(out / "index.html")
    assert len(list((out / "pictures").iterdir())) == 2 and not (out / "attention").exists()
    assert "<img src=x" not in (out / "index.html").read_text()
    shutil.copytree(run_dir, tmp_path / "other")
    detrlib(*words, tmp_path / "other", "--attention", "--head", 1, "--layer", 0, "--explain", "--limit", 1)
    predictions = json.loads((out / "other" / "predictions.json").read_text())
    assert predictions == json.loads((out / "run" / "predictions.json").read_text())
    assert {row["image_id"] for row in predictions} == {1}
    assert len(list((out / "attention").iterdir())) == 1 and len(list((out / "explanations").iterdir())) == 2
    assert "explanation: relevance" in (out / "index.html").read_text()


def test_predict_leaves_out_what_cannot_be_read_and_says_so(run_dir, photos, tmp_path):
    (photos / "text.jpg").write_text("no picture")
    content = (photos / "a.png").read_bytes()
    (photos / "cut.png").write_bytes(content[: len(content) // 2])
    line = refused("predict", run_dir, photos, "--out", tmp_path / "out")
    assert "text.jpg" in line and "cut.png" in line
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    assert "text.jpg" in refused("predict", run_dir, photos / "text.jpg", "--out", tmp_path / "none")
    assert "cut.png" in refused("predict", run_dir, photos / "cut.png", "--out", tmp_path / "none")
    assert not (tmp_path / "none" / "index.html").exists()


def test_predictions_that_cannot_be_made(run_dir, photos, tmp_path):
    out = ["--out", tmp_path / "out"]
    picture = photos / "a.png"
    for words, named in (
        (["no-such-run", picture], "no-such-run"),
        ([run_dir, photos / "absent.jpg"], "absent.jpg"),
        ([run_dir, f"{photos}/*.gif"], "*.gif"),
        ([run_dir], "no pictures"),
        ([picture], "no model"),
        ([run_dir, ""], "empty text"),
        ([run_dir, picture, "--device", "cuda:99"], "cuda:99"),
        ([run_dir, picture, "--checkpoint", "epoch-0099"], "epoch-0099"),
        ([run_dir, picture, "--layer", 7], "no layer 7"),
        ([run_dir, picture, "--head", 7], "no head 7"),
        ([run_dir, picture, "--head", "first"], "--head first"),
    ):
        assert named in refused("predict", *words, *out)
    assert "a.png is a file" in refused("predict", run_dir, picture, "--out", picture)
    assert not (tmp_path / "out").exists()


def test_explain(run_dir):
    words = ["explain", run_dir, "--images", 3, "--steps", 3, "--min-score", 0]
    assert "insertion low" in detrlib(*words, "--methods", "raw,odam,drise,random", "--masks", 4)
    frame = pd.read_parquet(run_dir / "measures" / "faithfulness.parquet")
    assert set(frame["method"]) == {"raw", "odam", "drise", "random"} and frame["image_id"].nunique() == 3
    assert "nonsense" in refused(*words, "--methods", "nonsense")


def test_intervene(run_dir):
    words = ["intervene", run_dir, "--images", 4]
    shown = detrlib(
        *(*words, "--alphas", "1", "--transforms", "sparsemax"),
        *("--learned-alphas", "--prune-heads", "--order-images", 4, "--sinks", "masked,zeroed"),
        *("--ablate", "single_queries,feedforward"),
    )
    stored = interventions_frame([run_dir])
    assert stored["kind"].value_counts().to_dict() == {
        **{"none": 1, "alpha": 1, "transform": 1},
        **{"learned_alpha": 2, "head": 8, "heads": 8, "sink": 6, "query": 10, "feedforward": 3},
    }
    assert "shuffled" in shown and len(shown.splitlines()) == 1 + len(stored)
    assert set(stored["trained"]) == {"alpha_entmax"} and 1 < stored["trained_alpha"].iloc[0] < 2
    assert "alpha 3" in refused(*words, "--alphas", "1,3")
    assert "--alphas" in refused(*words, "--alphas", "1 1.5")
    assert "nonsense" in refused(*words, "--transforms", "nonsense")
    assert "layers [9]" in refused(*words, "--alphas", "1", "--layer", 9)
    assert "feedforwards" in refused(*words, "--ablate", "layers,feedforwards")
    assert "hidden" in refused(*words, "--sinks", "hidden")


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


DAMAGES = {
    "missing": (shutil.rmtree, "config.yaml"),
    "results": (lambda folder: cut(folder / "results.json"), "results.json"),
    "results of another kind": (lambda folder: (folder / "results.json").write_text("[]"), "results.json"),
    "no settings": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml"),
    "settings": (lambda folder: (folder / "config.yaml").write_text("train: {epochs: ["), "config.yaml"),
    "checkpoint": (lambda folder: cut(folder / "checkpoints" / "last.pt"), "last.pt"),
    "no checkpoint": (lambda folder: (folder / "checkpoints" / "last.pt").unlink(), "best"),  # which is there
    "foreign checkpoint": (lambda folder: torch.save({"a": 1}, folder / "checkpoints" / "last.pt"), "last.pt"),
    "list for a checkpoint": (lambda folder: torch.save([1], folder / "checkpoints" / "last.pt"), "last.pt"),
}


@pytest.mark.parametrize("command", [("evaluate",), ("explain", "--images", 1), ("intervene", "--alphas", 1)])
@pytest.mark.parametrize(("damage", "name"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_named_whatever_the_command(run_dir, damage, name, command):
    damage(run_dir)
    assert name in refused(command[0], run_dir, *command[1:])


def test_weights_and_data_that_cannot_be_had(run_dir, monkeypatch, tmp_path):
    """Offline, as on the nodes of many clusters."""

    def offline(*arguments, **named):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("socket.create_connection", offline)
    monkeypatch.setattr("socket.getaddrinfo", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cfg = load_config(run_dir / "config.yaml")
    backbone = {"name": "resnet18", "weights": "imagenet"}
    for settings, words in (
        ({"model.backbone": backbone}, "resnet18"),
        ({"model.backbone": backbone | {"weights": "/nowhere.pt"}}, "/nowhere.pt"),
        ({"data.root": "/nowhere"}, "/nowhere"),
    ):
        save_config(replace(cfg, settings), run_dir / "config.yaml")
        assert words in refused("evaluate", run_dir, "--checkpoint", "untrained")


def test_a_damaged_table_of_interventions_is_named_before_anything_is_measured(run_dir):
    (run_dir / "measures" / "interventions.parquet").write_text("half a table")
    assert "interventions.parquet" in refused("intervene", run_dir, "--alphas", 1, "--images", 2)


# --- notebooks, sweeps, files ----------------------------------------------------------------------------------


def test_notebook(tmp_path, monkeypatch):
    executed = []
    monkeypatch.setattr("papermill.execute_notebook", lambda *given, **named: executed.append(given))
    output = tmp_path / "new" / "out.ipynb"
    assert detrlib("notebook", "evaluate", output, "-p", "run_name=007", "-p", "num_examples=5").strip() == str(output)
    assert executed == [(notebooks.find_notebook("evaluate"), output, {"run_name": "007", "num_examples": 5})]
    assert "06_train" in refused("notebook", "05_trian", output)
    assert "-p run_name" in refused("notebook", "evaluate", output, "-p", "run_name")
    assert "'run_nam'" in refused("notebook", "evaluate", output, "-p", "run_nam=a")
    assert "'num_examples'" in refused("notebook", "evaluate", output, "-p", "num_examples=many")
    assert "/proc" in refused("notebook", "evaluate", "/proc/none/out.ipynb")
    assert str(tmp_path) in refused("notebook", "evaluate", tmp_path)
    assert len(executed) == 1


def test_sweep(tmp_path, config, monkeypatch):
    asked = []
    monkeypatch.setattr(sweeps, "sweep", lambda *given: asked.append(given) or "report.html")
    assert detrlib("sweep", config, "--name", tmp_path / "many", "--parallel", 2) == "report.html\n"
    detrlib("sweep", config)
    assert asked == [(config, tmp_path / "many", 2), (config, None, None)]
    monkeypatch.undo()
    assert "tiny.yaml" in refused("sweep", config, "--name", tmp_path / "many")  # the settings of one run
    (tmp_path / "sweep.yaml").write_text("base: tiny.yaml\nruns: {one: 3}")
    assert "'one'" in refused("sweep", tmp_path / "sweep.yaml", "--name", tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_a_sweep_on_a_cluster(tmp_path, config, monkeypatch):
    asked, named = [], ("sweep", config, "--name", tmp_path / "many")
    for name, result in {"submit": "ab", "describe": "ab", "run_one": "a folder", "draw": "a folder"}.items():
        monkeypatch.setattr(cluster, name, lambda *given, result=result: asked.append(given) or result)
    assert detrlib(*named, "--slurm", "--time=1:00", "-p", "main", "--parallel", 2) == "a\nb\n"
    assert detrlib(*named, "--list") == "a\nb\n" and detrlib(*named, "--run", 3) == "a folder\n"
    assert detrlib("sweep", config, "--draw") == "a folder\n"
    given, options = (config, tmp_path / "many"), ["--time=1:00", "-p", "main"]
    assert asked == [(*given, options, 2), given, (config, 3, given[1]), (config, None)]
    assert "--time" in refused(*named, "--time=1:00") and "--run" in refused(*named, "--list", "--run", 1)


def test_in_a_job_a_finished_run_is_no_fault(tmp_path, config, monkeypatch):
    monkeypatch.setattr(cluster, "train_in_job", lambda *_: {"detection": {"AP": 0.25, "AP50": 0.5}})
    assert "0.250" in detrlib("train", config, "--name", tmp_path / "run", "--job")
    monkeypatch.setattr(cluster, "train_in_job", lambda *_: {})  # what was imported and never measured
    assert str(tmp_path / "run") in detrlib("train", config, "--name", tmp_path / "run", "--job")


def test_one_run_of_a_sweep(tmp_path, monkeypatch):
    worked_on = []
    monkeypatch.setattr(notebooks, "execute_asked", worked_on.append)
    detrlib("sweep-run", tmp_path)
    assert worked_on == [tmp_path]


def test_import(tmp_path, small):
    model = small(backbone={"name": "resnet18", "weights": "none"})
    torch.save({"model": export_official(model)}, tmp_path / "official.pth")
    shown = detrlib("import", tmp_path / "official.pth", "--set", "model.num_heads=4", "--as", tmp_path / "run")
    assert "detr, " in shown and "model.backbone.name: resnet18" in shown and "model.num_heads: 4" in shown
    assert (tmp_path / "run" / "config.yaml").exists()
    assert "absent.pth" in refused("import", tmp_path / "absent.pth")
    assert "there already" in refused(
        "import", tmp_path / "absent.pth", "--as", tmp_path / "run"
    )  # before it is fetched
    assert "names no run" in refused("import", tmp_path / "official.pth", "--as", "")


def test_unrel(tmp_path):
    """A photograph with a person, and a hat that COCO does not have."""
    objects = np.empty((2, 1), dtype=object)
    objects[0, 0] = {"category": "person", "box": np.array([[1, 2, 11, 12]])}
    objects[1, 0] = {"category": "hat", "box": np.array([[1, 2, 5, 5]])}
    none = np.empty((0, 1), dtype=object)
    photographs = np.empty((1, 1), dtype=object)
    photographs[0, 0] = {"filename": "7.png", "im_id": 7, "relationships": none, "objects": objects}
    savemat(tmp_path / "annotations.mat", {"annotations": photographs})
    Image.new("RGB", (60, 40)).save(tmp_path / "7.png")
    shown = detrlib("unrel", tmp_path / "annotations.mat", tmp_path, tmp_path / "unrel.json")
    assert f"{tmp_path / 'unrel.json'}: 1 images, 1 annotations of 1 classes" in shown and "hat 1" in shown
    assert "nowhere.mat" in refused("unrel", "nowhere.mat", tmp_path, tmp_path / "unrel.json")


def test_check(config, tmp_path):
    said = detrlib("check", config)
    assert "data: train 32 images" in said and "circle" in said and "fewer than 20" in said
    faulty = shutil.copytree(shapes_folder(load_config(config).data.shapes), tmp_path / "shapes")
    for number, split in enumerate(("train2017", "val2017")):
        path = sorted((faulty / split).iterdir())[number]
        path.write_bytes(path.read_bytes()[:200])
    line = refused("check", config, "--set", f"data.root={faulty}")
    assert "train and val" in line and str(faulty / "train2017") in line and str(faulty / "val2017") in line


def test_costs(config):
    shown = detrlib("costs", config, "--size", "64,96")
    assert len(shown.splitlines()) > 3 and "backbone" in shown
    for size in ("a,b", "1000000000,1000000000"):
        assert "--size" in refused("costs", config, "--size", size)
    own = detrlib("costs", config, "--set", "data.image_size=48", "--memory", "1")
    assert "of 48 x 64 pixels" in own.splitlines()[-1]
    *_, line = detrlib("costs", config, "--size", "64,96", "--memory", "1").splitlines()
    assert line.startswith("training: ") and "of 64 x 96 pixels" in line and "fit into 1 GiB" in line


def test_huggingface(huggingface_detector, tmp_path):
    huggingface_detector("detr").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 96}}')
    out = tmp_path / "out"
    Image.new("RGB", (90, 60)).save(tmp_path / "a.png")
    options = ["--pictures", tmp_path / "a.png", "--transforms", "softmax,tvmax", "--null-keys", "none,zero"]
    shown = detrlib("huggingface", tmp_path / "theirs", *options, "--out", out, "--sites", "encoder_self,decoder_self")
    assert sum(site in line for line in shown.splitlines() for site in ("encoder_self", "decoder_self")) == 2 + 2 + 2
    assert {path.suffix for path in out.iterdir()} == {".csv", ".json", ".md", ".tex", ".txt"}
    assert "nosuch" in refused("huggingface", "nosuch")
    assert "a file" in refused("huggingface", "--out", out / "huggingface.csv")
    assert "limit" in refused("huggingface", tmp_path / "theirs", *options, "--out", out, "--limit", 1)
    assert "--data" in refused("huggingface", tmp_path / "theirs", *options, "--data", tmp_path)


def test_a_benchmark_is_a_file_with_a_function_main(tmp_path, monkeypatch):
    assert "nonsense" in refused("benchmark", "nonsense")
    (tmp_path / "sums.py").write_text("def main(out):\n    (out / 'sums.json').write_text('2')\n")
    (tmp_path / "other.py").write_text("raise AssertionError\n")
    monkeypatch.setattr(benchmarks, "__path__", [str(tmp_path)])
    assert benchmarks.programs() == ["sums"]
    detrlib("benchmark", "sums", "--out", tmp_path)
    assert (tmp_path / "sums.json").read_text() == "2"
    assert "a file" in refused("benchmark", "sums", "--out", tmp_path / "sums.json")


def test_every_command_has_a_line_of_help():
    shown = detrlib("--help")
    names = "train evaluate predict explain intervene figures sweep notebook import unrel costs huggingface"
    for command in names.split():
        assert f"\n  {command} " in shown
        assert "Usage" in detrlib(command, "--help")
    assert "sweep-run" not in shown
    assert "nonsense" in refused("nonsense", code=2)


MEANINGLESS = (
    "predict r a.png --score nan; predict r a.png --score 2; explain r --min-score nan; explain r --steps 1000000000; "
    "explain r --steps 1; explain r --masks 1000000000; explain r --masks 0; costs c.yaml --memory nan; "
    "costs c.yaml --memory inf; huggingface --sharpen nan; huggingface --size 2000000000; sweep s.yaml --parallel -1; "
    "sweep s.yaml --parallel 0; train c.yaml --name r --processes 0"
)


@pytest.mark.parametrize("words", MEANINGLESS.split("; "))
def test_numbers_that_mean_nothing_are_refused_by_their_option(words):
    assert words.split()[-2] in refused(*words.split(), code=2)


def test_memory_that_is_short_is_one_line(config, tmp_path, monkeypatch):
    def short(*given, **named):
        raise RuntimeError("[enforce fail]\nDefaultCPUAllocator: you tried to allocate 256 bytes. Buy more")

    monkeypatch.setattr(door, "train", short)
    assert "256 bytes" in refused("train", config, "--name", tmp_path / "run")


def test_lists_between_commas():
    assert values_in("1,1.5, 2", "--alphas", float) == [1, 1.5, 2] and values_in(None, "--alphas") == []
    for text in ("1;2", "1,,2", ""):
        with pytest.raises(DetrlibError, match="--alphas"):
            values_in(text, "--alphas", float)
