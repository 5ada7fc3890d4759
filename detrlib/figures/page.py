"""A page of detections and of where they look, for any browser: one file, without kernel or network.

page.html is its frame, the SCRIPTS are what it does; here it gets its pictures. Maps are bytes, packed by gzip, and
unpacked when they are shown; what the library measures of each map stands beside it, and is not computed again.
Names of files and classes come from outside: the script shows them as text, and here they are escaped.

Legend: n detections of a picture, L layers, H heads, K keys: h x w cells of a map, or the queries of decoder_self.
"""

import gzip
import io
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from detrlib.errors import RunError
from detrlib.figures.choices import SAME, cell_at, cell_box, sites
from detrlib.figures.overlay import DECADES, PALE, map_numbers, overlay, text_colour
from detrlib.figures.predictions import MapChoice, class_colours, looks_from, looks_of, shares_of
from detrlib.files import write_atomic
from detrlib.metrics.failures import CAUSES, NEAR
from detrlib.metrics.sinks import LIMITS
from detrlib.metrics.sparsity import gini
from detrlib.runs.detected import Detected
from detrlib.runs.examples import Example

SCRIPTS = ("page_known.js", "page_drawing.js", "page.js")  # what is known of maps and detections; drawing; choosing
LONGEST = 800  # pixels of the longer side of a picture in the page
CRISP = 256  # up to this side a picture is embedded without loss
MOST_MAPS = 30  # detections of a picture and run whose maps are embedded: matched ones first, then the best
MOST_BYTES = 30_000_000  # of pictures: what a browser opens, and most mail takes, without complaint
STEPS = 10.5  # codes of a weight for each halving: 1 to 255 reach down by 2 ** -24, in steps of 7 %
NUMBERS = ("top", "gini", "support", "paibb", "mass", "at_sink")  # of each map, in this order


def page_picture(picture: Mapping[str, Detected], image: np.ndarray) -> str:
    """A picture with what every run detected in it, as JSON that the page reads.

    picture: run -> its detections in this picture; image: the picture, [H,W,3] uint8. Raises RunError naming the run
    whose detections or maps are not finite.
    """
    first = next(iter(picture.values()))
    runs = {
        run: _one_run(each.boxes / _corners(each.size), each.scores, each.names, each.example, each.explanations)
        for run, each in picture.items()
    }
    title = first.source.title  # not its path: a page is there to be sent
    return _as_json({"title": title, "name": title, "size": first.size}, image, runs)


def page_example(picture: Mapping[str, Example | None], names: Mapping[str, Mapping[int, str]], own: str = "") -> str:
    """The same of an image of the validation split, with its annotated objects.

    picture: run -> its example, None where the run stores none of this image; names: run -> label -> class; own: the
    title of a picture of one's own, of whose objects nothing is known. Raises RunError as `page_picture`.
    """
    run, first = next((run, example) for run, example in picture.items() if example is not None)
    size = first.image.shape[:2]
    objects = {"boxes": _ltwh(_in_image(first, "true_boxes")), "names": _names(first.true_labels, names[run])}
    runs = {
        run: one and _one_run(_in_image(one, "boxes"), one.scores, _names(one.labels, names[run]), one)
        for run, one in picture.items()
    }
    about = {"title": own or f"image {first.image_id}", "name": str(first.image_id), "size": size}
    return _as_json(about | ({} if own else {"objects": objects}), first.image, runs)


def page_pending(image_id: int, faults: Sequence[tuple[int, int] | None], stored: bool, own: str = "") -> str:
    """The same of an image that a notebook's kernel is asked for when it is wanted.

    faults: of each run how many objects it missed and how many detections are wrong, None where that is not known;
    stored: whether the image is quick to have; own: as of `page_example`.
    """
    about = {"title": own or f"image {image_id}", "name": str(image_id), "faults": list(faults), "stored": stored}
    return _embedded(about | {"pending": True, "detected": [None] * len(faults)})


def page_cell(example: Example, x: float, y: float) -> dict[str, Any]:
    """Where the cell of the encoder at (x, y), in shares of the picture, looks: as `maps` of a detection, and its box.

    Raises RunError where the example has no such maps.
    """
    height, width = example.image.shape[:2]
    cell = cell_at(example, x * width - 0.5, y * height - 0.5)
    box = (cell_box(example, cell)[None] + 0.5) / _corners((height, width))
    maps = _maps("encoder_self", looks_from(example, "encoder_self", [cell]), example, box)
    return {"maps": maps, "box": _ltwh(box)[0], "columns": maps["keys"][1], "cell": cell}


