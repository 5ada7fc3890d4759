"""Relatives of softmax and entmax, of 2018 to 2025: sparser by a parameter, by the number of keys, or by a threshold.

Legend as in `transforms`, and n: the valid keys of an image, fewer than K where it is padded. Rows sum to what is said
here; beside a null key, as there, to less by what that has.

    sparsegen, ssmax, asentmax     one, sparsemax, softmax or entmax of scores that are scaled
    normmax, topk                  one
    softpick                       one or less
    budget                         a number that is given
    sigmoid, relu                  anything: every key is weighed by itself
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrlib.attention.budget import budget_sparsemax
from detrlib.attention.normmax import normmax
from detrlib.attention.transforms import Entmax, Grid, Softmax, Sparsemax, Transform, valid_keys


class Sparsegen(Sparsemax):
    """sparsemax(s / (1 - lambda)), "sparsegen-lin" (Laha et al. 2018, "On Controllable Sparse Alternatives to Softmax",
    Sec. 3.2): sparser as lambda goes from 0, which is sparsemax, to 1, and denser below.
    """

    def __init__(self, lam: float):
        super().__init__()
        if not lam < 1:
            raise ValueError(f"sparsegen_lambda {lam} must be below 1")
        self.lam = lam

    def scaled(self, x: Tensor, padding: Tensor | None, keys: int) -> Tensor:
        return x / (1 - self.lam)

    def extra_repr(self) -> str:
        return f"lam={self.lam}"


class SSMax(Softmax):
    """softmax(a log(n) s) with one learned a per head: "scalable softmax" (Nakanishi 2025, "Scalable-Softmax Is
    Superior for Attention", Eq. 3). The largest weight does not fade as keys become more. `initial`: 0.168 is the
    inverse of the mean of log n for n from 1 to 1024, so that over so many keys it starts near softmax; the start is
    ours to choose, the paper's Fig. 1 draws 0.43.
    """

    def __init__(self, num_heads: int, initial: float = 0.168):
        super().__init__()
        self.a = nn.Parameter(torch.full((num_heads,), initial))

    def scaled(self, x: Tensor, padding: Tensor | None, keys: int) -> Tensor:
        return x * (self.a[:, None, None] * valid_keys(x, padding, keys).log()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={len(self.a)}"


class ASEntmax(Entmax):
    """entmax((delta + beta log(n)^gamma) s), "adaptive-scalable entmax" (Vasylenko et al. 2025, "Long-Context
    Generalization with Sparse Attention", Sec. 4): more keys make scores larger or smaller, as a head has learned.

    delta, beta and gamma are learned, one each per head, and start where those of the published code do: 1, U(0.1, 1)
    and N(0, 0.1). There delta stays 1, and beta and gamma may depend on the token that asks, which is not known here.
    """

    def __init__(self, num_heads: int, alpha: float):
        super().__init__(alpha)
        self.delta = nn.Parameter(torch.ones(num_heads))
        self.beta = nn.Parameter(torch.empty(num_heads).uniform_(0.1, 1.0))
        self.gamma = nn.Parameter(torch.empty(num_heads).normal_(0.0, 0.1))

    def scaled(self, x: Tensor, padding: Tensor | None, keys: int) -> Tensor:
        delta, beta, gamma = (p[:, None, None] for p in (self.delta, self.beta, self.gamma))  # [H,1,1]
        log_n = valid_keys(x, padding, keys).clamp(min=2).log()  # of one key it is 0, which has no power below 0
        return x * (delta + beta * log_n**gamma).to(x.dtype)


class Normmax(Transform):
    """argmax_p <p, s> - ||p||_alpha over the simplex (Santos et al. 2024, "Sparse and Structured Hopfield Networks",
    Sec. 3.2): where entmax tells weights apart, normmax makes the few that it keeps nearly equal.

    alpha: 1.001 to 1000; published 2 and 5.
    """

    def __init__(self, alpha: float):
        super().__init__()
        if not 1.001 <= alpha <= 1000:
            raise ValueError(
                f"normmax_alpha {alpha} must lie between 1.001 and 1000, where float32 can tell its weights"
            )
        self.alpha = alpha

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        return normmax(scores, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Budget(Transform):
    """clip(s - tau, 0, 1) with tau such that weights sum to `budget`: argmax_p <p, s> - ||p||^2 / 2 for 0 <= p <= 1, as
    `budget_bisect` in entmax 1.3 (deep-spin). No key has more than one; 1 is sparsemax. Where keys are fewer than the
    budget, each has one; a score as low as a mask (-1e9) counts as no key.
    """

    def __init__(self, budget: float):
        super().__init__()
        if not budget > 0:
            raise ValueError(f"budget {budget} must be above 0")
        self.budget = budget

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        return budget_sparsemax(scores, self.budget)

    def extra_repr(self) -> str:
        return f"budget={self.budget}"


class Softpick(Transform):
    """relu(e^s - 1) / (sum |e^s - 1| + eps) (Zuhri et al. 2025, "Softpick: No Attention Sink, No Massive Activations
    with Rectified Softmax", Eq. 1): a key has weight if its score is above 0, and other keys lessen that of all. Of a
    null key only a learned score changes anything.
    """

    EPS = 1e-8  # of the published code, where sums are divided by the largest e^s as well
    hidden = 0.0  # weighs nothing above and below

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        top = scores.detach().amax(-1, keepdim=True).clamp(min=0)
        beyond = (scores - top).expm1() - (-top).expm1()  # (e^s - 1) / e^top, also of the smallest scores
        return beyond.relu() / (beyond.abs().sum(-1, keepdim=True) + self.EPS)


class TopK(Transform):
    """softmax over the k largest scores of a row (Wang et al. 2021, "KVT: k-NN Attention for Boosting Vision
    Transformers", Eq. 3; Gupta et al. 2021): the baseline to beat. Keys that tie with the last of them count, too.
    """

    def __init__(self, k: int):
        super().__init__()
        if k < 1:
            raise ValueError(f"topk {k} must be at least 1")
        self.k = k

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        keys = scores.detach()
        if torch.compiler.is_exporting():  # a graph for any number of keys cannot ask how many there are
            keys = F.pad(keys, (0, self.k), value=float("-inf"))
        elif keys.shape[-1] <= self.k:
            return scores.softmax(-1)
        least = keys.topk(self.k, -1, sorted=False).values.amin(-1, keepdim=True)
        return scores.masked_fill(scores < least, float("-inf")).softmax(-1)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class Sigmoid(Transform):
    """sigmoid(s - log n) (Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
    Sec. 2): keys do not compete; a row of zeros as scores sums to about one. A null key changes nothing.
    """

    def scaled(self, x: Tensor, padding: Tensor | None, keys: int) -> Tensor:
        return x - valid_keys(x, padding, keys).log()

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        return scores.sigmoid()


class ReLU(Transform):
    """relu(s) / n (Wortsman et al. 2023, "Replacing softmax with ReLU in Vision Transformers", Sec. 3): keys do not
    compete. A null key changes nothing.
    """

    def scaled(self, x: Tensor, padding: Tensor | None, keys: int) -> Tensor:
        return x / valid_keys(x, padding, keys)

    def weights(self, scores: Tensor, grid: Grid | None) -> Tensor:
        return F.relu(scores)
