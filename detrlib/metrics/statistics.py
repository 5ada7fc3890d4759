"""How sure a difference between trained models is: bootstrap over images, and paired comparison of two runs.

Whether this trained model is better than that one on images like these is answered here, by resampling images
(`bootstrap_ap`, `compare`). Whether this way of training is better than that one is another question, which needs
several runs of each: see `seeds`.
Legend: R resamples, N images.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from detrlib.config.machine import cores
from detrlib.errors import ConfigError, DataError
from detrlib.metrics.bootstrap import (
    LEVEL,
    RankedDetections,
    average_precision,
    batches,
    bootstrap_ap,
    bootstrap_runs,
    highest,
    interval,
)
from detrlib.metrics.detection import Matches

MEAN_SAMPLING = {"n_resamples": 10_000, "batch": 500}  # means are cheap
NO_ROWS = pd.DataFrame(columns=["first", "second", "metric", "difference", "low", "high", "p", "images"], dtype=object)


def compare(
    first: Matches | pd.DataFrame | pd.Series,
    second: Matches | pd.DataFrame | pd.Series,
    metric: str = "AP",
    resamples: int = 1000,
    seed: int = 0,
    samples: tuple[pd.Series, pd.Series] | None = None,
) -> dict:
    """Compare two runs on the same images.

    The interval is that of the paired bootstrap, which draws the same images for both (see `bootstrap_ap`, `interval`),
    cut off at -1 and 1 where the metric lies in 0..1.
    p is that of a permutation test, two-sided: under the null hypothesis the results of an image could as well be
    exchanged between the runs, which is done at random for each image, independently of the others; for means this is
    flipping signs of differences. It assumes that exchangeability and nothing about distributions. Both speak of two
    trained models, not of two ways of training. Source: Efron & Tibshirani 1993, chapters 8, 13 and 15.

    Args:
        first, second: matches, compared by AP; or tables, compared by the mean of a column over images (the index, or
            column image_id; rows of one image are averaged first, undefined ones left out).
        metric: one of the six AP, or the column.
        resamples: drawn for AP; for means 10,000 are.
        seed: of what is drawn.
        samples: the bootstrap samples of both, as of `bootstrap_ap`, where they are drawn already.

    Returns:
        difference (first - second), low and high (95 %), p, and how many images.

    Raises:
        DataError: the images or annotations of the runs differ, or are too few.
        ConfigError: there is no such metric.
    """
    if isinstance(first, Matches):
        return _compare_ap(first, second, metric, resamples, seed, samples)
    a, b = (_per_image(table, metric) for table in (first, second))
    same_images(a.index, b.index)
    if len(a) < 2:
        raise DataError(f"{metric} is defined for {len(a)} images; a comparison over images needs two at least")
    gaps = (a - b).to_numpy()
    test = stats.permutation_test(
        (gaps,), np.mean, permutation_type="samples", rng=np.random.default_rng(seed), **MEAN_SAMPLING
    )
    drawn = stats.bootstrap(
        (gaps,), np.mean, method="basic", confidence_level=1 - LEVEL, rng=np.random.default_rng(seed), **MEAN_SAMPLING
    )
    ends = within_reach(drawn.confidence_interval, metric)
    return {"difference": float(gaps.mean()), **ends, "p": float(test.pvalue), "images": len(gaps)}


def _per_image(table: pd.DataFrame | pd.Series, metric: str) -> pd.Series:
    if isinstance(table, pd.DataFrame):
        if metric not in table:
            raise ConfigError(f"no column {metric!r}; there are {list(table.columns)}")
        table = (table.set_index("image_id") if "image_id" in table else table)[metric]
    return table.dropna().groupby(level=0).mean()


def same_images(first: Iterable[int], second: Iterable[int]) -> None:
    """Raises DataError where the images of two runs are not the same."""
    others = set(first) ^ set(second)
    if others:
        raise DataError(
            f"{len(others)} images are in one run only, such as {min(others)}; evaluate both runs on the same images"
        )


def _compare_ap(
    first: Matches,
    second: Matches,
    metric: str,
    resamples: int,
    seed: int,
    samples: tuple[pd.Series, pd.Series] | None,
) -> dict:
    a, b = (one.annotations.sort_values(["image_id", "category_id"], ignore_index=True) for one in (first, second))
    same_images(a["image_id"], b["image_id"])
    if not a.equals(b):
        raise DataError("the annotations of the runs differ; evaluate both again on the same annotation file")
    before, after = (average_precision(one)[metric] for one in (first, second))
    result = {"difference": before - after, "images": a["image_id"].nunique()}
    if np.isnan(before):
        return result | {"difference": np.nan, "low": np.nan, "high": np.nan, "p": np.nan}
    drawn = samples or [bootstrap_ap(one, resamples, seed, (metric,))[metric] for one in (first, second)]
    ends = within_reach(interval(before - after, drawn[0] - drawn[1]), metric)
    p = p_value(before - after, exchanged(first, second, metric, resamples, seed))
    return result | ends | {"p": p}


def exchanged(first: Matches, second: Matches, metric: str, resamples: int, seed: int) -> np.ndarray:
    """[R] differences of AP after each image has been exchanged between the runs with probability 1/2."""
    ranked, random = RankedDetections(first, second), np.random.default_rng(seed)
    images, parts = len(ranked.image_ids), []
    for count in batches(resamples, images):
        kept = random.integers(0, 2, (count, images), dtype=np.int32)
        one, other = (ranked.ap(np.hstack([chosen, 1 - chosen]), (metric,))[metric] for chosen in (kept, 1 - kept))
        parts.append(one - other)
    return np.concatenate(parts)


def p_value(difference: float, exchanged: np.ndarray) -> float:
    """Two-sided, from differences [R] after exchanges."""
    # The difference itself is one of the exchanges (nothing exchanged), so p is never 0. Rounding makes no exception.
    extreme = np.count_nonzero(np.abs(exchanged) >= abs(difference) - 1e-12)
    return np.nan if np.isnan(difference) else (1 + extreme) / (1 + len(exchanged))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p values adjusted for their number: comparing them with a level bounds the probability of any false finding.

    Holds under any dependence between the tests. NaN stays and does not count. Source: Holm 1979, "A simple
    sequentially rejective multiple test procedure".
    """
    given = np.asarray(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(given))
    order = known[np.argsort(given[known], kind="stable")]
    steps = given[order] * np.arange(len(order), 0, -1)
    adjusted = given.copy()
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else steps
    return adjusted


