"""The interactive viewer of notebook 08: click a detection and see where its query looked, in one run or two.

What is shown is a `views.View`; what that means are plain functions there. Here it is drawn, and connected to controls
and to the mouse.
"""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from html import escape

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import MouseEvent
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from detrlib.errors import DetrlibError
from detrlib.figures.attention import draw_box, thinner
from detrlib.figures.choices import cell_box
from detrlib.figures.overlay import BAR_WIDTH, Panel, colour_bar, draw_maps, overlay, scale_of
from detrlib.figures.style import MUTED, class_colour, look, styled
from detrlib.figures.views import (
    Stored,
    View,
    cell_of,
    clicked,
    consistent,
    lines_about,
    query_in,
    sink_in,
    sites,
    weights_in,
)
from detrlib.metrics.sinks import LIMITS
from detrlib.runs.examples import Example

PANEL, TALLEST, LINES = 3.9, 4.6, 1.0  # inches: width of an image, its largest height, the lines above and below it
RING = 0.75  # radius, in sides of a cell
HINT = "Click a detection, in either picture, to see where its query looked."


@styled
def draw_view(figure: Figure, view: View, stored: Stored, names: Mapping[int, str]) -> dict[str, Axes]:
    """Draw a view into an empty figure of its own size; the panels by run."""
    figure.clear()
    runs = [run for run in (view.run, view.beside) if run]
    height, width = stored[view.run][view.image_id].image.shape[:2]
    panel = min(PANEL, TALLEST * width / height)
    # Titles need their room, however narrow the image is.
    size = len(runs) * max(panel, 0.85 * PANEL) + BAR_WIDTH, panel * height / width + LINES
    figure.set_size_inches(*size)
    looks, panels = [], dict(zip(runs, np.atleast_1d(figure.subplots(1, len(runs))), strict=True))
    for run, axes in panels.items():
        axes.axis("off")
        example = stored[run].get(view.image_id)
        if example is None:
            axes.set_title(f"{run}\nimage {view.image_id} is not stored of this run", loc="left", color=MUTED)
        elif view.site not in sites(example):
            axes.set_title(f"{run}\n{view.site} is not stored of this run", loc="left", color=MUTED)
        else:
            query = query_in(view, stored, run)
            weights = weights_in(view, example, query)
            _draw_boxes(axes, view, example, query, names)
            if view.sink and view.site != "decoder_self":
                _ring(axes, view, example)
            if view.attention and weights is not None:
                own = None if view.site == "encoder_self" else example.boxes[query]
                extent = example.extent_of(weights)
                looks.append((Panel(axes, example.image, weights, extent, own), example.boxes))
            else:
                axes.imshow(example.image)
            threshold = getattr(stored[run], "sink_threshold", LIMITS.threshold)  # examples alone have none
            lines = [run, *lines_about(view, example, query, weights, names, threshold)]
            axes.set_title("\n".join(lines), loc="left")
    _draw_weights(figure, view, looks)
    return panels


def _ring(axes: Axes, view: View, example: Example) -> None:
    """A ring around the cell that gets most weight of all queries."""
    key, (rows, columns) = sink_in(view, example)[1:]
    height, width = example.image.shape[:2] / example.extent_of(np.empty((rows, columns)))  # pixels of a cell
    centre = (key % columns + 0.5) * width - 0.5, (key // columns + 0.5) * height - 0.5
    for colour, line in (("white", 3.0), ("black", 1.4)):
        axes.add_patch(Circle(centre, RING * max(height, width), fill=False, edgecolor=colour, linewidth=line))


def _draw_boxes(axes: Axes, view: View, example: Example, query: int | None, names: Mapping[int, str]) -> None:
    """The boxes that are wanted, in the colours of their classes; the one clicked is the thickest, in front."""
    for box, label in zip(example.true_boxes, example.true_labels, strict=True) if view.truth else []:
        draw_box(axes, box, class_colour(int(label), names), dashed=True, width=thinner(len(example.true_boxes)))
    colours = [class_colour(int(label), names) for label in example.labels]
    for number, box in enumerate(example.boxes if view.predictions else []):
        if number != query:
            draw_box(axes, box, colours[number], width=thinner(len(colours), 0.8))
    if view.site == "encoder_self":
        draw_box(axes, cell_box(example, cell_of(view, example)), "black", width=2.2)
    elif query is not None and view.predictions:
        draw_box(axes, example.boxes[query], colours[query], width=2.2)


def _draw_weights(figure: Figure, view: View, looks: Sequence[tuple[Panel, np.ndarray]]) -> None:
    """The map of every panel over its image, or, of weights that go to queries, their boxes [n,4] filled."""
    panels = [panel for panel, _ in looks]
    if view.site != "decoder_self":
        draw_maps(figure, panels, view.scale, view.logarithmic)
        for panel in panels:
            panel.axes.format_coord = partial(weight_at, panel)  # shown below the picture
            for image in panel.axes.images:
                image.mouseover = False  # whose colours say nothing more
        return
    scale = scale_of([panel.weights for panel in panels], view.logarithmic)
    for panel, boxes in looks:
        panel.axes.imshow(panel.image)
        for (x0, y0, x1, y1), colour in zip(boxes, overlay(panel.weights[None], scale)[0], strict=True):
            panel.axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=colour, edgecolor="none", zorder=0.5))
    if looks:
        colour_bar(figure, [panel.axes for panel in panels], scale, "weight")


