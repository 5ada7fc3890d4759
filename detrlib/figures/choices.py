"""What is meant by a place, a class, or the same object in another run: choices among examples, without drawing.

Legend: n queries of an example, best first; h x w cells of the feature map. Boxes are xyxy in pixels of the image.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

from detrlib.errors import ConfigError
from detrlib.runs.examples import Example

SAME = 0.3  # IoU above which detections of two runs stand for each other, where no object tells


def detection(example: Example, query: int, names: Mapping[int, str]) -> str:
    """The class and score of a query in words; names: label -> class."""
    label = int(example.labels[query])
    return f"{names.get(label, label)} {example.scores[query]:.2f}"


def corresponding_query(example: Example, query: int, other: Example) -> int | None:
    """The query of `other`, the same image in another run, that stands for the same object as `query` of `example`.

    It is `query` in its own example, else the one matched to the same object; where there is none, that of the highest
    IoU, and None where this is 0.3 or less. Images may be of different sizes.
    """
    if other is example:
        return query
    matched = example.matched[query]
    same = np.flatnonzero(other.matched == matched)
    if matched >= 0 and len(same):
        return int(same[0])
    overlap = box_iou(_shares(example)[query, None], _shares(other))[0]
    return int(overlap.argmax()) if len(overlap) and overlap.max() > SAME else None


def matched_query(example: Example, index: int) -> int | None:
    """The query matched to annotated object number `index`, None if there was none left for it."""
    matched = np.flatnonzero(example.matched == index)
    return int(matched[0]) if len(matched) else None


def _shares(example: Example) -> torch.Tensor:
    """The boxes [n,4] in 0..1 of the image."""
    height, width = example.image.shape[:2]
    return torch.from_numpy(example.boxes / np.array([width, height, width, height], dtype=np.float32))


# --- cells that ask in the encoder -----------------------------------------------------------------------------


def cells_ask(example: Example) -> bool:
    """Whether encoder_self is stored and its queries are the cells of the grid, not tokens of several levels."""
    if "encoder_self" not in example.sites:
        return False
    _, _, queries, rows, columns = example.shape("encoder_self")
    return queries == rows * columns


def sites(example: Example) -> list[str]:
    """The sites of which maps can be shown: what is stored, the encoder's only where cells of one level ask."""
    return [site for site in example.sites if site != "encoder_self" or cells_ask(example)]


def cell_at(example: Example, x: float, y: float) -> int:
    """The number, row by row, of the cell in which the encoder has the point (x, y); outside the image the nearest."""
    rows, columns = _grid(example)
    width, height = _cell_size(example)
    row, column = int((y + 0.5) // height), int((x + 0.5) // width)  # pixel 0 reaches from -0.5 to 0.5
    return min(max(row, 0), rows - 1) * columns + min(max(column, 0), columns - 1)


def cell_box(example: Example, cell: int) -> np.ndarray:
    """[4], the area of a cell as a box, cut at the border of the image."""
    row, column = divmod(cell, _grid(example)[1])
    size = _cell_size(example)
    corners = np.array([[column, row], [column + 1, row + 1]]) * size - 0.5
    height, width = example.image.shape[:2]
    return np.minimum(corners, [width - 0.5, height - 0.5]).ravel()


def _cell_size(example: Example) -> np.ndarray:
    """[2], width and height of a cell of the encoder's grid in pixels."""
    cells = np.empty(_grid(example), dtype=bool)
    return np.array(example.image.shape[1::-1]) / example.extent_of(cells)[::-1]


def _grid(example: Example) -> tuple[int, ...]:
    """Rows and columns of the encoder's grid, which is that of the other maps where they share one."""
    return example.shape("encoder_self" if "encoder_self" in example.sites else "decoder_cross")[-2:]


# --- classes ---------------------------------------------------------------------------------------------------


class ByClass(NamedTuple):
    """The best detection of a class, and in every run the query that stands for it."""

    label: int
    queries: Mapping[str, tuple[Example, int | None]]  # by run: the image, the query in it, None where there is none
    best: str  # the run with the best detection


def chosen_labels(classes: Sequence[str], names: Mapping[int, str]) -> list[int]:
    """Labels of classes by their names. Raises ConfigError for a class that does not exist, with the nearest name."""
    labels = {name: label for label, name in names.items()}
    unknown = [name for name in classes if name not in labels]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), labels, 1, 0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(labels)}"
        raise ConfigError(f"no class '{unknown[0]}'; {hint}")
    return [labels[name] for name in classes]


def best_of_class(examples: Mapping[str, Sequence[Example]], label: int) -> ByClass | None:
    """The most confident detection of a class over the images stored in every run; None if no run has any."""
    by_image = {run: {example.image_id: example for example in stored} for run, stored in examples.items()}
    shared = set.intersection(*(set(stored) for stored in by_image.values())) if by_image else set()
    candidates = [
        (stored[image_id].scores[query], run, image_id, query)
        for run, stored in by_image.items()
        for image_id in stored
        if image_id in shared
        for query in np.flatnonzero(stored[image_id].labels == label).tolist()
    ]
    if not candidates:
        return None
    _, best, image_id, query = max(candidates, key=lambda candidate: candidate[0])
    origin = by_image[best][image_id]
    queries = {run: (own[image_id], corresponding_query(origin, query, own[image_id])) for run, own in by_image.items()}
    return ByClass(label, queries, best)
