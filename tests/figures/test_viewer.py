"""The viewer: what clicks and controls mean, and that it is a picture where there is no browser."""

import base64
from collections.abc import Mapping

import numpy as np
import pytest
from matplotlib.backend_bases import MouseEvent
from matplotlib.figure import Figure

from detrlib.errors import RunError
from detrlib.figures.overlay import overlay, scale_of
from detrlib.figures.viewer import AttentionViewer, View, clicked, consistent, draw_view, query_in, weights_in

NAMES = {1: "circle", 2: "square"}


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """The viewer is not held to that: it makes pyplot ready for the browser."""


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


@pytest.mark.parametrize("scale", ["shared", "own"])
def test_two_runs_share_their_colours_unless_each_has_its_own(stored, scale):
    view = consistent(View("first", 7, beside="second", origin="first", query=1, scale=scale), stored)
    drawn = Figure(layout="constrained")
    panels = draw_view(drawn, view, stored, NAMES)
    maps = [weights_in(view, stored[run][7], query_in(view, stored, run)) for run in panels]
    for axes, weights in zip(panels.values(), maps, strict=True):
        compared = maps if scale == "shared" else [weights]
        np.testing.assert_allclose(axes.images[-1].get_array(), overlay(weights, scale_of(compared)), atol=1e-6)


def test_queries_without_weight_have_boxes_without_colour(stored):
    stored["first"][7].stored["decoder_self"][:] = [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]
    view = consistent(View("first", 7, site="decoder_self", origin="first", query=0), stored)
    (axes,) = draw_view(Figure(layout="constrained"), view, stored, NAMES).values()
    filled = [patch.get_facecolor()[3] for patch in axes.patches if patch.get_fill()]
    assert filled[0] > 0.5 and filled[1:] == [0, 0]


def press(viewer, run, x, y):
    """A mouse button pressed at pixel (x, y) of the image of `run`."""
    viewer.figure.canvas.draw()
    place = viewer.panels[run].transData.transform((x, y))
    viewer.canvas.callbacks.process("button_press_event", MouseEvent("button_press_event", viewer.canvas, *place, 1))


def test_the_widget_follows_mouse_and_controls(stored, texts):
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
        "scale": "own",
        "logarithmic": False,
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


class Lazy(Mapping):
    """Images that are made when they are asked for; the last one cannot be."""

    def __init__(self, make):
        self.make, self.made = make, []

    def __len__(self):
        return 3

    def __iter__(self):
        return iter((8, 7, 9))

    def __getitem__(self, image_id):
        if image_id == 9:
            raise RunError("no checkpoint <last.pt>")
        self.made.append(image_id)
        return self.make(image_id)

    def __contains__(self, image_id):
        return image_id in (8, 7, 9)

    def title(self, image_id):
        return "2 of 2 missed" if image_id == 8 else ""


def test_images_are_computed_when_they_are_shown(make_example):
    images = Lazy(make_example)
    viewer = AttentionViewer({"run": images}, NAMES)
    labels = [label for label, _ in viewer.controls["image_id"].options]
    assert labels == ["0: id 8 (2 of 2 missed)", "1: id 7", "2: id 9"] and set(images.made) == {8}
    viewer.controls["image_id"].value = 7
    assert viewer.view.image_id == 7 and set(images.made) == {8, 7}
    viewer.controls["image_id"].value = 9
    assert "&lt;last.pt&gt;" in viewer.hint.value
    assert viewer.view.image_id == viewer.controls["image_id"].value == 7
