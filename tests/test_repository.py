"""The rules that a reader of the repository can rely on: what notebooks, configs and dependencies look like."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from detrlib.config import PROJECT, load_config, read_yaml
from detrlib.experiments.sweep_file import read_sweep

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
CONFIGS = sorted(
    path for folder in ("configs", "study") for path in (PROJECT / "papermill_runs" / folder).glob("*.yaml")
)


def relative(path):
    return str(path.relative_to(PROJECT))


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=relative)


# --- notebooks -------------------------------------------------------------------------------------------------


def read_notebook(path):
    """The notebook with every cell's source as one string."""
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def is_parameters(cell):
    return "parameters" in cell["metadata"].get("tags", [])


@each(NOTEBOOKS)
def test_notebook_is_stripped(path):
    notebook = read_notebook(path)
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    assert "papermill" not in notebook["metadata"]
    for cell in code_cells(notebook):
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["source"][:80]


@each(NOTEBOOKS)
def test_notebook_opens_with_its_question_then_parameters_then_imports(path):
    cells = read_notebook(path)["cells"]
    assert cells[0]["cell_type"] == "markdown"
    for word in ("Needs", "Writes", "Runtime"):
        assert word in cells[0]["source"], f"the first cell does not say: {word}"
    assert [index for index, cell in enumerate(cells) if is_parameters(cell)] == [1]
    lines = [line for line in cells[2]["source"].splitlines() if line.strip()]
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(cells[2]["source"]).body)
    assert 1 <= len(lines) <= 8


@each(NOTEBOOKS)
def test_notebook_parameters_are_plain_values(path):
    (cell,) = [cell for cell in read_notebook(path)["cells"] if is_parameters(cell)]
    for node in ast.parse(cell["source"]).body:
        assert isinstance(node, ast.Assign | ast.AnnAssign), ast.unparse(node)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        assert all(isinstance(target, ast.Name) for target in targets), ast.unparse(node)
        ast.literal_eval(node.value)


@each(NOTEBOOKS)
def test_notebook_code_is_short_plain_python(path):
    imported_in = []
    for index, cell in enumerate(read_notebook(path)["cells"]):
        if cell["cell_type"] != "code":
            continue
        source = cell["source"]
        assert len(source.splitlines()) <= 20, f"a long cell: {source[:80]}"
        for word in ("sys.path", "filterwarnings", "get_ipython", "import *"):
            assert word not in source, f"{word} in: {source[:80]}"
        tree = ast.parse(source)  # a magic is a syntax error here
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)):
            imported_in.append(index)
    assert imported_in in ([], [2]), f"imports belong into one cell, the third; found in {imported_in}"


# --- configs, environment, repository --------------------------------------------------------------------------


def test_there_are_configs():
    assert CONFIGS


@each(CONFIGS)
def test_every_config_loads(path):
    if "runs" not in read_yaml(path):
        load_config(path)
        return
    for name in read_sweep(path).configs:
        assert re.fullmatch(r"[\w.-]+", name), f"{name} cannot name a run folder"


def project_metadata():
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def declared():
    """Every requirement of pyproject.toml that `make` installs."""
    project = project_metadata()
    return [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


def test_environment_yml_names_no_version_that_pyproject_does_not():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    project = project_metadata()
    *conda, pip = environment["dependencies"]
    assert environment["name"] == project["name"]
    assert conda == [f"python{project['requires-python']}", "pip"]
    assert pip == {"pip": ["-e .[dev]"]}
    assert "dev" in project["optional-dependencies"]


def test_every_dependency_says_what_it_is_for():
    for line in (PROJECT / "pyproject.toml").read_text().splitlines():
        if re.match(r'    "[a-z][\w.-]*(>=[\d.]+)?",', line):
            assert re.search(r"# \w+", line), line


def test_the_lock_pins_every_dependency_and_names_no_address():
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert "://" not in "\n".join(lines)
    assert pins == sorted(set(pins), key=lambda pin: pin.split("==")[0])
    versions = dict(pin.split("==") for pin in pins)
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} is not pinned"
        assert requirement.specifier.contains(versions[name]), f"{name}=={versions[name]} against {requirement}"


def test_the_lock_leaves_platform_wheels_to_torch():
    assert not re.search(r"^(nvidia-|cuda-|triton)", (PROJECT / "requirements.lock").read_text(), re.MULTILINE)


def test_the_citation_agrees_with_licence_and_package():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format asks for
    holder = re.search(r"Copyright \(c\) \d+ (.*)", (PROJECT / "LICENSE").read_text())[1]
    assert citation["authors"] == [{"name": holder}] and citation["license"] == project_metadata()["license"]
    assert citation["title"].startswith(project_metadata()["name"])


def test_no_large_file_is_committed():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [PROJECT / name for name in listing.stdout.split("\0") if name]
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    study = {path: size for path, size in sizes.items() if path.is_relative_to(PROJECT / "papermill_runs" / "study")}
    assert sum(study.values()) < 5_000_000  # results of the study, to be seen without running it
    assert [relative(path) for path, size in sizes.items() if size > 600_000 and path not in study] == []


def test_make_leaves_an_environment_that_is_linked_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".ready").touch()
    (tmp_path / "checkout").mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(PROJECT / name, tmp_path / "checkout")
    (tmp_path / "checkout" / ".venv").symlink_to(tmp_path / "elsewhere")
    done = subprocess.run(["make", "-B", "setup"], cwd=tmp_path / "checkout", capture_output=True, text=True)
    assert done.returncode != 0 and ".venv is a link to" in done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [".ready"]


@pytest.mark.parametrize(
    "given, wanted", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_that_wait_for_each_other_leave_their_core_soon(given, wanted):
    """Before torch is imported, since its OpenMP reads this then; what the user has set wins."""
    unset = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    program = "import os, sys, detrlib; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, env=unset | given, capture_output=True, text=True
    )
    assert done.stdout.split() == [wanted, "False"], done.stderr
