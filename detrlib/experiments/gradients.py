"""Where a detection comes from by its gradients: those of the pixels, and of what the decoder looks at.

Y is a number that a query predicts of the image X. A is what the decoder looks at: the tokens that the encoder returns,
or the projected feature map where there is no encoder. It is to the decoder what a feature map is to the heads of the
convolutional detectors that ODAM was made for.

    gradient    max over channels of |dY / dX|, mean over the pixels of a cell     Simonyan et al. 2014, Sec. 3.1
    odam        (sum over channels of dY / dA * A)^+                               Zhao & Chan 2023, "ODAM", Sec. 3

Y is the score of the detection's class, of which the logarithm is taken: its gradient has the same direction, and does
not vanish in float32 where the score is nearly 0 or 1. ODAM also has maps of the edges of the box; all together are the
highest of its maps, each scaled to end at one. Its weights dY / dA may be smoothed; here as in its authors' code they
are not. Levels are added as channels are, which is exact: what a coarse cell has is shared among the finer ones in it.

Legend: n detections of an image, T targets of each, h x w cells of the maps' grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from detrlib.attention.deformable import wide
from detrlib.boxes import cxcywh_to_xyxy
from detrlib.errors import ModelError
from detrlib.experiments.cells import cell_means, on_grid, spread
from detrlib.models import AttentionMaps, Predictions


def score_targets(predictions: Predictions, queries: Tensor, labels: Tensor) -> Tensor:
    """Logarithms of the scores [n,1] of queries [n] for labels [n] in a batch of one image."""
    logits = wide(predictions.logits[0, queries])
    log = logits.log_softmax(-1) if predictions.classification == "softmax" else F.logsigmoid(logits)
    return log.gather(1, labels[:, None])


def box_targets(predictions: Predictions, queries: Tensor) -> Tensor:
    """Edges [n,4] of the boxes of queries [n] in a batch of one image: x0, y0, x1, y1 in 0..1."""
    return cxcywh_to_xyxy(predictions.boxes[0, queries])


def saliency(targets: Tensor, image: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The size of the gradient of targets [n,1] of the pixels of a batch of one image, [n,h,w].

    image: [1,3,H,W] that the targets were predicted of and that asks for gradients; size: of it without padding.
    """
    maps = image.new_zeros(len(targets), *image.shape[2:])
    for number, target in enumerate(targets[:, 0]):
        maps[number] = torch.autograd.grad(target, image, retain_graph=True)[0][0].abs().amax(0)
    return cell_means(maps, size, grid)


def odam(targets: Tensor, attention: AttentionMaps) -> Tensor:
    """ODAM of targets [n,T], [n,h,w]: of several targets the highest, each scaled to end at one.

    attention: what the model returned with the predictions that the targets are of. Raises ModelError where these do
    not depend on what it says the decoder looks at.
    """
    maps = targets.new_zeros(len(targets), *attention.grid)
    for number, of_one in enumerate(targets):
        own = torch.stack([odam_sums(target, attention).clamp(min=0) for target in of_one])  # [T,h,w]
        if len(own) > 1:
            highest = own.amax((1, 2), keepdim=True)
            own = own / highest.where(highest > 0, 1.0)
        maps[number] = own.amax(0)
    return maps


def odam_sums(target: Tensor, attention: AttentionMaps) -> Tensor:
    """What each cell adds to a number by the first order, [h,w]: the sum over channels and levels of gradient times A.

    Together they are the derivative of the number when all that the decoder looks at grows in proportion.
    """
    encoded = attention.encoded
    gradients = torch.autograd.grad(target, encoded.tensors, retain_graph=True, allow_unused=True)
    if any(gradient is None for gradient in gradients):
        raise ModelError("the predictions do not depend on what the model says its decoder looks at")
    products = [(g * a.detach())[0] for g, a in zip(gradients, encoded.tensors, strict=True)]
    if products[0].dim() == 3:  # [E,h,w] of each level
        levels = [product.sum(0) for product in products]
    elif attention.polled is not None:
        return on_grid(products[0].sum(-1)[None], attention)[0]
    elif len(products[0]) != sum(h * w for h, w in encoded.shapes):
        raise ModelError("odam: the model has levels whose sizes are not known, such as those of a dilated backbone")
    else:  # [S,E] of all levels
        parts = products[0].sum(-1).split([h * w for h, w in encoded.shapes])
        levels = [part.view(shape) for part, shape in zip(parts, encoded.shapes, strict=True)]
    inside = attention.valid_grid(0)
    return sum(spread(level, side, inside, attention.grid) for level, side in zip(levels, encoded.sides, strict=True))
