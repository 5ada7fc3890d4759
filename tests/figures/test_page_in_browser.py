"""The page in a real browser: clicks and keys change what is drawn, and what is drawn and told is the library's."""

import shutil
from html import escape

import numpy as np
import pytest
import torch

from detrlib.figures.choices import corresponding_query
from detrlib.figures.page import STEPS, page_example, page_picture, write_page
from detrlib.figures.viewer import shown, write_viewer
from detrlib.metrics.detection import errors_by_image
from detrlib.metrics.failures import CAUSES, find_failures, worst_images
from detrlib.metrics.sparsity import gini
from detrlib.runs.examples import EXAMPLE_SCORE, Example
from detrlib.runs.results import load_matches

NAMES = {1: "circle", 2: "square"}
RUNS = ("first", "second")
PANEL = "document.querySelectorAll('.panel')[{}]"
CANVAS = PANEL + ".querySelector('canvas')"


@pytest.fixture
def opened(browser, tmp_path):
    """Writes a page of examples by run, opens it and returns it."""

    def opened(stored, address="", width=1280):
        names = dict.fromkeys(stored, NAMES)
        images = dict.fromkeys(image_id for of_run in stored.values() for image_id in of_run)
        pictures = [page_example({run: own.get(image) for run, own in stored.items()}, names) for image in images]
        path = tmp_path / "viewer.html"
        write_page(path, pictures, list(stored), names.values(), score=EXAMPLE_SCORE)
        browser.open(path.as_uri() + address, width)
        browser.settled()
        assert browser.faults() == []
        return path

    return opened


def test_a_click_chooses_the_smallest_box_and_shows_where_its_query_looked(see, opened, stored):
    opened({"first": stored["first"]}, "#image=7")
    example = stored["first"][7]
    for x, y, row in ((5, 35, 0), (15, 15, 1), (70, 15, 2)):  # the second lies within the first
        see.click(x / 96, y / 64)
        assert see.chosen() == [f"{NAMES[example.labels[row]]} {example.scores[row]:.2f}"]
        weights = example.maps(layer=-1)[:, row].mean(0)
        see.assert_drawn(see.map(), weights)
        assert see.numbers()["Gini"] == f"{gini(torch.from_numpy(weights.ravel())):.3f}"
    see.click(50 / 96, 60 / 64)
    assert see.chosen() == [] and see.numbers() == {} and see.value(f"{CANVAS.format(0)} === null")


def test_layers_heads_and_sites_are_those_of_the_library(see, opened, stored):
    opened({"first": stored["first"]}, "#image=7")
    example = stored["first"][7]
    for layer in (0, 1):
        for head in (0, 2):
            see.choose("layer", layer), see.choose("head", head)
            maps = example.maps(layer=layer)[:, 0]
            weights = maps[head - 1] if head else maps.mean(0)
            see.assert_drawn(see.map(), weights)
            zeros, _, rest = see.numbers()["zeros"].partition(" ")
            assert abs(float(zeros) - (weights == 0).mean()) < 6e-4 and rest.startswith(f"({(weights > 0).sum()} of 24")
    see.choose("site", "decoder_self")
    weights = example.maps("decoder_self", 1)[1, 0]
    assert "PAIBB" not in see.numbers() and see.value(f"{CANVAS.format(0)} === null")
    fills = see.value("[...document.querySelectorAll('.picture .box:not(.object)')].map(box => box.style.fill)")
    wanted = see.colours(weights[None])[0][::-1]  # the best detection is drawn last
    for fill, colour in zip(fills, wanted, strict=True):
        assert np.abs(np.array([float(part) for part in fill[5:-1].split(",")])[:3] - colour[:3]).max() < 12


