"""What the kernels of `rows` and `flash` share: the scores they take, and Newton's method on the threshold.

With z = (alpha - 1) (x - max x), c = 1 / (alpha - 1) and u = (z - tau)_+, steps start at tau = -1 and end at the root
of ||u||_c = 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # all arithmetic is in float32
MOST_STEPS = tl.constexpr(60)  # never reached in practice, as in `attention.entmax`
EPS = tl.constexpr(torch.finfo(torch.float32).eps)


def supported(x: Tensor) -> bool:
    """Whether the kernels take scores like x: on a GPU with bfloat16 (Ampere or newer), of at most float32."""
    return x.is_cuda and x.dtype in DTYPES and torch.cuda.get_device_capability(x.device) >= (8, 0)


def check(*tensors: Tensor) -> None:
    """Raise TypeError for a dtype that the kernels would silently round."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise TypeError(f"the kernels compute in float32 and do not take {tensor.dtype}")


def describe(alpha: float | Tensor, device: torch.device) -> tuple[str, Tensor, int]:
    """Which formula serves alpha, its values in float32, and the stride from one to the next: 0 if there is but one."""
    if isinstance(alpha, Tensor):
        return "general", alpha.detach().float().contiguous(), 1
    kind = {2.0: "sparsemax", 1.5: "entmax15"}.get(alpha, "general")
    return kind, torch.full((1,), alpha, dtype=torch.float32, device=device), 0


@triton.jit
def tolerance(beyond, KIND: tl.constexpr):
    """The step after which Newton's method may stop, given alpha - 1.

    As in `attention.entmax`: times c, the error is about the square of the last step, and sparsemax ends exactly. Above
    alpha = 1.5 the curvature has no bound, and steps shrink to rounding before it is safe to stop; so do those near
    alpha = 1, because tau, unlike the threshold there, is a number near 1.
    """
    if KIND == "sparsemax":
        return EPS
    else:
        return tl.where(beyond > 0.5, 4 * EPS, tl.maximum(0.1 * EPS**0.5 * beyond, 4 * EPS))


@triton.jit
def lower_power(above, beyond, KIND: tl.constexpr):
    """u^(c-1), and 0 outside the support even where c - 1 is 0; times u it is u^c, so that no second power is needed.

    above: u; beyond: alpha - 1, of a shape that broadcasts to it.
    """
    if KIND == "sparsemax":
        return (above > 0).to(tl.float32)
    elif KIND == "entmax15":
        return above
    else:
        inside = above > 0
        return tl.where(inside, tl.exp2((1 / beyond - 1) * tl.log2(tl.where(inside, above, 1.0))), 0.0)


@triton.jit
def newton_step(total, slope, beyond, KIND: tl.constexpr):
    """How far tau rises, given the sums of u^c (total) and u^(c-1) (slope); 0 for a row of -inf.

    Never negative, so that a key once below tau stays below; NaN stays NaN, so that it can be seen in the result.
    """
    filled = tl.where(slope == 0, 1.0, total)  # total is 0 there, too
    if KIND == "sparsemax":
        root = 1.0
    elif KIND == "entmax15":
        root = tl.sqrt(filled)
    else:
        root = tl.exp2((1 - beyond) * tl.log2(filled))
    step = (filled - root) / tl.where(slope == 0, 1.0, slope)
    return tl.where(step < 0, 0.0, step)


@triton.jit
def bend(above):
    """u - 1 - u log u: times s (g - centre) / (alpha - 1)^2 and summed, the slope of a row's output in alpha.

    From p = u^c and u = (alpha - 1) x - tau follows dp / dalpha = s (u - u log u + a) / (alpha - 1)^2. Here a depends
    on tau, but it is one number for all keys of a row, and any number will do, since s (g - centre) sums to zero. With
    -1 most digits are kept: for alpha near 1 the u of all keys that matter are near 1, and these terms near 0.
    """
    inside = tl.where(above > 0, above, 1.0)
    return (inside - 1) - inside * tl.log(inside)
