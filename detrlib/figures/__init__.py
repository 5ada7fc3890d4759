"""Figures as functions: data in, a matplotlib Figure out. Nothing here computes results or reads a model.

What statistics say is drawn in `results`, `statistics`, `interventions` and `explanations`, what stands in images in
`attention`, `queries`, `deformable` and `dataset`; `predictions` are of pictures of one's own, which `page`
and `album` show in a browser and in a folder; `viewer` answers to clicks; `tables` are text.
"""

# ruff: noqa: F401
from detrlib.figures import (
    album,
    attention,
    choices,
    dataset,
    deformable,
    explanations,
    interventions,
    page,
    predictions,
    queries,
    results,
    statistics,
    style,
    tables,
)
