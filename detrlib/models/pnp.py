"""Poll and pool (Wang et al. 2021, "PnP-DETR"): encoder and decoder see fewer tokens than there are cells.

A network scores every cell; the best stay tokens of their own, and all the others are pooled into a few.
Legend: B images, K cells, n kept cells, the most of the batch, M pooled tokens, E channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrlib.models.outputs import Polled
from detrlib.models.sparse import keep_best
from detrlib.models.transformer import Memory


class PollAndPool(nn.Module):
    """Memory of K cells -> memory of n + M tokens: kept cells in the order of the grid, then pooled ones.

    ratio: share of an image's valid cells that are kept, int(ratio * cells) + 1 of them; another may be set at any
    time, and with `train_ratios` training draws one between these two for every batch, so that one model serves many.
    """

    def __init__(self, dim: int, ratio: float, pooled: int, train_ratios: tuple[float, float] | None = None):
        super().__init__()
        self.ratio, self.train_ratios = ratio, train_ratios
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))
        # Biases would change no share: softmax takes them away.
        self.share = nn.Linear(dim, pooled, bias=False) if pooled else None
        self.value = nn.Linear(dim, dim) if pooled else nn.Identity()

    def forward(self, memory: Memory) -> Memory:
        """A kept cell is its normalised features times its score, which learns by that; its position stays."""
        padding, cells = memory.padding, memory.tokens.shape[1]
        logits = self.score(memory.tokens).squeeze(-1)  # [B,K]
        kept = keep_best(logits.detach(), padding, self._ratio())
        features, scores = F.layer_norm(memory.tokens, memory.tokens.shape[-1:]), logits.sigmoid()
        hidden = torch.zeros_like(scores, dtype=torch.bool) if padding is None else padding
        share = self._shares(features, kept.mask(cells) | hidden)
        # Rows of shares sum to one, so projecting the M mixtures is the same as mixing K projections.
        tokens = torch.cat([kept.gather(features * scores[..., None]), self.value(share @ features)], 1)
        position = torch.cat([kept.gather(memory.position), share @ memory.position], 1)
        polled = Polled(kept, share, scores, hidden)
        full = padding is None and kept.index.shape[1] < cells  # then every token is one, in every image
        return Memory(tokens, position, None if full else polled.key_padding(), None, polled)

    def _ratio(self) -> float:
        if not self.training or self.train_ratios is None:
            return self.ratio
        low, high = self.train_ratios
        return low + (high - low) * torch.rand(()).item()

    def _shares(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Shares [B,M,K] in every pooled token of the cells that are not `hidden` [B,K]; zero where all are."""
        if self.share is None:
            return features.new_zeros(features.shape[0], 0, features.shape[1])
        logits, hidden = self.share(features).transpose(1, 2), hidden[:, None]
        lowest = torch.finfo(logits.dtype).min  # -inf would leave NaN in the gradient where all are hidden
        return logits.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)