def test_two_runs_share_their_colours_unless_each_has_its_own_and_can_be_swapped(see, opened, stored):
    opened(stored, "#image=7&layer=1")
    rows = [0, corresponding_query(stored["first"][7], 0, stored["second"][7])]
    maps = [stored[run][7].maps(layer=0)[:, row].mean(0) for run, row in zip(RUNS, rows, strict=True)]
    for panel, other in ((0, 1), (1, 0)):
        see.assert_drawn(see.map(panel), maps[panel], maps[other])
    see.press("c")
    for panel in (0, 1):
        see.assert_drawn(see.map(panel), maps[panel])
    see.press("x")
    assert see.value("[...document.querySelectorAll('.panel h3')].map(title => title.firstChild.data)") == [*RUNS[::-1]]
    see.assert_drawn(see.map(0), maps[1])
    see.choose("run", 0)  # the one beside it: both stay, in the other order
    see.assert_drawn(see.map(0), maps[0]), see.assert_drawn(see.map(1), maps[1])
    see.choose("beside", -1)
    assert see.value("document.querySelectorAll('.panel').length") == 1
    see.choose("beside", 0)  # the run that is shown alone: another one takes its place
    assert see.value("[...document.querySelectorAll('.panel h3')].map(title => title.firstChild.data)") == [*RUNS[::-1]]


def test_keys_go_through_images_detections_layers_and_heads(see, opened, stored):
    opened(stored)
    see.choose("order", "given")
    see.value("document.querySelector('#list button').click()")
    assert see.heading().startswith("image 7")
    for key, wanted in (("ArrowRight", "image 8"), ("ArrowRight", "image 7"), ("ArrowLeft", "image 8")):
        see.press(key)
        assert see.heading().startswith(wanted)
    for key, control, wanted in (("[", "layer", "0"), ("]", "layer", "1"), ("h", "head", "1"), ("H", "head", "0")):
        see.press(key)
        assert see.value(f"document.getElementById('{control}').value") == wanted
    first = see.chosen()
    see.press("j")
    assert see.chosen() != first
    see.press("k")
    assert see.chosen() == first
    see.press("Escape")
    assert see.chosen() == []
    see.press("?")
    assert see.value("document.getElementById('help').open")
    see.value("control('letters').click(), control('help').close()")
    for key, nothing in (("j", see.chosen), ("?", lambda: see.value("control('help').open"))):
        see.press(key)
        assert not nothing(), "letters can be switched off"
    see.press("ArrowRight")
    assert see.heading().startswith("image 7")


def test_the_pointer_tells_the_weight_of_a_cell_in_both_runs(see, opened, stored, browser):
    example = stored["first"][7]
    example.stored["decoder_cross"][1, 0, 0, 1, 2] = 1e-12  # below what the page can tell from others
    opened({"first": stored["first"]}, "#image=7&layer=2&head=1")
    see.click(5 / 96, 35 / 64)  # the first detection, in the third row and the first column
    weights = example.maps(layer=1)[0, 0]
    for row in range(4):
        for column in range(6):
            at = f"pointAt({(column + 0.5) / 6}, {(row + 0.5) / 4})"
            browser.value(f"globalThis.pointAt = (x, y) => {{ say(x, y); }}; {at}")
            place, _, told = see.value("document.querySelector('.readout').textContent").partition(": ")
            assert place == f"row {row + 1}, column {column + 1}"
            assert (told == "0") == (weights[row, column] == 0)
            assert told.startswith("≤ ") == ((row, column) == (1, 2))
            least = weights[row, column] if (row, column) != (1, 2) else 2.0 ** (-254 / STEPS) * weights.max()
            assert abs(float(told.removeprefix("≤ ")) - least) <= 0.04 * least


def test_after_a_click_on_a_picture_arrow_keys_are_those_of_the_page(see, opened, stored):
    opened(stored)
    focused = see.value(
        "(document.querySelector('#layer').focus(), document.querySelector('.picture').dispatchEvent("
        "new MouseEvent('mousedown', {bubbles: true, cancelable: true})), document.activeElement.tagName)"
    )
    assert focused == "BODY"