def weight_at(panel: Panel, x: float, y: float) -> str:
    """The cell of a map that lies below a point of its image, in pixels, and its weight, in words."""
    height, width = panel.image.shape[:2] / np.asarray(panel.extent)  # pixels of a cell
    row, column = int((y + 0.5) // height), int((x + 0.5) // width)
    inside = 0 <= row < panel.weights.shape[0] and 0 <= column < panel.weights.shape[1]
    return f"row {row + 1}, column {column + 1}: weight {panel.weights[row, column]:.3g}" if inside else ""


# --- the widget ------------------------------------------------------------------------------------------------


class AttentionViewer(ipywidgets.VBox):
    """Controls above a picture that answers to clicks.

    examples: by the name of the run, as of `load_examples`, or by image id, which may be computed when they are shown
    (`engine.examples.ValidationImages`); names: label -> class; image_id: shown first, None for the first one; layer:
    the decoder layer shown first, negative ones from the end.

    Where no browser shows widgets (an executed notebook on a web page, as HTML or in a report) it is a picture.
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[Example] | Mapping[int, Example]],
        names: Mapping[int, str],
        image_id: int | None = None,
        layer: int = -1,
    ):
        super().__init__()
        self.stored = {run: _by_id(of_run) for run, of_run in examples.items()}
        self.names = names
        first, *others = self.stored
        image_id = next(iter(self.stored[first])) if image_id is None else image_id
        layers = self.stored[first][image_id].shape()[0]
        self.view = View(first, image_id, beside=next(iter(others), ""), layer=range(layers)[layer], origin=first)
        self.figure, self.canvas = _clickable_figure(self._click)
        self.controls = self._controls()
        rows = [("run", "beside", "image_id"), ("site", "layer", "head"), ("truth", "predictions", "attention")]
        rows.append(("scale", "logarithmic", "sink"))
        self.hint = ipywidgets.HTML(HINT)
        boxes = [ipywidgets.HBox([self.controls[name] for name in row]) for row in rows]
        self.children = (*boxes, self.hint, self.canvas)
        self.show(self.view)

    def _controls(self) -> dict[str, ipywidgets.Widget]:
        """A control for each part of a view that is not clicked, under its name."""
        wide = {"layout": {"width": "300px"}, "style": {"description_width": "60px"}}
        runs = list(self.stored)
        controls = {
            "run": ipywidgets.Dropdown(options=runs, description="run", **wide),
            "beside": ipywidgets.Dropdown(options=[("no other run", "")], description="beside", **wide),
            "image_id": ipywidgets.Dropdown(description="image", **wide),
            "site": ipywidgets.Dropdown(description="site", **wide),
            "layer": ipywidgets.SelectionSlider(options=[("1", 0)], description="layer", **wide),
            "head": ipywidgets.SelectionSlider(options=[("mean", "mean")], description="head", **wide),
            "truth": ipywidgets.Checkbox(description="ground truth (dashed)", indent=False),
            "predictions": ipywidgets.Checkbox(description="predictions", indent=False),
            "attention": ipywidgets.Checkbox(description="attention", indent=False),
            "sink": ipywidgets.Checkbox(description="ring at the sink", indent=False),
            "scale": ipywidgets.Dropdown(options=["shared", "own"], description="scale", **wide),
            "logarithmic": ipywidgets.Checkbox(description="logarithmic colours", indent=False),
        }
        for name, control in controls.items():
            control.observe(lambda change, name=name: self._changed(name, change["new"]), "value")
        return controls

    def _options(self) -> dict[str, list]:
        """What can be chosen beside the present view, by control."""
        images = self.stored[self.view.run]
        example = images[self.view.image_id]
        layers, heads = example.shape(self.view.site)[:2]
        return {
            "beside": [("no other run", ""), *((run, run) for run in self.stored if run != self.view.run)],
            "image_id": [(_image_label(number, image_id, images), image_id) for number, image_id in enumerate(images)],
            "site": sites(example),
            "layer": [(str(layer + 1), layer) for layer in range(layers)],
            "head": [("mean", "mean"), *((str(head + 1), head) for head in range(heads))],
        }

    def show(self, view: View) -> None:
        """Show `view`, or the nearest one that exists: in the picture and in the controls."""
        self.view = consistent(view, self.stored)
        self._writing = True  # what is written into controls here was not chosen by the user
        for name, options in self._options().items():
            if list(self.controls[name].options) != options:
                self.controls[name].options = options
        for name, control in self.controls.items():
            control.value = getattr(self.view, name)
        self._writing = False
        self.panels = draw_view(self.figure, self.view, self.stored, self.names)
        self.canvas.manager.set_window_title(f"{self.view.run} {self.view.image_id}")  # the name of a saved picture
        self.canvas.manager.toolbar.update()  # "home" is the whole of this picture, not of the one before
        self.canvas.draw_idle()

    def _changed(self, name: str, value) -> None:
        if self._writing:
            return
        self.hint.value = HINT
        swapped = {"beside": self.view.run} if name == "run" and value == self.view.beside else {}
        try:
            self.show(changed(self.view, **{name: value}, **swapped))
        except DetrlibError as error:  # of an image that cannot be computed; a widget's errors appear nowhere
            self.hint.value = escape(str(error))
            self.show(self.view)

    def _click(self, event: MouseEvent) -> None:
        if self.canvas.manager.toolbar.mode:  # the click belongs to zooming or moving the picture
            return
        for run, axes in self.panels.items():
            if event.inaxes is axes and self.view.image_id in self.stored[run]:
                self.show(clicked(self.view, self.stored, run, event.xdata, event.ydata))

    def _repr_mimebundle_(self, **kwargs) -> dict:
        picture = io.BytesIO()
        self.figure.savefig(picture, format="png", dpi="figure")
        bundle = super()._repr_mimebundle_(**kwargs)
        return bundle | {"text/plain": "AttentionViewer", "image/png": b64encode(picture.getvalue()).decode()}


def _by_id(examples: Sequence[Example] | Mapping[int, Example]) -> Mapping[int, Example]:
    return examples if isinstance(examples, Mapping) else {example.image_id: example for example in examples}


def _image_label(number: int, image_id: int, images: Mapping[int, Example]) -> str:
    """What the control says of an image, with what went wrong in it where that is known."""
    title = images.title(image_id) if hasattr(images, "title") else ""
    return f"{number}: id {image_id}" + (f" ({title})" if title else "")


def _clickable_figure(click):
    """An empty figure and its canvas for the browser; `click` is called with every press of a mouse button."""
    backend = matplotlib.get_backend()
    plt.switch_backend(backend)  # loaded as the current one, a notebook's backend sees to it that figures are shown
    from ipympl.backend_nbagg import Canvas, FigureManager

    plt.switch_backend(backend)  # importing ipympl makes it the backend of all figures
    figure = Figure(dpi=look().get("figure.dpi"), layout="constrained")
    canvas = Canvas(figure)
    canvas.header_visible = canvas.resizable = False  # the footer tells what lies below the mouse
    canvas.toolbar_position = "right"  # on the left it would cover what a panel says
    FigureManager(canvas, 0)
    canvas.mpl_connect("button_press_event", click)
    return figure, canvas
