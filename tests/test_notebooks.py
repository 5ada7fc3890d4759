"""Every notebook from its first to its last cell, the checks on parameters, and sweeps of runs."""

import base64
import io
import json
import subprocess
import sys

import nbformat
import pytest
import tiny
import yaml
from PIL import Image
from tiny import tiny_config

from detrlib.config import PROJECT, load_config, save_config
from detrlib.engine import notebooks
from detrlib.engine.notebooks import checked_parameters, execute_notebook, find_notebook, is_executed
from detrlib.errors import ConfigError, RunError
from detrlib.experiments import sweep
from detrlib.experiments.sweep import read_sweep

NOTEBOOKS = sorted(path.stem for path in notebooks.NOTEBOOKS.glob("*.ipynb"))


# --- every notebook --------------------------------------------------------------------------------------------


class TinyRun:
    """One run that the notebooks share: trained by 05, evaluated by 06, whichever test comes first."""

    def __init__(self, folder):
        self.folder, self.name = folder, str(folder / "run")
        self.config = folder / "tiny.yaml"
        save_config(tiny_config({"model.attention.decoder_cross": "alpha_entmax"}), self.config)

    def parameters(self, notebook):
        """Small parameters of a notebook."""
        run, runs = {"run_name": self.name}, {"run_names": [self.name]}
        small = {
            "01_data_exploration": {},
            "03_attention_transforms": {},
            "02_detr_walkthrough": {},
            "04_deformable_and_sparse": {
                "run_name": "",
                "config": "papermill_runs/configs/shapes-sparse.yaml",
                "overrides": {"data.shapes.train": 32, "data.shapes.val": 13},
                "batch": 4,
                "timed_size": [160, 160],
                "timed_ratios": [0.1, 1.0],
                "repeats": 1,
                "count_published": False,
            },
            "06_train": run | {"config": str(self.config), "overrides": {"train.epochs": 1}, "gpus": 0},
            "07_evaluate": run
            | {"num_examples": 1, "untrained": True}
            | {"alphas": [1, 2], "swaps": ["softmax"], "prune_heads": True, "intervention_images": 2},
            "08_attention_maps": runs,
            "09_thesis_figures": runs | {"output": str(self.folder / "figures")},
            "10_benchmarks": {
                "device": "cpu",
                "threads": 1,
                "shapes": {"decoder_cross": [1, 4, 10, 5, 6], "encoder": [1, 4, 30, 5, 6]},
                "repeats": 1,
                "time_limit": 0.5,
                "tvmax_maps": 4,
                "step_transforms": ["sparsemax", "alpha_entmax"],
                "step_backbone": "tiny",
                "step_image_size": 64,
                "step_batch": 1,
                "step_repeats": 1,
                "output_dir": str(self.folder / "benchmarks"),
            },
        }
        assert notebook in small, f"add small parameters for {notebook} to TinyRun.parameters in {__file__}"
        values = small[notebook]
        declared = notebooks._inspect(find_notebook(notebook))
        for name, value in {"config": str(self.config), "run_name": self.name}.items():
            if name in declared and name not in values:  # notebooks that show a data set or an untrained model
                values = values | {name: value}
        return values

    def execute(self, notebook):
        """Execute a notebook once, and those that it needs before it."""
        output = self.folder / f"{notebook}.ipynb"
        if not is_executed(output):
            for needed in {"06": ["06_train"], "07": ["07_evaluate"], "08": ["07_evaluate"]}.get(notebook[:2], []):
                self.execute(needed)
            execute_notebook(notebook, output, self.parameters(notebook))
        return output


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    return TinyRun(tmp_path_factory.mktemp("notebooks"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs_from_top_to_bottom(notebook, tiny_run):
    parameters = tiny_run.parameters(notebook)
    executed = nbformat.read(tiny_run.execute(notebook), as_version=4)
    tagged = {tag: cell for cell in executed.cells for tag in cell.metadata.get("tags", [])}
    declared = {line.split(" = ")[0] for line in tagged["parameters"].source.splitlines() if " = " in line}
    assert set(parameters) <= declared
    if parameters:
        injected = {}
        exec(tagged["injected-parameters"].source, injected)
        assert {name: injected[name] for name in parameters} == parameters
    for cell in executed.cells:
        if cell.cell_type == "code":
            assert [o for o in cell.outputs if o.output_type == "error"] == [], cell.source
            assert "Traceback" not in str(cell.outputs), cell.source
            assert cell.execution_count or not cell.source, f"not executed: {cell.source}"


def test_the_shared_run_was_trained_and_evaluated(tiny_run):
    """What the notebooks write, and that the second does not depend on where it is started."""
    tiny_run.execute("07_evaluate")
    run_dir = tiny_run.folder / "run"
    assert load_config(run_dir / "config.yaml").train.epochs == 1
    results = json.loads((run_dir / "results.json").read_text())
    assert results["images"] == 13 and len(list((run_dir / "examples").glob("*.npz"))) == 2
    assert is_executed(tiny_run.folder / "07_evaluate.ipynb")


# --- parameters, failing cells ---------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a notebook of the given cells, the first of them its parameters."""
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)

    def write(name, parameters, *cells):
        book = nbformat.v4.new_notebook()
        book.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
        book.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *cells)]
        book.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(book, tmp_path / f"{name}.ipynb")
        return tmp_path / f"{name}.ipynb"

    return write


