"""Notebooks without anybody watching: what is refused before they run, and what is left when they fail."""

import base64
import errno
import io
import json
import re
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import psutil
import pytest
from PIL import Image

from detrlib.config import PROJECT, save_config
from detrlib.engine import notebooks
from detrlib.engine.notebooks import (
    checked_parameters,
    execute_notebook,
    find_executed,
    find_notebook,
    is_executed,
    report_html,
)
from detrlib.errors import STOPPED, RunError, Stopped
from detrlib.figures import tables
from detrlib.files import load_checkpoint, write_json


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
    with pytest.raises(RunError, match=r"05_trian.*06_train"):
        find_notebook("05_trian")


def test_a_notebook_goes_by_its_name_whatever_its_number(write, tmp_path):
    write("07_evaluate", "n = 1")
    for name in ("07_evaluate", "evaluate", "06_evaluate", "07_evaluate.ipynb", "notebooks/07_evaluate.ipynb"):
        assert find_notebook(name) == tmp_path / "07_evaluate.ipynb"
    old = tmp_path / "run" / "06_evaluate.ipynb"
    assert find_executed(tmp_path / "run", "evaluate") is None
    execute_notebook("06_evaluate", old, {})
    assert find_executed(tmp_path / "run", "evaluate") == find_executed(tmp_path / "run", "07_evaluate") == old
    old.write_text(old.read_text()[:50])
    assert find_executed(tmp_path / "run", "evaluate") is None


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


@pytest.mark.parametrize("name", ["", "book.ipynb", "out.html"])
def test_an_executed_copy_is_a_notebook_of_its_own(write, tmp_path, name):
    before = write("book", "n = 1").read_text()
    with pytest.raises(RunError, match=re.escape(str(tmp_path / name))):
        execute_notebook("book", tmp_path / name, {})
    assert (tmp_path / "book.ipynb").read_text() == before


def test_notebooks_run_from_the_project_root(write, tmp_path):
    write("book", "n = 1", "import os; print(os.getcwd(), n)")
    output = execute_notebook("book", tmp_path / "out.ipynb", {"n": "5"})
    assert nbformat.read(output, as_version=4).cells[-1].outputs[0].text == f"{PROJECT} 5\n"


def test_bars_of_progress_are_not_part_of_a_copy(write, tmp_path):
    bar = "from tqdm.notebook import tqdm\nfor _ in tqdm(range(2), leave=False): pass\nprint('done')"
    write("book", "n = 1", bar, "import ipywidgets; ipywidgets.IntSlider()")
    *_, first, second = nbformat.read(execute_notebook("book", tmp_path / "out.ipynb", {}), as_version=4).cells
    assert [output.output_type for output in first.outputs] == ["stream"] and len(second.outputs) == 1


def test_a_copy_shows_the_page_that_stands_beside_a_widget_and_keeps_no_states(write, tmp_path):
    shown = (
        "import ipywidgets\nclass Page(ipywidgets.IntSlider):\n    def _repr_mimebundle_(self, **kwargs):\n"
        "        return super()._repr_mimebundle_(**kwargs) | {'text/html': '<p>the page</p>'}\nPage()"
    )
    write("book", "n = 1", shown)
    path = execute_notebook("book", tmp_path / "out.ipynb", {})
    copy = nbformat.read(path, as_version=4)
    assert copy.cells[-1].outputs[0].data.keys() == {"text/html", "text/plain"} and "widgets" not in copy.metadata
    assert "<p>the page</p>" in notebooks.report_html(path, tmp_path / "report.html", "copy").read_text()


def test_pictures_shrink_and_stay_pictures(write, tmp_path):
    code = "import numpy as np\nfrom PIL import Image\n"
    write("book", "n = 1", code + "Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8))")
    path = execute_notebook("book", tmp_path / "out" / "book.ipynb", {})

    def picture():
        outputs = json.loads(path.read_text())["cells"][-1]["outputs"]
        return base64.b64decode(outputs[0]["data"]["image/png"])

    before = picture()
    notebooks.shrink_pictures(path)
    assert len(picture()) < len(before) / 2 and is_executed(path)
    assert Image.open(io.BytesIO(picture())).size == (80, 80)


def test_an_interrupted_notebook_does_not_count_as_executed(write, tmp_path, monkeypatch):
    write("book", "n = 1")
    output = execute_notebook("book", tmp_path / "out.ipynb", {})

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("papermill.execute_notebook", interrupted)
    with pytest.raises(Stopped):
        execute_notebook("book", output, {})
    assert not is_executed(output)


@pytest.mark.parametrize("fault", [None, RuntimeError("Kernel died")])
def test_a_signal_without_a_cell_to_interrupt_is_not_lost(write, tmp_path, monkeypatch, fault):
    """It comes after the last one, or reaches the kernel too; another child has ended that nobody has waited for."""
    write("book", "n = 1")

    def executed(*_, **__):
        with subprocess.Popen(["true"]) as child:
            while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)
        if fault:
            raise fault

    monkeypatch.setattr("papermill.execute_notebook", executed)
    with pytest.raises(Stopped, match="SIGTERM"):
        execute_notebook("book", tmp_path / "out.ipynb", {})