def compare_runs(
    runs: Mapping[str, Matches | pd.DataFrame | pd.Series],
    metric: str = "AP",
    pairs: Sequence[tuple[str, str]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    samples: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Compare all pairs of runs, or those given, on the same images; pairs side by side on all cores.

    Args:
        runs: by name, what `compare` takes: matches for AP, or tables for the mean of a column.
        metric: one of the six AP, or the column.
        pairs: names of the runs to compare; None: all.
        resamples, seed: of the bootstrap and the permutations.
        samples: by name, what `bootstrap_ap` has drawn of the runs with these `resamples` and `seed`, where it has.

    Returns:
        A row per pair: first, second, metric, difference, low, high, p, images, p_adjusted (Holm) and verdict,
        "established" or "not established" at 5 %; no rows for fewer than two runs.

    Raises:
        DataError: the images or annotations of two runs differ.
        ConfigError: there is no such metric.
    """
    pairs = list(pairs or combinations(runs, 2))
    compared = {name: runs[name] for name in dict.fromkeys(name for pair in pairs for name in pair)}
    drawn = {name: own[[metric]] for name, own in (samples or {}).items() if name in compared and metric in own}
    left = {name: one for name, one in compared.items() if isinstance(one, Matches) and name not in drawn}
    drawn |= bootstrap_runs(left, resamples, seed, (metric,))  # once for all pairs

    def row(pair: tuple[str, str]) -> dict:
        own = tuple(drawn[name][metric] for name in pair) if drawn else None
        try:
            told = compare(*(runs[name] for name in pair), metric, resamples, seed, own)
        except DataError as error:
            raise DataError(f"{' and '.join(pair)}: {error}") from error
        return dict(zip(("first", "second"), pair, strict=True)) | {"metric": metric, **told}

    with ThreadPoolExecutor(cores()) as pool:
        rows = list(pool.map(row, pairs))
    return with_verdicts(pd.DataFrame(rows) if rows else NO_ROWS)


def with_verdicts(comparisons: pd.DataFrame) -> pd.DataFrame:
    """`comparisons` with p_adjusted, by Holm over all rows, and verdict."""
    adjusted = holm(comparisons["p"])
    words = np.where(adjusted <= LEVEL, "established", "not established")
    return comparisons.assign(p_adjusted=adjusted, verdict=words)


def within_reach(ends: Iterable[float], metric: str) -> dict[str, float]:
    """Low and high of the interval of a difference, which of two numbers in 0..1 lies in -1..1."""
    low, high = np.clip([*ends], -highest(metric), highest(metric)).tolist()
    return {"low": low, "high": high}


def comparison_table(comparisons: pd.DataFrame, decimals: int = 3) -> pd.DataFrame:
    """Rows of `compare_runs` or `compare_groups` in words, ready for `figures.tables.markdown_table`.

    The index names the pair; columns metric, difference, 95 % interval, p (Holm), verdict, "not established (3 seeds)",
    with the lower number of seeds of the two, or the number of images; for seeds also the paired interval, or, of
    explanations, the one over images.
    """
    table = pd.DataFrame(index=(comparisons["first"] + " − " + comparisons["second"]).rename("pair"))
    table["metric"] = comparisons["metric"].to_numpy()
    table["difference"] = [_signed(value, decimals) for value in comparisons["difference"]]
    table["95 % interval"] = _intervals(comparisons, "low", "high", decimals)
    if "images_low" in comparisons:
        table["over images, seeds fixed"] = _intervals(comparisons, "images_low", "images_high", decimals)
    elif "paired_low" in comparisons:
        table["paired by seed"] = _intervals(comparisons, "paired_low", "paired_high", decimals)
    table["p (Holm)"] = [_p_value(p) for p in comparisons["p_adjusted"]]
    table["verdict"] = comparisons["verdict"].to_numpy() + _evidence(comparisons)
    return table


def _evidence(comparisons: pd.DataFrame) -> np.ndarray:
    """ " (3 seeds)" or " (500 images)" for each row."""
    seeds = "seeds_first" in comparisons
    counts = comparisons[["seeds_first", "seeds_second"]].min(axis=1) if seeds else comparisons["images"]
    word = "seed" if seeds else "image"
    return np.array([f" ({count} {word}{'' if count == 1 else 's'})" for count in counts], dtype=object)


def _intervals(comparisons: pd.DataFrame, low: str, high: str, decimals: int) -> list[str]:
    ends = zip(comparisons[low], comparisons[high], strict=True)
    return ["–" if np.isnan(a) else f"{_signed(a, decimals)} to {_signed(b, decimals)}" for a, b in ends]


def _signed(value: float, decimals: int) -> str:
    """With a sign, a true minus; missing values read as a dash."""
    return "–" if np.isnan(value) else f"{value:+.{decimals}f}".replace("-", "−")


def _p_value(p: float) -> str:
    return "–" if np.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"
