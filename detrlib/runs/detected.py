"""What is detected in a picture of one's own, and the same for other programs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from detrlib.data.pictures import Picture
from detrlib.errors import ConfigError, listed
from detrlib.files import write_json
from detrlib.metrics.coco_format import coco_detections, coco_entries, save_detections
from detrlib.runs.examples import Example

COLUMNS = ("picture", "image_id", "name", "score", "x0", "y0", "x1", "y1", "label", "query")


@dataclass(repr=False)
class Detected:
    """What is detected in one picture: n detections, best first.

    Boxes are xyxy in pixels of the original picture, turned upright (a list of images in COCO's format says otherwise:
    see `find_pictures`).
    """

    picture: str  # its path, or "picture 3" of those given
    image_id: int
    size: tuple[int, int]  # height and width of the original picture, pixels
    boxes: np.ndarray  # [n,4] float32
    scores: np.ndarray  # [n] 0..1
    labels: np.ndarray  # [n] the model's numbers of classes
    names: list[str]  # n names of classes
    queries: np.ndarray  # [n] whose detections they are; with sigmoids a query may have several
    source: Picture
    classes: Mapping[int, str] = field(default_factory=dict)  # all that the model knows, label -> name
    example: Example | None = None  # with attention: the same rows, with their maps
    sparsity: pd.DataFrame | None = None  # of this picture, see `sparsity_of`
    explanations: dict[str, np.ndarray] = field(default_factory=dict)  # method -> [m,h,w] of the m best

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        best = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        return f"Detected({self.picture}, {self.size[0]} x {self.size[1]}: {listed(best) or 'nothing'})"

    def light(self) -> "Detected":
        """The same without maps, for those who keep many."""
        return replace(self, example=None, explanations={})

    def image(self, longest: int = 1024) -> np.ndarray:
        """The picture as [H,W,3] uint8, read again, reduced where its longer side has more than `longest` pixels."""
        return self.source.pixels(longest)

    def boxes_in(self, image: np.ndarray) -> np.ndarray:
        """The boxes [n,4] in pixels of a reduced `image` [H,W,3]."""
        (height, width), (rows, columns) = self.size, image.shape[:2]
        return self.boxes * np.array([columns / width, rows / height] * 2, dtype=np.float32)

    def to_frame(self) -> pd.DataFrame:
        """A row per detection: picture, image_id, name, score, corners x0, y0, x1, y1 in pixels, label, query."""
        corners = dict(zip(("x0", "y0", "x1", "y1"), self.boxes.T, strict=True))
        own = {"name": self.names, "score": self.scores, "label": self.labels, "query": self.queries}
        return pd.DataFrame({"picture": self.picture, "image_id": self.image_id, **own, **corners})[list(COLUMNS)]

    def to_coco(self) -> list[dict]:
        """The detections in COCO's results format, the labels as category ids."""
        return coco_entries(self._table())

    def _table(self) -> pd.DataFrame:
        return coco_detections(self.image_id, self.boxes, self.scores, self.labels)

    def to_supervision(self) -> Any:
        """The detections as `supervision.Detections`, for its annotators, trackers and zones.

        Raises ConfigError where that package is not installed.
        """
        return supervision_detections(self.boxes, self.scores, self.labels, self.names)


def supervision_detections(boxes: ArrayLike, scores: ArrayLike, labels: ArrayLike, names: Sequence[str]) -> Any:
    """n detections as `supervision.Detections`: boxes [n,4] xyxy in pixels, scores, labels and names of classes [n].

    Raises ConfigError where that package is not installed.
    """
    try:
        import supervision
    except ImportError:
        raise ConfigError("supervision is not installed; pip install supervision, or use to_frame()") from None
    return supervision.Detections(
        xyxy=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        confidence=np.asarray(scores, dtype=np.float32),
        class_id=np.asarray(labels, dtype=int),
        data={"class_name": np.array(names, dtype=str)},
    )


def save_detected(folder: Path, detected: Sequence[Detected]) -> None:
    """Write the detections of one detector in COCO's format, so that they can be read without the pictures.

    Args:
        folder: becomes that of predictions.json, a list of detections as `detrlib evaluate --predictions` takes it, and
            of images.json, which lists the pictures with their sizes and the classes.
        detected: what it detected in each picture; labels are the category ids.

    Raises:
        RunError: a file cannot be written.
    """
    names = {int(label): name for one in detected for label, name in zip(one.labels, one.names, strict=True)}
    names |= {label: name for one in detected[:1] for label, name in one.classes.items()}
    images = [
        {"id": one.image_id, "file_name": one.picture, "width": one.size[1], "height": one.size[0]} for one in detected
    ]
    categories = [{"id": label, "name": name} for label, name in sorted(names.items())]
    save_detections(folder / "predictions.json", (one._table() for one in detected))
    write_json(folder / "images.json", {"images": images, "annotations": [], "categories": categories})