def test_arrow_keys_in_a_picture_tell_the_weight_of_one_cell_after_another_and_enter_chooses(see, opened, stored):
    opened(stored, "#image=7&layer=2&head=1")
    weights = stored["first"][7].maps(layer=1)[0, 0]
    see.value("document.querySelector('.picture').focus()")
    read = "[...document.querySelectorAll('.readout')].map(readout => readout.textContent)"
    for key, row, column in (("ArrowUp", 1, 3), ("ArrowLeft", 1, 2), *(("ArrowDown", at, 2) for at in (2, 3, 3))):
        see.press(key)
        told = see.value(read)
        assert all(one.startswith(f"row {row + 1}, column {column + 1}: ") for one in told) and len(told) == 2
        assert abs(float(told[0].split()[-1]) - weights[row, column]) <= 0.04 * weights[row, column]
    mark, picture = (
        see.value(f"(({{x, y, width}}) => [x, y, width])(document.querySelector('{it}').getBoundingClientRect())")
        for it in (".at", ".picture")
    )
    assert np.allclose(mark[:2], [picture[0] + picture[2] / 3, picture[1] + picture[2] * 2 / 3 * 3 / 4], atol=1)
    see.press("h")  # another map, of which the same cell is told
    assert see.value(read)[0].startswith("row 4, column 3: ") and see.heading().startswith("image 7")
    for key in ("ArrowUp", "ArrowUp", "ArrowUp", "ArrowRight", "ArrowRight", "Enter"):
        see.press(key)
    assert see.chosen()[0] == "square 0.40"  # the box at the upper right
    assert see.value("document.activeElement.matches('.picture')")


def test_faults_are_counted_as_the_library_counts_them_and_the_worst_come_first(see, browser, evaluated_once, tmp_path):
    runs = [shutil.copytree(evaluated_once, tmp_path / run) for run in RUNS]
    browser.open(write_viewer(runs, tmp_path / "viewer.html").as_uri())
    browser.settled()
    wanted = errors_by_image(load_matches(runs[0]), EXAMPLE_SCORE)
    pictures = see.listed()
    wanted = wanted.loc[[int(picture) for picture in sorted(pictures, key=int)]]
    wanted = wanted.sort_values(["missed", "false_positives"], ascending=False, kind="stable")
    assert pictures == [str(image_id) for image_id in wanted.index]
    assert see.badges() == [f"{row.missed} missed, {row.false_positives} wrong" for row in wanted.itertuples()]


def test_every_order_puts_its_own_images_first(see, opened, make_example):
    """Images: one as it should be, one with a confident mistake, one whose attention is elsewhere."""
    images = {number: make_example(number, matched=(-1, 0, 1)) for number in (1, 2, 3)}
    for example in images.values():
        example.scores, example.labels = np.array([0.35, 0.9, 0.8]), np.array([2, 1, 2])
    images[2].scores[0] = 0.95
    images[3].stored["decoder_cross"][:, :, 2] = 0
    images[3].stored["decoder_cross"][:, :, 2, 3, 0] = 1  # the lower left; its object is at the upper right
    other = {number: make_example(number, matched=(-1, 0, 1)) for number in (1, 2, 3)}
    for example in other.values():
        example.scores, example.labels = np.array([0.35, 0.9, 0.8]), np.array([2, 1, 2])
    other[1].scores[2] = 0.4
    other[2].scores[0] = 0.9
    opened({"first": images, "second": other})
    for order, first, badge, about in (
        ("wrong", "2", "square 0.95", "square 0.95"),
        ("paibb", "3", "1 of 2 zero", "square 0.80"),
        ("apart", "1", "square 0.80, in second 0.40", "square 0.80"),
        ("most", "1", "3 detections", "square 0.35"),
    ):
        see.choose("order", order)
        assert (see.listed()[0], see.badges()[0], see.chosen()[0]) == (first, badge, about), order
    see.choose("order", "missed")
    see.choose("score", 0.85)  # now every square is missed
    assert see.badges() == ["1 missed, 1 wrong", "1 missed, 0 wrong", "1 missed, 0 wrong"]
    see.choose("name", "circle")
    assert set(see.badges()) == {"0 missed, 0 wrong"}


def test_the_order_by_paibb_says_of_how_many_maps_it_is(see, opened, make_example, monkeypatch):
    example = make_example()
    example.stored["decoder_cross"][:, :, 1] = np.eye(24)[18].reshape(4, 6)  # of the first object, which lies elsewhere
    for kept, badge in ((30, "1 of 2 zero"), (1, "1 of 1 with maps zero")):  # both objects are matched
        monkeypatch.setattr("detrlib.figures.page.MOST_MAPS", kept)
        opened({"first": {7: example}})
        see.choose("order", "paibb")
        assert see.badges() == [badge]