def has_room(pictures: Sequence[str]) -> bool:
    """Whether a page with these pictures takes one more."""
    return sum(map(len, pictures)) < MOST_BYTES


def write_page(path: Path, *args: Any, **kwargs: Any) -> None:
    """Write the page, whole or not at all; arguments: of `page_text`. Raises RunError on a full disk."""
    text = page_text(*args, **kwargs)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def page_text(
    pictures: Iterable[str],
    runs: Sequence[str],
    classes: Iterable[Mapping[int, str]],
    *,
    title: str = "Detections",
    note: str = "",
    score: float = 0.5,
    view: MapChoice | None = None,
    thresholds: Sequence[float] = (),
    image: str = "",
) -> str:
    """The page as HTML.

    Args:
        pictures: of each picture what `page_picture`, `page_example` or `page_pending` returns.
        runs: names of the runs, of which two stand side by side.
        classes: label -> class of every run.
        title, note: what stands above and below.
        score: the lowest one that is shown at first.
        view: the map that is shown at first.
        thresholds: of each run, from which weight on the best key is called a sink.
        image: the name of the picture that is shown at first; none: the first in order.
    """
    view = view or MapChoice()
    settings = {
        "runs": list(runs),
        "thresholds": list(thresholds) or [LIMITS.threshold] * len(runs),
        "classes": {name: [colour, text_colour(colour)] for name, colour in class_colours(classes).items()},
        "causes": CAUSES,
        "near": NEAR,
        "same": SAME,
        "score": score,
        "steps": STEPS,
        "decades": DECADES,
        "colours": _ramp(),
        "numbers": NUMBERS,
        "image": image,
        "site": view.site,
        "layer": view.layer,
        "head": 0 if view.head == "mean" else view.head + 1,
    }
    source = files("detrlib.figures")
    filled = {"TITLE": _as_text(title), "NOTE": _as_text(note), "PALE": str(1 - PALE)}
    filled |= {"SCRIPT": "\n".join(source.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)}
    elements = [f'<script type="application/json" class="picture">{picture}</script>' for picture in pictures]
    filled |= {"SETTINGS": _embedded(settings), "PICTURES": "\n".join(elements)}
    text = source.joinpath("page.html").read_text(encoding="utf-8")
    for name, value in filled.items():
        text = text.replace(f"@{name}@", value)
    return text


