"""Average precision of weighted images, from matches alone: what resampling needs, thousands of times.

A weight is how many times an image is there, so that a sample drawn with replacement needs no copies; detections are
matched and sorted once. Detections of equal score keep the order of their image ids, as in COCO.
Legend: R rows of weights, N images, C classes, A area ranges (all, small, medium, large), S detections of a class.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from detrlib.config.machine import cores
from detrlib.errors import ConfigError
from detrlib.metrics.detection import AREAS, IOU_THRESHOLDS, METRICS, NO_CATEGORY, Matches

AP_METRICS = METRICS[:6]
# Numbers that lie in 0..1, by any part of their names between slashes: AP and AR, shares, overlaps, scores.
SHARES = r"(AP|AR)\d*(_\w+)?|gini|zeros(_\w+)?|paibb|pointing|((deletion|insertion)_)?(score|iou|similarity)"
RECALLS = np.linspace(0, 1, 101)
NUMBERS_AT_ONCE = 2**19  # of a class, worked on together: about what a processor's cache holds


def average_precision(matches: Matches) -> dict[str, float]:
    """The six AP of `coco_ap` from matches alone; missing where there is nothing to be detected."""
    ranked = RankedDetections(matches)
    numbers = ranked.ap(np.ones((1, len(ranked.image_ids)), np.int32), AP_METRICS)
    return {name: float(values[0]) for name, values in numbers.items()}


class RankedDetections:
    """Detections sorted once, best first in each class, to compute AP under any weights of the images.

    A weight is how many times an image is there, with its detections and annotations. These are those of one or several
    lists of the same images; image n of list l has the weight in column l * N + n.
    """

    def __init__(self, *lists: Matches):
        self.image_ids = np.unique(lists[0].annotations["image_id"])
        counted = pd.concat([self._numbered(one.annotations, number) for number, one in enumerate(lists)])
        counted = counted[counted["category_id"] != NO_CATEGORY]
        self.category_ids, category = np.unique(counted["category_id"], return_inverse=True)
        shape = len(lists) * len(self.image_ids), len(self.category_ids)
        entries = counted["column"], category
        self.counts = [sparse.csr_array((counted[area], entries), shape) for area in AREAS]  # A times [columns,C]
        tables = [self._numbered(one.detections, number) for number, one in enumerate(lists)]
        table = pd.concat(tables).sort_values(["category_id", "image_id"], kind="stable")
        table = table.iloc[np.lexsort((-table["score"], table["category_id"]))]
        self.classes = dict(iter(table.groupby("category_id")))

    def _numbered(self, table: pd.DataFrame, number: int) -> pd.DataFrame:
        column = np.searchsorted(self.image_ids, table["image_id"]) + number * len(self.image_ids)
        return table.assign(column=column)

    def ap(self, weights: np.ndarray, metrics: Sequence[str]) -> dict:
        """{metric: [R]}, NaN where nothing is to be detected; weights [R,columns] of detections and annotations."""
        wanted = {name: _cut(name) for name in metrics}
        sums = {name: np.zeros(len(weights)) for name in wanted}
        defined = {name: np.zeros(len(weights), int) for name in wanted}
        totals = [(count.T @ weights.T).T for count in self.counts]  # A times [R,C]
        for position, category in enumerate(self.category_ids):
            values = {}
            if category in self.classes:
                values = _class_ap(self.classes[category], weights, [t[:, position] for t in totals], wanted.values())
            for name, (area, thresholds) in wanted.items():
                precisions = [values.get((area, t), 0.0) for t in thresholds]
                there = totals[area][:, position] > 0
                sums[name] += np.where(there, sum(precisions) / len(thresholds), 0.0)
                defined[name] += there
        with np.errstate(invalid="ignore"):
            return {name: sums[name] / defined[name] for name in wanted}


def _cut(metric: str) -> tuple[int, tuple[int, ...]]:
    """The area range and the IoU thresholds, by position, that a metric is a mean over."""
    if metric not in AP_METRICS:
        raise ConfigError(f"metric {metric!r} is none of {', '.join(AP_METRICS)}")
    thresholds = {"AP50": (0,), "AP75": (5,)}.get(metric, tuple(range(len(IOU_THRESHOLDS))))
    return list(AREAS).index(metric.partition("_")[2] or "all"), thresholds


def _class_ap(table: pd.DataFrame, weights: np.ndarray, totals: list[np.ndarray], wanted: Iterable[tuple]) -> dict:
    """{(area, threshold): [R]} of one class, whose detections `table` holds best first; totals A times [R].

    Most detections are false positives at every threshold. They are counted once per area range, and only those that
    are something else at some threshold, S of them, are looked at threshold by threshold.
    """
    cells = sorted({(area, threshold) for area, thresholds in wanted for threshold in thresholds})
    true, ignored = (table[[f"{kind}_{area}" for area in AREAS]].to_numpy() for kind in ("true", "ignored"))
    every = 2 ** len(IOU_THRESHOLDS) - 1
    distinct = ((true > 0) | ((ignored > 0) & (ignored < every))).any(1)
    special, plain = np.flatnonzero(distinct), np.flatnonzero(~distinct)
    column, result = table["column"].to_numpy(), {cell: np.zeros(len(weights)) for cell in cells}
    if not len(special):
        return result
    false = {area: plain[ignored[plain, area] == 0] for area, _ in cells}
    between = {area: _counts_between(special, own, column, weights.shape[1]) for area, own in false.items()}
    true, ignored, column = true[special], ignored[special], column[special]
    step = max(1, NUMBERS_AT_ONCE // len(special))
    for rows in (slice(start, start + step) for start in range(0, len(weights), step)):
        # `take` keeps rows together in memory, unlike an index, and sums run along rows.
        own, by_column = weights[rows].take(column, 1), np.ascontiguousarray(weights[rows].T)  # [R,S], [columns,R]
        before = {area: _sums((counts @ by_column).T) for area, counts in between.items()}
        passed = {area: _LevelsPassed(totals[area][rows], int(own.sum(1).max())) for area in between}
        listed = {}
        for area, threshold in cells:
            used = (ignored[:, area] >> threshold & 1) == 0
            if (key := (area, used.tobytes())) not in listed:  # as a rule the same at all thresholds
                listed[key] = _sums(own * used) + before[area]
            hits = np.flatnonzero(used & (true[:, area] >> threshold & 1 > 0))
            curve = _sums(own.take(hits, 1)), listed[key].take(hits, 1)
            result[area, threshold][rows] = _area_under_curve(*curve, passed[area])
    return result


def _counts_between(special: np.ndarray, others: np.ndarray, column: np.ndarray, columns: int) -> sparse.csr_array:
    """[S,columns], how many `others` of each column are listed between each special detection and the one before it.

    Multiplied by weights it takes one addition for each of the others, and sums over S are short.
    """
    segment = np.searchsorted(special, others)
    there = segment < len(special)  # none comes after those that are listed last
    places = segment[there], column[others[there]]
    return sparse.csr_array((np.ones(there.sum(), np.int32), places), (len(special), columns))


def _sums(counts: np.ndarray) -> np.ndarray:
    """[R,n] of what stands up to each place of a row."""
    return np.cumsum(np.ascontiguousarray(counts), axis=1, dtype=np.int32)


class _LevelsPassed:
    """How many recall levels so many true positives have passed, looked up: total [R] annotations, most: positives."""

    def __init__(self, total: np.ndarray, most: int):
        kinds, which = np.unique(total, return_inverse=True)
        recall = np.arange(most + 1) / np.maximum(kinds, 1)[:, None]
        self.levels = np.searchsorted(RECALLS, recall, side="right").astype(np.int16).ravel()
        self.start = (which * (most + 1)).astype(np.int32)[:, None]

    def __call__(self, hit: np.ndarray) -> np.ndarray:
        return self.levels.take(hit + self.start)


def _area_under_curve(hit: np.ndarray, listed: np.ndarray, passed: _LevelsPassed) -> np.ndarray:
    """[R] COCO's interpolated precision, a mean over 101 recall levels, from counts at the true positives.

    hit [R,n] true positives and listed [R,n] all detections so far. Each true positive stands for the levels that
    recall passes there, with the highest precision from there on.
    """
    precision = hit / (listed + np.spacing(1))
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    levels = passed(hit)
    levels[:, 1:] -= levels[:, :-1].copy()
    return (levels * highest).sum(1) / len(RECALLS)


# Resampling

LEVEL = 0.05  # a difference is established when its adjusted p value is not above; intervals cover the rest
IMAGES_AT_ONCE = 2**22  # weights of images in memory together


def bootstrap_ap(
    matches: Matches, resamples: int = 1000, seed: int = 0, metrics: Sequence[str] = AP_METRICS
) -> pd.DataFrame:
    """Compute AP of samples of the images, drawn with replacement.

    Assumes that the images are independent draws from those of interest, and says nothing about training anew.
    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6 and 13.

    Args:
        matches: of one run, as of `match_detections` or `load_matches`.
        resamples: how many samples are drawn.
        seed: the same one draws the same images for every run on them.
        metrics: some of the six AP.

    Returns:
        A row per sample, a column per metric; NaN where a sample has nothing to be detected.

    Raises:
        ConfigError: a metric is none of the six.
    """
    ranked, random = RankedDetections(matches), np.random.default_rng(seed)
    images, parts = len(ranked.image_ids), []
    for count in batches(resamples, images):
        times = random.multinomial(images, np.full(images, 1 / images), size=count)  # [R,N] that each image is drawn
        parts.append(pd.DataFrame(ranked.ap(times.astype(np.int32), metrics)))
    return pd.concat(parts, ignore_index=True)


def bootstrap_runs(
    matches: Mapping[str, Matches], resamples: int = 1000, seed: int = 0, metrics: Sequence[str] = AP_METRICS
) -> dict[str, pd.DataFrame]:
    """`bootstrap_ap` of several runs by name, side by side on all cores."""
    draw = partial(bootstrap_ap, resamples=resamples, seed=seed, metrics=metrics)
    with ThreadPoolExecutor(cores()) as pool:
        return dict(zip(matches, pool.map(draw, matches.values()), strict=True))


def batches(resamples: int, images: int) -> list[int]:
    """How many resamples of so many images are worked on together, batch by batch."""
    most = max(1, IMAGES_AT_ONCE // images)
    return [min(most, resamples - start) for start in range(0, resamples, most)]


def interval(estimate: ArrayLike, samples: pd.DataFrame | pd.Series) -> pd.DataFrame | pd.Series:
    """The basic 95 % bootstrap interval (rows low, high) around `estimate`, of each column of bootstrap `samples`.

    It reflects percentiles at the estimate: AP of few annotations per class is too high, that of samples with repeated
    images once more so, and percentiles themselves would add that error where these take it off. What is left of it
    with few annotations per class makes intervals of AP itself, less so those of differences, too narrow.
    Source: Davison & Hinkley 1997, "Bootstrap Methods and their Application", section 5.2.
    """
    ends = samples.quantile([1 - LEVEL / 2, LEVEL / 2])
    return (2 * estimate - ends).set_axis(["low", "high"], axis=0)


def highest(metric: str) -> float:
    """What a metric cannot exceed: 1 for one that lies in 0..1, such as "AP50" or "paibb/small"; otherwise infinity."""
    return 1.0 if any(re.fullmatch(SHARES, part) for part in metric.split("/")) else np.inf


def ap_table(matches: Matches, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The six AP of a run with their 95 % intervals, cut off at 0 and 1: columns value, low, high.

    All are missing where AP is undefined.
    """
    values = pd.Series(average_precision(matches))
    ends = interval(values, bootstrap_ap(matches, resamples, seed)).clip(0, 1)
    return ends.T.assign(value=values)[["value", "low", "high"]]
