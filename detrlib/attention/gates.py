"""What may become of what heads have mixed, before it is projected: a gate, and the difference of two maps.

Legend: B images, H heads, Q queries, K keys, E embedding, D = E / H channels per head.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GateName = Literal["none", "head", "channel"]


class Gate(nn.Module):
    """How much of what a head has mixed, or of each of its channels, goes on: sigmoid(x W), as the query x says.

    Qiu et al. 2025, "Gated Attention for Large Language Models", Eq. 5 behind the mixing (their G1), headwise or
    elementwise. A head can so do nothing without resting on a key. W has no bias and starts as the projection of
    queries does, of which it is a part in the published code: by Xavier here, so that gates start around one half.
    """

    def __init__(self, embed_dim: int, num_heads: int, name: GateName):
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.empty(num_heads if name == "head" else embed_dim, embed_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What queries are projected from, x [B,Q,E] -> shares in 0..1, [B,H,Q,1] of heads or [B,H,Q,D] of channels."""
        return F.linear(x, self.weight).sigmoid().unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, shares={len(self.weight)}"


class Difference(nn.Module):
    """Two maps of a head, one less a share of the other: what both look at is noise, and cancels.

        weights = transform(s1) - lambda transform(s2),  lambda = exp(q1 . k1) - exp(q2 . k2) + start
        mixed   = (1 - start) norm(weights value),       start  = 0.8 - 0.6 exp(-0.3 (layer - 1))

    Ye et al. 2024, "Differential Transformer", Eq. 1 to 3, with any transform in place of softmax; both maps of a head
    share what it has learned. Scores s1 are of one half of the channels of queries and keys, s2 of the other, so that
    a head costs no parameter more but those of lambda, one for the layer, and of the norm, an RMSNorm of each head.
    q1, k1, q2, k2 start from N(0, 0.1).

    Weights may be negative, and their rows sum to 1 - lambda: see `models.outputs.AttentionMaps`. The norm gives every
    head its full say again, whatever the sum of a row; only a row of zeros stays nothing.

    Args:
        channels: D, even.
        layer: counted from one.

    Raises:
        ValueError: `channels` is odd.
    """

    def __init__(self, channels: int, layer: int):
        super().__init__()
        if channels % 2:
            raise ValueError(f"a head of {channels} channels has no two halves of them, which differential needs")
        self.start = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
        for name in ("q1", "k1", "q2", "k2"):
            self.register_parameter(f"lambda_{name}", nn.Parameter(0.1 * torch.randn(channels // 2)))
        self.norm = nn.RMSNorm(channels, eps=1e-5)

    def share(self) -> Tensor:
        """lambda, a number."""
        first, second = self.lambda_q1 @ self.lambda_k1, self.lambda_q2 @ self.lambda_k2
        return first.exp() - second.exp() + self.start

    def forward(
        self,
        first: tuple[Tensor, Tensor | None],
        second: tuple[Tensor, Tensor | None],
        value: Tensor,
        dropped: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values [B,H,Q,D] and weights [B,H,Q,K] or None by each of the two maps -> those of their difference.

        value [B,H,K,D] is mixed anew by the weights that are returned, so that gradients reach them; not where some
        of them were `dropped` on the way, which they do not show.
        """
        share = self.share()
        mixed, weights = first[0] - share * second[0], None
        if first[1] is not None:
            weights = first[1] - share * second[1]
            mixed = mixed if dropped else weights.to(value.dtype) @ value
        return self.norm(mixed) * (1 - self.start), weights

    def extra_repr(self) -> str:
        return f"start={self.start:.3f}"