@pytest.fixture
def crowded():
    """Makes images whose detections are moved objects, of which some have another class, and what COCO knows of it."""

    def make(count, objects=4, detections=14, size=(64, 96)):
        random, examples, annotations, detected = np.random.default_rng(5), {}, [], []
        for image_id in range(1, count + 1):
            corners = np.stack([random.uniform(0, 60, objects), random.uniform(0, 30, objects)], 1)
            true = np.hstack([corners, corners + random.uniform(12, 30, (objects, 2))]).astype(np.float32)
            labels, of = random.integers(1, 3, objects), random.integers(0, objects, detections)
            boxes = true[of] + random.normal(0, 1, (detections, 4)) * random.choice([1, 6, 15], (detections, 1))
            boxes = np.hstack([boxes[:, :2], np.maximum(boxes[:, 2:], boxes[:, :2] + 3)]).astype(np.float32)
            scores = np.sort(random.uniform(0.31, 1, detections).round(4))[::-1]
            found = np.where(random.random(detections) < 0.3, 3 - labels[of], labels[of])
            none = {"matched": np.full(detections, -1), "stored": {}, "extent": np.array([4.0, 6.0])}
            own = {"boxes": boxes, "labels": found, "scores": scores, "queries": np.arange(detections)}
            image = np.full((*size, 3), 20 * image_id, np.uint8)
            examples[image_id] = Example(image_id, image, true_boxes=true, true_labels=labels, **own, **none)
            for box, label in zip(np.hstack([true[:, :2], true[:, 2:] - true[:, :2]]).tolist(), labels, strict=True):
                area = {"area": box[2] * box[3], "iscrowd": 0, "id": len(annotations) + 1}
                annotations.append({"image_id": image_id, "category_id": int(label), "bbox": box} | area)
            for box, label, score in zip(boxes, found, scores, strict=True):
                ltwh = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
                one = {"image_id": image_id, "category_id": int(label), "bbox": ltwh, "score": float(score)}
                detected.append(one)
        images = [{"id": image_id, "height": size[0], "width": size[1]} for image_id in examples]
        categories = [{"id": label, "name": name} for label, name in NAMES.items()]
        return examples, {"images": images, "annotations": annotations, "categories": categories}, detected

    return make


def test_a_long_list_has_a_place_for_every_image_and_stays_while_maps_change(see, opened, make_example):
    opened({"first": {number: make_example(number) for number in range(1, 31)}})
    assert see.value("new Set([...control('list').children].map(entry => entry.offsetHeight)).size") == 1
    see.press("ArrowLeft")  # to the last one, which is scrolled to
    ends = "{}.getBoundingClientRect().bottom"
    last, whole = (see.value(ends.format(f"control('list'){end}")) for end in (".lastChild", ""))
    assert 0 < last <= whole
    first = "control('list').firstChild"
    for order, stays in (("missed", True), ("paibb", False)):  # which depends on the map that is chosen
        see.choose("order", order)
        see.value(f"globalThis.before = {first}, 0")
        see.press("[")
        assert see.value(f"{first} === before") == stays


def test_images_behind_each_share_are_those_of_the_library_and_an_address_names_them(see, browser, opened, crowded):
    examples, truth, detected = crowded(6)
    path = opened({"first": examples})
    failures = find_failures(truth, detected)
    for cause in CAUSES:
        see.choose("order", cause)
        wanted = worst_images(failures, cause)
        assert len(wanted) > 1, "images of each cause are there to be found"
        told = dict(zip(map(int, see.listed()), see.badges(), strict=True))
        counts = {image: int(badge.replace(",", " ").split()[0]) for image, badge in told.items() if badge != "none"}
        assert counts == wanted["failures"].to_dict()
        if cause != "miss":
            assert list(told)[: len(wanted)] == list(wanted.index)
            assert see.heading().startswith(f"image {wanted.index[0]}")  # the first of them, and what failed in it
            assert see.numbers()["wrong"] == f"{cause}: {CAUSES[cause]}"
    browser.open(path.as_uri() + "#order=duplicate")
    browser.settled()
    assert see.heading().startswith(f"image {worst_images(failures, 'duplicate').index[0]}")
    see.value("location.hash = 'order=class'")
    browser.wait(
        f"document.getElementById('heading').textContent.startsWith('image "
        f"{worst_images(failures, 'class').index[0]} ')"
    )


