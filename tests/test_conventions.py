"""The rules of the repository that a reader can rely on: who imports whom, what notebooks and configs look like."""

import ast
import sys

import pytest

from detrlib.config import PROJECT

LIBRARY = PROJECT / "detrlib"
MODULES = sorted(LIBRARY.rglob("*.py"))
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
CONFIGS = sorted((PROJECT / "papermill_runs" / "configs").rglob("*.yaml"))

# Lowest first: a file imports from rows above its own, and freely within its folder; figures from a few only.
ORDER = (
    {"errors", "files", "boxes", "config"},
    {"data", "attention"},
    {"models"},
    {"losses", "checkpoints"},
    {"metrics"},
    {"runs"},
    {"engine"},
    {"experiments"},
    {"figures"},
    {"teaching", "benchmarks"},
    {"commands"},
    {"__main__"},
)
RANK = {name: number for number, names in enumerate(ORDER) for name in names}
FIGURES_MAY_IMPORT = {"boxes", "errors", "files", "models.outputs", "metrics", "runs", "figures"}
ATTENTION_MAY_IMPORT = {"torch", "triton"} | set(sys.stdlib_module_names)
PRINTS = {"__main__", "engine.launch", "experiments.sweep"}  # and what processes of theirs say

# Lines of code in each folder, so that growth is a decision: raise a number here, with a reason in the commit.
CEILINGS = {
    ".": 540,
    "config": 1430,
    "attention": 2170,
    "attention/kernels": 1030,
    "models": 3190,
    "losses": 380,
    "checkpoints": 1420,
    "data": 3610,
    "metrics": 3050,
    "runs": 2610,
    "engine": 4000,
    "experiments": 4000,
    "figures": 3840,
    "teaching": 790,
    "benchmarks": 2460,
    "commands": 560,
}
LONGEST_FILE, LONGEST_FUNCTION = 350, 45


def relative(path):
    return str(path.relative_to(PROJECT))


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=relative)


def parse(path):
    return ast.parse(path.read_text(), filename=str(path))


def dotted_name(path):
    """detrlib/models/outputs.py -> 'models.outputs'; detrlib/models/__init__.py -> 'models'."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = LIBRARY.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path):
    """Full names of every import in a file, wherever it stands: ('torch.nn', 'detrlib.models.outputs', ...)."""
    package = ["detrlib", *path.relative_to(LIBRARY).parent.parts]
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            within = [f"{base}.{alias.name}" for alias in node.names]
            inside = base.split(".")[0] == "detrlib"
            found |= {full if inside and is_module(full.removeprefix("detrlib.")) else base for full in within}
    return found


def library_imports(path):
    return {name.removeprefix("detrlib.") for name in imports(path) if name.startswith("detrlib.")}


# --- the library -----------------------------------------------------------------------------------------------


@each([path for path in MODULES if path != LIBRARY / "__init__.py"])
def test_imports_point_downwards(path):
    name = dotted_name(path)
    top = name.split(".")[0]
    targets = library_imports(path)
    if top == "figures":
        allowed = {t for t in targets for a in FIGURES_MAY_IMPORT if t == a or t.startswith(a + ".")}
        assert targets == allowed, f"figures may not import {sorted(targets - allowed)}"
        return
    assert top in RANK, f"give {top} a place in ORDER"
    for target in targets:
        other = target.split(".")[0]
        assert other == top or RANK[other] < RANK[top] or is_level(top, other), f"{name} imports {target}"


def is_level(top, other):
    """The foundations may import each other: files names its faults by errors, config too."""
    return RANK[top] == RANK[other] == 0


@each([path for path in MODULES if path.is_relative_to(LIBRARY / "attention")])
def test_attention_stands_alone(path):
    assert {name for name in library_imports(path) if not name.startswith("attention")} == set()
    outside = {name.split(".")[0] for name in imports(path)} - {"detrlib"}
    assert outside <= ATTENTION_MAY_IMPORT


@each(MODULES)
def test_no_hooks_path_tricks_exits_or_stray_prints(path):
    tree = parse(path)
    prints = dotted_name(path) in PRINTS or path.is_relative_to(LIBRARY / "benchmarks")  # programs that show a table
    forbidden = {"sys.path", "sys.exit", "exit", "quit"} | (set() if prints else {"print"})
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            assert "*" not in names, f"line {node.lineno}: import *"
            assert not (node.module == "sys" and names & {"path", "exit"}), f"line {node.lineno}: from sys import"
        elif isinstance(node, ast.Attribute):
            hooks = node.attr.startswith("register_forward") and not path.is_relative_to(LIBRARY / "benchmarks")
            assert not hooks, f"line {node.lineno}: {node.attr}"
            patched = isinstance(node.ctx, ast.Store) and node.attr == "forward"
            assert not patched, f"line {node.lineno}: replaces a forward"
            assert ast.unparse(node) not in forbidden, f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in forbidden, f"line {node.lineno}: {node.func.id}()"


@each(MODULES)
def test_public_functions_and_classes_have_docstrings(path):
    """Sections of the settings are excused: each of their fields carries its own comment."""
    for node in parse(path).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        bases = {ast.unparse(base) for base in getattr(node, "bases", [])}
        if not bases & {"Section", "BaseModel"}:
            assert ast.get_docstring(node), f"line {node.lineno}: {node.name} has no docstring"


@each([path for folder in ("detrlib", "tests") for path in sorted((PROJECT / folder).rglob("*.py"))])
def test_files_stay_short(path):
    longest = LONGEST_FILE if path.is_relative_to(LIBRARY) else 525
    assert len(path.read_text().splitlines()) <= longest


@each(MODULES)
def test_functions_stay_short(path):
    """Docstrings aside; kernels are one function each by nature, and a command's options are its signature."""
    if path.is_relative_to(LIBRARY / "attention" / "kernels"):
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno + 1 <= LONGEST_FUNCTION, f"line {node.lineno}: {node.name} is long"


