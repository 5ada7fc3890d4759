"""Precision over recall, by class and by size, and which classes are taken for which."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from detrlib.errors import ConfigError
from detrlib.metrics.bootstrap import RECALLS, RankedDetections
from detrlib.metrics.detection import AREAS, IOU_THRESHOLDS, NO_CATEGORY, Matches, overlapping
from detrlib.metrics.failures import Failures

ALL = "all classes"
BACKGROUND = "background"  # a detection that is on no object, or an object without a detection


def precision_recall(matches: Matches, names: Mapping[int, str], iou: float = 0.5) -> pd.DataFrame:
    """The curves that AP is the area under: at each of 101 recalls the highest precision from there on.

    Args:
        matches: of one run, as of `match_detections` or `load_matches`.
        names: the class of each category id.
        iou: one of 0.50, 0.55, ..., 0.95, from which a detection is true.

    Returns:
        A row per class, size ("all", "small", "medium", "large") and recall: class, size, recall, precision and score,
        the lowest of the detections that reach this recall (NaN where none do; there precision is 0). Classes without
        objects of a size have no rows; `ALL` is the mean over those that have, whose mean in turn is AP.

    Raises:
        ConfigError: there is no such IoU.
    """
    bit = np.flatnonzero(np.isclose(IOU_THRESHOLDS, iou))
    if not len(bit):
        raise ConfigError(f"iou {iou} is none of {', '.join(f'{one:.2f}' for one in IOU_THRESHOLDS)}")
    counted = matches.annotations[matches.annotations["category_id"] != NO_CATEGORY]
    totals = counted.groupby("category_id")[list(AREAS)].sum()
    ranked, rows = RankedDetections(matches).classes, []
    for category_id, count in totals.iterrows():
        table = ranked.get(category_id, matches.detections[:0])
        for size in AREAS:
            if not count[size]:
                continue
            true, ignored = ((table[f"{kind}_{size}"].to_numpy() >> bit[0]) & 1 > 0 for kind in ("true", "ignored"))
            curve = _curve(true[~ignored], table["score"].to_numpy()[~ignored], int(count[size]))
            rows.append(pd.DataFrame({"class": names[category_id], "size": size, "recall": RECALLS} | curve))
    if not rows:
        return pd.DataFrame(columns=["class", "size", "recall", "precision", "score"])
    curves = pd.concat(rows, ignore_index=True)
    mean = curves.groupby(["size", "recall"], sort=False, as_index=False)["precision"].mean()
    return pd.concat([mean.assign(**{"class": ALL}), curves], ignore_index=True)[[*curves.columns]]


def _curve(true: np.ndarray, scores: np.ndarray, total: int) -> dict[str, np.ndarray]:
    """Precision and score at each of RECALLS, of detections in falling order."""
    hits = np.cumsum(true)
    precision = hits / np.arange(1, len(hits) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / total, RECALLS)
    return {"precision": np.append(highest, 0.0)[at], "score": np.append(scores.astype(float), np.nan)[at]}


def confusion(failures: Failures, names: Mapping[int, str], min_score: float = 0.3, iou: float = 0.5) -> pd.DataFrame:
    """Count what objects of each class are taken for.

    Detections and objects of an image are paired one to one, whatever their classes, where their IoU is at least `iou`:
    pairs of one class first, so that no object that is detected counts as confused, then the others, each in falling
    order of IoU, and of one box with several classes by score.

    Args:
        failures: of one run, as of `find_failures`; what is ignored there does not count.
        names: the class of each category id.
        min_score: of the detections that count, in 0..1.
        iou: in 0.05..1.

    Returns:
        A row per class of object and a column per class of detection, in the order of `names`, with `BACKGROUND` last:
        the column counts objects without a detection, the row detections without an object.

    Raises:
        ConfigError: the IoU is another.
    """
    if not 0.05 <= iou <= 1:
        raise ConfigError(f"iou {iou} is not in 0.05..1")
    found = failures.detections
    found = found[(found["score"] >= min_score) & (found["cause"] != "ignored")].reset_index(drop=True)
    objects = failures.annotations[failures.annotations["fate"] != "ignored"].reset_index(drop=True)
    d, g, overlap = overlapping(found, objects, ("image_id",), iou)
    position = {category_id: number for number, category_id in enumerate(names)}
    guess, truth = (table["category_id"].map(position).to_numpy(int) for table in (found, objects))
    pair = np.full(len(found), -1)  # the object of each detection
    taken = np.zeros(len(objects), bool)
    for one in np.lexsort((-found["score"].to_numpy()[d], -overlap, guess[d] != truth[g])):
        if pair[d[one]] < 0 and not taken[g[one]]:
            pair[d[one]], taken[g[one]] = g[one], True
    counts = np.zeros((len(names) + 1, len(names) + 1), int)
    np.add.at(counts, (np.append(truth, len(names))[pair], guess), 1)
    np.add.at(counts, (truth[~taken], len(names)), 1)
    labels = [*names.values(), BACKGROUND]
    return pd.DataFrame(counts, pd.Index(labels, name="object"), pd.Index(labels, name="detected as"))