def test_an_image_that_a_run_has_not_stored_and_one_without_detections(see, opened, make_example):
    nothing = make_example(9)
    for name in ("boxes", "labels", "scores", "matched", "queries"):
        setattr(nothing, name, getattr(make_example(), name)[:0])
    nothing.stored = {"decoder_cross": nothing.stored["decoder_cross"][:, :, :0]}
    opened({"first": {7: make_example(7), 9: nothing}, "second": {7: make_example(7)}}, "#image=9")
    assert "not stored of this run" in see.value(f"{PANEL.format(1)}.textContent")
    assert "0 detections, 2 missed" in see.value(f"{PANEL.format(0)}.textContent")
    see.press("ArrowRight")
    assert see.heading().startswith("image 7") and len(see.chosen()) == 2


def test_what_a_run_has_not_stored_is_neither_missed_nor_agreed_on(see, opened, make_example):
    opened({"first": {7: make_example(7)}, "second": {7: make_example(7), 8: make_example(8)}})
    assert see.badges() == ["0 missed, 1 wrong", "not stored of this run"]
    see.choose("order", "miss")
    assert see.badges()[1] == "not stored of this run"
    see.press("x")
    see.choose("order", "apart")
    assert see.badges() == ["they agree", "not in two runs"]


@pytest.mark.parametrize("address", ["order=apart", "order=constructor", "layer=99&head=99", "site=x&run=x&image=x"])
def test_an_address_that_names_what_is_not_there_shows_the_rest(see, opened, stored, address):
    opened({"first": stored["first"]}, f"#{address}")
    menus = ("order", "layer", "head", "site")
    assert see.value(f"{[*menus]}.map(name => control(name).value)") == ["missed", "1", "0", "decoder_cross"]
    see.assert_drawn(see.map(), stored["first"][7].maps(layer=-1)[:, 0].mean(0))


def test_the_other_run_shows_its_detection_whatever_its_score_or_class(see, opened, make_example, browser):
    first, second = make_example(matched=(-1, -1, -1)), make_example(matched=(-1, -1, -1))
    second.scores, second.labels = np.array([0.5, 0.45, 0.4]), np.array([1, 1, 1])
    opened({"first": {7: first}, "second": {7: second}})
    see.choose("score", 0.85)
    assert see.chosen() == ["square 0.90"] and see.numbers(1)["query"].startswith("circle 0.50")
    see.choose("score", 0.3)
    see.choose("name", "square")
    assert see.numbers(1)["query"].startswith("circle 0.50")
    see.assert_drawn(see.map(1), second.maps(layer=-1)[:, 0].mean(0), first.maps(layer=-1)[:, 0].mean(0))
    assert browser.faults() == []


def test_a_class_that_no_image_has_leaves_nothing_shown(see, opened, make_example, browser):
    example = make_example(matched=(-1, -1, -1))
    example.labels, example.true_labels = np.array([2, 2, 2]), np.array([2, 2])
    opened({"first": {7: example}})
    see.choose("name", "circle")
    for key in ("j", "ArrowRight", "l"):
        see.press(key)
    assert see.heading() == "no image with this class" and see.value("document.querySelectorAll('.panel').length") == 0
    see.choose("name", "square")
    assert see.heading().startswith("image 7") and see.chosen() and browser.faults() == []


def test_pictures_of_ones_own_have_no_objects_and_explanations_are_maps(see, browser, make_detected, tmp_path):
    explained = make_detected(matched=(-1, -1, -1))
    explained.explanations = {"odam": np.arange(48, dtype=np.float32).reshape(2, 4, 6)}
    picture = page_picture({"run": explained}, np.zeros((64, 96, 3), dtype=np.uint8))
    write_page(tmp_path / "index.html", [picture], ["run"], [NAMES], score=0.3)
    browser.open((tmp_path / "index.html").as_uri())
    assert see.value("[...document.getElementById('order').options].map(o => o.value)") == ["given", "most", "unsure"]
    assert see.value("document.getElementById('two').hidden && document.getElementById('annotated').hidden")
    see.choose("site", "explanation: odam")
    see.press("j")
    weights = explained.explanations["odam"][1]
    see.assert_drawn(see.map(), weights / weights.sum())
    see.press("j")
    assert see.numbers()["map"] == "none is kept of this detection"  # the two best are explained
    assert browser.faults() == []


