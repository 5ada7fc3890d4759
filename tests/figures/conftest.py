"""What tests of figures share: examples with random maps, what a figure shows, a run, and a browser."""

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detrlib.data.pictures import find_pictures
from detrlib.engine.loop import train
from detrlib.figures.overlay import overlay, scale_of
from detrlib.figures.page import NUMBERS, STEPS
from detrlib.runs.detected import Detected
from detrlib.runs.examples import Example

CLASSES = {1: "circle", 2: "square"}
PANEL = "document.querySelectorAll('.panel')[{}]"
BOXES = np.array([[0, 0, 40, 40], [10, 10, 20, 20], [60, 5, 80, 30]], dtype=np.float32)


@pytest.fixture(autouse=True)
def nothing_left(leaves_nothing_behind):
    """Of every test of this folder."""


@pytest.fixture
def make_example():
    """Makes an image of 64 x 96 pixels, maps [L,H,3,4,6] with many zeros, and three queries: two overlapping boxes,
    the smaller within the larger, and one alone. `shift` puts them in another order; `sites`: further maps it has.
    """

    def make(image_id=7, layers=2, heads=3, shift=0, sites=(), matched=(-1, 0, 1)):
        random = np.random.default_rng(image_id + shift)
        weights = random.random((layers, heads, 3, 4, 6)).astype(np.float32)
        weights[weights < 0.5] = 0
        order = np.roll(np.arange(3), shift)
        own = {"decoder_self": random.dirichlet(np.ones(3), (layers, heads, 3)).astype(np.float32)}
        own["encoder_self"] = random.random((1, heads, 24, 4, 6)).astype(np.float32)
        return Example(
            image_id=image_id,
            image=random.integers(0, 255, (64, 96, 3), dtype=np.uint8),
            true_boxes=BOXES[[1, 2]],
            true_labels=np.array([1, 2]),
            boxes=BOXES[order],
            labels=np.array([2, 1, 2])[order],
            scores=np.array([0.9, 0.8, 0.4]),
            matched=np.array(matched)[order],
            extent=np.array([4.0, 6.0]),
            queries=np.arange(3),
            stored={"decoder_cross": weights} | {site: own[site] for site in sites},
        )

    return make


@pytest.fixture
def make_detected(make_example):
    """Makes detections in a black picture: the first `count` queries of an example, with its maps unless not wanted."""

    def make(count=3, attention=True, size=(64, 96), **options):
        example = make_example(**options)
        for name in ("boxes", "labels", "scores", "queries", "matched"):
            setattr(example, name, getattr(example, name)[:count])
        example.stored = {s: m if s == "encoder_self" else m[:, :, :count] for s, m in example.stored.items()}
        (source,) = find_pictures(np.zeros((*size, 3), dtype=np.uint8))
        names = [CLASSES[label] for label in example.labels]
        own = [example.boxes, example.scores, example.labels, names, example.queries]
        rows = [("decoder_cross", layer, "detected", 24, 9.0, 0.5, 0.6) for layer in range(2)]
        sparsity = pd.DataFrame(rows, columns=["site", "layer", "queries", "keys", "support", "gini", "zeros"])
        detected = Detected("picture 1", 7, size, *own, source, CLASSES, example, sparsity)
        return detected if attention else detected.light()

    return make


@pytest.fixture
def stored(make_example):
    """Two runs with examples of images 7 and 8: by run and image; the second has fewer layers, heads and sites."""
    first = make_example(7, sites=("encoder_self", "decoder_self")), make_example(8)
    second = make_example(7, layers=1, heads=2, shift=1), make_example(8, shift=1)
    return {"first": {e.image_id: e for e in first}, "second": {e.image_id: e for e in second}}


@pytest.fixture
def titles():
    """The titles of all panels of a figure."""

    def titles(drawn: Figure) -> list[str]:
        return [axes.get_title(loc="left") or axes.get_title() for axes in drawn.axes]

    return titles


@pytest.fixture
def boxes_in():
    """Boxes xyxy drawn in a panel, those of one colour if one is given; the white rims left out."""

    def boxes_in(axes, colour=None) -> list[tuple]:
        edges = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
        edges = [patch for patch in edges if to_hex(patch.get_edgecolor()) != "#ffffff"]
        wanted = [patch for patch in edges if colour is None or to_hex(patch.get_edgecolor()) == colour.lower()]
        return [tuple(patch.get_bbox().extents) for patch in wanted]

    return boxes_in


@pytest.fixture(scope="session")
def evaluated_once(tmp_path_factory, tiny_config):
    """The folder of a tiny run whose maps are stored at every site."""
    folder = tmp_path_factory.mktemp("page") / "sparse"
    settings = {"model.attention.decoder_cross": "sparsemax", "train.epochs": 1}
    settings |= {"evaluate.store_sites": ["decoder_cross", "decoder_self", "encoder_self"], "evaluate.examples": 3}
    train(tiny_config(settings), folder)
    return folder


@pytest.fixture
def evaluated_run(evaluated_once, tmp_path):
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(evaluated_once, tmp_path / "sparse"))


@pytest.fixture
def scripts():
    """What a page holds as JSON, of elements with some attribute."""

    def scripts(text: str, kind: str) -> list:
        found = re.findall(rf'<script type="application/json" {kind}>(.*?)</script>', text)
        return [json.loads(one) for one in found]

    return scripts