def test_half_a_copy_on_a_full_disk_is_one_line(write, tmp_path, monkeypatch):
    write("book", "n = 1")

    def half(source, output, *_, **__):
        output.write_text('{"cells": [')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("papermill.execute_notebook", half)
    with pytest.raises(RunError, match="No space left"):
        execute_notebook("book", tmp_path / "out.ipynb", {})
    assert not is_executed(tmp_path / "out.ipynb")


def test_notebooks_that_a_folder_asks_for_are_executed_in_it(write, tmp_path):
    """In the order given, without torch, for which a process that only waits would be waited for."""
    for name in ("06_first", "07_second"):
        write(name, "n = 1", "print(n)")
    run = tmp_path / "run"
    write_json(run / notebooks.ASKED, {"second": {"n": 3}, "first": {}})
    notebooks.execute_asked(run)
    assert is_executed(run / "06_first.ipynb") and is_executed(run / "07_second.ipynb")
    assert nbformat.read(run / "07_second.ipynb", as_version=4).cells[-1].outputs[0].text == "3\n"
    program = "import sys, detrlib.engine.notebooks; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert not {"torch", "pandas", "matplotlib"} & set(loaded.stdout.split())


HOSTILE = "<img src=x onerror=alert(1)></title><script>alert(2)</script>"


def test_a_report_shows_names_as_text(tmp_path):
    """Of classes, files and runs, wherever a notebook shows them: printed, in tables, and in the title."""
    table = pd.DataFrame({"class": [HOSTILE, HOSTILE], "AP": [0.5, 0.25]}).set_index("class")
    markdown = {"text/markdown": tables.markdown_table(table, {})}
    shown = [{"text/html": tables.shown(table.reset_index()).to_html()}, {"text/html": table.to_html()}, markdown]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    book.cells[0].outputs = [nbformat.v4.new_output("display_data", data) for data in shown]
    book.cells[0].outputs.append(nbformat.v4.new_output("stream", name="stdout", text=HOSTILE))
    nbformat.write(book, tmp_path / "book.ipynb")
    text = report_html(tmp_path / "book.ipynb", tmp_path / "report.html", HOSTILE).read_text()
    assert text.count("alert(2)") >= 5 and "<img src=x" not in text and "<script>alert" not in text


SAVES = """
import pathlib, signal, time
from detrlib.engine.children import saving_without_parent
from detrlib.errors import Stopped
came = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: came.append(number))
with saving_without_parent():
    pathlib.Path("{folder}/begun").touch()
    while not came:
        time.sleep(0.05)
    time.sleep(1.2)  # longer than ipykernel leaves a kernel whose parent is gone
    pathlib.Path("{folder}/saved").touch()
    raise Stopped("stopped at step 3")
"""
EXECUTES = """
import sys
from pathlib import Path
from detrlib.engine import notebooks
from detrlib.errors import Stopped
notebooks.NOTEBOOKS = Path(sys.argv[1])
try:
    notebooks.execute_notebook("book", Path(sys.argv[1]) / "out.ipynb", {})
except Stopped as stopped:
    raise SystemExit(f"code 75: {stopped}")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_cell_saves_before_the_kernel_leaves(write, tmp_path, number):
    write("book", "n = 1", SAVES.format(folder=tmp_path), f"open('{tmp_path}/next', 'w')")
    command = [sys.executable, "-c", EXECUTES, str(tmp_path)]
    process = psutil.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.1)
    (kernel,) = process.children()
    process.send_signal(number)
    said = process.communicate()[1]
    kernel.wait(600)
    assert (tmp_path / "saved").exists() and not (tmp_path / "next").exists()
    assert number == signal.SIGKILL or said.splitlines()[-1] == "code 75: stopped at step 3", said
    assert not is_executed(tmp_path / "out.ipynb")


@pytest.mark.slow
@pytest.mark.parametrize("by, number", [("detrlib", signal.SIGTERM), ("papermill", signal.SIGINT)])
def test_training_in_a_notebook_saves_and_its_kernel_leaves(ended, tiny_config, tmp_path, by, number):
    """papermill itself hands on an interrupt only; its kernel notices that it is gone."""
    save_config(tiny_config({"train.epochs": 5000}), tmp_path / "long.yaml")
    values = {"config": tmp_path / "long.yaml", "run_name": tmp_path / "run"}
    if by == "detrlib":
        pairs = [word for name, value in values.items() for word in ("-p", f"{name}={value}")]
        command = ["detrlib", "notebook", "06_train", tmp_path / "out.ipynb", *pairs]
    else:
        pairs = [word for name, value in values.items() for word in ("-p", name, value)]
        source = PROJECT / "notebooks" / "06_train.ipynb"
        command = ["papermill", source, tmp_path / "out.ipynb", "--cwd", PROJECT, "-k", "python3", *pairs]
    code, said = ended(command, number)
    if by == "detrlib" and number != signal.SIGKILL:
        assert code == STOPPED and "Traceback" not in said, said
        assert not is_executed(tmp_path / "out.ipynb")
    last = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"][-1]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["global_step"] == last["stopped"]
