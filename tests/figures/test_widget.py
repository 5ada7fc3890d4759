"""The viewer with a kernel: the page holds one image, and asks for any other when it is wanted."""

import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files

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

    def __contains__(self, image_id):
        return image_id in (8, 7, 9)

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
    images = Lazy(make_example, at_once={8})
    viewer = AttentionViewer({"run": images}, NAMES)
    first, *others = scripts(viewer.page, PICTURE)
    assert images.made == [8] and first["name"] == "8" and "pending" not in first
    assert [(each["name"], each["pending"], each["stored"]) for each in others] == [
        ("7", True, False),
        ("9", True, False),
    ]
    picture = json.loads(ask(viewer, image="7")["picture"])
    assert images.made == [8, 7] and picture["objects"]["names"] == ["circle", "square"]
    assert ask(viewer, image="9") == {"fault": "no checkpoint <last.pt>"}


def test_an_image_of_other_data_with_the_same_number_is_not_shown_beside_it(make_example, scripts):
    other = make_example(7)
    other.true_boxes = other.true_boxes[:1]
    (picture,) = scripts(AttentionViewer({"first": {7: make_example(7)}, "other": {7: other}}, NAMES).page, PICTURE)
    assert [detected is None for detected in picture["detected"]] == [False, True]


def test_runs_that_number_their_classes_in_their_own_way_are_shown_with_their_own_names(make_example, scripts):
    other = make_example(7)
    other.labels, other.true_labels = other.labels - 1, other.true_labels - 1  # as data.contiguous has them
    names = {"first": NAMES, "other": {0: "circle", 1: "square"}}
    viewer = AttentionViewer({"first": {7: make_example(7)}, "other": {7: other}}, names)
    (picture,) = scripts(viewer.page, PICTURE)
    assert [detected["names"] for detected in picture["detected"]] == [["square", "circle", "square"]] * 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [(MemoryError, "memory is short"), (KeyError, "KeyError"), (KeyboardInterrupt, "choose another image")],
)  # the last: who waited too long
def test_a_fault_of_any_kind_is_an_answer(make_example, ask, kind, words, caplog):
    def faulty(image_id):
        if image_id == 7:
            raise kind
        return make_example(image_id)

    assert words in ask(AttentionViewer({"run": Lazy(faulty)}, NAMES), image="7")["fault"]
    assert bool(caplog.records) == (kind is KeyError), "of a defect the traceback is told"


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


# In a real browser: the frame of a notebook, whose kernel is this test.
KERNEL = """{
  globalThis.sent = [];
  const waiting = [];
  const ask = asked => new Promise(done => sent.push({number: waiting.push(done) - 1, asked}));
  globalThis.answer = ({number, answer}) => waiting[number](answer);
  Object.defineProperty(window, "frameElement", {value: {ask}});
}"""


