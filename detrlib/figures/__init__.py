"""Figures as functions: data in, a matplotlib Figure out. Nothing here computes results or reads a model.

What statistics say is drawn in `results`, `statistics`, `interventions` and `explanations`, what went wrong in
`failures`, what stands in images in `attention`, `queries`, `deformable` and `dataset`, where attention rests in
`sinks`, maps by `overlay`; `tables` are text, `thesis` is a document of them and of figures. `predictions` are of
pictures of one's own, which `album` puts into a folder. `page` puts them, or what runs store, into one file for a
browser: `viewer` beside runs, and `widget` into a notebook, whose kernel it asks for more.
`figures.save(figure, "name")` writes one for LaTeX.
"""

from detrlib.figures import (
    album,
    attention,
    choices,
    dataset,
    deformable,
    explanations,
    failures,
    interventions,
    overlay,
    page,
    predictions,
    queries,
    results,
    sinks,
    statistics,
    style,
    tables,
    thesis,
    viewer,
)
from detrlib.figures.style import save
