"""A folder of detections to look through: a picture for each picture, a contact sheet, and a page.

    FOLDER/
        index.html               everything to click on, in one file
        contact_sheet.png        all pictures small
        pictures/<name>.png      detections, runs side by side
        attention/<name>.png     where they look, with maps
        explanations/<name>--<run>.png
        <run>/predictions.json   detections in COCO's results format
        <run>/images.json        the pictures and classes that they refer to, in COCO's format
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from detrlib.errors import RunError
from detrlib.figures.explanations import explanations_grid
from detrlib.figures.page import page_picture, write_page
from detrlib.figures.predictions import (
    MOST,
    SHEET,
    View,
    class_colours,
    contact_sheet,
    detections_by_run,
    maps_by_detection,
)
from detrlib.figures.style import NOTHING, STYLE
from detrlib.runs.detected import Detected, save_detected

MOST_IN_PAGE = 100  # pictures; a browser opens a page of some 30 megabytes without complaint
OURS = "detrlib predict"  # what our own pictures say that they are made by: only those are replaced
PIXELS = 1024  # longer side of a picture in a figure
PAGE_PIXELS, THUMBNAIL = 800, 200


class Album:
    """A folder that is filled picture by picture, in constant memory; `close` writes what needs all of them.

    folder: is made; what an earlier album has left there is removed, other files are not touched.
    names: run -> label -> class, of all runs that stand side by side; attention: draw maps, those of `view` first.

    Raises RunError where the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        names: Mapping[str, Mapping[int, str]],
        *,
        score: float = 0.5,
        view: View | None = None,
        attention: bool = False,
    ):
        self.folder, self.names, self.score, self.attention = folder, names, score, attention
        self.view = view or View()
        self.runs = list(names)
        self.classes = [name for of_run in names.values() for name in of_run.values()]
        self.colours = class_colours(self.classes)
        self.folders = dict(zip(self.runs, _file_names(self.runs), strict=True))
        self._taken, self._page, self._thumbnails = set(self.folders.values()), [], []
        self._detected = {run: [] for run in self.runs}
        self.pictures = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "index.html").open("a").close()
            for name in ("pictures", "attention", "explanations"):
                _remove_ours(folder / name)
        except OSError as error:
            raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another folder (--out)") from None
