"""Execute a notebook headless, with papermill, refusing what papermill lets pass.

    detrlib notebook 07_evaluate papermill_runs/my-run/07_evaluate.ipynb -p run_name=my-run

papermill only warns of a misspelt parameter and runs on with the default, and it injects `1e-3` as text.
Here parameters are checked against the notebook's `parameters` cell, by name and type, before anything runs.
"""

import ast
import difflib
import io
import json
import logging
import signal
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from traitlets.config import Config

from detrlib.config import PROJECT, parse_value
from detrlib.engine.children import GRACE, interrupt, passing_on, stopped
from detrlib.errors import ConfigError, RunError, Stopped
from detrlib.files import load_json, write_atomic

NOTEBOOKS = PROJECT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
ASKED = "notebooks.json"  # in a folder: {notebook: its parameters}, what is to be executed there


def execute_notebook(name: str, output: Path, parameters: dict[str, Any], progress: bool = False) -> Path:
    """Run notebooks/<name>.ipynb with `parameters`; the executed copy is `output`, also when a cell fails.

    Raises RunError naming the parameter, the failing cell and its error, or where the copy cannot be written; Stopped
    where a signal came.
    """
    import papermill  # here: with it comes a grammar of URLs, built for two seconds, which most commands never need
    from papermill.exceptions import PapermillExecutionError

    source = find_notebook(name)
    values = checked_parameters(source, parameters)
    if output.is_dir() or output.suffix != ".ipynb" or output.resolve() == source:
        found = "a folder" if output.is_dir() else "the notebook itself" if output.suffix == ".ipynb" else "no .ipynb"
        raise RunError(f"{output} is {found}; name the file that the executed copy is to be, such as out.ipynb")
    cut_off, options = False, {"cwd": str(PROJECT), "kernel_name": "python3", "log_output": False}
    # Half of it is for leaving in order; a cell that is interrupted has all the time it wants.
    options["config"] = Config({"KernelManager": {"shutdown_wait_time": 2 * GRACE}})
    # It warns that it is not encrypted, and of the interrupt by which it is ended. Errors of cells come as messages.
    options["extra_arguments"] = ["--log-level=CRITICAL"]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with passing_on(lambda: _interrupt_cell(came)) as came:
            options["on_cell_start"] = lambda **_: came and interrupt()  # one that came between two cells
            papermill.execute_notebook(source, output, values, progress_bar=progress, **options)
        if came:  # too late to interrupt a cell; whoever goes on from here has to know
            raise stopped(came)
    except PapermillExecutionError as error:
        if came or error.ename == Stopped.__name__:
            raise stopped(came, *[error.evalue] * (error.ename == Stopped.__name__)) from None
        raise RunError(
            f"{source.name}: cell {error.exec_count} failed: {error.ename}: {error.evalue} (executed copy: {output})"
        ) from None
    except OSError as error:
        raise RunError(f"{source.name}: could not be executed into {output}: {error}") from error
    except (RuntimeError, KeyboardInterrupt) as error:  # the first: a kernel died, or could not start
        cut_off = True
        if came or isinstance(error, KeyboardInterrupt):  # what came may have reached the kernel too, and ended it
            raise stopped(came) from None
        raise RunError(f"{source.name}: {error}; was memory short? (executed copy: {output})") from None
    finally:
        if output.exists():
            _correct_notes(output, cut_off)
    return output


def _interrupt_cell(came: Sequence[signal.Signals]) -> None:
    """Interrupt what a kernel is at, which saves and ends the notebook; when told again, everything at once."""
    if len(came) > 1:
        interrupt()
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has ended, and nobody has asked yet how
            if "ipykernel_launcher" in child.cmdline():
                child.send_signal(signal.SIGINT)


def execute_asked(folder: Path) -> None:
    """Execute in `folder` the notebooks that its notebooks.json names, in that order, with the parameters given there.

    Raises RunError as `execute_notebook`.
    """
    for name, parameters in load_json(folder / ASKED, "start the sweep again, which writes it").items():
        execute_notebook(name, folder / find_notebook(name).name, parameters)


