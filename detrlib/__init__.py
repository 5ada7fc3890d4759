"""Sparse attention in detection transformers: where does a detector look, and how little of it is enough?

An image's way is `data`, `models` (with `attention` inside), `losses`, `engine`; that of an attention map is
`models.outputs`, `metrics`, `runs`, `figures`. A file imports only from folders to its left:

    errors, files, boxes, config < data, attention < models < losses, checkpoints < metrics < runs < engine
        < experiments < figures < teaching, benchmarks, __main__
"""

__version__ = "0.2.0"
