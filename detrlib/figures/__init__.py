"""Figures as functions: data in, a matplotlib Figure out. Nothing here computes results or reads a model.

What statistics say is drawn in `results`, `statistics`, `interventions` and `explanations`, what stands in images in
`attention`, `queries`, `deformable` and `dataset`, maps by `overlay`; `viewer` answers to clicks; `tables` are text.
`figures.save(figure, "name")` writes one for LaTeX.
"""

# ruff: noqa: F401
from detrlib.figures import (
    attention,
    choices,
    dataset,
    deformable,
    explanations,
    interventions,
    overlay,
    queries,
    results,
    statistics,
    style,
    tables,
)
from detrlib.figures.style import save