def _correct_notes(output: Path, cut_off: bool) -> None:
    """What papermill notes: paths from the project root, since a copy is there to be shared; that it was cut off.

    And widgets are left out where a copy is better without, since they live with a kernel only: bars of progress, which
    would stand at 0 %, and those beside which stands what is shown without, such as the viewer's page.
    """
    try:
        notebook = json.loads(output.read_text())
    except ValueError:  # half of one, which does not count as executed: papermill could not write it to its end
        return
    noted = notebook["metadata"].setdefault("papermill", {})
    for name in {"input_path", "output_path"} & noted.keys():
        noted[name] = noted[name].removeprefix(f"{PROJECT}/")
    for cell in notebook["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [shown for shown in map(_without_widget, cell["outputs"]) if shown]
    if not any(WIDGET in shown.get("data", {}) for cell in notebook["cells"] for shown in cell.get("outputs", [])):
        notebook["metadata"].pop("widgets", None)  # their states
    if cut_off:  # papermill notes a cell that failed, but takes this one for completed
        noted["exception"] = True
    _save(notebook, output)


def _without_widget(output: dict) -> dict | None:
    """An output without a widget that a copy does not need; None of a bar of progress."""
    data = output.get("data", {})
    if WIDGET in data and "%|" in "".join(data.get("text/plain", "")):
        return None
    if "text/html" in data:
        data.pop(WIDGET, None)
    return output


def _save(notebook: dict, path: Path) -> None:
    write_atomic(path, lambda file: file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"))


def is_executed(path: Path) -> bool:
    """Whether `path` is an executed copy that ran to its end: papermill saves it after every cell."""
    try:
        notebook = json.loads(path.read_text())
        records = [part["metadata"].get("papermill", {}) for part in (notebook, *notebook["cells"])]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or half of one
        return False
    return not records[0].get("exception") and all(record.get("status") == "completed" for record in records[1:])


def executed_with(path: Path) -> dict[str, Any]:
    """The parameters that an executed copy was given."""
    return json.loads(path.read_text())["metadata"].get("papermill", {}).get("parameters", {})


def bare_name(notebook: str | Path) -> str:
    """The name without its number, which notebooks that come to be in between change: "07_evaluate" is "evaluate"."""
    return Path(notebook).stem.lstrip("0123456789_")


def find_notebook(name: str) -> Path:
    """notebooks/<name>.ipynb; the number in front may be missing or that of an older version.

    Raises RunError with the nearest name.
    """
    there = {bare_name(path): path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    if bare_name(name) not in there:
        near = difflib.get_close_matches(bare_name(name), there, 1, 0.3)
        names = [path.stem for path in there.values()]
        hint = f"did you mean {there[near[0]].stem}?" if near else f"there are {', '.join(names)}"
        raise RunError(f"no notebook {name} in {NOTEBOOKS}; {hint}")
    return there[bare_name(name)]


def find_executed(folder: Path, name: str) -> Path | None:
    """The copy of notebook `name` in `folder`, whatever its number, that was executed to its end."""
    copies = (path for path in sorted(folder.glob("*.ipynb")) if bare_name(path) == bare_name(name))
    return next(filter(is_executed, copies), None)


def checked_parameters(notebook: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """`parameters` with text read as YAML where the notebook declares another type.

    Raises RunError for a name that the notebook does not declare or a value of the wrong type.
    """
    declared = {name: ast.literal_eval(entry["default"]) for name, entry in _inspect(notebook).items()}
    checked = {}
    for name, value in parameters.items():
        if name not in declared:
            near = difflib.get_close_matches(str(name), declared, 1, 0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"it declares {', '.join(declared)}"
            raise RunError(f"{notebook.name}: unknown parameter '{name}'; {hint}")
        checked[name] = _as_declared(value, declared[name], f"{notebook.name}: parameter '{name}'")
    return checked


def _inspect(notebook: Path) -> dict:
    import papermill

    # papermill reports each parameter it cannot infer a type for; we infer types from the values ourselves.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    return papermill.inspect_notebook(str(notebook))


def _as_declared(value: Any, default: Any, where: str) -> Any:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = parse_value(value)
        except ConfigError as error:
            raise RunError(f"{where}: {error}") from None
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if default is not None and value is not None and type(value) is not type(default):
        raise RunError(f"{where} is {value!r}, expected {type(default).__name__} such as {default!r}")
    return value


def shrink_pictures(path: Path) -> None:
    """Give the pictures of an executed notebook 256 colours each: a third of the size, and hard to tell apart."""
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = Image.open(io.BytesIO(b64decode(data["image/png"]))).convert("RGB").quantize(256)
                smaller = io.BytesIO()
                picture.save(smaller, "PNG", optimize=True)
                data["image/png"] = b64encode(smaller.getvalue()).decode()
    _save(notebook, path)


def report_html(notebook: Path, output: Path, title: str) -> Path:
    """An executed notebook as one HTML file, pictures inside, code left out."""
    from nbconvert import HTMLExporter

    logging.getLogger("traitlets").setLevel(logging.ERROR)  # it misses alternative texts of the pictures
    exporter = HTMLExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_filename(str(notebook), resources={"metadata": {"name": title}})
    write_atomic(output, lambda path: path.write_text(body))
    return output
