"""The viewer: what clicks and controls mean, and that it is a picture where there is no browser."""

import base64

import numpy as np
import pytest
from drawn import texts
from matplotlib.backend_bases import MouseEvent

from detrlib.figures import choices, queries
from detrlib.figures.viewer import AttentionViewer, View, clicked, consistent, query_in, weights_in
from detrlib.runs.examples import Example

NAMES = {1: "circle", 2: "square"}


def example(image_id=7, layers=2, heads=3, shift=0, sites=()):
    """Three queries: two overlapping boxes, the smaller within the larger, and one alone; maps [L,H,3,4,6]."""
    random = np.random.default_rng(image_id + shift)
    maps = random.random((layers, heads, 3, 4, 6)).astype(np.float32)
    boxes = np.array([[0, 0, 40, 40], [10, 10, 20, 20], [60, 5, 80, 30]], dtype=np.float32)
    order = np.roll(np.arange(3), shift)
    own = {"decoder_self": random.random((layers, heads, 3, 3)).astype(np.float32)}
    own["encoder_self"] = random.random((1, heads, 24, 4, 6)).astype(np.float32)
    return Example(
        image_id=image_id,
        image=np.full((64, 96, 3), 200, dtype=np.uint8),
        true_boxes=boxes[[1, 2]],
        true_labels=np.array([1, 2]),
        boxes=boxes[order],
        labels=np.array([2, 1, 2])[order],
        scores=np.array([0.9, 0.8, 0.4]),
        matched=np.array([-1, 0, 1])[order],
        extent=np.array([4.0, 6.0]),
        queries=np.arange(3),
        stored={"decoder_cross": maps} | {site: own[site] for site in sites},
    )


@pytest.fixture
def stored():
    return {
        "first": {e.image_id: e for e in (example(7, sites=("encoder_self", "decoder_self")), example(8))},
        "second": {e.image_id: e for e in (example(7, layers=1, heads=2, shift=1), example(8, shift=1))},
    }


def test_a_click_means_the_smallest_box_that_holds_it_or_one_in_reach():
    boxes = example().boxes
    assert choices.clicked_query(boxes, 15, 15, 1) == 1
    assert choices.clicked_query(boxes, 30, 30, 1) == 0
    assert choices.clicked_query(boxes, 81, 10, 2) == 2
    assert choices.clicked_query(boxes, 90, 60, 2) is None
    assert choices.clicked_query(boxes[:0], 1, 1, 5) is None


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


def press(viewer, run, x, y):
    """A mouse button pressed at pixel (x, y) of the image of `run`."""
    viewer.figure.canvas.draw()
    place = viewer.panels[run].transData.transform((x, y))
    viewer.canvas.callbacks.process("button_press_event", MouseEvent("button_press_event", viewer.canvas, *place, 1))


def test_the_widget_follows_mouse_and_controls(stored):
    viewer = AttentionViewer({run: list(found.values()) for run, found in stored.items()}, NAMES, image_id=7)
    assert viewer.view.run == "first" and viewer.view.beside == "second" and viewer.view.layer == 1
    press(viewer, "first", 70, 20)
    assert viewer.view.query == 2 and any("square 0.40" in text for text in texts(viewer.figure))
    press(viewer, "second", 15, 15)
    assert viewer.view.origin == "second" and viewer.stored["second"][7].matched[viewer.view.query] == 0
    before = viewer.view
    press(viewer, "first", 92, 60)  # beside all boxes
    assert viewer.view == before
    for name, value in {
        "layer": 0,
        "head": 1,
        "truth": False,
        "predictions": False,
        "attention": False,
        "beside": "",
        "site": "decoder_self",
        "image_id": 8,
        "run": "second",
    }.items():
        viewer.controls[name].value = value
        assert getattr(viewer.view, name) == value, name
    assert viewer.view.site == "decoder_cross", "the other image has no other maps"
    assert viewer.controls["site"].value == "decoder_cross"


def test_without_a_browser_it_is_a_picture(stored):
    viewer = AttentionViewer({run: list(found.values()) for run, found in stored.items()}, NAMES)
    bundle = viewer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"


def test_classes_are_chosen_by_name_and_by_their_best_detection(stored):
    assert choices.chosen_labels(["square"], NAMES) == [2]
    with pytest.raises(ValueError, match="no class 'squares'; did you mean 'square'"):
        choices.chosen_labels(["squares"], NAMES)
    runs = {run: list(found.values()) for run, found in stored.items()}
    best = choices.best_of_class(runs, 2)
    assert best.best in runs and set(best.found) == set(runs)
    assert choices.best_of_class(runs, 5) is None


def test_matching_names_objects_and_queries():
    drawn = queries.matching(example(), NAMES)
    shown = " ".join(texts(drawn))
    assert "#1: circle 0.80, 1.00" in shown and "#0: square 0.90" in shown
