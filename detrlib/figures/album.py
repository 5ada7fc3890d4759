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

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from detrlib.errors import RunError
from detrlib.figures.explanations import explained
from detrlib.figures.page import has_room, page_picture, write_page
from detrlib.figures.predictions import (
    SHEET,
    MapChoice,
    contact_sheet,
    detections_by_run,
    maps_by_detection,
)
from detrlib.figures.style import NOTHING, look
from detrlib.files import write_atomic
from detrlib.runs.detected import Detected, save_detected

DRAWN = ("pictures", "attention", "explanations")  # folders of drawn pictures
OURS = "detrlib predict"  # what our own pictures say that they are made by: only those are replaced
PIXELS = 1024  # longer side of a picture in a figure
THUMBNAIL = 200


class Album:
    """A folder that is filled picture by picture; at the end of a `with` statement what needs all of them is written.

    folder: is made; with the first picture, what an earlier album has left there is removed. Other files are not
    touched, and without any picture nothing is.
    runs: the names of those that stand side by side; score: the lowest that is in the folder; attention: draw maps,
    those of `view` first.

    Raises RunError where the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        runs: Sequence[str],
        *,
        score: float = 0.5,
        view: MapChoice | None = None,
        attention: bool = False,
    ):
        self.folder, self.page = folder, folder / "index.html"
        self.runs, self.score, self.attention = list(runs), score, attention
        self.view = view or MapChoice()
        self.folders = dict(zip(self.runs, _file_names(self.runs, DRAWN), strict=True))
        self._taken, self._pages, self._thumbnails = set(), [], []
        self._detected = {run: [] for run in self.runs}
        self.pictures = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.page.open("a").close()
        except OSError as error:
            raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another folder (--out)") from None

    def add(self, picture: Sequence[Detected]) -> None:
        """One picture: what every run detected in it, in the order of the runs. Raises RunError on a full disk."""
        for name in () if self.pictures else DRAWN:
            _remove_ours(self.folder / name)
        by_run, first = dict(zip(self.runs, picture, strict=True)), picture[0]
        image, name = first.image(PIXELS), self._name(first.source.title)
        self._save(detections_by_run(by_run, image), f"pictures/{name}.png")
        if self.attention:
            self._save(maps_by_detection(by_run, self.view, image), f"attention/{name}.png")
        for run, detected in by_run.items():
            if detected.explanations and len(detected):
                self._save(explained(detected, image), f"explanations/{name}--{self.folders[run]}.png")
            self._detected[run].append(detected.light())
        if has_room(self._pages):
            self._pages.append(page_picture(by_run, image))
        if self.pictures < SHEET:
            self._thumbnails.append(reduced(image, THUMBNAIL))
        self.pictures += 1

    def __enter__(self) -> "Album":
        return self

    def __exit__(self, kind, error, trace) -> None:
        with suppress(RunError) if error else nullcontext():  # what was done so far is not lost, nor is the reason
            self.close()

    def close(self) -> None:
        """Write what all pictures are needed for: contact sheets, predictions and the page."""
        if not self.pictures:
            if not self.page.stat().st_size:  # made above, to see whether it can be
                self.page.unlink()
            return
        for run, detected in self._detected.items():
            save_detected(self.folder / self.folders[run], detected)
            thumbnails = list(zip(self._thumbnails, detected, strict=False))
            self._save(contact_sheet(thumbnails), f"{self.folders[run]}/contact_sheet.png")
        here, more = len(self._pages), self.pictures > len(self._pages)
        note = f"The first {here} of {self.pictures} pictures; all of them are in pictures/." if more else ""
        options = {"title": f"What {' and '.join(self.runs)} detected", "note": note, "score": self.score}
        classes = [detected[0].classes for detected in self._detected.values() if detected]
        write_page(self.page, self._pages, self.runs, classes, **options, view=self.view)

    def counts(self) -> dict[str, int]:
        """How many detections each run has so far."""
        return {run: sum(map(len, detected)) for run, detected in self._detected.items()}

    def _name(self, title: str) -> str:
        """A file name for a picture that no other has."""
        (name,) = _file_names([Path(title).stem], self._taken)
        self._taken.add(name.casefold())
        return name

    def _save(self, drawn: Figure, name: str) -> None:
        if drawn.get_label() == NOTHING:
            return
        with plt.rc_context(look()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # file names may be in any script
            write_atomic(self.folder / name, partial(drawn.savefig, format="png", metadata={"Software": OURS}))


def check_folder(folder: Path) -> None:
    """Raise RunError where a folder cannot be made or written; nothing is made yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "is not yours to write in" if there.is_dir() else "is a file"
        raise RunError(f"{there} {reason}; choose another folder for the results (--out)")


def reduced(image: np.ndarray, longest: int) -> np.ndarray:
    """A picture [H,W,3] whose longer side has at most `longest` pixels."""
    smaller = Image.fromarray(image)
    smaller.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(smaller)


def _file_names(titles: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """A short name without any sign that a shell or a file system minds, for each title, none twice."""
    names, taken = [], set(taken)
    for title in titles:
        plain = re.sub(r"[^\w.-]+", "-", title).strip("-.")[:80] or "picture"
        number, name = 1, plain
        while name.casefold() in taken:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
        taken.add(name.casefold())  # "a.png" and "A.png" are one file in some file systems
    return names


def _remove_ours(folder: Path) -> None:
    for path in folder.glob("*.png"):
        try:
            with Image.open(path) as file:
                ours = file.info.get("Software") == OURS
        except (OSError, SyntaxError):
            continue
        if ours:
            with suppress(OSError):  # then it is replaced, or says what is wrong when it is to be
                path.unlink()
