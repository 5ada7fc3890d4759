"""The viewer that travels: the page of what runs store, as a file beside them and in a frame of a notebook."""

from collections.abc import Collection, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detrlib.figures.page import has_room, page_example, write_page
from detrlib.runs.examples import EXAMPLE_SCORE, Example, load_examples
from detrlib.runs.folder import class_names, load_results, run_labels
from detrlib.runs.sinks import sink_threshold

VIEWER = "viewer.html"
HEIGHT = 820  # pixels of the frame in a notebook


def write_viewer(run_dirs: Iterable[Path], path: Path) -> Path | None:
    """Write the page of what evaluated runs store: their examples and maps, image by image.

    Args:
        run_dirs: folders of runs, or of results inside them; those that store no examples are left out.
        path: of the HTML file; none is there afterwards where no run stores examples.

    Returns:
        The path, or None where there is nothing to show.

    Raises:
        RunError: what a run stores is damaged.
    """
    labels = {run: label for run, label in run_labels(run_dirs).items() if any((run / "examples").glob("*.npz"))}
    if not labels:
        path.unlink(missing_ok=True)
        return None
    stored = {label: load_examples(run) for run, label in labels.items()}
    names = {label: class_names(run) for run, label in labels.items()}
    images = _by_image(stored)
    pictures = []
    for image in images:
        if has_room(pictures):
            pictures.append(page_example({run: image.get(run) for run in stored}, names))
    results = [load_results(run) for run in labels]
    counted = {"stored": len(images), "evaluated": max(each.get("images", 0) for each in results)}
    fewer = [f"{count} {what}" for what, count in counted.items() if len(pictures) < count]
    about = {"title": title_of(stored), "score": EXAMPLE_SCORE}
    about |= {"note": f"These are {len(pictures)} of {' and of '.join(fewer)} images." if fewer else ""}
    about |= {"thresholds": [*map(sink_threshold, results)]}
    write_page(path, pictures, list(stored), names.values(), **about)
    return path


def title_of(runs: Collection[str]) -> str:
    """What stands above the page of runs."""
    return f"Where {', '.join(runs)} look{'s' * (len(runs) == 1)}"


def refresh_viewers(run_dir: Path) -> list[Path]:
    """Write the viewer of a run, and of results inside it, wherever it is missing or older than the results.

    Returns the paths of those that were written. Raises RunError as `write_viewer`.
    """
    written = []
    for results in sorted(run_dir.rglob("results.json")):
        path = results.with_name(VIEWER)
        if not path.exists() or path.stat().st_mtime < results.stat().st_mtime:
            written.append(write_viewer([results.parent], path))
    return [path for path in written if path]


def shown(path: Path | None) -> Any:
    """The page in a frame for the output of a notebook's cell, which keeps it whole; None shows nothing."""
    from IPython.display import HTML

    if path is None:
        return HTML("nothing to show: no run stores examples with attention")
    return HTML(frame_of(path.read_text(encoding="utf-8"), f", or open {path.name}"))


def frame_of(page: str, otherwise: str = "") -> str:
    """The text of a page as an element of another page; otherwise: what else can be done where it is not shown."""
    look = f"width: 100%; height: {HEIGHT}px; border: 0"
    # What stands inside is left where JupyterLab does not trust a notebook, and takes frames out of it.
    remedy = f"to see the viewer, press Ctrl+Shift+C and choose Trust Notebook{escape(otherwise)}"
    return f'<div><iframe title="viewer" style="{look}" srcdoc="{escape(page)}">{remedy}</iframe></div>'


def _by_image(stored: Mapping[str, list[Example]]) -> list[dict[str, Example]]:
    """What runs store of each image, by run; images of other data may have the same number, and are other images."""
    images = {}
    for run, examples in stored.items():
        for example in examples:
            known = images.setdefault(example.image_id, [])
            mine = next((own for own in known if same_image(next(iter(own.values())), example)), {})
            known += [] if mine else [mine]
            mine[run] = example
    return [image for known in images.values() for image in known]


def same_image(first: Example, second: Example) -> bool:
    """Whether two examples are of one picture, in whatever size, with the same objects.

    As thumbnails one picture differs from itself by 1 in 255, from others by 15.
    """
    a, b = (
        np.asarray(Image.fromarray(one.image).resize((8, 8), Image.Resampling.BOX), float) for one in (first, second)
    )
    boxes = [one.true_boxes.reshape(-1, 4) / np.tile(one.image.shape[1::-1], 2) for one in (first, second)]
    annotated = len(boxes[0]) == len(boxes[1]) and np.allclose(*boxes, atol=0.02)
    return annotated and np.abs(a - b).mean() < 5
