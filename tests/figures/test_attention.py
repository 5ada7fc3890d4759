"""Attention over images: every function draws small examples without a warning and shows what it promises."""

import numpy as np
import pytest

from detrlib.errors import ConfigError
from detrlib.figures import attention, style
from detrlib.figures.overlay import overlay, scale_of

pytestmark = pytest.mark.filterwarnings("error")

NAMES = {1: "cat", 2: "dog"}


@pytest.fixture
def shows():
    """Whether the map drawn in a panel is this one, on the scale of these maps."""

    def shows(axes, weights, *compared):
        return np.allclose(axes.images[-1].get_array(), overlay(weights, scale_of(compared)), atol=1e-5)

    return shows


def test_detections_show_their_class_score_box_and_map(make_example, boxes_in, titles, shows):
    example = make_example()
    drawn = attention.detections_with_attention(example, NAMES, max_queries=4)
    first, *rest, bar = drawn.axes
    assert titles(drawn)[:4] == ["2 objects", "1 dog 0.90", "2 cat 0.80", "3 dog 0.40"] and len(rest) == 3
    cat, dog = (style.class_colour(label, NAMES) for label in NAMES)
    truth, boxes = ([tuple(box) for box in own] for own in (example.true_boxes, example.boxes))
    assert boxes_in(first, cat) == [truth[0], boxes[1]] and boxes_in(first, dog) == [truth[1], boxes[0], boxes[2]]
    mean = example.maps(layer=-1).mean(0)
    for number, axes in enumerate(rest):
        assert boxes_in(axes) == [boxes[number]]
        assert shows(axes, mean[number], *mean)  # the same colour is the same weight in all panels
    assert bar.get_ylim()[1] == pytest.approx(mean.max(), rel=1e-4)


def test_objects_by_run_has_a_row_per_run_and_a_column_per_object(make_example, titles, texts, shows):
    drawn = attention.objects_by_run({"one": make_example(), "two": make_example(matched=(-1, -1, 1))}, NAMES)
    assert titles(drawn) == [
        "one",
        "2 dog 0.40",
        "1 cat 0.80",
        "two",
        "2 dog 0.40",
        "1 no query left",
        "",
    ]  # largest object first, with the numbers of the annotations, as where they are matched
    assert len(drawn.axes[5].images) == 1  # nothing was matched to that object: no map
    maps = make_example().maps(layer=-1).mean(0)[[2, 1]]  # of the queries matched to either
    assert shows(drawn.axes[1], maps[0], *maps) and shows(drawn.axes[2], maps[1], *maps)
    assert texts(attention.objects_by_run({}, NAMES)) == ["Nothing to show: no run has stored examples with attention."]


def test_runs_that_number_their_classes_in_their_own_way(make_example, titles, texts, boxes_in):
    one, two = make_example(), make_example()
    two.labels, two.true_labels = two.labels - 1, two.true_labels - 1  # as data.contiguous has them
    names = {"one": NAMES, "two": {label - 1: name for label, name in NAMES.items()}}
    drawn = attention.objects_by_run({"one": one, "two": two}, names)
    assert titles(drawn)[1:3] == titles(drawn)[4:6] == ["2 dog 0.40", "1 cat 0.80"]
    colour = style.class_colour(2, NAMES)
    assert boxes_in(drawn.axes[1], colour) == boxes_in(drawn.axes[4], colour) != []
    stored = {"one": [one], "two": [two]}
    (words,) = texts(attention.chosen_classes(stored, names))
    assert "one, two" in words
    same = attention.chosen_classes({"one": [one], "two": [one]}, dict.fromkeys(stored, NAMES), ["dog"])
    assert titles(same)[0] == "dog"


