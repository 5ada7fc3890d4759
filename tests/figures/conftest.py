"""What tests of figures share: examples with random maps, and what a figure shows."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detrlib.data.pictures import find_pictures
from detrlib.runs.detected import Detected
from detrlib.runs.examples import Example

CLASSES = {1: "circle", 2: "square"}
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
