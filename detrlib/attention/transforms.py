"""From attention scores to attention weights: softmax and its sparse relatives.

Legend: B images, H heads, Q queries, K keys. Every transform here maps scores [B,H,Q,K] to non-negative weights
[B,H,Q,K] that sum to one over the valid keys, or to less beside a null key. They belong to one family, entmax (Peters,
Niculae & Martins 2019, "Sparse Sequence-to-Sequence Models", Eq. 10):

    entmax_alpha(z) = argmax_p  <p, z> + H_alpha(p)  =  [(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1))

with tau such that the weights sum to one: alpha = 1 is softmax, 1.5 entmax15, 2 sparsemax.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrlib.attention.entmax import LEAST_ALPHA, entmax_unchecked
from detrlib.attention.tvmax import tvmax

ALPHA_LOW, ALPHA_HIGH = 1.01, 2.0  # range of a learnable alpha
Grid = tuple[int, int]  # (h, w) of a feature map whose cells are the keys


class Transform(nn.Module):
    """Scores to weights over the last axis, in float32 or wider, exact under padding.

    Subclasses define `weights(scores, grid)`, and some `scaled`; this class takes care of precision, of padded keys,
    which get exactly zero weight and pass no gradient, and of the null key. A row whose keys are all padding becomes a
    row of zeros.

    `null_score`: of one key more, which stands for no key, and whose value is zero: a head that has nothing to say puts
    its weight there. The weights of the keys that there are sum to one less that of the null key, which is not
    returned: weights(s) = transform([s, null_score]) without its last entry. 0: softmax becomes exp(s_j) / (1 + sum
    exp(s)), "softmax1" (Miller 2023, "Attention Is Off By One"); a parameter, one for each head: "learned sink" (OpenAI
    2025, gpt-oss); None: there is no such key.

    `hidden`: the score that `weights` finds in the place of a padded key.

    `padding_adds_one`: add 1 to the scores of padded keys instead, which favours them: what models trained with a
    boolean mask added to the scores have learned to expect.
    """

    padding_adds_one = False
    by_row = True  # weights of a row follow from its scores alone, so that queries may be taken in parts
    hidden = float("-inf")

    def __init__(self):
        super().__init__()
        self.null_score: float | nn.Parameter | None = None  # number, or [H]

    def forward(self, scores: Tensor, padding: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """scores [B,H,Q,K]; padding bool, broadcastable to it, True = padding; grid (h, w), h * w == K, where keys
        are cells of a feature map -> weights [B,H,Q,K].
        """
        with torch.autocast(scores.device.type, enabled=False):
            scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
            if padding is not None and self.padding_adds_one:
                scores, padding = scores + padding.to(scores.dtype), None
            if self.null_score is not None:
                return self._beside_null_key(scores, padding, grid)
            scores = self.scaled(scores, padding, scores.shape[-1])
            if padding is None:
                return self.weights(scores, grid)
            # A row of nothing but -inf has no weights: leave it finite here, and clear it in the end.
            empty = padding.all(-1, keepdim=True)
            weights = self.weights(scores.masked_fill(padding & ~empty, self.hidden), grid)
            # There is hardly ever such a row. On a GPU a copy costs less than the answer; a graph cannot ask.
            asked = empty.is_cpu and not torch.compiler.is_compiling()
            return weights if asked and not empty.any() else weights.masked_fill(empty, 0.0)

    def _beside_null_key(self, scores: Tensor, padding: Tensor | None, grid: Grid | None) -> Tensor:
        """As `forward`: weights of the keys where there is a null key too, behind them all and never padding."""
        keys = scores.shape[-1]
        if isinstance(self.null_score, Tensor):
            null = self.null_score.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, null], -1)  # [B,H,Q,K+1]
        else:
            scores = F.pad(scores, (0, 1), value=self.null_score)
        scores = self.scaled(scores, padding, keys)
        if padding is not None:
            scores = scores.masked_fill_(F.pad(padding, (0, 1)), self.hidden)  # of a copy, made above
        return self.weights(scores, grid)[..., :-1]

    def scaled(self, x: Tensor, padding: Tensor | None, keys: int) -> Tensor:
        """Scores as `weights` wants them, where these depend on how many keys there are: see `valid_keys`.

        Of a `Softmax` or an `Entmax` it can only be a factor for each image and head: `attend` may scale queries by it.
        """
        return x

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        """Of scores in float32 or wider [B,H,Q,K], padded keys among them -inf; a null key stands behind the grid."""
        raise NotImplementedError


def valid_keys(x: Tensor, padding: Tensor | None, keys: int) -> Tensor:
    """n, how many of `keys` are no padding, at least one: broadcastable to scores x, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if padding is None:
        return torch.full((), keys, dtype=dtype, device=x.device)
    return (~padding).sum(-1, keepdim=True).clamp(min=1).to(dtype)


