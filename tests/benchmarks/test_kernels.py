"""Kernels are compared with plain PyTorch and timed, here by Triton's interpreter with tiny tensors.

In a process of its own, that runs this file, where nothing is installed that a machine with a GPU may lack.
"""

import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from itertools import islice

import pytest

LACKING = (
    *("papermill", "wandb", "jupyterlab", "nbconvert", "nbformat", "nbclient", "ipykernel", "IPython", "anywidget"),
    *("entmax", "adasplash", "pycocotools"),
)
CHECKS = {"check_rows": 9, "check_fused": 4, "check_fused_half": 4, "check_deformable": 4}
TIMES = {"machine": 3, "time_rows": 3, "time_fused": 3, "time_deformable": 2}


@pytest.fixture(scope="module")
def measured():
    """Rows by the function that yields them."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_results_are_those_of_plain_pytorch(measured):
    for name, number in CHECKS.items():
        assert len(measured[name]) == number
        for row in measured[name]:
            assert row["ok"] and 0 <= row["error"] <= row["limit"] < 0.1, row
    assert {row["alpha"] for row in measured["check_rows"]} == {"sparsemax", "entmax15", "entmax 1.3", "alpha per head"}
    assert measured["wrong"][0]["ok"] is False


def test_times_and_memory_are_measured(measured):
    for name in TIMES:
        assert len(measured[name]) == TIMES[name] and not any("fault" in row for row in measured[name]), measured[name]
    assert {row["source"] for row in measured["time_fused"]} == {"torch", "one kernel", "by rows"}
    assert {row["source"] for row in measured["time_deformable"]} == {"one kernel", "grid_sample"}
    for row in measured["time_rows"] + measured["time_deformable"]:
        assert row["forward [ms]"] > 0 and row["forward [% of copying]"] > 0 and row["memory [MiB]"] > 0


def test_one_that_fails_is_a_row_too(measured):
    assert measured["failing"] == {"source": "none", "fault": "ZeroDivisionError: division by zero"}


def measure() -> dict:
    """Some rows of every function."""
    import torch

    from detrlib.benchmarks import kernels, rivals

    rivals.package_version = lambda name: None
    sizes = kernels.SIZES["cpu"]
    kernels.SIZES["cpu"] = sizes._replace(rows=sizes.rows[1:2])
    rows = {name: list(islice(getattr(kernels, name)("cpu"), n)) for name, n in (CHECKS | TIMES).items()}
    one, two = torch.ones(1), torch.full((1,), 2.0)
    rows["wrong"] = list(kernels._compared({}, ("sum",), (one,), (two,), {"": 0.1}))
    rows["failing"] = kernels.timed({"source": "none"}, lambda: 1 / 0, [], (1, 1), 1.0, "cpu")
    return rows


class Finder(PathFinder):
    """Finds all that is installed but for what is lacking."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in LACKING else super().find_spec(name, path, target)


if __name__ == "__main__":
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
    from typer.testing import CliRunner

    from detrlib.__main__ import app

    assert "gpu" in CliRunner().invoke(app, ["benchmark", "--help"]).output
    print(json.dumps(measure()))
