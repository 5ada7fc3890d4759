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
    """One run that the notebooks share: trained by 06, evaluated by 07, whichever test comes first."""

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


@pytest.mark.slow
def test_all_figures_and_tables_are_in_a_document_that_compiles_within_its_margins(tiny_run, compiled):
    tiny_run.execute("09_thesis_figures")
    folder = tiny_run.folder / "figures"
    document = (folder / thesis.DOCUMENT).read_text()
    for path in [*folder.glob("*.pdf"), *folder.glob("*.tex")]:
        assert path.name == thesis.DOCUMENT or f"{{{path.name}}}" in document
    captions = re.findall(r"\\caption\{(.*)\}", document)
    assert len(captions) == len(list(folder.glob("*.pdf"))) and all(len(caption) > 20 for caption in captions)
    log = compiled(folder / thesis.DOCUMENT)
    assert [float(points) for points in re.findall(r"Overfull .hbox \(([\d.]+)pt", log) if float(points) > 2] == []
    assert "undefined" not in log


def test_the_command_for_figures_says_what_is_missing_before_anything_runs(tmp_path, monkeypatch):
    executed, run_dir, unfinished, out = [], tmp_path / "run", tmp_path / "unfinished", tmp_path / "new"
    run_dir.mkdir()
    unfinished.mkdir()
    write_json(run_dir / "results.json", {})

    def execute(*given, **named):
        executed.append(given)
        (out / thesis.DOCUMENT).write_text(f"{thesis.LEFT_OUT}fig:alpha_sweep (no interventions)\n")

    def detrlib(*words):
        done = CliRunner().invoke(commands.app, ["figures", *map(str, words)])
        assert done.exit_code == int(done.output.startswith("error: ")), done.output
        return done.output

    monkeypatch.setattr("papermill.execute_notebook", execute)
    assert f"no run {tmp_path / 'none'}" in detrlib(run_dir, tmp_path / "none", "--out", out)
    assert f"{unfinished} has no results.json" in detrlib(run_dir, unfinished, "--out", out)
    assert "/proc/none" in detrlib(run_dir, "--out", "/proc/none")
    assert "--out" in detrlib(run_dir, "--out", run_dir / "results.json")
    assert "-p output" in detrlib(run_dir, "--out", out, "-p", "output=there")
    assert "'resample'" in detrlib(run_dir, "--out", out, "-p", "resample=5")
    assert executed == [] and not out.exists()
    shown = detrlib(run_dir, "--out", out, "-p", "resamples=50").splitlines()
    assert shown == ["nothing to show: fig:alpha_sweep (no interventions)", str(out / thesis.DOCUMENT)]
    source, copy = find_notebook("thesis_figures"), out / "09_thesis_figures.ipynb"
    assert executed == [(source, copy, {"resamples": 50, "run_names": [str(run_dir)], "output": str(out)})]


# --- the course as pages ---------------------------------------------------------------------------------------

FORMULA = r"Half: $\frac{1}{2}$." + "\n\n" + r"$$p_j = \big(e^{z_j}\big)\,\Big[\bigl\{1\bigr\}\Big], \dots$$"
FIGURE = "%matplotlib inline\nfrom detrlib.figures.statistics import spread\nimport pandas as pd\n"
FIGURE += "spread(pd.DataFrame({'group': ['a', 'b'], 'AP': [0.1, 0.2]}), ['AP'])"


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """From the text of a first and a second notebook to the folder of their pages, made as `make course` does."""
    pytest.importorskip("myst_nb", reason="needs the extra course, which `make course` installs")
    build = pytest.importorskip("sphinx.cmd.build").build_main
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)

    def make(**cells):
        source = tmp_path / "source"
        for name, (text, code) in cells.items():
            made = [nbformat.v4.new_markdown_cell(f"# {name}\n\n{text}"), nbformat.v4.new_code_cell(code)]
            nbformat.write(nbformat.v4.new_notebook(cells=made), tmp_path / f"{name}.ipynb")
            execute_notebook(name, source / f"{name}.ipynb", {})
        (source / "index.md").write_text("# Start\n\n```{toctree}\n" + "\n".join(cells) + "\n```\n")
        arguments = ["-q", "-W", "-c", str(PROJECT / "notebooks"), str(source), str(source / "html")]
        assert [build(arguments), build(["-E", *arguments])] == [0, 0]  # again, beside what the first time left
        return source / "html"

    return make


def test_pages_have_formulas_pictures_folds_search_and_an_order_without_network(pages):
    folded = "<details><summary>Solution</summary>\n\n```python\nx = 1\n```\n</details>"
    made = pages(first=(f"{FORMULA}\n\n{folded}", FIGURE), second=("Needle", "1 + 1"))
    first, second = ((made / f"{name}.html").read_text() for name in ("first", "second"))
    assert first.count("<math") == 2 and "<mfrac>" in first and "$" not in re.sub(r"<pre>.*?</pre>", "", first)
    (alternative,) = re.findall(r'<img alt="([^"]*)"\s+src="_images', first)
    assert "one dot per seed" in alternative and "AP" in alternative
    assert re.search(r"<details><summary>Solution</summary>.*?x.*?</details>", first, re.DOTALL)
    assert 'rel="next" title="second" href="second.html"' in first and "first.html" in second
    assert "needl" in (made / "searchindex.js").read_text()
    loaded = [
        link for page in (first, second) for link in re.findall(r'<(?:link|script|img)[^>]*(?:src|href)="([^"]*)', page)
    ]
    assert '<pre tabindex="0">' in first  # what scrolls is in reach of the keyboard
    assert loaded and not [link for link in loaded if link.startswith(("http", "//"))]


def test_formulas_say_what_tex_says(pages):
    """Of two digits TeX takes one as the numerator; a star puts the set below the name; bars in pairs are brackets."""
    tex = r"$$\operatorname*{argmin}_{p \in S} \tfrac12 \lVert p \rVert^2 + \lvert x \rvert$$"
    page = re.sub(r"\s+", "", (pages(first=(tex, "1")) / "first.html").read_text())
    (formula,) = re.findall("<math.*?</math>", page)
    assert "<mn>1</mn><mn>2</mn></mfrac>" in formula and '<munder><mrow><mimathvariant="normal">argmin</mi>' in formula
    assert "*" not in formula
    for bar, inside in ("‖p", "|x"):
        assert f"<mrow><mo>{bar}</mo><mi>{inside}</mi><mo>{bar}</mo></mrow>" in formula


def test_a_formula_that_cannot_be_drawn_stops_the_site_and_is_named(pages, capsys):
    with pytest.raises(AssertionError):
        pages(first=(r"$\nosuchcommand{1}$", "1"))
    assert "nosuchcommand" in capsys.readouterr().err
