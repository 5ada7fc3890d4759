"""D-RISE: a detection explained by random masks, from what a detector predicts alone (Petsiuk et al. 2021).

Parts of the image are covered at random, many times. A part is important if the detection is found again where the part
can be seen. The slow reference for other explanations: it needs no gradient and no attention.

    masks       an even grid, each cell of which is visible with a probability, enlarged and shifted at random (Petsiuk,
                Das & Saenko 2018, "RISE", Sec. 3.2); pixels times the mask, so that zero, the mean colour of the
                normalisation, takes their place
    weight      of a mask: the highest similarity of the detection to any that is then made, that is IoU * cosine of the
                scores of all classes * objectness. Detectors with a softmax have an objectness, 1 - the probability of
                no object; for those with sigmoids, which have none, the highest score stands in
    map         the sum of masks by weight. Weights are taken less their mean, which in the limit adds a constant to the
                map and leaves its order; with few masks it removes the noise of how often a pixel happened to be seen

Published: 5,000 masks of 16 x 16 cells, visible with probability 0.5.
Legend: n detections of an image, N masks, b of them at a time, Q queries, C classes, h x w cells of the maps' grid.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.engine import tracking
from detrlib.errors import ConfigError
from detrlib.experiments.cells import cell_means
from detrlib.models import Predictions

PUBLISHED_MASKS, GRID, VISIBLE = 5000, 16, 0.5
MASKS = 1000  # what is drawn unless asked otherwise: a fifth of what was published


@torch.no_grad()
def drise(
    model: nn.Module,
    image: Tensor,
    padding_mask: Tensor | None,
    predictions: Predictions,
    queries: Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    *,
    masks: int = MASKS,
    cells: int = GRID,
    visible: float = VISIBLE,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Maps [n,h,w] of the detections by queries [n] in a batch of one image, non-negative.

    Args:
        model: any detector that is called as those of `detrlib.models`.
        image, padding_mask: [1,3,H,W] and [1,H,W] or None, as the model was given them.
        predictions: what it made of them.
        queries: of the detections, [n].
        size: height and width of the image without its padding, in pixels.
        grid: cells of the maps.
        masks, cells, visible: how many masks, their cells along both sides, the probability that one is visible.
        seed: of the masks, which are those of the image whatever it is padded to.
        batch_size: masked images that the model sees at a time.

    Raises:
        ConfigError: fewer than one mask or cell, or a probability that is not between 0 and 1.
    """
    if masks < 1 or cells < 1 or not 0 < visible < 1:
        raise ConfigError(f"{masks} masks of {cells} cells visible with probability {visible}: need 1, 1 and 0 to 1")
    boxes, scores = predictions.boxes[0, queries], predictions.class_scores()[0, queries]
    by_weight, total, sums = 0.0, 0.0, 0.0  # [n,h,w], [h,w], [n]
    with tracking.progress(None, "D-RISE", total=masks, unit="mask") as bar:
        for drawn in random_masks(masks, size, cells, visible, seed, batch_size):
            drawn = drawn.to(image)
            masked = image.repeat(len(drawn), 1, 1, 1)
            masked[:, :, : size[0], : size[1]] *= drawn[:, None]
            padding = None if padding_mask is None else padding_mask.expand(len(drawn), -1, -1)
            weights = similarity(model(masked, padding), boxes, scores)  # [b,n]
            seen = cell_means(F.pad(drawn, (0, image.shape[3] - size[1], 0, image.shape[2] - size[0])), size, grid)
            weights, seen = weights.double(), seen.double()  # what is left of the sums is small beside them
            by_weight = by_weight + torch.einsum("bn,bhw->nhw", weights, seen)
            total, sums = total + seen.sum(0), sums + weights.sum(0)
            bar.update(len(drawn))
    maps = by_weight - (sums / masks)[:, None, None] * total
    outside = cell_means(torch.ones_like(image[0, :1]), size, grid) == 0
    return (maps - maps.masked_fill(outside, torch.inf).amin((1, 2), keepdim=True)).masked_fill(outside, 0.0)


def random_masks(
    count: int, size: tuple[int, int], cells: int, visible: float, seed: int, batch_size: int
) -> Iterator[Tensor]:
    """`count` masks of an image in 0..1, [b,height,width] at a time, the same for any batch size."""
    generator = torch.Generator().manual_seed(seed)
    sides = [math.ceil(pixels / cells) for pixels in size]
    grids = (torch.rand(count, 1, cells, cells, generator=generator) < visible).float()
    shifts = torch.stack([torch.randint(side, (count,), generator=generator) for side in sides], 1).tolist()
    enlarged = [(cells + 1) * side for side in sides]
    for start in range(0, count, batch_size):
        part = F.interpolate(grids[start : start + batch_size], enlarged, mode="bilinear")[:, 0]
        cut = zip(part, shifts[start : start + batch_size], strict=True)
        yield torch.stack([mask[y : y + size[0], x : x + size[1]] for mask, (y, x) in cut])


def similarity(predictions: Predictions, boxes: Tensor, scores: Tensor) -> Tensor:
    """How well each of n detections, boxes [n,4] cxcywh and scores [n,C], is found again in each of b images: [b,n]."""
    found = predictions.class_scores()  # [b,Q,C]
    objectness = found.sum(-1) if predictions.classification == "softmax" else found.amax(-1)
    cosine = F.normalize(found, dim=-1) @ F.normalize(scores, dim=-1).mT  # [b,Q,n]
    predicted = cxcywh_to_xyxy(predictions.boxes.float()).flatten(0, 1)
    iou = box_iou(predicted, cxcywh_to_xyxy(boxes.float())).view_as(cosine)
    return (iou * cosine * objectness[..., None]).amax(1)
