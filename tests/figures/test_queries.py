"""Queries beside objects, and among each other."""

import numpy as np
import pytest

from detrlib.figures import queries, style
from detrlib.figures.overlay import overlay, scale_of

pytestmark = pytest.mark.filterwarnings("error")

NAMES = {1: "circle", 2: "square"}


def test_matching_names_objects_and_queries(make_example, boxes_in, texts):
    example = make_example()
    drawn = queries.matching(example, NAMES)
    shown = " ".join(texts(drawn))
    assert "#1: circle 0.80, 1.00" in shown and "#0: square 0.90" in shown
    assert boxes_in(drawn.axes[0], style.MUTED) == [tuple(example.boxes[0])]  # confident, and matched to nothing
    assert len(drawn.axes[1].get_lines()) == 2  # one for each matched pair
    circle = style.class_colour(1, NAMES)
    assert boxes_in(drawn.axes[0], circle) == [tuple(example.boxes[1]), tuple(example.true_boxes[0])]


def test_a_picture_without_annotated_objects_has_a_list_of_detections(make_example, texts):
    example = make_example()
    example.true_boxes, example.true_labels = example.true_boxes[:0], example.true_labels[:0]
    example.matched[:] = -1
    shown = " ".join(texts(queries.matching(example, NAMES)))
    assert "no annotated objects" in shown and "#0: square 0.90" in shown and "IoU" not in shown


def test_query_matrix_writes_percent_among_the_queries_shown_and_what_goes_to_others(make_example, texts):
    example = make_example(sites=("decoder_self",))
    example.queries = np.array([2, 0, 1])  # their numbers in the model
    drawn = queries.query_matrix(example, NAMES, layer=0, max_queries=2)
    weights = 100 * example.maps("decoder_self", 0).mean(0)[:2]  # of the two best, to all three
    among = weights[:, [2, 0]]
    assert np.allclose(drawn.axes[0].images[0].get_array(), overlay(among, scale_of([among])), atol=1e-4)
    written = ["<1" if value < 0.5 else f"{value:.0f}" for value in among.ravel()] + [
        f"{value:.0f}" for value in 100 - among.sum(1)
    ]
    assert [text.get_text() for text in drawn.axes[0].texts] == written
    assert {"square #2", "circle #0", "all others"} <= set(texts(drawn))


def test_weights_of_zero_have_neither_number_nor_colour(make_example):
    example = make_example(sites=("decoder_self",))
    example.stored["decoder_self"][:] = [[1, 0, 0], [0.999, 0.001, 0], [0, 0.5, 0.5]]
    axes = queries.query_matrix(example, NAMES).axes[0]
    assert [text.get_text() for text in axes.texts[:9]] == ["100", "", "", "100", "<1", "", "", "50", "50"]
    assert (axes.images[0].get_array()[..., 3] > 0).tolist() == [
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]


def test_query_matrix_says_that_maps_are_not_stored(make_example, texts):
    assert texts(queries.query_matrix(make_example(), NAMES)) == [
        "Nothing to show: maps of decoder_self are not stored."
    ]
