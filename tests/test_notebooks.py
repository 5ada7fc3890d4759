"""Every notebook from its first to its last cell, the checks on parameters, and sweeps of runs."""

import json
import re
import shutil

import nbformat
import pytest
from typer.testing import CliRunner

from detrlib import __main__ as commands
from detrlib.config import PROJECT, load_config, replace, save_config
from detrlib.engine import notebooks
from detrlib.engine.notebooks import execute_notebook, find_notebook, is_executed
from detrlib.figures import thesis
from detrlib.files import write_json
from detrlib.runs.folder import load_results

NOTEBOOKS = sorted(path.stem for path in notebooks.NOTEBOOKS.glob("*.ipynb"))


# --- every notebook --------------------------------------------------------------------------------------------


class TinyRun:
    """One run that the notebooks share: trained by 05, evaluated by 06, whichever test comes first."""

    def __init__(self, folder, settings):
        self.folder, self.name = folder, str(folder / "run")
        self.config = folder / "tiny.yaml"
        save_config(settings, self.config)

    def parameters(self, notebook):
        """Small parameters of a notebook."""
        run, runs = {"run_name": self.name}, {"run_names": [self.name]}
        small = {
            "01_data_exploration": {},
            "03_attention_transforms": {},
            "02_detr_walkthrough": {},
            "04_deformable_and_sparse": {
                "run_name": str(self.folder / "absent"),  # images are learned by heart where there is no such run
                "updates": 4,
                "config": "papermill_runs/configs/shapes-sparse.yaml",
                "overrides": {"data.shapes.train": 32, "data.shapes.val": 13},
                "batch": 4,
                "timed_size": [160, 160],
                "timed_ratios": [0.1, 1.0],
                "repeats": 1,
            },
            "05_measures": {"updates": 20},
            "06_train": run | {"config": str(self.config), "overrides": {"train.epochs": 1}, "gpus": 0},
            "07_evaluate": run
            | {"num_examples": 1, "untrained": True, "explained_images": 2, "explained_by": ["raw", "odam", "box"]}
            | {"alphas": [1, 2], "swaps": ["softmax"], "prune_heads": True, "intervention_images": 2}
            | {"sinks_away": ["masked"], "ablated": ["queries", "layers", "sites", "feedforward"]},
            "08_attention_maps": runs | {"sites": ["decoder_cross", "decoder_self", "encoder_self"]},
            "09_thesis_figures": {"run_names": self.study(), "output": str(self.folder / "figures"), "resamples": 50},
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

    def study(self):
        """The names of copies of the run: two groups of two seeds each, whose AP differ a little."""
        names = [f"{group}-seed{seed}" for group in ("first", "second") for seed in (1, 2)]
        for number, name in enumerate(names if (self.folder / "run" / "results.json").exists() else []):
            folder = self.folder / name
            if not folder.exists():
                shutil.copytree(self.folder / "run", folder)
                save_config(
                    replace(load_config(folder / "config.yaml"), {"train.seed": number % 2}), folder / "config.yaml"
                )
                results = load_results(folder)
                results["detection"]["AP"] += 0.01 * number
                write_json(folder / "results.json", results)
        return [str(self.folder / name) for name in names]

    def execute(self, notebook):
        """Execute a notebook once, and those that it needs before it."""
        output = self.folder / f"{notebook}.ipynb"
        if not is_executed(output):
            for needed in {"07": ["06_train"], "08": ["07_evaluate"], "09": ["07_evaluate"]}.get(notebook[:2], []):
                self.execute(needed)
            execute_notebook(notebook, output, self.parameters(notebook))
        return output


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_config):
    settings = tiny_config({"model.attention.decoder_cross": "alpha_entmax"})
    return TinyRun(tmp_path_factory.mktemp("notebooks"), settings)


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


from detrlib import __main__ as commands
from detrlib.config import PROJECT, load_config, replace, save_config
