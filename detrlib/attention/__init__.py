"""Attention: from scores to weights, and from weights to output.

In order of reading: `reference` defines the family of transforms in forty lines; `transforms` has it as modules, and
`build` all of them by name; `mixing` is attention with any of them, `multihead` the layers around it, `gates` what may
become of what their heads have mixed, and `dropout` what is drawn; `entmax` (by `newton`) and `tvmax` compute weights
exactly and fast; `deformable` samples locations instead of weighing all keys; `kernels` does the same on a GPU.
"""

from detrlib.attention.build import TRANSFORMS, build_transform
from detrlib.attention.mixing import attend
from detrlib.attention.multihead import ConditionalCrossAttention, ConditionalSelfAttention, Mixing, MultiheadAttention
from detrlib.attention.transforms import AlphaEntmax, Transform
