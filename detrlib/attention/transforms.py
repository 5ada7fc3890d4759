"""From attention scores to attention weights: softmax and its sparse relatives.

Legend: B images, H heads, Q queries, K keys. Every transform maps scores [B,H,Q,K] to non-negative weights
[B,H,Q,K] that sum to one over the valid keys. They belong to one family, entmax (Peters, Niculae & Martins
2019, "Sparse Sequence-to-Sequence Models", Eq. 10):

    entmax_alpha(z) = argmax_p  <p, z> + H_alpha(p)  =  [(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1))

with tau such that the weights sum to one: alpha = 1 is softmax, 1.5 entmax15, 2 sparsemax.
"""

import torch
from torch import Tensor, nn

from detrlib.attention.solvers import entmax

ALPHA_LOW, ALPHA_HIGH = 1.01, 2.0  # range of a learnable alpha, open at both ends


class Transform(nn.Module):
    """Scores to weights over the last axis, in float32 or wider, exact under padding.

    Subclasses define `weights(scores)`; this class takes care of precision and of padded keys, which get
    exactly zero weight and pass no gradient. A row whose keys are all padding becomes a row of zeros.
    """

    def forward(self, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        """scores [B,H,Q,K]; padding bool, broadcastable to it, True = padding -> weights [B,H,Q,K]."""
        with torch.autocast(scores.device.type, enabled=False):
            scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
            if padding is None:
                return self.weights(scores)
            # A row of nothing but -inf has no weights: leave it finite here and let the last line clear it.
            hidden = padding & ~padding.all(-1, keepdim=True)
            return self.weights(scores.masked_fill(hidden, float("-inf"))).masked_fill(padding, 0.0)

    def weights(self, scores: Tensor) -> Tensor:
        raise NotImplementedError


class Softmax(Transform):
    """exp(z) / sum exp(z): every valid key gets some weight."""

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class Sparsemax(Transform):
    """Euclidean projection onto the simplex (Martins & Astudillo 2016, Eq. 2)."""

    def weights(self, scores: Tensor) -> Tensor:
        return entmax(scores, 2.0)


class Entmax15(Transform):
    """entmax with alpha = 1.5 (Peters et al. 2019, Sec. 3.2)."""

    def weights(self, scores: Tensor) -> Tensor:
        return entmax(scores, 1.5)


class Entmax(Transform):
    """entmax with one fixed `alpha` in (1, 2]."""

    def __init__(self, alpha: float):
        super().__init__()
        if not 1 < alpha <= 2:
            raise ValueError(f"alpha {alpha} must lie above 1 (softmax) and be at most 2 (sparsemax)")
        self.alpha = alpha

    def weights(self, scores: Tensor) -> Tensor:
        return entmax(scores, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class AlphaEntmax(Transform):
    """entmax with one learnable alpha per head (Correia, Niculae & Martins 2019, "Adaptively Sparse Transformers").

    alpha = 1.01 + 0.99 sigmoid(pre_alpha), so that the gradient fades only at the ends of the range; clamping
    instead would freeze every head that drifts below the bound.

    `initial`: a value in (1.01, 2) for every head, or "normal" to draw pre_alpha from N(0, 1) for each.
    """

    def __init__(self, num_heads: int, initial: float | str = 1.5):
        super().__init__()
        self.pre_alpha = nn.Parameter(torch.empty(num_heads))
        if initial == "normal":
            nn.init.normal_(self.pre_alpha)
            return
        if not ALPHA_LOW < initial < ALPHA_HIGH:
            raise ValueError(f"alpha_init {initial} must lie between {ALPHA_LOW} and {ALPHA_HIGH}, or be 'normal'")
        share = torch.tensor((initial - ALPHA_LOW) / (ALPHA_HIGH - ALPHA_LOW))
        nn.init.constant_(self.pre_alpha, torch.logit(share).item())

    @property
    def alpha(self) -> Tensor:
        """[H], each in (1.01, 2)."""
        return ALPHA_LOW + (ALPHA_HIGH - ALPHA_LOW) * self.pre_alpha.sigmoid()

    def weights(self, scores: Tensor) -> Tensor:
        return entmax(scores, self.alpha.to(scores.dtype)[:, None, None])  # [H,1,1]


TRANSFORMS = {
    "softmax": lambda num_heads, alpha, alpha_init: Softmax(),
    "sparsemax": lambda num_heads, alpha, alpha_init: Sparsemax(),
    "entmax15": lambda num_heads, alpha, alpha_init: Entmax15(),
    "entmax": lambda num_heads, alpha, alpha_init: Entmax(alpha),
    "alpha_entmax": lambda num_heads, alpha, alpha_init: AlphaEntmax(num_heads, alpha_init),
}


def build_transform(name: str, num_heads: int, alpha: float = 1.5, alpha_init: float | str = 1.5) -> Transform:
    """The transform called `name`, freshly initialised. Raises ValueError listing the names there are."""
    if name not in TRANSFORMS:
        raise ValueError(f"unknown attention transform '{name}'; there are {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name](num_heads, alpha, alpha_init)