class Softmax(Transform):
    """exp(z) / sum exp(z): every valid key gets some weight."""

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        return scores.softmax(-1)


class Entmax(Transform):
    """entmax with one `alpha`, above 1 and at most 2. Training may move it, also to 1, where it is softmax."""

    def __init__(self, alpha: float):
        super().__init__()
        if not LEAST_ALPHA <= alpha <= 2:
            raise ValueError(f"alpha {alpha} must lie above 1 (softmax), by 1e-6 or more, and be at most 2 (sparsemax)")
        self.alpha = alpha

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        return entmax_unchecked(scores, self.alpha) if self.alpha >= LEAST_ALPHA else scores.softmax(-1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Sparsemax(Entmax):
    """Euclidean projection onto the simplex (Martins & Astudillo 2016, Eq. 2)."""

    def __init__(self):
        super().__init__(2.0)


class Entmax15(Entmax):
    """entmax with alpha = 1.5 (Peters et al. 2019, Sec. 3.2)."""

    def __init__(self):
        super().__init__(1.5)


class AlphaEntmax(Transform):
    """entmax with one learnable alpha per head (Correia, Niculae & Martins 2019, "Adaptively Sparse Transformers").

    alpha = 1.01 + 0.99 sigmoid(pre_alpha), so that the gradient fades only at the ends of the range; clamping
    instead freezes every head that drifts below the bound.

    `initial`: a value in (1.01, 2) for every head, "normal" to draw pre_alpha from N(0, 1), or pre_alpha itself [H].
    `clamped`: alpha = clamp(1 + sigmoid(pre_alpha), 1.01, 2), for weights that were trained so.
    """

    def __init__(self, num_heads: int, initial: float | str | Tensor = 1.5, clamped: bool = False):
        super().__init__()
        self.clamped = clamped
        if isinstance(initial, Tensor):
            self.pre_alpha = nn.Parameter(initial.detach().clone())
        elif initial == "normal":
            self.pre_alpha = nn.Parameter(torch.randn(num_heads))
        elif not isinstance(initial, str) and ALPHA_LOW < initial < ALPHA_HIGH:
            low = 1.0 if clamped else ALPHA_LOW
            share = torch.full((num_heads,), (initial - low) / (ALPHA_HIGH - low))
            self.pre_alpha = nn.Parameter(torch.logit(share))
        else:
            raise ValueError(f"alpha_init {initial} must lie between {ALPHA_LOW} and {ALPHA_HIGH}, or be 'normal'")

    @property
    def alpha(self) -> Tensor:
        """[H], each between 1.01 and 2."""
        share = self.pre_alpha.sigmoid()
        if self.clamped:
            return (1 + share).clamp(ALPHA_LOW, ALPHA_HIGH)
        return ALPHA_LOW + (ALPHA_HIGH - ALPHA_LOW) * share

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        return entmax_unchecked(scores, self.alpha.to(scores.dtype)[:, None, None])  # [H,1,1]

    def extra_repr(self) -> str:
        return f"num_heads={len(self.pre_alpha)}, clamped={self.clamped}"


class TVMax(Transform):
    """Sparsemax of scores smoothed by total variation over the key grid: weights form patches (Martins et al. 2021).

    `tv_lambda`: the price of a step between neighbouring cells; 0 is sparsemax. Half of the published code's alpha.
    """

    def __init__(self, tv_lambda: float):
        super().__init__()
        if not tv_lambda >= 0:
            raise ValueError(f"tv_lambda {tv_lambda} must not be negative")
        self.tv_lambda = tv_lambda

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        if grid is None:
            raise ValueError("tvmax needs keys that form a grid: use it at encoder_self or decoder_cross")
        return tvmax(scores, grid, self.tv_lambda)

    def extra_repr(self) -> str:
        return f"tv_lambda={self.tv_lambda}"
