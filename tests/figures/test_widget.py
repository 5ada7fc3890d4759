"""The viewer with a kernel: the page holds one image, and asks for any other when it is wanted."""

import html
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from detrlib.errors import RunError
from detrlib.figures.widget import AttentionViewer

NAMES = {1: "circle", 2: "square"}
PICTURE = 'class="picture"'


class Lazy(Mapping):
    """Images that are made when they are asked for; the last one cannot be."""

    def __init__(self, make, **about):
        self.make, self.made = make, []
        self.__dict__ |= about

    def __len__(self):
        return 3

    def __iter__(self):
        return iter((8, 7, 9))

    def __getitem__(self, image_id):
        if image_id == 9:
            raise RunError("no checkpoint <last.pt>")
        self.made.append(image_id)
        return self.make(image_id)


@pytest.fixture
def ask(monkeypatch):
    """Asks a widget as its page does, and returns what it answers."""

    def ask(viewer, **asked):
        told = []
        monkeypatch.setattr(viewer, "send", told.append)
        viewer._handle_custom_msg({"number": 3, "asked": asked}, [])
        (answer,) = told
        assert answer["number"] == 3
        return answer["answer"]

    return ask


def test_images_are_computed_when_they_are_asked_for(make_example, ask, scripts):
    images = Lazy(make_example, stored={8: None})
    viewer = AttentionViewer({"run": images}, NAMES)
    first, *others = scripts(viewer.page, PICTURE)
    assert images.made == [8] and first["name"] == "8" and "pending" not in first
    assert [(each["name"], each["pending"], each["stored"]) for each in others] == [
        ("7", True, False),
        ("9", True, False),
    ]
    picture = scripts(
        f'<script type="application/json">{ask(viewer, image="7")["picture"]}</script>'.replace('json"', 'json" x'), "x"
    )[0]
    assert images.made == [8, 7] and picture["objects"]["names"] == ["circle", "square"]
    assert ask(viewer, image="9") == {"fault": "no checkpoint <last.pt>"}


def test_an_image_of_other_data_with_the_same_number_is_not_shown_beside_it(make_example, scripts):
    other = make_example(7)
    other.true_boxes = other.true_boxes[:1]
    (picture,) = scripts(AttentionViewer({"first": {7: make_example(7)}, "other": {7: other}}, NAMES).page, PICTURE)
    assert [detected is None for detected in picture["detected"]] == [False, True]


@pytest.mark.parametrize("kind", [MemoryError, OSError, KeyboardInterrupt])  # the last: who waited too long
def test_a_fault_of_any_kind_is_an_answer(make_example, ask, kind):
    def faulty(image_id):
        if image_id == 7:
            raise kind
        return make_example(image_id)

    assert ask(AttentionViewer({"run": Lazy(faulty)}, NAMES), image="7") == {"fault": kind.__name__}


def test_known_faults_are_told_before_an_image_is_computed(make_example, scripts):
    errors = pd.DataFrame({"missed": [3], "false_positives": [1]}, index=[7])
    viewer = AttentionViewer({"run": Lazy(make_example, errors=errors), "other": Lazy(make_example)}, NAMES, 8)
    assert [each["faults"] for each in scripts(viewer.page, PICTURE)[1:]] == [[[3, 1], None], [None, None]]


def test_any_cell_of_an_encoder_can_be_asked(stored, ask, unpacked):
    viewer = AttentionViewer(stored, NAMES, image_id=7)
    example = stored["first"][7]
    answer = ask(viewer, image="7", run="first", cell=[0.99, 0.3])  # of 4 x 6 cells the last one of the second row
    assert (answer["cell"], answer["columns"]) == (11, 6)
    assert np.allclose(answer["box"], [5 / 6, 1 / 4, 1 / 6, 1 / 4], atol=1e-4)
    weights, numbers = unpacked(answer["maps"])
    own = example.maps("encoder_self", 0)[:, 11].reshape(3, -1)
    assert np.array_equal(weights[0, 0, 1:] > 0, own > 0) and np.allclose(weights[0, 0, 1:], own, rtol=0.04)
    assert np.array_equal(numbers["support"][0, 0, 1:], (own > 0).sum(-1))


def test_pictures_of_ones_own_have_their_names_and_no_objects(make_example, scripts):
    own = Lazy(make_example, annotated=False, title="photo {}.jpg".format)
    first, second, _ = scripts(AttentionViewer({"run": own}, NAMES).page, PICTURE)
    assert (first["title"], second["title"]) == ("photo 8.jpg", "photo 7.jpg") and "objects" not in first


def test_without_a_kernel_it_is_the_page_of_the_first_image(stored, scripts):
    bundle, _ = AttentionViewer(stored, NAMES, image_id=8, layer=0)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    page = html.unescape(re.search('srcdoc="(.*?)"', bundle["text/html"], re.DOTALL)[1])
    (picture,), (settings,) = scripts(page, PICTURE), scripts(page, 'id="settings"')
    assert picture["name"] == settings["image"] == "8" and settings["layer"] == 0
