"""Signs that a model has not learned to look, in words and with what to do about them.

Loss curves look normal while a model learns no more than where objects usually are: one box for all pictures, and
attention that rests on a corner. Three numbers of an evaluation tell, with these values for DETR with anchor queries:

| | learned (drawn shapes, 400 updates) | collapsed (photographs of raccoons, 250 updates) |
|---|---:|---:|
| AP, and that of fixed boxes (`metrics.floor`) | 0.43, 0.002 | 0.19, 0.23 |
| spread of the best detection, and of the objects below it | 0.36, 0.36 | 0.01, 0.31 |
| share of attention in the box over chance, in the best layer | 10 | 0.8 |

A low entropy alone is no sign: sparsemax rests on one or two cells of the right object.
"""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from detrlib.boxes import cxcywh_to_xyxy, pairwise_giou
from detrlib.metrics.detection import UNDEFINED
from detrlib.metrics.moments import Moments
from detrlib.models import Predictions

FEWEST = 10  # images or objects that say something
# Of the spread of the objects that the best detections lie on. A detector that finds them has 1, whatever its data: it
# is compared with the very objects it points at, not with all. Ten times what a collapsed one has, in the mean.
LEAST_SPREAD = 0.25
# Chance is 1: attention spread evenly, whatever the size of objects. The margin is for rounding; more of it would call
# attention to objects that fill nearly all of their image collapsed.
CHANCE = 1.02
MORE = "lower train.lr_backbone, train for more updates (train.epochs, train.epoch_updates), or begin with train.start"
REMEDIES = {
    "AP": MORE,
    "box": f"look at the detections (notebook 08_attention_maps), then {MORE}",
    "attention": f"see whether objects fit the model's view (data.image_size, notebook 01_data_exploration), or {MORE}",
}


class BestDetections:
    """How much the box of the best detection varies from image to image, beside the object that it lies on."""

    def __init__(self):
        self.boxes = Moments(2, 4)

    def add(self, predictions: Predictions, targets: list[dict]) -> None:
        """Take one batch; images without objects do not count."""
        best = predictions.class_scores().amax(-1).argmax(1)
        pairs = [
            torch.stack([box, _nearest(box, target["boxes"])])
            for box, target in zip(predictions.boxes[range(len(best)), best].float(), targets, strict=True)
            if len(target["boxes"])
        ]
        if pairs:
            self.boxes.add(torch.stack(pairs).cpu())

    def summary(self) -> dict[str, float | int]:
        """images, how many; detections and objects: their spread, the root of the summed variances of cx, cy, w, h."""
        count, _, deviation = self.boxes.results()  # [2,4]
        detections, objects = deviation.square().sum(1).sqrt().nan_to_num().tolist()
        return {"images": int(count.max()), "detections": detections, "objects": objects}


def _nearest(box: Tensor, boxes: Tensor) -> Tensor:
    overlap = pairwise_giou(cxcywh_to_xyxy(box[None]), cxcywh_to_xyxy(boxes))[0]
    return boxes[overlap.argmax()]


def symptoms(results: Mapping) -> pd.DataFrame:
    """Judge the results of an evaluation by three numbers.

    Args:
        results: as results.json holds them. What they lack, such as those of older runs, is not judged.

    Returns:
        A row for each number, by its name: value, beside (what it is compared with), collapsed, and meaning, in words.
        AP collapses at its floor; box (of the best detection) where it hardly varies from image to image; attention
        where no layer looks at the matched object more than chance would.
    """
    rows = {}
    ap, floor = (results.get(name, {}).get("AP", UNDEFINED) for name in ("detection", "floor"))
    if UNDEFINED not in (ap, floor) and results["floor"]["images"] >= FEWEST:  # one image has a floor of 1
        said = f"AP {ap:.3f} is {{}} the floor: fixed boxes, which never look at the image, reach {floor:.3f}"
        rows["AP"] = ap, floor, ap <= floor, said, ("not above", "above")
    spread = results.get("spread", {"images": 0})
    if spread["images"] >= FEWEST:
        box, below = spread["detections"], spread["objects"]
        said = f"over {spread['images']} images the best detection {{}}: its box by {box:.3f} of the side, the object"
        said = f"{said} below it by {below:.3f}"
        rows["box"] = box, below, box < LEAST_SPREAD * below, said, ("hardly varies", "varies with the image")
    located = results.get("localisation", {}).get("all", {"pairs": 0})
    if located["pairs"] >= FEWEST:
        layers = located["paibb_normalised"]["mean"]
        best = max(layers)
        entropy = results["sparsity"]["decoder_cross"]["matched"]["entropy"]["mean"][layers.index(best)]
        said = f"attention {{}} at the matched objects: {best:.2f} times as much as by chance lies in their boxes"
        said = f"{said}, in the best layer"
        if entropy is not None:  # of rows that have weight
            said = f"{said}, with an entropy of {entropy:.1f} nats"
        rows["attention"] = best, 1.0, best <= CHANCE, said, ("does not look", "looks")
    judged = {
        name: (value, beside, collapsed, words.format(verdict[not collapsed]))
        for name, (value, beside, collapsed, words, verdict) in rows.items()
    }
    return pd.DataFrame.from_dict(judged, orient="index", columns=["value", "beside", "collapsed", "meaning"])


def signs_of_collapse(results: Mapping) -> dict[str, str]:
    """A line for each of the `symptoms` of a collapse, with the remedy, by its name."""
    table = symptoms(results)
    found = table["meaning"][table["collapsed"].astype(bool)]
    return {name: f"{meaning}; {REMEDIES[name]}" for name, meaning in found.items()}
