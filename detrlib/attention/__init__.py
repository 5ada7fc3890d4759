"""Attention: from scores to weights, and from weights to output.

In order of reading: `reference` defines the transforms in forty lines; `transforms` and `family` have them as modules,
`build` by name; `mixing` is attention with any of them, `multihead` the layers around it, `gates` what may become of
what their heads have mixed, `dropout` what is drawn; `entmax` (by `native` or `newton`), `tvmax`, `normmax`, `budget`
are exact and fast; `deformable` samples locations instead of weighing all keys; `kernels` are for a GPU, and in C.
"""

from detrlib.attention.build import TRANSFORMS, build_transform
from detrlib.attention.mixing import attend
from detrlib.attention.multihead import ConditionalCrossAttention, ConditionalSelfAttention, Mixing, MultiheadAttention
from detrlib.attention.transforms import AlphaEntmax, Transform
