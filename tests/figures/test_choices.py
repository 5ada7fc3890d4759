"""What a cell, a class or the same object means."""

import numpy as np
import pytest

from detrlib.errors import ConfigError
from detrlib.figures import choices

NAMES = {1: "circle", 2: "square"}


def test_the_same_object_in_another_run_is_that_of_the_match_or_of_the_overlap(make_example):
    example, other = make_example(), make_example(shift=1)
    assert [choices.corresponding_query(example, query, other) for query in range(3)] == [1, 2, 0]
    assert choices.corresponding_query(example, 0, example) == 0
    away = make_example(matched=(-1, -1, -1))
    away.boxes = away.boxes + 200
    assert choices.corresponding_query(example, 1, away) is None
    width = example.boxes[1, 2] - example.boxes[1, 0]
    for share, found in ((0.5, 1), (0.6, None)):  # boxes moved by this much of their width: an IoU of 1/3, of 1/4
        beside = make_example(matched=(-1, -1, -1))
        beside.boxes = np.tile(example.boxes[1] + 1000, (3, 1))
        beside.boxes[1] = example.boxes[1] + np.array([share * width, 0, share * width, 0])
        assert choices.corresponding_query(example, 1, beside) == found


def test_cells_are_numbered_row_by_row_and_cut_at_the_border(make_example):
    example = make_example()
    example.extent = np.array([3.5, 6.0])  # half of the last row of cells lies beyond the image
    assert choices.cell_at(example, 0, 0) == 0 and choices.cell_at(example, 95, 63) == 23
    assert choices.cell_at(example, 500, -20) == 5  # outside the image the nearest
    assert np.allclose(choices.cell_box(example, 7), [15.5, 64 / 3.5 - 0.5, 31.5, 2 * 64 / 3.5 - 0.5])
    assert choices.cell_box(example, 23)[3] == 63.5


def test_cells_ask_only_where_the_encoder_is_stored_and_its_queries_are_cells(make_example):
    assert not choices.cells_ask(make_example())
    example = make_example(sites=("encoder_self",))
    assert choices.cells_ask(example)
    example.stored["encoder_self"] = example.stored["encoder_self"][:, :, :20]  # tokens were dropped
    assert not choices.cells_ask(example)


def test_classes_are_chosen_by_name_and_by_their_best_detection(stored):
    assert choices.chosen_labels(["square"], NAMES) == [2]
    with pytest.raises(ConfigError, match="no class 'squares'; did you mean 'square'"):
        choices.chosen_labels(["squares"], NAMES)
    runs = {run: list(found.values()) for run, found in stored.items()}
    best = choices.best_of_class(runs, 2)
    assert best.best in runs and set(best.queries) == set(runs)
    assert best.queries[best.best][0].scores[best.queries[best.best][1]] == 0.9
    assert choices.best_of_class(runs, 5) is None
