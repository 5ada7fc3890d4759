"""What clicks and controls of the viewer mean, and what it says of a map."""

import numpy as np

from detrlib.figures.views import View, clicked, consistent, lines_about, query_in, sink_in, weights_in

NAMES = {1: "circle", 2: "square"}


def test_the_other_run_shows_its_query_for_the_same_object(stored):
    view = clicked(consistent(View("first", 7, beside="second"), stored), stored, "first", 15, 15)
    assert (view.origin, view.query) == ("first", 1)
    other = query_in(view, stored, "second")
    assert stored["second"][7].matched[other] == 0 == stored["first"][7].matched[1]
    unmatched = clicked(view, stored, "first", 30, 35)  # matched to no object: the box that overlaps most
    assert np.array_equal(stored["second"][7].boxes[query_in(unmatched, stored, "second")], [0, 0, 40, 40])


def test_a_view_that_does_not_exist_becomes_the_nearest_that_does(stored):
    view = consistent(View("second", 9, beside="second", site="encoder_self", layer=5, head=7, query=40), stored)
    assert view == View("second", 7, site="decoder_cross", layer=0, head="mean", origin="second", query=0)


def test_weights_are_those_of_layer_head_and_query(stored):
    seen = stored["first"][7]
    view = consistent(View("first", 7, layer=1, head=2, query=1, origin="first"), stored)
    assert np.array_equal(weights_in(view, seen, 1), seen.maps(layer=1)[2, 1])
    mean = consistent(View("first", 7, layer=0, query=2, origin="first"), stored)
    assert np.allclose(weights_in(mean, seen, 2), seen.maps(layer=0)[:, 2].mean(0))
    cell = clicked(consistent(View("first", 7, site="encoder_self"), stored), stored, "first", 95, 63)
    assert np.allclose(weights_in(cell, seen, None), seen.maps("encoder_self", 0)[:, 23].mean(0))


def test_the_sink_is_the_key_with_most_weight_of_all_queries(stored):
    seen = stored["first"][7]
    for site, layer in (("decoder_cross", 1), ("decoder_self", 0), ("encoder_self", 0)):
        maps = seen.maps(site, layer)  # [H,n,...]
        received = (maps / np.maximum(maps.sum(tuple(range(2, maps.ndim)), keepdims=True), 1)).mean(1)
        for head in ("mean", 2):
            sink = sink_in(View("first", 7, site=site, layer=layer, head=head), seen)
            expected = received.mean(0) if head == "mean" else received[head]
            assert sink.grid == expected.shape
            assert (sink.key, sink.weight) == (expected.argmax(), np.float32(expected.max()))


def said(view, stored, query=1):
    seen = stored["first"][7]
    return lines_about(view, seen, query, weights_in(view, seen, query), NAMES)


def test_sinks_and_null_keys_are_told(stored):
    view = consistent(View("first", 7, layer=1, head=0, query=1, origin="first"), stored)
    maps = np.zeros((2, 3, 3, 4, 6), dtype=np.float32)
    maps[1, 0, :, 2, 3] = 0.4
    stored["first"][7].stored["decoder_cross"] = maps
    first, second, third = said(view, stored)
    assert first == "circle 0.80, matched to an object" and second == "layer 2, head 1: 60% to none of the cells"
    assert third == "0.40 of all weight lies on the ringed cell, a sink"
    maps[1, 0, 1:] = 0.0  # rows of the others are empty
    assert said(view, stored)[1:] == [
        "layer 2, head 1: 100% to none of the cells",
        "0.13 of all weight lies on the ringed cell",
    ]


def test_weights_of_queries_that_are_not_shown_are_no_null_key(stored):
    rows = np.array([[0.5, 0.2, 0.0, 0.3], [0.1, 0.1, 0.2, 0.2], [0.0, 0.0, 0.0, 1.0]], dtype=np.float32)
    stored["first"][7].stored["decoder_self"] = np.tile(rows, (2, 3, 1, 1))
    view = consistent(View("first", 7, site="decoder_self", origin="first"), stored)
    told = [said(view, stored, query)[1] for query in range(3)]
    assert told[0] == "layer 1, mean over heads: 30% of the weight goes to queries not shown"
    assert told[1].endswith(": 20% of the weight goes to queries not shown, 40% to none of the queries")
    assert said(view, stored, 0)[2] == "0.50 of all weight lies on query 3, a sink"
