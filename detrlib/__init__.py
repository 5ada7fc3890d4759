"""Sparse attention in detection transformers: where does a detector look, and how little of it is enough?

An image's way is `data`, `models` (with `attention` inside), `losses`, `engine`; that of an attention map is
`models.outputs`, `metrics`, `runs`, `figures`. A file imports only from folders to its left:

    errors, files, boxes, config < data, attention < models < losses, checkpoints < metrics < runs < engine
        < experiments < figures < teaching, benchmarks < commands < __main__
"""

import os

# Threads of OpenMP wait for each other by turning round, by default for milliseconds. Where another program has the
# core of one of them, all others turn round for as long as it waits, and a step on two threads takes ten times the
# processor time of one on a single thread. libgomp reads this when torch is imported, and programs started from here
# inherit it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.2.0"
