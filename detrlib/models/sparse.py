"""Sparse DETR (Roh et al. 2022): a scoring network chooses the tokens that the encoder updates.

Legend: B images, S tokens of all levels, k kept tokens, the most that an image can have, E channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Kept(NamedTuple):
    """Tokens that the encoder updates. Images with fewer valid tokens keep fewer than k: the rest is surplus."""

    index: Tensor  # [B,k] in ascending order
    surplus: Tensor  # [B,k], True = not kept after all
    spare: Tensor  # [B,k], True = more than any image of the batch keeps

    def gather(self, values: Tensor) -> Tensor:
        """Values [B or 1,S,...] of all tokens -> those of the kept ones, [B,k,...]."""
        index = self.index.view(*self.index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        return values.expand(index.shape[0], *values.shape[1:]).gather(1, index)

    def scatter(self, tokens: Tensor, updated: Tensor) -> Tensor:
        """Tokens [B,S,E] with the kept ones replaced by `updated` [B,k,E]."""
        tokens = tokens.to(updated.dtype)  # projections inside autocast are less precise than norms
        updated = torch.where(self.surplus[..., None], self.gather(tokens), updated)
        return tokens.scatter(1, self.index[..., None].expand_as(updated), updated)

    def mask(self, tokens: int) -> Tensor:
        """[B,S], True = kept."""
        return torch.zeros(self.index.shape[0], tokens, dtype=torch.bool, device=self.index.device).scatter(
            1, self.index, ~self.surplus
        )


def keep_best(scores: Tensor, padding: Tensor | None, ratio: float) -> Kept:
    """The int(ratio * n) + 1 best of the n valid tokens of each image, but no more than n; scores and padding [B,S].

    As many are listed as an image without padding would keep, so that their number follows from shapes alone: no GPU is
    asked for it. What an image does not keep of them is surplus.
    """
    tokens = scores.shape[1]
    if padding is None:
        valid = torch.full(scores.shape[:1], tokens, device=scores.device)
    else:
        valid = (~padding).sum(1)
        scores = scores.masked_fill(padding, -torch.inf)
    wanted = ((valid.double() * ratio).long() + 1).minimum(valid)  # [B]
    best = scores.topk(min(torch.sym_int(tokens * ratio) + 1, tokens), dim=1).indices
    index, rank = best.sort(dim=1)  # as tokens lie in memory
    return Kept(index, rank >= wanted[:, None], rank >= wanted.amax())


class ScoringNetwork(nn.Module):
    """How much the decoder will look at a token: from its own features and the mean of all (Roh et al. 2022, Sec. 3.2).

    official_padding: the mean takes padding for tokens, so that scores depend on the batch, and padding has the lowest
    score of the batch, as in the official code.
    """

    def __init__(self, dim: int, official_padding: bool = False):
        super().__init__()
        self.layer1 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.layer2 = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 1)
        )
        self.official_padding = official_padding

    def forward(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """tokens [B,S,E], padding [B,S] -> logits [B,S]."""
        own, shared = self.layer1(tokens).chunk(2, -1)  # [B,S,E/2]
        if padding is None or self.official_padding:
            mean = shared.mean(1, keepdim=True)
        else:
            count = (~padding).sum(1)[:, None, None]
            mean = shared.masked_fill(padding[..., None], 0.0).sum(1, keepdim=True) / count
        logits = self.layer2(torch.cat([own, mean.expand_as(own)], -1)).squeeze(-1).float()
        if padding is not None and self.official_padding:
            logits = logits.masked_fill(padding, logits.min())
        return logits
