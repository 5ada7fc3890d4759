"""Attention: scores to weights (`transforms`) and weights to output (`multihead`)."""

from detrlib.attention.multihead import ConditionalCrossAttention, MultiheadAttention, attend
from detrlib.attention.transforms import TRANSFORMS, AlphaEntmax, Transform, build_transform

__all__ = [
    "TRANSFORMS",
    "AlphaEntmax",
    "ConditionalCrossAttention",
    "MultiheadAttention",
    "Transform",
    "attend",
    "build_transform",
]
