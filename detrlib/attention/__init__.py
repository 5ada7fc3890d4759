"""Attention: from scores to weights, and from weights to output.

In order of reading: `reference` defines the family of transforms in forty lines; `transforms` has all of them as
modules; `multihead` is attention with any of them, `gates` what may become of what its heads have mixed, and `dropout`
what it draws; `entmax` (by `newton`) and `tvmax` compute weights exactly and fast; `deformable` samples locations
instead of weighing all keys; `kernels` does the same on a GPU.
"""

from detrlib.attention.multihead import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    Mixing,
    MultiheadAttention,
    attend,
)
from detrlib.attention.transforms import TRANSFORMS, AlphaEntmax, Transform, build_transform
