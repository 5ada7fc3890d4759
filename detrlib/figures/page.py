"""A page of detections to look through in any browser: one file, without network; its script is in page.html.

Names of files and classes come from outside: the script shows them as text, and here they are escaped.

Legend: n detections of a picture, H heads, h x w cells of a map.
"""

import io
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detrlib.figures.overlay import DECADES, PALE, map_numbers, overlay, text_colour
from detrlib.figures.predictions import LAYER_OF, MapChoice, class_colours, views_of
from detrlib.runs.detected import Detected

LONGEST = 800  # pixels of the longer side of a picture in the page
CRISP = 256  # up to this side a picture is embedded without loss
MOST_MAPS = 20  # detections of a picture and run whose maps are embedded, the best ones
STEPS = 10.5  # codes of a weight for each halving: 1 to 255 reach down to 2 ** -24, in steps of 7 %


def page_picture(picture: Mapping[str, Detected], image: np.ndarray) -> str:
    """A picture with what every run detected in it, as the script element that the page reads.

    picture: run -> its detections in this picture; image: the picture, [H,W,3] uint8.
    """
    first = next(iter(picture.values()))
    values = {
        "title": first.source.title,
        "name": first.picture,
        "size": list(first.size),
        "source": _data_uri(Image.fromarray(image)),
        "detected": [_one_run(detected) for detected in picture.values()],
    }
    return f'<script type="application/json" class="picture">{_embedded(values)}</script>'


def write_page(
    path: Path,
    pictures: Iterable[str],
    runs: Sequence[str],
    classes: Iterable[Mapping[int, str]],
    *,
    title: str = "Detections",
    note: str = "",
    score: float = 0.5,
    view: MapChoice | None = None,
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        pictures: of each picture what `page_picture` returns.
        runs: names of the runs that stand side by side.
        classes: label -> class of every run.
        title, note: what stands above and below.
        score: the lowest one that is shown at first.
        view: the map that is shown at first.
    """
    view = view or MapChoice()
    settings = {
        "runs": list(runs),
        "classes": {name: [colour, text_colour(colour)] for name, colour in class_colours(classes).items()},
        "score": score,
        "steps": STEPS,
        "decades": DECADES,
        "colours": _ramp(),
        "site": LAYER_OF[view.site],
        "layer": view.layer,
        "head": 0 if view.head == "mean" else view.head + 1,
    }
    filled = {
        "TITLE": escape(title),
        "NOTE": escape(note),
        "WIDTH": str(max(330 * min(len(runs), 3), 460) + 30),
        "PALE": str(1 - PALE),
    }
    filled |= {"SETTINGS": _embedded(settings), "PICTURES": "\n".join(pictures)}
    text = files("detrlib.figures").joinpath("page.html").read_text(encoding="utf-8")
    for name, value in filled.items():  # pictures last: what they hold is not looked at
        text = text.replace(f"@{name}@", value)
    path.write_text(text, encoding="utf-8")


def code_weights(weights: np.ndarray) -> np.ndarray:
    """Weights in 0..1 as bytes on a logarithmic scale: 0 for exactly no weight, never for any other."""
    with np.errstate(divide="ignore"):
        codes = np.round(255 + STEPS * np.log2(weights.astype(np.float64)))
    return np.where(weights > 0, codes.clip(1, 255), 0).astype(np.uint8)


def _ramp() -> list[list[int]]:
    """RGBA in 0..255 of 256 weights from the lowest to the highest that has a colour of its own, as figures have it."""
    colours = overlay(np.geomspace(10.0**-DECADES, 1.0, 256)[None])[0]
    return (255 * colours).round().astype(int).tolist()


def _one_run(detected: Detected) -> dict[str, Any]:
    left, top, right, bottom = detected.boxes.reshape(-1, 4).T
    boxes = np.stack([left, top, right - left, bottom - top], 1)
    values = {
        "boxes": boxes.round(2).tolist(),
        "scores": detected.scores.round(4).tolist(),
        "names": detected.names,
    }
    views = views_of(detected)
    if not views or not len(detected):
        return values
    kept = range(min(len(detected), MOST_MAPS))
    cells = detected.example.shape()[-2:]
    views = {title: maps for title, maps in views.items() if maps.shape[-2:] == cells}  # one grid to a page
    widest = max(maps.shape[1] for maps in views.values())
    sheets = np.zeros((len(kept), len(views), cells[0], widest, cells[1]), dtype=np.uint8)
    for row, maps in enumerate(views.values()):
        sheets[:, row, :, : maps.shape[1]] = code_weights(maps[: len(kept)]).swapaxes(1, 2)
    extent, where = detected.example.extent, (detected.boxes[: len(kept)], detected.size)
    numbers = [map_numbers(maps[: len(kept)], *where, extent) for maps in views.values()]  # of [n,1+H,3]
    maps = {
        "views": list(views),
        "heads": [maps.shape[1] - 1 for maps in views.values()],
        "cells": list(cells),
        "extent": extent.tolist(),
        "sheets": [_data_uri(Image.fromarray(sheet.reshape(-1, widest * cells[1]))) for sheet in sheets],
        "numbers": [[of[index].round(3).tolist() for of in numbers] for index in kept],
    }
    return values | {"maps": maps}


def _data_uri(image: Image.Image) -> str:
    """A picture as text: photographs as JPEG, drawings and weights without loss."""
    content = io.BytesIO()
    lossless = image.mode == "L" or max(image.size) <= CRISP
    image.save(content, "PNG" if lossless else "JPEG", **({"optimize": True} if lossless else {"quality": 88}))
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{b64encode(content.getvalue()).decode()}"


def _embedded(values: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("@", "\\u0040")