DECLARED = """run_name = "a"  # a name
learning_rate = 1e-4  # a float
epochs = 2  # an integer
sites = ["encoder_self"]  # a list
quick = True  # yes or no
overrides = {}  # a mapping
gpus = None  # anything
"""


@pytest.mark.parametrize(
    "name, given, wanted",
    [
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", "2", 2.0),
        ("learning_rate", 3, 3.0),
        ("epochs", "7", 7),
        ("sites", "[a, b]", ["a", "b"]),
        ("sites", ("a", "b"), ["a", "b"]),
        ("quick", "false", False),
        ("overrides", "{train.lr: 1e-4}", {"train.lr": 1e-4}),
        ("run_name", "007", "007"),
        ("run_name", PROJECT, str(PROJECT)),
        ("gpus", "0", 0),
        ("gpus", "null", None),
        ("gpus", 2, 2),
        ("epochs", None, None),
    ],
)
def test_text_becomes_the_declared_type(write, name, given, wanted):
    value = checked_parameters(write("book", DECLARED), {name: given})[name]
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("run_nam", "a", r"book.ipynb: unknown parameter 'run_nam'; did you mean 'run_name'\?"),
        ("xyz", 1, "unknown parameter 'xyz'; it declares run_name, learning_rate, epochs"),
        ("epochs", "many", "parameter 'epochs' is 'many', expected int such as 2"),
        ("epochs", 1.5, "parameter 'epochs' is 1.5, expected int"),
        ("epochs", True, "parameter 'epochs' is True, expected int"),
        ("learning_rate", True, "parameter 'learning_rate' is True, expected float"),
        ("quick", 1, "parameter 'quick' is 1, expected bool such as True"),
        ("run_name", 7, "parameter 'run_name' is 7, expected str"),
        ("sites", "encoder_self", "parameter 'sites' is 'encoder_self', expected list"),
        ("overrides", "{a: ", "parameter 'overrides': '{a: ' is not valid YAML"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(write, tmp_path, name, given, message):
    write("book", DECLARED)
    with pytest.raises(RunError, match=message):
        execute_notebook("book", tmp_path / "out" / "book.ipynb", {name: given})
    assert not (tmp_path / "out").exists()


def test_a_notebook_that_is_not_there():
    with pytest.raises(RunError, match=r"no notebook .*05_trian.ipynb; did you mean 06_train\?"):
        find_notebook("05_trian")
    assert find_notebook("07_evaluate.ipynb") == PROJECT / "notebooks" / "07_evaluate.ipynb"


def test_a_failing_cell_is_named_and_the_executed_copy_kept(write, tmp_path):
    write("book", "n = 1", "n + 1", "1 / (n - 3)", "'never'")
    output = tmp_path / "out" / "book.ipynb"
    assert not is_executed(output)
    with pytest.raises(RunError) as caught:
        execute_notebook("book", output, {"n": 3})
    # The cell's number is that of the executed copy, injected parameters included.
    assert str(caught.value) == (
        f"book.ipynb: cell 4 failed: ZeroDivisionError: division by zero (executed copy: {output})"
    )
    cells = {cell.source: cell for cell in nbformat.read(output, as_version=4).cells}
    assert cells["n + 1"].outputs[0].data["text/plain"] == "4"
    assert cells["1 / (n - 3)"].outputs[0].ename == "ZeroDivisionError" and not cells["'never'"].outputs
    assert not is_executed(output)
    assert is_executed(execute_notebook("book", output, {"n": 4}))


def test_a_kernel_that_dies_is_an_error(write, tmp_path):
    write("book", "n = 1", "import os; os._exit(1)")
    with pytest.raises(RunError, match=r"book\.ipynb: Kernel died"):
        execute_notebook("book", tmp_path / "out.ipynb", {})
    assert not is_executed(tmp_path / "out.ipynb")


def test_notebooks_run_from_the_project_root_and_from_the_terminal(write, tmp_path, monkeypatch, capsys):
    write("book", "n = 1", "import os; print(os.getcwd(), n)")
    output = tmp_path / "out.ipynb"
    monkeypatch.setattr(sys, "argv", ["notebooks", "book", str(output), "-p", "n", "5"])
    notebooks.main()
    assert nbformat.read(output, as_version=4).cells[-1].outputs[0].text == f"{PROJECT} 5\n"
    monkeypatch.setattr(sys, "argv", ["notebooks", "book", str(output), "-p", "m", "5"])
    with pytest.raises(SystemExit, match=r"error: book\.ipynb: unknown parameter 'm'"):
        notebooks.main()


def test_pictures_shrink_and_stay_pictures(write, tmp_path):
    code = "import numpy as np\nfrom PIL import Image\n"
    write("book", "n = 1", code + "Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8))")
    path = execute_notebook("book", tmp_path / "book.ipynb", {})

    def picture():
        outputs = json.loads(path.read_text())["cells"][-1]["outputs"]
        return base64.b64decode(outputs[0]["data"]["image/png"])

    before = picture()
    notebooks.shrink_pictures(path)
    assert len(picture()) < len(before) / 2 and is_executed(path)
    assert Image.open(io.BytesIO(picture())).size == (80, 80)


# --- sweeps ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep_file(tmp_path):
    """A sweep of three tiny runs; values may be changed."""
    save_config(tiny_config(), tmp_path / "base.yaml")

    def write(**changes):
        runs = {"one": None, "two": {"train.epochs": 3}, "three": {"train.seed": 3}}
        values = {"base": "base.yaml", "overrides": {"train.epochs": 1, "train.lr": 5e-4}, "runs": runs} | changes
        path = tmp_path / "many.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
        return path

    return write


def test_a_sweep_is_a_config_for_every_run(sweep_file):
    configs, measure = read_sweep(sweep_file())
    assert measure == {} and set(configs) == {"one", "two", "three"}
    assert [configs[name].train.epochs for name in ("one", "two", "three")] == [1, 3, 1]
    assert configs["three"].train.seed == 3 and configs["two"].train.lr == 5e-4
    assert configs["one"].model.hidden_dim == tiny.SETTINGS["model.hidden_dim"]


def test_a_sweep_over_seeds_repeats_every_run(sweep_file):
    configs, measure = read_sweep(sweep_file(seeds=[4, 5], measure={"num_examples": 2}))
    assert set(configs) == {f"{name}-seed{seed}" for name in ("one", "two", "three") for seed in (4, 5)}
    assert [cfg.train.seed for cfg in configs.values()] == [4, 4, 4, 5, 5, 5]
    assert configs["two-seed5"].train.epochs == 3
    assert measure == {"num_examples": 2}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": "3"}, r"many.yaml: seeds is '3', expected whole numbers"),
        ({"measure": {"num_example": 2}}, r"many.yaml: measure: .*'num_example'; did you mean 'num_examples'"),
        ({"base": None}, "many.yaml: 'base' or 'runs' is missing; a sweep has base"),
        ({"runs": None}, "'base' or 'runs' is missing"),
        ({"runs": ["one"]}, "'base' or 'runs' is missing"),
        ({"override": {}}, "many.yaml: unknown override; a sweep has base, runs"),
        ({"base": "bass.yaml"}, r"no such config file; did you mean base.yaml\?"),
        ({"runs": {"one": {"train.epoch": 3}}}, r"unknown setting 'train.epoch'; did you mean 'train.epochs'\?"),
    ],
)
def test_a_sweep_file_that_is_none(sweep_file, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_sweep(sweep_file(**changes))


@pytest.fixture
def stand_ins(monkeypatch, write, tmp_path):
    """Runs that take no time: a run called "two" fails as long as the file "broken" exists."""
    executed = []
    write("book", "n = 1")
    execute_notebook("book", tmp_path / "done.ipynb", {})
    code = """
import pathlib, shutil, sys
folder, place = map(pathlib.Path, sys.argv[1:])
print("training", folder.name, flush=True)
if folder.name == "two" and (place / "broken").exists():
    (folder / "07_evaluate.ipynb").write_text('{"metadata": {}, "cells": [{"metadata": {}, "source": "1"}]}')
    raise SystemExit("error: 07_evaluate.ipynb: cell 2 failed")
shutil.copy(place / "done.ipynb", folder / "07_evaluate.ipynb")
"""
    real = subprocess.Popen

    def popen(command, **options):
        assert command[1:4] == ["-m", "detrlib.experiments.sweep", "--one"]
        executed.append(command[4].rsplit("/", 1)[1])
        return real([sys.executable, "-c", code, command[4], str(tmp_path)], **options)

    def draw(name, output, parameters):
        executed.append((name, parameters))
        output.write_text('{"cells": []}')

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    monkeypatch.setattr(sweep, "execute_notebook", draw)
    monkeypatch.setattr(sweep, "report_html", lambda notebook, output, title: (output.write_text(title), output)[1])
    return executed


def test_a_failing_run_is_reported_with_its_log_and_the_others_finish(sweep_file, stand_ins, tmp_path, capsys):
    path, folder = sweep_file(), tmp_path / "many"
    (tmp_path / "broken").touch()
    with pytest.raises(RunError) as caught:
        sweep.sweep(path, folder, parallel=2)
    assert str(caught.value) == (
        f"1 of 3 runs failed: {folder}/two/log.txt: error: 07_evaluate.ipynb: cell 2 failed. Call again to retry them."
    )
    assert sorted(stand_ins) == ["one", "three", "two"]
    assert [is_executed(folder / name / "07_evaluate.ipynb") for name in ("one", "two", "three")] == [True, False, True]
    assert load_config(folder / "two" / "sweep.yaml").train.epochs == 3

    stand_ins.clear()
    (tmp_path / "broken").unlink()
    assert sweep.sweep(path, folder, parallel=2) == folder / "report.html"
    names = [str(folder / name) for name in read_sweep(path).configs]
    assert stand_ins == [
        "two",
        ("08_attention_maps", {"run_names": names}),
        ("09_thesis_figures", {"run_names": names, "output": str(folder / "figures")}),
    ]

    stand_ins.clear()
    capsys.readouterr()
    assert sweep.sweep(path, folder) == folder / "report.html"
    assert stand_ins == [] and f"all 3 runs are done: {folder / 'report.html'}" in capsys.readouterr().out


def test_an_interrupted_notebook_does_not_count_as_executed(write, tmp_path, monkeypatch):
    write("book", "n = 1")
    output = execute_notebook("book", tmp_path / "out.ipynb", {})

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks.papermill, "execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute_notebook("book", output, {})
    assert not is_executed(output)


def test_one_run_of_a_sweep_skips_training_that_is_done(stand_ins, tmp_path):
    sweep.run_one(tmp_path)
    assert stand_ins == [
        ("06_train", {"config": str(tmp_path / "sweep.yaml"), "run_name": str(tmp_path), "gpus": None}),
        ("07_evaluate", {"run_name": str(tmp_path)}),
    ]
    stand_ins.clear()
    (tmp_path / "results.json").write_text("{}")
    sweep.run_one(tmp_path)
    assert [name for name, _ in stand_ins] == ["07_evaluate"]


def test_runs_below_papermill_runs_go_by_their_names():
    assert sweep._run_name(sweep.runs.RUNS / "many" / "one") == "many/one"
