"""Sparse attention in detection transformers: where does a detector look, and how little of it is enough?

Read the package from the top of the import order downwards (`launch`, `train`, `criterion`, `models`,
`attention`) or from the bottom up (`attention`, `models`, `criterion`, `train`); a file imports only
from the rows below it.
"""

__version__ = "0.1.0"