def folder_of(path):
    parts = path.relative_to(LIBRARY).parent.as_posix()
    return parts if parts in CEILINGS else parts.split("/")[0]


def test_folders_stay_under_their_ceilings():
    lines = dict.fromkeys(CEILINGS, 0)
    for path in MODULES:
        lines[folder_of(path)] += len(path.read_text().splitlines())
    assert {folder: count for folder, count in lines.items() if count > CEILINGS[folder]} == {}


def test_every_folder_has_a_docstring_that_says_what_stands_in_it():
    for path in LIBRARY.rglob("__init__.py"):
        assert ast.get_docstring(parse(path)), relative(path)


# --- tests -----------------------------------------------------------------------------------------------------

TESTS = sorted((PROJECT / "tests").rglob("*.py"))
# Tests of the repository itself and of what several modules do together.
OF_NO_MODULE = {
    "tests/test_conventions.py",
    "tests/test_repository.py",
    "tests/test_notebooks.py",
    "tests/test_main.py",
    "tests/experiments/test_slurm.py",
    "tests/figures/test_page_in_browser.py",
}


def test_every_module_has_a_test_file_of_its_name():
    """Commands aside: from their words to what they show, they are in test_main.py."""
    modules = {path.relative_to(LIBRARY) for path in MODULES if path.name not in ("__init__.py", "__main__.py")}
    proved = {path.relative_to(PROJECT / "tests") for path in TESTS}
    modules = {module for module in modules if module.parts[0] != "commands"}
    assert sorted(str(m) for m in modules if m.with_name(f"test_{m.name}") not in proved) == []


@each([path for path in TESTS if path.name.startswith("test_")])
def test_test_files_stand_for_a_module(path):
    module = path.relative_to(PROJECT / "tests").with_name(path.name.removeprefix("test_"))
    assert (LIBRARY / module).exists() or relative(path) in OF_NO_MODULE


@each(TESTS)
def test_no_test_file_imports_another(path):
    names = {name.split(".")[0] for name in imports_of(parse(path))}
    assert not names & {other.stem for other in TESTS}


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
