"""The viewer with a kernel: the page in a notebook, which asks for whatever it does not hold."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from detrlib.errors import fault_of, in_one_line
from detrlib.figures.page import page_cell, page_example, page_pending, page_text
from detrlib.figures.predictions import MapChoice
from detrlib.figures.viewer import HEIGHT, frame_of, same_image, title_of
from detrlib.metrics.sinks import LIMITS
from detrlib.runs.examples import EXAMPLE_SCORE, Example

logger = logging.getLogger(__name__)


class AttentionViewer(anywidget.AnyWidget):
    """The page in a notebook with a kernel: of every image, stored or not, and of every cell of an encoder.

    Args:
        images: by the name of the run: id -> example, which may be computed when it is asked for, as of
            `engine.examples.open_images`. What those say of themselves is told: `errors`, `at_once`, `title`,
            `annotated` and `sink_threshold`.
        names: label -> class, or run -> label -> class, since runs may number their classes in ways of their own.
        image_id: shown first; None: the first one.
        layer: the decoder layer shown first, negative ones from the end.

    Where no kernel answers (an executed notebook on a web page, as HTML or in a report) it is the page of the first
    image alone.
    """

    _esm = Path(__file__).with_name("page_frame.js")
    page = traitlets.Unicode().tag(sync=True)
    height = traitlets.Int(HEIGHT).tag(sync=True)

    def __init__(
        self,
        images: Mapping[str, Mapping[int, Example]],
        names: Mapping[int, str] | Mapping[str, Mapping[int, str]],
        image_id: int | None = None,
        layer: int = -1,
    ):
        self.images, self.names = images, {run: names.get(run, names) for run in images}
        first = next(iter(images.values()))
        self._ids = {str(number): number for number in first}
        start = str(next(iter(first)) if image_id is None else image_id)
        here, at_once = self._picture(start), getattr(first, "at_once", ())
        faults = [_faults(own) for own in images.values()]
        waiting = {
            name: page_pending(number, [known.get(number) for known in faults], number in at_once, self._own(name))
            for name, number in self._ids.items()
        }
        super().__init__(page=self._page((waiting | {start: here}).values(), start, layer))
        self._alone = self._page([here], start, layer)
        self.on_msg(self._asked)

    def _page(self, pictures: Iterable[str], start: str, layer: int) -> str:
        thresholds = [getattr(images, "sink_threshold", LIMITS.threshold) for images in self.images.values()]
        more = {"view": MapChoice(layer=layer), "thresholds": thresholds, "image": start}
        more |= {"title": title_of(self.images), "score": EXAMPLE_SCORE}
        return page_text(pictures, list(self.images), self.names.values(), **more)

    def _own(self, name: str) -> str:
        """The title of a picture of one's own, empty of images with annotated objects."""
        first = next(iter(self.images.values()))
        return "" if getattr(first, "annotated", True) else first.title(self._ids[name])

    def _picture(self, name: str) -> str:
        image_id = self._ids[name]
        there = {run: images[image_id] for run, images in self.images.items() if image_id in images}
        first = next(iter(there.values()))
        same = {run: example for run, example in there.items() if same_image(first, example)}
        return page_example({run: same.get(run) for run in self.images}, self.names, self._own(name))

    def _asked(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        """Answer what the page asks for; a fault is an answer, since errors of a widget appear nowhere."""
        asked = content["asked"]
        try:
            if "cell" in asked:
                answer = page_cell(self.images[asked["run"]][self._ids[asked["image"]]], *asked["cell"])
            else:
                answer = {"picture": self._picture(asked["image"])}
        except KeyboardInterrupt:  # who waited too long
            answer = {"fault": "interrupted; choose another image, or this one again"}
        except Exception as error:  # memory, a file, the run; or a defect
            if fault_of(error) is None:
                logger.exception("the viewer's question %s has no answer", asked)
            answer = {"fault": fault_of(error) or in_one_line(error)}
        self.send({"number": content["number"], "answer": answer})

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict] | None:
        shown = super()._repr_mimebundle_(**kwargs)
        shown[0].update({"text/html": frame_of(self._alone), "text/plain": "AttentionViewer"})
        return shown


def _faults(images: Mapping[int, Example]) -> dict[int, list[int]]:
    """How many objects each image missed and detections are wrong, where that is known before it is computed."""
    errors = getattr(images, "errors", ())
    rows = errors[["missed", "false_positives"]].itertuples(name=None) if "missed" in errors else ()
    return {image_id: faults for image_id, *faults in rows}
