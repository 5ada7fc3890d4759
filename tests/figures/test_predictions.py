"""Pictures of one's own: detections of every run, maps of every detection, and what is written beside them."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from detrlib.figures import predictions
from detrlib.figures.overlay import overlay, text_colour
from detrlib.figures.predictions import MapChoice, views_of
from detrlib.figures.style import NOTHING, Nothing


def test_a_panel_for_each_run_with_boxes_classes_and_scores(make_detected, titles, boxes_in, texts):
    picture = {"first": make_detected(), "second": make_detected(count=1)}
    drawn = predictions.detections_by_run(picture)
    assert titles(drawn) == ["first: 3 detections", "second: 1 detection"]
    assert len(boxes_in(drawn.axes[0], "#0072B2")) == 1 and len(boxes_in(drawn.axes[0], "#D55E00")) == 2
    assert "square 0.90" in texts(drawn) and "circle 0.80" in texts(drawn)


def test_views_are_layers_heads_and_explanations(make_detected):
    detected = make_detected(sites=("encoder_self",))
    detected.explanations = {"relevance": np.full((3, 4, 6), 2.0, dtype=np.float32)}
    views = views_of(detected)
    assert list(views) == ["layer 1", "layer 2", "encoder layer 1", "explanation: relevance"]
    maps = detected.example.maps()
    assert views["layer 2"].shape == (3, 4, 4, 6) and np.array_equal(views["layer 2"][1, 3], maps[1, 2, 1])
    assert np.allclose(views["layer 1"][2, 0], maps[0, :, 2].mean(0))
    # The encoder's cell in the middle of the box of the first detection, (20, 20) of 96 x 64 pixels in 6 x 4 cells.
    assert np.allclose(views["encoder layer 1"][0, 1], detected.example.maps("encoder_self")[0, 0, 6 + 1])
    assert views["explanation: relevance"].shape == (3, 1, 4, 6)
    assert np.allclose(views["explanation: relevance"].sum((1, 2, 3)), 1)
    assert views_of(make_detected(attention=False)) == {}


def test_a_view_names_its_map_or_says_that_there_is_none(make_detected):
    views = views_of(make_detected())
    title, maps = MapChoice(layer=0, head=1).of(views)
    assert title == "layer 1" and np.array_equal(maps, views["layer 1"][:, 2])
    assert MapChoice(layer=0, head=1).words(title) == "layer 1, head 2" and "mean" in MapChoice().words(title)
    for view in (MapChoice(layer=2), MapChoice(head=3), MapChoice("encoder_self")):
        with pytest.raises(Nothing):
            view.of(views)


def test_maps_of_detections_in_one_scale_with_the_numbers_of_the_picture(make_detected, titles, texts):
    picture = {"first": make_detected(), "second": make_detected(count=1)}
    drawn = predictions.maps_by_detection(picture, MapChoice(layer=0))
    own = titles(drawn)
    assert own[0].startswith("first\nlayer 1, mean over heads\neach head: 9.0 of 24 keys")
    assert own[1:4] == ["square 0.90", "circle 0.80", "square 0.40"] and own[4].startswith("second")
    assert any("/24 cells" in text for text in texts(drawn)) and any("in box" in text for text in texts(drawn))
    weights = views_of(picture["first"])["layer 1"][:, 0]
    highest = overlay(weights[0] / weights.max())  # colours of a map depend on the others
    shown = drawn.axes[1].images[-1].get_array()
    assert shown.shape == highest.shape and np.array_equal(shown[..., 3] == 0, weights[0] == 0)
    none = predictions.maps_by_detection({"first": make_detected(attention=False)})
    assert none.get_label() == NOTHING


@pytest.mark.parametrize("shape", [(1, 1), (5000, 3), (3, 5000)])
def test_figures_of_pictures_of_any_shape_have_a_bearable_size(make_detected, shape):
    detected = make_detected(size=shape)
    drawn = predictions.detections_by_run({"run": detected})
    width, height = drawn.get_size_inches()
    assert 0.2 < height / width < 2.5


def test_contact_sheet(make_detected, titles, boxes_in):
    one = make_detected()
    drawn = predictions.contact_sheet([(one.image(50), one)] * 60)
    assert len(drawn.axes) == predictions.SHEET and titles(drawn)[0] == "picture 1: 3"
    assert len(boxes_in(drawn.axes[0])) == 3
    assert predictions.contact_sheet([]).get_label() == NOTHING


def test_a_class_has_one_colour_in_all_runs_and_text_that_can_be_read():
    first, second = {1: "circle", 2: "square"}, {1: "square", 2: "star"}
    colours = predictions.class_colours([first, second])
    assert list(colours) == ["circle", "square", "star"] and colours["circle"] != colours["square"]
    assert colours == predictions.class_colours([first, second, first])
    assert all(to_hex(colour).lower() == colour.lower() for colour in colours.values())
    assert text_colour("#88CCEE") == "black" and text_colour("#0072B2") == "white"


def test_a_crowd_has_thin_lines_captions_that_can_be_read_and_counts(make_detected, titles, boxes_in):
    few = make_detected()
    tiled = {name: np.concatenate([getattr(few, name)] * 40) for name in ("boxes", "scores", "labels", "queries")}
    many = replace(few, **tiled, names=few.names * 40, example=None)
    drawn = predictions.detections_by_run({"few": few, "many": many})
    first, second = titles(drawn)
    assert first == "few: 3 detections" and second.startswith("many: 120 detections, ") and "of them named\n" in second
    widths = [axes.patches[-1].get_linewidth() for axes in drawn.axes]
    assert widths[1] < widths[0] and len(boxes_in(drawn.axes[1])) == 120
    assert 0 < len(drawn.axes[1].texts) <= 30