def code_weights(weights: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Weights as bytes on a logarithmic scale that ends at `top`: 0 for exactly no weight, 1 for the least."""
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.round(255 + STEPS * np.log2(weights.astype(np.float64) / top))
        return np.where(weights > 0, codes.clip(1, 255), 0).astype(np.uint8)


def _ramp() -> list[list[int]]:
    """RGBA in 0..255 of 256 weights from the lowest to the highest that has a colour of its own, as figures have it."""
    colours = overlay(np.geomspace(10.0**-DECADES, 1.0, 256)[None])[0]
    return (255 * colours).round().astype(int).tolist()


# --- one run in one picture ------------------------------------------------------------------------------------


def _one_run(
    boxes: np.ndarray,
    scores: np.ndarray,
    names: list[str],
    example: Example | None,
    explanations: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Boxes [n,4] in 0..1 of the picture; example: the same detections, with their maps."""
    matched = np.full(len(boxes), -1) if example is None else example.matched
    values = {"boxes": _ltwh(boxes), "scores": scores.round(4).tolist(), "names": names, "matched": matched.tolist()}
    if example is None or not len(boxes):
        return values
    kept = np.sort(np.argsort(matched < 0, kind="stable")[:MOST_MAPS])
    about = _aims(example)[kept]
    looks = {site: looks_of(example, site, kept) for site in sites(example)}
    maps = [_maps(site, each, example, about) for site, each in looks.items()]
    for method, each in shares_of(explanations or {}).items():
        among = kept[kept < len(each)]
        maps.append(_maps(f"explanation: {method}", each[among, None, None], example, about[: len(among)]))
    return values | {"queries": example.queries.tolist(), "kept": kept.tolist(), "maps": list(filter(None, maps))}


def _maps(site: str, looks: np.ndarray, example: Example, about: np.ndarray) -> dict[str, Any] | None:
    """Maps [n,L,1+H,...] of a site with what is measured of each, packed; None where there is none.

    about: boxes [n,4] whose share of the weight is told.
    """
    if not looks.size:
        return None
    flat = looks.reshape(*looks.shape[:3], -1)  # [n,L,1+H,K]
    top = flat.max(-1)
    values = {"site": site, "layers": looks.shape[1], "heads": looks.shape[2] - 1, "keys": list(looks.shape[3:])}
    if site == "decoder_self":
        weights = torch.from_numpy(flat)
        told = [gini(weights).numpy(), (flat > 0).sum(-1), np.full(top.shape, np.nan)]
    else:
        extent = example.extent_of(looks)
        support, concentration, inside = np.moveaxis(map_numbers(looks, about, (1, 1), extent), -1, 0)
        told = [concentration, support, inside]
        values["extent"] = np.asarray(extent, dtype=float).tolist()
    at_sink = np.full(top.shape, np.nan)
    if site in sites(example):
        weight, key = _sinks(example, site)  # [L,1+H]
        at_sink = np.take_along_axis(flat, np.broadcast_to(key, top.shape)[..., None], -1)[..., 0]
        values["sinks"] = {"weights": weight.round(4).tolist(), "keys": key.tolist()}
    numbers = np.stack([top, *told, flat.sum(-1), at_sink], -1)  # in the order of NUMBERS
    return values | {
        "numbers": _packed(numbers.astype("<f4")),
        "codes": _packed(code_weights(flat, top[..., None])),
    }


def _sinks(example: Example, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight and number of the key that gets most of all queries, in the mean over heads and in each: [L,1+H]."""
    layers = range(example.shape(site)[0])
    received = np.stack([example.received(site, layer) for layer in layers])
    received = received.reshape(*received.shape[:2], -1)
    received = np.concatenate([received.mean(1, keepdims=True), received], 1)
    return received.max(-1), received.argmax(-1)


def _aims(example: Example) -> np.ndarray:
    """Boxes [n,4] in 0..1 that attention is measured against: annotated where a query is matched, else predicted."""
    aims, matched = _in_image(example, "boxes").copy(), example.matched >= 0
    aims[matched] = _in_image(example, "true_boxes")[example.matched[matched]]
    return aims


def _in_image(example: Example, boxes: str) -> np.ndarray:
    return getattr(example, boxes).reshape(-1, 4) / _corners(example.image.shape[:2])


def _corners(size: tuple[int, ...]) -> np.ndarray:
    height, width = size
    return np.array([width, height, width, height], dtype=np.float32)


def _ltwh(boxes: np.ndarray) -> list[list[float]]:
    """Left, top, width and height of boxes [n,4]."""
    boxes = boxes.reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(float).round(5).tolist()


def _names(labels: np.ndarray, names: Mapping[int, str]) -> list[str]:
    return [names.get(int(label), str(label)) for label in labels]


# --- into the file ---------------------------------------------------------------------------------------------


def _as_json(about: dict[str, Any], image: np.ndarray, runs: Mapping[str, dict | None]) -> str:
    reduced, detected = Image.fromarray(image), []
    reduced.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    for run, values in runs.items():
        try:
            detected.append(_embedded(values))
        except ValueError:  # of JSON, which has no NaN
            raise RunError(f"{run}: detections or maps of {about['title']} are not finite; evaluate it again") from None
    return _embedded(about | {"source": _data_uri(reduced)})[:-1] + f',"detected":[{",".join(detected)}]}}'


def _packed(values: np.ndarray) -> str:
    return b64encode(gzip.compress(np.ascontiguousarray(values).tobytes(), mtime=0)).decode()


def _data_uri(image: Image.Image) -> str:
    """A picture as text: photographs as JPEG, drawings without loss."""
    content, lossless = io.BytesIO(), max(image.size) <= CRISP
    image.save(content, "PNG" if lossless else "JPEG", **({"optimize": True} if lossless else {"quality": 88}))
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{b64encode(content.getvalue()).decode()}"


def _as_text(text: str) -> str:
    """Text that is neither markup nor, as @NAME@, a place of page.html to be filled."""
    return escape(text).replace("@", "&#64;")


def _embedded(values: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("@", "\\u0040")
