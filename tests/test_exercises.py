"""The exercises of notebook 02: their solutions pass the check, and the check finds what is wrong."""

import json
import re

import pytest
import torch

from detrlib.config import PROJECT
from detrlib.exercises import check

CASES = [(torch.tensor([1.0, 2.0]),), (torch.tensor([-3.0]),)]


@pytest.mark.parametrize(
    "attempt, verdict",
    [
        (lambda x: 2 * x, "Correct, in all 2 cases"),
        (lambda x: None, "Not solved yet"),
        (lambda x: x, r"Not yet: tensor\(\[1., 2.\]\)\nwanted tensor\(\[2., 4.\]\)\nfor tensor\(\[1., 2.\]\)"),
        (lambda x: 2 * x.abs(), r"Not yet: tensor\(\[6.\]\)\nwanted tensor\(\[-6.\]\)"),
        (lambda x: 2 * x / 0 * 0, "Not yet: .*nan"),
        (lambda x: 2 * x[:1], r"Not yet: the shape is \[1\], wanted \[2\]"),
        (lambda x: x.unknown, "Not yet: AttributeError: .*unknown"),
        (lambda x: x.mul_(2), "Correct"),  # in place, but on a copy
    ],
)
def test_check_says_what_is_wrong(attempt, verdict):
    assert re.match(verdict, check(attempt, lambda x: 2 * x, CASES))
    assert torch.equal(CASES[0][0], torch.tensor([1.0, 2.0]))


def test_every_solution_passes(capsys):
    cells = json.loads((PROJECT / "notebooks" / "02_attention_transforms.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    names = {}
    for source in (sources[1], sources[2], next(source for source in sources if source.startswith("names = "))):
        exec(source, names)  # parameters, imports, the transforms
    solutions = [re.search(r"<details>.*?```python\n(.*?)```", source, re.DOTALL) for source in sources]
    for exercise, solution in zip(sources, solutions[1:], strict=False):
        if solution:
            stub, rest = re.split(r"    return None.*\n", exercise)
            exec(exercise, names)
            exec(solution[1] + rest, names)
            assert stub in solution[1]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in printed] == ["Not solved yet: the function returns None.", "Correct"] * 4