def test_without_annotated_objects_runs_are_compared_by_detections_of_the_first(make_example, titles, boxes_in, shows):
    one, two = make_example(sites=("encoder_self",)), make_example(shift=1)
    for example in (one, two):
        example.true_boxes, example.true_labels = example.true_boxes[:0], example.true_labels[:0]
        example.matched[:] = -1
    two.boxes[2] += 1000  # what stands for the second detection of the first run; others hardly overlap it
    drawn = attention.objects_by_run({"one": one, "two": two}, NAMES, max_objects=2)
    assert titles(drawn)[:6] == ["one", "1 dog 0.90", "2 cat 0.80", "two", "1 dog 0.80", "2 not detected"]
    assert boxes_in(drawn.axes[1]) == [tuple(one.boxes[0])] == boxes_in(drawn.axes[4]) and boxes_in(drawn.axes[5]) == []
    assert titles(attention.detections_with_attention(one, NAMES))[0] == "no annotated objects"
    cells = attention.cells_grid(one, NAMES, max_objects=2)
    assert titles(cells)[:3] == ["encoder layer 1", "dog", "dog"]


def test_queries_by_layer_has_a_row_per_detection_and_a_column_per_layer(make_example, titles, boxes_in, shows):
    example = make_example()
    drawn = attention.queries_by_layer(example, NAMES, max_queries=2)
    assert titles(drawn)[:6] == ["dog 0.90", "layer 1", "layer 2", "cat 0.80", "", ""]
    means = example.maps()[:, :, :2].mean(1)  # [layers,2,h,w]
    assert shows(drawn.axes[5], means[1, 1], means)  # of the second query in the second layer
    assert boxes_in(drawn.axes[5]) == [tuple(example.boxes[1])]


def test_chosen_classes_have_a_row_per_class_and_a_column_per_run(stored, titles, texts):
    runs = {run: list(examples.values()) for run, examples in stored.items()}
    drawn = attention.chosen_classes(runs, NAMES, ["dog", "cat"])
    assert titles(drawn)[:4] == ["dog", "first\ndog 0.90", "second\ndog 0.80", "cat"] and len(drawn.axes) == 7
    assert titles(attention.chosen_classes(runs, NAMES))[0] == "cat"  # the first ones, where none is named
    (words,) = texts(attention.chosen_classes({}, NAMES))
    assert words == "Nothing to show: no detections of cat, dog are stored."
    with pytest.raises(ConfigError, match="dogs"):
        attention.chosen_classes(runs, NAMES, ["dogs"])


def test_cells_grid_shows_where_the_cell_in_the_middle_of_an_object_looks(make_example, titles, boxes_in, texts, shows):
    example = make_example(sites=("encoder_self",))
    drawn = attention.cells_grid(example, NAMES)
    assert titles(drawn)[:3] == ["encoder layer 1", "dog", "cat"]
    # The largest object first: its centre (70, 17.5) lies in the cell of row 1, column 4; cells are 16 pixels wide.
    assert boxes_in(drawn.axes[1]) == [(63.5, 15.5, 79.5, 31.5)]
    weights = example.maps("encoder_self", 0)[:, [1 * 6 + 4, 0]].mean(0)
    assert shows(drawn.axes[1], weights[0], *weights)
    assert (
        boxes_in(drawn.axes[0], style.class_colour(1, NAMES)) == boxes_in(drawn.axes[2]) == [(-0.5, -0.5, 15.5, 15.5)]
    )
    (words,) = texts(attention.cells_grid(make_example(), NAMES))
    assert "encoder_self" in words


def test_layers_grid_has_a_row_per_layer_and_the_mean_before_the_heads(make_example, titles, boxes_in, shows):
    example = make_example()
    drawn = attention.layers_grid(example, NAMES, query=1)
    assert titles(drawn)[:8] == ["layer 1, mean", "head 1", "head 2", "head 3", "layer 2, mean", "", "", ""]
    assert all(boxes_in(axes) == [tuple(example.boxes[1])] for axes in drawn.axes[:8])
    maps = example.maps()[:, :, 1]
    assert shows(drawn.axes[7], maps[1, 2], maps, maps.mean(1))


def test_single_map_counts_the_cells_with_weight(make_example, titles, texts):
    example = make_example()
    weights = example.maps()[0, 0, 0]
    support = f"{(weights > 0).sum()}/24 cells"
    for mass, words in ((1.0, ""), (0.41, "mass 0.41")):
        drawn = attention.single_map(example.image, mass * weights / weights.sum(), example.boxes[0], "a cat")
        assert titles(drawn)[0] == "a cat"
        assert any(text.startswith(support) and text.endswith(words) for text in texts(drawn))