def test_it_works_in_the_frame_of_a_notebook(browser, opened, stored, tmp_path):
    path = opened(stored)
    (tmp_path / "notebook.html").write_text(f"<!doctype html><title>n</title>{shown(path).data}", encoding="utf-8")
    browser.ask("Page.navigate", url=(tmp_path / "notebook.html").as_uri())
    browser.wait("document.querySelector('iframe')?.contentDocument.querySelectorAll('.panel canvas').length === 2")
    inside = "document.querySelector('iframe').contentDocument"
    heading = f"{inside}.getElementById('heading').textContent"
    before = browser.value(heading)
    left, top = browser.value(
        f"[document.querySelector('iframe'), {inside}.querySelector('.picture')]"
        ".map(one => one.getBoundingClientRect()).reduce(([x, y], box) => [x + box.x, y + box.y], [5, 5])"
    )
    for kind in ("mousePressed", "mouseReleased"):  # keys come to the page after a click in it, as everywhere
        browser.ask("Input.dispatchMouseEvent", type=kind, x=left, y=top, button="left", clickCount=1)
    browser.ask("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    browser.wait(f"{heading} !== {before!r}")


def test_where_scripts_are_not_run_it_says_what_to_do_and_nothing_else(see, browser, opened, stored, tmp_path):
    """As JupyterLab opens a file that is not trusted: in a frame that may not run anything."""
    path = opened(stored)
    assert see.value("document.getElementById('unscripted') === null")
    frame = f'<!doctype html><title>n</title><iframe sandbox="allow-same-origin" srcdoc="{escape(path.read_text())}">'
    (tmp_path / "untrusted.html").write_text(frame, encoding="utf-8")
    browser.ask("Page.navigate", url=(tmp_path / "untrusted.html").as_uri())
    inside = "document.querySelector('iframe')?.contentDocument"
    browser.wait(f"{inside}?.querySelector('dialog') !== null && {inside}.readyState === 'complete'")
    assert "Trust HTML" in see.value(f"{inside}.body.innerText")
    assert see.value(f"[...{inside}.body.children].filter(part => part.checkVisibility()).length") == 1


def test_two_runs_stand_side_by_side_in_a_window_beside_which_files_are_listed(see, opened, stored):
    opened(stored, width=960)
    tops = see.value("[...document.querySelectorAll('.panel')].map(panel => panel.getBoundingClientRect().top)")
    assert len(tops) == 2 and tops[0] == tops[1]


@pytest.mark.parametrize("matched", [(-1, 0, 1), (-1, -1, -1)])
def test_names_that_are_markup_are_shown_as_text(see, browser, make_example, tmp_path, matched):
    hostile = '</script><script>ran = 1</script><img src=x onerror="ran = 2">@NOTE@'
    picture = dict.fromkeys((hostile, "second"), make_example(sites=("decoder_self",), matched=matched))
    own = "" if max(matched) >= 0 else hostile  # the name of a picture of one's own
    names = {run: {1: hostile, 2: "square"} for run in picture}
    path, said = tmp_path / "viewer.html", {"title": hostile, "note": hostile}
    write_page(path, [page_example(picture, names, own)], list(picture), names.values(), **said)
    browser.open(path.as_uri())
    for control in ("order", "site", "name"):
        for value in see.value(f"[...control('{control}').options].map(option => option.value)"):
            see.choose(control, value)
    see.choose("name", ""), see.press("Escape")
    titled = ["#heading", "#list span"] if own else []
    for part in ("h1", ".panel h3", "#run option", "#name", ".rows", "footer", "svg", *titled):
        assert hostile in see.value(f"document.querySelector('{part}').textContent"), part
    assert see.value("document.title") == hostile and see.value("document.querySelectorAll('[onerror]').length") == 0
    assert see.value("globalThis.ran") is None and browser.faults() == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(see, opened, stored, width):
    opened(stored, width=width)
    assert see.value("document.documentElement.scrollWidth <= window.innerWidth")
    widths = see.value("[...document.querySelectorAll('.panel')].map(panel => panel.getBoundingClientRect().right)")
    assert max(widths) <= width
