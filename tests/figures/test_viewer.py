"""The viewer: what clicks and controls mean, and that it is a picture where there is no browser."""

import base64
from collections.abc import Mapping

import numpy as np
import pytest
from matplotlib.backend_bases import MouseEvent
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from detrlib.errors import RunError
from detrlib.figures.overlay import overlay, scale_of
from detrlib.figures.viewer import AttentionViewer, draw_view
from detrlib.figures.views import View, consistent, query_in, sink_in, weights_in

NAMES = {1: "circle", 2: "square"}


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """The viewer is not held to that: it makes pyplot ready for the browser."""


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


def test_the_mouse_tells_the_cell_below_it_and_its_weight(stored):
    view = consistent(View("first", 7, origin="first", query=1), stored)
    (axes,) = draw_view(Figure(layout="constrained"), view, stored, NAMES).values()
    weights = weights_in(view, stored["first"][7], 1)
    for row, column in ((0, 0), (2, 5)):  # cells are 16 pixels wide and high
        told = axes.format_coord(16 * column + 1, 16 * row + 14)
        assert told == f"row {row + 1}, column {column + 1}: weight {weights[row, column]:.3g}"
    assert axes.format_coord(-20, 0) == "" and not any(image.mouseover for image in axes.images)


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("site", ["decoder_cross", "encoder_self", "decoder_self"])
def test_the_sink_is_ringed_where_keys_are_cells(stored, site, sink):
    view = consistent(View("first", 7, site=site, origin="first", head=1, layer=1, sink=sink), stored)
    (axes,) = draw_view(Figure(layout="constrained"), view, stored, NAMES).values()
    rings = [patch for patch in axes.patches if isinstance(patch, Circle)]
    assert len(rings) == 2 * (sink and site != "decoder_self")  # with a white rim
    for ring in rings:  # cells are 16 pixels wide and high
        key = sink_in(view, stored["first"][7]).key
        assert ring.center == (key % 6 * 16 + 7.5, key // 6 * 16 + 7.5)


@pytest.mark.parametrize("above", [-0.01, 0.01])
def test_what_a_sink_is_each_run_says_itself(stored, above):
    class Measured(dict):
        """As of `engine.examples`: images, and the threshold that the run was measured with."""

        sink_threshold: float

    stored["first"] = Measured(stored["first"])
    view = consistent(View("first", 7, site="encoder_self", origin="first", head=1, layer=1), stored)
    stored["first"].sink_threshold = sink_in(view, stored["first"][7]).weight + above
    (axes,) = draw_view(Figure(layout="constrained"), view, stored, NAMES).values()
    assert axes.get_title(loc="left").endswith(", a sink") == (above < 0)


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
        "sink": False,
        "beside": "",
        "site": "decoder_self",
        "image_id": 8,
        "run": "second",
    }.items():
        viewer.controls[name].value = value
        assert getattr(viewer.view, name) == value, name
    assert viewer.view.site == "decoder_cross", "the other image has no other maps"
    assert viewer.controls["site"].value == "decoder_cross"


def test_the_second_run_chosen_as_the_first_changes_places_with_it(stored):
    viewer = AttentionViewer({run: list(found.values()) for run, found in stored.items()}, NAMES, image_id=7)
    assert viewer.canvas._figure_label == "first 7"  # what a saved picture is called
    viewer.controls["run"].value = "second"
    assert (viewer.view.run, viewer.view.beside) == ("second", "first") and list(viewer.panels) == ["second", "first"]
    assert viewer.controls["beside"].value == "first" and viewer.canvas._figure_label.startswith("second")


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
