"""Whether an explanation names the pixels a detection rests on: deletion and insertion curves.

Pixels are replaced in the order of an explanation, most important first, and the detection is looked for in what the
model then predicts (Petsiuk, Das & Saenko 2018, "RISE", Sec. 4.2; for detectors Petsiuk et al. 2021, "D-RISE").
Deletion starts from the image and should fall early: a small area under its curve is good. Insertion starts
from the replacement and should rise early: a large area is good.

Legend: n explanations, each of one detection; h x w cells of an explanation; H x W pixels of the padded image, P of
them image; S steps; Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import gaussian_blur

from detrlib.boxes import cxcywh_to_xyxy
from detrlib.errors import ConfigError
from detrlib.metrics.bootstrap import LEVEL
from detrlib.metrics.statistics import MEAN_SAMPLING, NO_ROWS, compare_runs
from detrlib.models.outputs import Predictions, cell_side

Unit = Literal["cell", "pixel"]
Replacement = Literal["mean", "blur"]
MEASURES = ("score", "iou", "similarity")
BLUR = 0.1  # standard deviation of the blur relative to the shorter side: objects of a tenth of the image dissolve


@dataclass
class Curves:
    """Deletion and insertion curves of n explanations, and what they cost."""

    fractions: Tensor  # [S+1] share of the pixels deleted, or inserted; 0 to 1
    deletion: Tensor  # [n,S+1,3] score, IoU and similarity, as `MEASURES`
    insertion: Tensor  # [n,S+1,3]
    passes: int  # images the model was run on

    def areas(self) -> tuple[Tensor, Tensor]:
        """Areas under the curves of deletion and insertion by the trapezoid rule, [n,3] each; 0 to 1."""
        return tuple(torch.trapezoid(curve, self.fractions, dim=1) for curve in (self.deletion, self.insertion))


def pixel_ranks(maps: Tensor, padding: Tensor, unit: Unit = "cell", seed: int = 0) -> Tensor:
    """The rank of every pixel in the order of explanations: maps [n,h,w], padding [H,W] -> [n,H,W], 0 = first.

    unit: "cell", all pixels of a cell together; "pixel", by bilinear interpolation between the centres of cells.
    Cells of the same weight, such as the many zeros of sparse attention, come in a random order drawn from `seed`:
    any fixed order would favour some corner of the image. Pixels of padding (True) have rank P: they are never
    replaced, and weights of cells that are all padding do not matter. Raises ConfigError for another unit.
    """
    modes = {"cell": "nearest-exact", "pixel": "bilinear"}
    if unit not in modes:
        raise ConfigError(f"unit {unit!r} must be one of {', '.join(modes)}")
    (height, width), valid = padding.shape, ~padding
    size = int(valid[:, 0].sum()), int(valid[0].sum())
    side = cell_side(padding.shape, maps.shape[1:])
    rows, columns = (-(-pixels // side) for pixels in size)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(maps), rows, columns, generator=generator, dtype=torch.float64).to(maps.device)
    # Where the image ends its cells end: padding does not bleed into the interpolation.
    both = torch.stack([maps[:, :rows, :columns].double(), noise], 1)  # [n,2,rows,columns]
    enlarged = F.interpolate(both, (rows * side, columns * side), mode=modes[unit])
    weights, noise = enlarged[:, :, : size[0], : size[1]].flatten(2).unbind(1)  # [n,P]
    order = noise.argsort(dim=-1, stable=True)
    # In float32 what interpolation between equal weights has rounded differently is equal again.
    order = order.gather(1, weights.float().gather(1, order).argsort(dim=-1, descending=True, stable=True))
    ranks = torch.full((len(maps), height, width), order.shape[1], dtype=torch.int32, device=maps.device)
    positions = torch.arange(order.shape[1], device=maps.device).expand_as(order)
    ranks[:, : size[0], : size[1]] = torch.empty_like(order).scatter_(1, order, positions).unflatten(1, size)
    return ranks


def replacement_image(image: Tensor, padding: Tensor, kind: Replacement = "mean") -> Tensor:
    """What deleted pixels become: image [3,H,W], padding [H,W] -> [3,H,W], padding left as it is.

    kind: "mean", the mean colour of the image; "blur", the image blurred by a tenth of its shorter side.
    Raises ConfigError for another kind.
    """
    valid = ~padding
    height, width = int(valid[:, 0].sum()), int(valid[0].sum())
    inside = image[:, :height, :width]
    if kind == "mean":
        new = inside.mean((1, 2), keepdim=True).expand_as(inside)
    elif kind == "blur":
        deviation = BLUR * min(height, width)
        new = gaussian_blur(inside, 2 * int(2 * deviation) + 1, deviation)
    else:
        raise ConfigError(f"replacement {kind!r} must be one of mean, blur")
    replaced = image.clone()
    replaced[:, :height, :width] = new
    return replaced


def best_match(predictions: Predictions, boxes: Tensor, labels: Tensor) -> Tensor:
    """How well detections are recovered: predictions of n images, one for each of boxes [n,4], labels [n] -> [n,3].

    Of the Q detections of an image the one that is most similar, by IoU with the box times score of the class, counts:
    its score, its IoU, its similarity (D-RISE's, with the score of the class for what it makes of all scores).
    Boxes are cxcywh in 0..1 of the image.
    """
    scores = predictions.class_scores().gather(2, labels[:, None, None].expand(-1, predictions.logits.shape[1], 1))
    scores = scores[..., 0]  # [n,Q]
    predicted, wanted = cxcywh_to_xyxy(predictions.boxes.float()), cxcywh_to_xyxy(boxes.float())[:, None]
    iou = torch.stack([box_iou(own, one)[:, 0] for own, one in zip(predicted, wanted, strict=True)])  # [n,Q]
    similarity, query = (scores * iou).max(-1, keepdim=True)
    return torch.cat([scores.gather(1, query), iou.gather(1, query), similarity], 1)


@torch.no_grad()
def faithfulness_curves(
    model: nn.Module,
    image: Tensor,
    padding: Tensor,
    boxes: Tensor,
    labels: Tensor,
    ranks: Tensor,
    steps: int = 16,
    replacement: Replacement = "mean",
    batch_size: int = 64,
) -> Curves:
    """Curves of n explanations of detections in one image [3,H,W] with padding [H,W].

    boxes [n,4] cxcywh in 0..1 and labels [n] of the detections; ranks [n,H,W] as of `pixel_ranks`. After step s of
    S the first (s / S)^2 of the pixels are replaced (deletion), or are back in the replaced image (insertion): steps
    grow, since an object is a small part of its image and nearly everything happens while it goes or comes. Both ends
    of the curves are the same pictures for all, so that the model sees 2 + 2 n (S - 1) of them, `batch_size` at a
    time. Raises ConfigError for fewer than one step.
    """
    if steps < 1:
        raise ConfigError(f"steps {steps} must be at least 1")
    other = replacement_image(image, padding, replacement)
    total, count = int((~padding).sum()), len(boxes)
    masks = None if total == padding.numel() else padding[None]  # for models, None says that there is no padding
    ends = model(torch.stack([image, other]), None if masks is None else masks.expand(2, -1, -1))
    full, empty = (best_match(_repeated(ends, i, count), boxes, labels) for i in (0, 1))  # [n,3]
    fractions = torch.linspace(0, 1, steps + 1, device=image.device) ** 2
    between = (fractions[1:-1] * total).round().int()
    jobs = torch.cartesian_prod(*(torch.arange(size) for size in (count, steps - 1, 2))).to(image.device)
    measured = [full.new_empty(0, 3)]
    for part in jobs.split(batch_size):
        which, step, inserting = part.unbind(1)
        first = ranks[which] < between[step][:, None, None]  # [b,H,W] pixels whose turn has come
        pictures = torch.where((first ^ inserting.bool()[:, None, None])[:, None], other, image)
        predictions = model(pictures, None if masks is None else masks.expand(len(part), -1, -1))
        measured.append(best_match(predictions, boxes[which], labels[which]))
    inner = torch.cat(measured).view(count, steps - 1, 2, 3)
    deletion = torch.cat([full[:, None], inner[:, :, 0], empty[:, None]], 1)
    insertion = torch.cat([empty[:, None], inner[:, :, 1], full[:, None]], 1)
    return Curves(fractions, deletion, insertion, 2 + len(jobs))


def _repeated(predictions: Predictions, index: int, count: int) -> Predictions:
    """The predictions of image number `index`, `count` times."""
    logits, boxes = (x[index].expand(count, -1, -1) for x in (predictions.logits, predictions.boxes))
    return Predictions(logits, boxes, predictions.classification)


def mean_curves(per_image: Tensor, methods: Sequence[str], fractions: Tensor) -> pd.DataFrame:
    """Curves [images,2,methods,S+1,3], means over the detections of each image, as one mean per method.

    Columns method, direction (deletion, insertion), measure, fraction, mean, standard_error (over images: detections
    of one image are no independent samples) and images.
    """
    names = [("deletion", "insertion"), methods, fractions.tolist(), MEASURES]
    index = pd.MultiIndex.from_product(names, names=["direction", "method", "fraction", "measure"])
    images = pd.DataFrame(per_image.flatten(1).numpy(), columns=index)
    columns = {"mean": images.mean(), "standard_error": images.sem(), "images": len(images)}
    frame = pd.DataFrame(columns).reset_index()
    order = ["method", "direction", "measure", "fraction", "mean", "standard_error", "images"]
    return frame[order].sort_values(order[:4], kind="stable", ignore_index=True)


def image_means(frame: pd.DataFrame, measure: str = "similarity") -> pd.DataFrame:
    """Areas under the curves of `measure`, columns deletion and insertion: means of each image_id's rows of `frame`."""
    columns = {f"{direction}_{measure}": direction for direction in ("deletion", "insertion")}
    return frame.groupby("image_id")[list(columns)].mean().rename(columns=columns)


def means_by_method(frame: pd.DataFrame, measure: str = "similarity") -> dict[str, pd.DataFrame]:
    """`image_means` of each method in `frame`, as of `faithfulness_run`, in its order."""
    return {method: image_means(part, measure) for method, part in frame.groupby("method", sort=False)}


def mean_interval(values: pd.Series) -> tuple[float, float]:
    """The 95 % bootstrap interval, over images, of the mean of one number per image; missing for fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    options = {"method": "basic", "confidence_level": 1 - LEVEL, "rng": np.random.default_rng(0)}
    ends = stats.bootstrap((values.to_numpy(),), np.mean, **options, **MEAN_SAMPLING).confidence_interval
    return ends.low.item(), ends.high.item()


def gains(frame: pd.DataFrame, measure: str = "similarity", references: Sequence[str] = ("box", "raw")) -> pd.DataFrame:
    """How much better methods do than others on the same images of one run.

    Args:
        frame: of one run, as of `faithfulness_run`.
        measure: score, iou or similarity.
        references: methods that all others are compared with, each pair once: a later reference with an earlier one.
            Those that were not measured are left out.

    Returns:
        Rows as of `metrics.statistics.compare_runs`, of paired bootstrap and permutation over images: first (a method),
        second (the reference), metric (deletion gain, insertion gain: a positive difference is better), difference,
        low, high, p, images, p_adjusted (Holm over the pairs of a metric), verdict. No rows for a single image.
    """
    better = {"deletion": -1, "insertion": 1}
    means = {method: own.mul(better).add_suffix(" gain") for method, own in means_by_method(frame, measure).items()}
    # Between two references there is one test, not one in either direction: Holm would count it twice.
    known = [(n, one) for n, one in enumerate(references, 1) if one in means]
    pairs = [(name, one) for n, one in known for name in means if name not in references[:n]]
    if not pairs or len(next(iter(means.values()))) < 2:
        return NO_ROWS.assign(p_adjusted=[], verdict=[])
    return pd.concat([compare_runs(means, f"{name} gain", pairs) for name in better], ignore_index=True)
