"""Attention of many layers put together: what in the image each query of an encoder and decoder goes back to.

Legend: B images, H heads, K keys (cells of the image), Q queries. Everything is written in R_ii [K,K], the sources in
the image of each of its own cells, R_qq [Q,Q] and R_qi [Q,K], those of each query among queries and in the image:

    R_ii = I        R_qq = I        R_qi = 0        before the first layer.

Registers of an encoder are sources and go-betweens like cells: R_ii is of them all, and only R_qi, whose columns are
sources in the image, leaves them out. What a row of weights lacks to one, on a null key, is no source: rollout leaves
it to the residual connection, and relevance has no gradient with respect to it.

Weights may have signs (differential attention). Rollout follows where layers look, so it takes magnitudes, a row that
sums to more than one as shares of its sum. Relevance takes weight times gradient, which is what a weight contributes,
whatever its sign.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detrlib.errors import ModelError
from detrlib.models import AttentionMaps, Predictions


class Layers(NamedTuple):
    """One matrix per layer and site, heads put together; layers first to last."""

    encoder_self: list[Tensor]  # [B,K,K], with N registers [B,K+N,K+N], these last
    decoder_self: list[Tensor]  # [B,Q,Q]
    decoder_cross: list[Tensor]  # [B,Q,K]


def mean_over_heads(attention: AttentionMaps) -> Layers:
    """Magnitudes of the maps of all sites, cut off from gradients: what `rollout` multiplies."""

    def mean(weights: Tensor) -> Tensor:
        shares = weights.detach().abs()
        return (shares / shares.sum(-1, keepdim=True).clamp(min=1)).mean(1)

    return Layers(*([mean(weights) for weights in layers] for layers in _by_site(attention)))


def _by_site(attention: AttentionMaps) -> list[Sequence[Tensor]]:
    """The maps of encoder_self, with its registers, of decoder_self and decoder_cross."""
    encoder = attention.encoder_self if attention.encoder_whole is None else attention.encoder_whole
    return [encoder, attention.decoder_self, attention.decoder_cross]


def weighted_by_gradient(predictions: Predictions, queries: Tensor, labels: Tensor) -> Iterator[Layers]:
    """A' (Chefer, Gur & Wolf 2021, Eq. 5) of one image for one detection after the other.

    The gradient is that of the logit of the detection's class; queries, labels [n] of the detections in a batch of one
    image. Raises ModelError for a model without gradients, or whose maps are put together of several.
    """
    by_site = _by_site(predictions.attention)
    maps = [weights for layers in by_site for weights in layers]
    if not all(weights.requires_grad for weights in maps):
        raise ModelError("explanations by gradient need a model with gradients: call model.requires_grad_()")
    for logit in predictions.logits[0, queries, labels]:
        gradients = torch.autograd.grad(logit, maps, retain_graph=True, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise ModelError("explanations by gradient need an image without padding: give it alone")
        weighted = ((g * w.detach()).clamp(min=0).mean(1) for g, w in zip(gradients, maps, strict=True))
        yield Layers(*([next(weighted) for _ in layers] for layers in by_site))


def rollout(maps: Layers) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, Sec. 3) carried over to an encoder and a decoder: R_qi [B,Q,K].

    A layer passes on what comes through its residual connection and through its attention A, the mean over heads; rows
    are divided by their sum, 1 + s with s that of the row of A:

        encoder, self     R_ii <- (I + A) R_ii / (1 + s)
        decoder, self     R_qq <- (I + A) R_qq / (1 + s)    R_qi <- (I + A) R_qi / (1 + s)
        decoder, cross    R_qq <- R_qq / (1 + s)            R_qi <- (R_qi + A R_ii) / (1 + s)

    That is half through each where rows sum to one, and all through the residual where a row of A is empty. It is
    rollout over one sequence of cells and queries, and rows of (R_qq, R_qi) sum to one, but for what lies on registers.
    It is computed from the last layer back to the first, which multiplies matrices of Q rows instead of K.
    """
    first = maps.decoder_cross[0]
    to_queries, to_image = _identity(first, first.shape[1]), torch.zeros_like(first)
    for self_map, cross_map in zip(reversed(maps.decoder_self), reversed(maps.decoder_cross), strict=True):
        to_queries = _divided(to_queries, cross_map)
        to_image = to_image + to_queries @ cross_map
        to_queries = _divided(to_queries, self_map)
        to_queries = to_queries + to_queries @ self_map
    cells = to_image.shape[-1]
    for self_map in reversed(maps.encoder_self):
        to_image = F.pad(to_image, (0, self_map.shape[-1] - to_image.shape[-1]))  # the decoder sees no registers
        to_image = _divided(to_image, self_map)
        to_image = to_image + to_image @ self_map
    return to_image[..., :cells]


def _divided(sources: Tensor, weights: Tensor) -> Tensor:
    """Sources [B,M,N] over 1 + s, the row sums of weights [B,N,...] beside a residual connection."""
    return sources / (1 + weights.sum(-1))[:, None]


def relevance(weighted: Layers) -> Tensor:
    """Relevance of every cell to every query (Chefer, Gur & Wolf 2021, Sec. 3): R_qi [B,Q,K].

    `weighted` holds A' = mean over heads of (gradient * A)^+ (Eq. 5). With the gradient of what one query says, only
    the row of that query means something.

        encoder, self     R_ii <- R_ii + A' R_ii                                         (Eq. 6)
        decoder, self     R_qq <- R_qq + A' R_qq        R_qi <- R_qi + A' R_qi           (Eq. 6, 7)
        decoder, cross    R_qi <- R_qi + N(R_qq)^T A' N(R_ii)                            (Eq. 10)

    N(R) = (R - I) / S + I, S the row sums of R - I, gives what was added the weight of the residual (Eq. 8, 9).
    A row to which nothing was added stays a row of I: always so in an encoder without layers.
    """
    first = weighted.decoder_cross[0]
    cells = first.shape[2]
    r_ii = _identity(first, weighted.encoder_self[0].shape[2] if weighted.encoder_self else cells)
    for self_map in weighted.encoder_self:
        r_ii = r_ii + self_map @ r_ii
    r_ii = _normalised(r_ii)[:, :cells, :cells]
    r_qq, r_qi = _identity(first, first.shape[1]), torch.zeros_like(first)
    for self_map, cross_map in zip(weighted.decoder_self, weighted.decoder_cross, strict=True):
        r_qq, r_qi = r_qq + self_map @ r_qq, r_qi + self_map @ r_qi
        r_qi = r_qi + _normalised(r_qq).mT @ cross_map @ r_ii
    return r_qi


def _identity(like: Tensor, size: int) -> Tensor:
    """I [B,size,size] of the kind of `like` [B,...]."""
    return torch.eye(size, device=like.device, dtype=like.dtype).expand(len(like), -1, -1)


def _normalised(relevance: Tensor) -> Tensor:
    """N(R) of R [B,M,M]."""
    identity = _identity(relevance, relevance.shape[-1])
    added = relevance - identity
    total = added.sum(-1, keepdim=True)
    # Everywhere divided, then chosen: the sum of nothing is replaced before it divides.
    return added / total.where(total > 0, 1.0) + identity
