"""Attention over images: every function draws small examples without a warning and shows what it promises."""

import numpy as np
import pytest

from detrlib.errors import ConfigError
from detrlib.figures import attention, style

pytestmark = pytest.mark.filterwarnings("error")

NAMES = {1: "cat", 2: "dog"}


def test_detections_show_their_class_score_box_and_map(make_example, boxes_in, titles):
    example = make_example()
    drawn = attention.detections_with_attention(example, NAMES, max_queries=4)
    visible = [axes for axes in drawn.axes if axes.get_visible()]
    assert titles(drawn)[:4] == ["2 objects", "dog 0.90", "cat 0.80", "dog 0.40"] and len(visible) == 4
    assert boxes_in(visible[0], "#000000") == [tuple(box) for box in example.true_boxes]  # ground truth
    mean = example.maps(layer=-1).mean(0)
    for number, axes in enumerate(visible[1:]):
        assert boxes_in(axes) == boxes_in(visible[0], style.PALETTE[number]) == [tuple(example.boxes[number])]
        assert np.allclose(axes.images[1].get_array(), mean[number] / mean[number].max())


def test_a_map_covers_the_image_or_reaches_beyond_it(make_example):
    example = make_example()
    weights = example.maps()[0, 0, 0]
    _, axes = style.figure()
    attention.draw_map(axes, example.image, weights)
    assert axes.images[1].get_extent() == [-0.5, 95.5, 63.5, -0.5]
    assert (np.asarray(axes.images[1].get_alpha())[weights == 0] == 0).all()  # no weight leaves the image as it is
    _, axes = style.figure()
    attention.draw_map(axes, example.image, weights, extent=np.array([3.2, 6.0]))  # of 4 rows, 3.2 lie on the image
    assert np.allclose(axes.images[1].get_extent(), [-0.5, 95.5, 79.5, -0.5])
    assert axes.get_ylim() == (63.5, -0.5)


def test_objects_by_run_has_a_row_per_run_and_a_column_per_object(make_example, titles, texts):
    drawn = attention.objects_by_run({"one": make_example(), "two": make_example(matched=(-1, -1, 1))}, NAMES)
    assert titles(drawn) == ["one", "dog 0.40", "cat 0.80", "two", "dog 0.40", "no query left"]  # largest object first
    assert len(drawn.axes[5].images) == 1  # nothing was matched to that object: no map
    assert texts(attention.objects_by_run({}, NAMES)) == ["Nothing to show: no run has stored examples with attention."]


def test_queries_by_layer_has_a_row_per_detection_and_a_column_per_layer(make_example, titles, boxes_in):
    example = make_example()
    drawn = attention.queries_by_layer(example, NAMES, max_queries=2)
    assert titles(drawn) == ["dog 0.90", "layer 1", "layer 2", "cat 0.80", "", ""]
    mean = example.maps()[1, :, 1].mean(0)  # of the second query in the second layer
    assert np.allclose(drawn.axes[5].images[1].get_array(), mean / mean.max())
    assert boxes_in(drawn.axes[5]) == [tuple(example.boxes[1])]


def test_chosen_classes_have_a_row_per_class_and_a_column_per_run(stored, titles, texts):
    runs = {run: list(examples.values()) for run, examples in stored.items()}
    drawn = attention.chosen_classes(runs, NAMES, ["dog", "cat"])
    assert titles(drawn)[:4] == ["dog", "first\ndog 0.90", "second\ndog 0.80", "cat"] and len(drawn.axes) == 6
    assert titles(attention.chosen_classes(runs, NAMES))[0] == "cat"  # the first ones, where none is named
    (words,) = texts(attention.chosen_classes({}, NAMES))
    assert words == "Nothing to show: no detections of cat, dog are stored."
    with pytest.raises(ConfigError, match="dogs"):
        attention.chosen_classes(runs, NAMES, ["dogs"])


def test_cells_grid_shows_where_the_cell_in_the_middle_of_an_object_looks(make_example, titles, boxes_in, texts):
    example = make_example(sites=("encoder_self",))
    drawn = attention.cells_grid(example)
    assert titles(drawn) == ["encoder layer 1", "", ""]
    # The largest object first: its centre (70, 17.5) lies in the cell of row 1, column 4; cells are 16 pixels wide.
    assert boxes_in(drawn.axes[1]) == [(63.5, 15.5, 79.5, 31.5)]
    weights = example.maps("encoder_self", 0)[:, 1 * 6 + 4].mean(0)
    assert np.allclose(drawn.axes[1].images[1].get_array(), weights / weights.max())
    assert boxes_in(drawn.axes[0], style.PALETTE[1]) == boxes_in(drawn.axes[2]) == [(-0.5, -0.5, 15.5, 15.5)]
    (words,) = texts(attention.cells_grid(make_example()))
    assert "encoder_self" in words


def test_layers_grid_has_a_row_per_layer_and_the_mean_before_the_heads(make_example, titles, boxes_in):
    example = make_example()
    drawn = attention.layers_grid(example, query=1)
    assert titles(drawn) == ["layer 1, mean", "head 1", "head 2", "head 3", "layer 2, mean", "", "", ""]
    assert all(boxes_in(axes) == [tuple(example.boxes[1])] for axes in drawn.axes)
    weights = example.maps()[1, 2, 1]
    assert np.allclose(drawn.axes[7].images[1].get_array(), weights / weights.max())


def test_single_map_counts_the_cells_with_weight(make_example, titles):
    example = make_example()
    weights = example.maps()[0, 0, 0]
    drawn = attention.single_map(example.image, weights, example.boxes[0], "a cat")
    assert titles(drawn) == ["a cat", f"{(weights > 0).sum()} of 24 cells have weight"]