@pytest.fixture
def unpacked():
    """Weights [n,L,1+H,K] and numbers by name [n,L,1+H] of the maps of a site, as the page reads them."""

    def unpacked(maps: dict) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        codes, numbers = (gzip.decompress(base64.b64decode(maps[name])) for name in ("codes", "numbers"))
        shape = (-1, maps["layers"], 1 + maps["heads"])
        measured = np.frombuffer(numbers, "<f4").reshape(*shape, len(NUMBERS))
        codes = np.frombuffer(codes, np.uint8).reshape(*shape, int(np.prod(maps["keys"])))
        weights = np.where(codes > 0, measured[..., :1] * 2.0 ** ((codes.astype(float) - 255) / STEPS), 0)
        return weights, dict(zip(NUMBERS, np.moveaxis(measured, -1, 0), strict=True))

    return unpacked


# A program whose descriptors 3 and 4 are those given.
PIPES = """import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """A page in Chromium without a window, told what to do over its pipe for debugging, which needs no library."""

    def __init__(self, program: str, home: Path):
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={home}"]
        command = [sys.executable, "-c", PIPES, str(to_read), str(to_write), program, *options, "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(to_read, to_write), **quiet)
        os.close(to_read), os.close(to_write)
        self._number, self._read, self._session, self.told = 0, b"", {}, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters) -> dict:
        """A command of the DevTools protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.told.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._read:
            part = os.read(self._from, 2**20)
            assert part, "the browser has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def open(self, address: str, width: int = 1280, height: int = 800) -> None:
        """Load an address and wait until its script has drawn."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url="about:blank")
        self.told.clear()
        self.ask("Page.navigate", url=address)
        self.wait("document.querySelector('#panels[aria-busy=false] img')?.complete")

    def value(self, expression: str):
        """What an expression of JavaScript is, or its promise brings."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.ask("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"not true in {seconds} s: {expression}; {self.faults()}"
            time.sleep(0.02)

    def settled(self) -> None:
        """Until what was asked for is drawn: maps are unpacked in their own time."""
        self.value("new Promise(done => setTimeout(done))")
        self.wait("document.querySelector('#panels[aria-busy=false]') !== null")

    def press(self, key: str) -> None:
        """A key, pressed and let go."""
        text = {"text": key} if len(key) == 1 else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settled()

    def click(self, x: float, y: float) -> None:
        """A click of the mouse at a point of the window."""
        at = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, **at)
        self.settled()

    def faults(self) -> list[dict]:
        """Exceptions of the page, and what its policy has refused."""
        return [told for told in self.told if told["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def close(self) -> None:
        self._session = {}
        self.ask("Browser.close")
        self.process.wait(20)
        os.close(self._to), os.close(self._from)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A browser; tests that need one are skipped where there is no Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"needs one of {', '.join(names)}")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def see(browser):
    """What the page shows, and what is done to it."""

    class See:
        def map(self, panel=0):
            """Pixels [h,w,4] of the map of a panel."""
            here = f"{PANEL.format(panel)}.querySelector('canvas')"
            values = browser.value(f"[...{here}.getContext('2d').getImageData(0, 0, {here}.width, {here}.height).data]")
            return np.array(values).reshape(browser.value(f"{here}.height"), -1, 4)

        def numbers(self, panel=0):
            """What is told of a map: term -> text."""
            terms = f"[...{PANEL.format(panel)}.querySelectorAll('dt')]"
            return dict(browser.value(f"{terms}.map(term => [term.textContent, term.nextSibling.textContent])"))

        def choose(self, control, value):
            """Choose in a menu, or set a switch."""
            here, name = f"document.getElementById('{control}')", "checked" if isinstance(value, bool) else "value"
            browser.value(f"{here}.{name} = {str(value).lower() if isinstance(value, bool) else repr(str(value))}")
            browser.value(f"{here}.dispatchEvent(new Event('input'))")
            browser.settled()

        def click(self, x, y, panel=0):
            """A click into the picture of a panel, at shares of its width and height."""
            here = f"{PANEL.format(panel)}.querySelector('.picture')"
            browser.value(f"{here}.scrollIntoView()")
            box = browser.value(f"(({{x, y, width, height}}) => [x, y, width, height])({here}.getBoundingClientRect())")
            browser.click(box[0] + x * box[2], box[1] + y * box[3])

        def badges(self):
            """What is said of each image in the list."""
            return browser.value("[...document.querySelectorAll('#list small')].map(badge => badge.textContent)")

        def listed(self):
            """Names of the images in the list."""
            return browser.value("[...document.querySelectorAll('#list button')].map(button => button.title)")

        def chosen(self):
            """Names of the detections that are chosen."""
            chosen = "[...document.querySelectorAll('.rows [aria-pressed=true]')]"
            return browser.value(f"{chosen}.map(button => button.firstChild.textContent)")

        def colours(self, weights, *compared):
            """RGBA in 0..255 that figures give to a map, on one scale with others."""
            return 255 * overlay(weights, scale_of([weights, *compared]))

        def assert_drawn(self, drawn, weights, *compared):
            """That a map is drawn as figures draw it; weights are told in steps of 7 %."""
            assert np.array_equal(drawn[..., 3] > 0, weights > 0), "a cell without colour has exactly no weight"
            assert np.abs(drawn - self.colours(weights, *compared))[weights > 0].max() < 12

        press = staticmethod(browser.press)
        value = staticmethod(browser.value)
        heading = staticmethod(lambda: browser.value("document.getElementById('heading').textContent"))

    return See()
