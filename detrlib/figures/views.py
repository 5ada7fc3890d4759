"""What the interactive viewer shows, as plain functions of a `View`: what clicks mean, which map it is, and its sink.

Layers are counted from 0 here, from 1 where a reader sees them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Literal, NamedTuple

import numpy as np

from detrlib.figures.choices import cell_at, cells_ask, clicked_query, corresponding_query, detection
from detrlib.figures.overlay import ROUNDING, Sharing
from detrlib.metrics.sinks import LIMITS
from detrlib.runs.examples import Example

Stored = Mapping[str, Mapping[int, Example]]  # by run and image id
REACH = 0.02  # of the longer side of the image: how far from a box a click still means it


@dataclass(frozen=True)
class View:
    """What the viewer shows."""

    run: str
    image_id: int
    beside: str = ""  # another run, or none
    site: str = "decoder_cross"
    layer: int = 0
    head: int | Literal["mean"] = "mean"  # the mean over heads
    origin: str = ""  # the run in which `query` was clicked
    query: int | None = None  # None: there is none in this image
    position: tuple[float, float] = (0.5, 0.5)  # (x, y) of the cell that asks in the encoder, in shares of the image
    truth: bool = True
    predictions: bool = True
    attention: bool = True
    sink: bool = True  # mark the cell that gets most weight of all queries
    scale: Sharing = "shared"  # of the colours of two runs
    logarithmic: bool = True


def sites(example: Example) -> list[str]:
    """The sites of which maps can be shown: what is stored, the encoder's only where cells of one level ask."""
    return [site for site in example.sites if site != "encoder_self" or cells_ask(example)]


def consistent(view: View, stored: Stored) -> View:
    """The view nearest to `view` that exists: runs differ in images, sites, layers, heads and queries."""
    images = stored[view.run]
    image_id = view.image_id if view.image_id in images else next(iter(images))
    example = images[image_id]
    beside = "" if view.beside == view.run else view.beside
    site = view.site if view.site in sites(example) else "decoder_cross"
    layer, head = _layer_and_head(changed(view, site=site), example)
    shown = {view.run, beside} - {""}
    origin = view.origin if view.origin in shown and image_id in stored[view.origin] else view.run
    before = stored.get(view.origin, {}).get(image_id)
    query = view.query
    if before is not None and query is not None and origin != view.origin:  # the same object in the new run
        query = corresponding_query(before, query, stored[origin][image_id])
    count = len(stored[origin][image_id].boxes)
    if query is None or image_id != view.image_id or query >= count:
        query = 0 if count else None
    return changed(
        view,
        image_id=image_id,
        beside=beside,
        site=site,
        layer=layer,
        head=head,
        origin=origin,
        query=query,
    )


def clicked(view: View, stored: Stored, run: str, x: float, y: float) -> View:
    """The view after a click at pixel (x, y) of the image in the panel of `run`: another query, or another cell."""
    example = stored[run][view.image_id]
    height, width = example.image.shape[:2]
    if view.site == "encoder_self":
        return changed(view, position=((x + 0.5) / width, (y + 0.5) / height))
    query = clicked_query(example.boxes, x, y, REACH * max(height, width))
    return view if query is None else changed(view, origin=run, query=query)


def query_in(view: View, stored: Stored, run: str) -> int | None:
    """The query shown of `run`: the one clicked, or that of the same object where another run was clicked."""
    origin = stored[view.origin][view.image_id]
    if view.query is None or run == view.origin:
        return view.query
    return corresponding_query(origin, view.query, stored[run][view.image_id])


def weights_in(view: View, example: Example, query: int | None) -> np.ndarray | None:
    """The map [h,w] of a view, or the weights [n] that go to the queries of the example; None without a query."""
    asking = cell_of(view, example) if view.site == "encoder_self" else query
    if asking is None:
        return None
    weights = _row(view, example, asking)
    return weights[example.queries] if view.site == "decoder_self" else weights


def _row(view: View, example: Example, asking: int) -> np.ndarray:
    """All weights of the query or cell that asks: [h,w], of decoder_self [Q]."""
    layer, head = _layer_and_head(view, example)
    weights = example.maps(view.site, layer)[:, asking]
    return weights.mean(0, dtype=np.float32) if head == "mean" else weights[head]


class Sink(NamedTuple):
    """The key that gets most weight in a layer and head, or in the mean over heads."""

    weight: float  # mean over all queries of the model
    key: int  # number of a query, or of a cell: row * w + column
    grid: tuple[int, ...]  # (h, w), or (Q,)


def sink_in(view: View, example: Example) -> Sink:
    """The sink of a view, be its weight large or small."""
    layer, head = _layer_and_head(view, example)
    received = example.received(view.site, layer)
    received = received.mean(0) if head == "mean" else received[head]
    return Sink(float(received.max()), int(received.argmax()), received.shape)


def _layer_and_head(view: View, example: Example) -> tuple[int, int | Literal["mean"]]:
    """Those asked for, or, where a run has fewer, the last layer and the mean over heads."""
    layers, heads = example.shape(view.site)[:2]
    return min(view.layer, layers - 1), "mean" if view.head == "mean" or view.head >= heads else view.head


def cell_of(view: View, example: Example) -> int:
    """The cell of the encoder that asks."""
    height, width = example.image.shape[:2]
    return cell_at(example, view.position[0] * width - 0.5, view.position[1] * height - 0.5)


def lines_about(
    view: View,
    example: Example,
    query: int | None,
    weights: np.ndarray | None,
    names: Mapping[int, str],
    threshold: float = LIMITS.threshold,
) -> list[str]:
    """Three lines about a panel: which detection, which map is shown, and where most of all weight lies.

    threshold: `evaluate.sink_threshold` of the run, above which that is a sink.
    """
    layer, head = _layer_and_head(view, example)
    by = "mean over heads" if head == "mean" else f"head {head + 1}"
    if view.site == "encoder_self":
        first = f"cell {cell_of(view, example)}"
    elif query is None:
        return ["no detection here", "", ""]
    else:
        matched = ", matched to " + ("an object" if example.matched[query] >= 0 else "no object")
        first = detection(example, query, names) + matched * (len(example.true_boxes) > 0)
    second = f"layer {layer + 1}, {by}{_elsewhere(view, example, query, weights)}"
    return [first, second, _resting(view, example, threshold)]


def _elsewhere(view: View, example: Example, query: int | None, weights: np.ndarray) -> str:
    """How much of the weight of the one that asks is not in the picture, in words."""
    total = float(_row(view, example, cell_of(view, example) if view.site == "encoder_self" else query).sum())
    parts = []
    if view.site == "decoder_self":
        parts.append(f"{total - weights.sum():.0%} of the weight goes to queries not shown")
    if total < 1 - ROUNDING:
        parts.append(f"{1 - total:.0%} to none of the {'queries' if view.site == 'decoder_self' else 'cells'}")
    return f": {', '.join(parts)}" if parts else ""


def _resting(view: View, example: Example, threshold: float) -> str:
    """How much of the weight of all queries lies on one key, in words."""
    sink = sink_in(view, example)
    key = f"query {sink.key}" if view.site == "decoder_self" else "the ringed cell" if view.sink else "one cell"
    words = f"{sink.weight:.2f} of all weight lies on {key}"
    return f"{words}, a sink" if sink.weight > threshold else words