@pytest.fixture
def live(browser, monkeypatch, tmp_path):
    """Opens the page of a widget, and answers with it what the page asks for until it asks no more."""
    script = browser.ask("Page.addScriptToEvaluateOnNewDocument", source=KERNEL)["identifier"]

    def answer(viewer):
        monkeypatch.setattr(viewer, "send", lambda reply: browser.value(f"answer({json.dumps(reply)})"))
        while messages := browser.value("sent.splice(0)"):
            for message in messages:
                viewer._handle_custom_msg(message, [])
            browser.value("new Promise(done => setTimeout(done, 30))")
        browser.settled()

    def live(viewer, at_once=True):
        (tmp_path / "live.html").write_text(viewer.page, encoding="utf-8")
        browser.open((tmp_path / "live.html").as_uri())
        if at_once:
            answer(viewer)
        return lambda: answer(viewer)

    yield live
    browser.ask("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


class Kernel(dict):
    """Images of a run by number, of which some are stored and one cannot be computed."""

    at_once = (8,)
    errors = pd.DataFrame({"missed": [0, 0, 9], "false_positives": [0, 1, 0]}, index=[7, 8, 9])

    def __getitem__(self, image_id):
        if image_id == 9:
            raise RunError("no checkpoint <last.pt>")
        return super().__getitem__(image_id)


def test_a_kernel_is_asked_for_images_and_its_faults_are_told(see, live, stored, browser):
    images = Kernel(stored["first"] | {9: None})
    answer = live(AttentionViewer({"first": images}, NAMES, image_id=7))
    assert see.heading().startswith("image 7")
    assert (see.listed()[0], see.badges()[0]) == ("9", "9 missed, 0 wrong")  # as the run has it
    see.choose("order", "given")
    assert see.badges() == ["3 detections", "3 detections", "not looked at yet"]  # the stored one has come
    browser.value("document.querySelectorAll('#list button')[1].click()")
    answer()
    assert see.heading().startswith("image 8") and see.chosen()
    see.assert_drawn(see.map(), images[8].maps(layer=-1)[:, 0].mean(0))
    browser.value("document.querySelectorAll('#list button')[2].click()")
    answer()
    assert see.heading() == "image 9: no checkpoint <last.pt>"
    see.press("ArrowLeft")
    assert see.heading().startswith("image 8")
    assert browser.faults() == []


def test_what_is_wanted_is_shown_though_other_images_arrive_meanwhile(see, live, stored, browser, make_example):
    images = Kernel(stored["first"] | {5: make_example(5)})
    answer = live(AttentionViewer({"first": images}, NAMES, image_id=7), at_once=False)
    browser.value("show(pictures.find(picture => picture.name === '5')), 0")  # and the stored one is on its way
    answer()
    assert see.heading().startswith("image 5") and see.chosen()
    assert browser.faults() == []


def test_the_heading_tells_what_is_awaited_until_one_goes_elsewhere(see, live, stored, browser, make_example):
    images = Kernel(stored["first"] | {5: make_example(5)})
    answer = live(AttentionViewer({"first": images}, NAMES, image_id=7))
    by_name = "show(pictures.find(picture => picture.name === '{}'))"
    browser.value(f"{by_name.format(8)}, {by_name.format(5)}, 0")  # the first is here, and is drawn meanwhile
    browser.settled()
    assert see.heading().startswith("image 5: asked of the kernel")
    browser.value(f"{by_name.format(7)}, 0")
    see.choose("score", 0.35)
    answer()
    assert see.heading().startswith("image 7") and browser.faults() == []


def test_of_images_that_are_passed_by_the_last_one_alone_is_asked_for(see, live, stored, browser, make_example):
    images = Kernel({7: stored["first"][7]} | {number: make_example(number) for number in (3, 4, 5)})
    answer = live(AttentionViewer({"first": images}, NAMES, image_id=7))
    see.choose("order", "given")
    browser.value(
        "globalThis.asked_for = [], sent.push = (one) => { asked_for.push(one.asked.image); "
        "return Array.prototype.push.call(sent, one); }, 0"
    )
    for _ in range(3):
        see.press("ArrowRight")
    answer()
    assert see.heading().startswith("image 5") and see.chosen()
    assert see.value("asked_for") == ["3", "5"]


def test_a_kernel_that_is_not_reached_is_told_and_can_be_asked_again(see, live, stored, browser, make_example):
    images = Kernel({7: stored["first"][7], 5: make_example(5)})
    answer = live(AttentionViewer({"first": images}, NAMES, image_id=7))
    see.press("ArrowRight")
    browser.value("answer({number: sent.pop().number, answer: Promise.reject(Error('Cannot send'))})")
    browser.wait("document.getElementById('heading').textContent.includes('run the cell again (Cannot send)')")
    browser.value("show(state.going), 0")
    answer()
    assert see.heading().startswith("image 5") and see.chosen() and browser.faults() == []


def test_known_faults_are_those_of_all_classes_and_scores(see, live, stored):
    live(AttentionViewer({"first": Kernel(stored["first"] | {9: None})}, NAMES, image_id=7))
    see.choose("score", 0.5)
    assert dict(zip(see.listed(), see.badges(), strict=True))["9"] == "not looked at yet"


def test_maps_are_offered_though_the_first_image_has_none(see, live, stored, make_example, browser):
    nothing = make_example(5)
    for name in ("boxes", "labels", "scores", "matched", "queries"):
        setattr(nothing, name, getattr(nothing, name)[:0])
    nothing.stored = {}
    answer = live(AttentionViewer({"first": Kernel({5: nothing} | {7: stored["first"][7]})}, NAMES, image_id=5))
    assert see.value("document.getElementById('attention').hidden")
    see.press("ArrowRight")
    answer()
    assert see.heading().startswith("image 7") and see.value("control('layer').value") == "1"
    see.assert_drawn(see.map(), stored["first"][7].maps(layer=-1)[:, 0].mean(0))


def test_any_cell_of_an_encoder_shows_where_it_looks_in_every_run(see, live, stored, browser):
    stored["second"][7] = stored["first"][7]
    answer = live(AttentionViewer(stored, NAMES, image_id=7))
    see.choose("site", "encoder_self")
    see.press("Escape")  # no detection asks any more, and no map is shown
    see.value(
        "(({x, y, width, height}) => document.querySelector('.picture').dispatchEvent(new MouseEvent('click',"
        " {clientX: x + 0.95 * width, clientY: y + 0.3 * height})))"
        "(document.querySelector('.picture').getBoundingClientRect())"
    )  # the panels are drawn when the kernel has answered, and not before
    answer()
    example = stored["first"][7]
    for head in (0, 2):
        see.choose("head", head)
        maps = example.maps("encoder_self", 0)[:, 11]
        for panel in (0, 1):
            see.assert_drawn(see.map(panel), maps[head - 1] if head else maps.mean(0))
            assert see.numbers(panel)["cell"] == "row 2, column 6" and see.chosen() == []
    key = "document.querySelector('.picture').dispatchEvent(new KeyboardEvent('keydown', {{key: '{}'}}))"
    see.value(key.format("ArrowLeft")), see.value(key.format("Enter"))
    answer()
    assert see.numbers()["cell"] == "row 2, column 5"
    see.assert_drawn(see.map(), example.maps("encoder_self", 0)[1, 10])
    see.choose("site", "decoder_cross")
    assert see.numbers() == {}
    see.press("j")
    see.choose("site", "encoder_self")
    assert "cell" not in see.numbers() and len(see.chosen()) == 2
    assert browser.faults() == []


def test_the_frame_of_a_widget_passes_questions_and_answers_on(browser, stored, tmp_path):
    viewer = AttentionViewer({"first": Kernel(stored["first"])}, NAMES, image_id=7)
    replies, messages = [], "globalThis.sent = [], globalThis.handlers = []"
    viewer.send = replies.append
    model = "{get: name => values[name], send: message => sent.push(message), on: (_, f) => handlers.push(f), off() {}}"
    values = json.dumps({"page": viewer.page, "height": 400}).replace("<", "\\u003c")
    script = files("detrlib.figures").joinpath("page_frame.js").read_text()
    script = script.replace("export default {render};", f"render({{model: {model}, el: document.body}});")
    page = f"<!doctype html><title>n</title><body><script>const values = {values}; {messages};</script>"
    (tmp_path / "notebook.html").write_text(f"{page}<script>{script}</script>", encoding="utf-8")
    browser.ask("Page.navigate", url=(tmp_path / "notebook.html").as_uri())
    browser.wait("globalThis.sent?.length === 1")
    viewer._handle_custom_msg(browser.value("sent[0]"), [])
    assert "picture" in replies[0]["answer"]
    browser.value(f"handlers.forEach(handler => handler({json.dumps(replies[0])}))")
    shown = "document.querySelector('iframe').contentDocument"
    browser.wait(f"[...{shown}.querySelectorAll('#list img')].every(image => image.src)")
