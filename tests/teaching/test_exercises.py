"""The exercises of the notebooks: their solutions pass the check, and the check finds what is wrong."""

import json
import re

import matplotlib.pyplot as plt
import pytest
import torch

from detrlib.config import PROJECT
from detrlib.teaching.exercises import check

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


@pytest.mark.parametrize(("result", "wanted", "said"), [(5.9, 5, "5.9"), (0.3, True, "0.3"), (0.123, 0, "0.123")])
def test_numbers_are_not_cut_to_the_kind_that_is_wanted(result, wanted, said):
    assert said in check(lambda: result, lambda: wanted, [()])
    assert "Correct" in check(lambda: float(wanted), lambda: wanted, [()])


@pytest.mark.parametrize(
    ("notebook", "needed", "exercises"),
    [
        ("01_data_exploration", [], 3),
        ("02_detr_walkthrough", [], 6),
        ("03_attention_transforms", ["figures.style.use"], 6),
        ("04_deformable_and_sparse", ["dim, heads, ", "grids = [(16, 24)"], 3),
        ("05_measures", [], 6),
    ],
)
def test_every_solution_passes(notebook, needed, exercises, capsys):
    cells = json.loads((PROJECT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert "figure_size = " in sources[1] and any("style.use(figure_size)" in source for source in sources)
    names = {}
    beginnings = [next(source for source in sources if source.startswith(words)) for words in needed]
    with plt.rc_context():
        for source in (sources[1], sources[2], *beginnings):  # parameters, imports, what the exercises build on
            exec(source, names)
    solutions = [re.search(r"<details>.*?```python\n(.*?)```", source, re.DOTALL) for source in sources]
    for exercise, solution in zip(sources, solutions[1:], strict=False):
        if solution:
            stub, rest = re.split(r"    # your.*\n    \.\.\.\n", exercise)
            exec(exercise, names)
            exec(solution[1] + rest, names)
            assert stub in solution[1]
    printed = capsys.readouterr().out.splitlines()
    wanted = ["Not solved yet: the function returns None.", "Correct"] * exercises
    assert [line.split(",")[0] for line in printed] == wanted
