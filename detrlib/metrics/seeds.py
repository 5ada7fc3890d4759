"""What several runs of each way of training establish: their spread, differences of means, and how many are needed.

Whether this way of training is better than that one needs several runs each, because initialisation and the order of
data alone move AP (Bouthillier et al. 2021, "Accounting for variance in machine learning benchmarks"). Tables of
results have a row per run with columns run, group and seed, as of `runs.results.results_frame`.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from detrlib.errors import ConfigError, DataError
from detrlib.metrics.bootstrap import LEVEL
from detrlib.metrics.statistics import NO_ROWS, with_verdicts, within_reach

POWER = 0.8  # the probability of finding a difference that is there, as planned for by convention (Cohen 1988)
MOST_SEEDS = 1000


def seed_table(results: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Describe the spread over seeds.

    Args:
        results: a row per run with columns group, seed and the metrics, as of `results_frame`; missing numbers are
            left out.
        metrics: some of its columns.

    Returns:
        A row per group and metric: group, metric, mean, std (of the sample, n - 1), min, max and n.

    Raises:
        ConfigError: a column is missing.
        DataError: a group has several runs of one seed.
    """
    values = _by_seed(results, metrics).melt(["group", "seed"], list(metrics), "metric")
    table = values.groupby(["group", "metric"], sort=False)["value"].agg(["mean", "std", "min", "max", "count"])
    return table.rename(columns={"count": "n"}).reset_index()


def compare_groups(
    results: pd.DataFrame,
    metrics: Sequence[str],
    pairs: Sequence[tuple[str, str]] | None = None,
    samples: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Compare the means of groups over seeds, and over images where their bootstrap samples are given.

    The verdict is that of Welch's t test, which assumes independent runs with normally distributed results of any two
    variances. All runs are measured on the same images, so it speaks of these; with `samples`, the variance of the
    difference over images is added to that over seeds, and it speaks of other images like them, too. The degrees of
    freedom stay those over seeds: Satterthwaite's would rise with a variance that is known well, and make an interval
    for more images narrower than the one for these. What an image and a seed do together is in both variances. So
    intervals are a little too wide. The paired t test assumes normal differences, and gains only where a seed does the
    same to both groups (the same images in the same order): it is shown, not judged by. One seed, or no spread at all,
    establishes nothing, whatever the images of one run say. Source: Welch 1947; Bouthillier et al. 2021, section 4;
    Holm 1979.

    Args:
        results, metrics: as of `seed_table`.
        pairs: names of the groups to compare; None, or none: all.
        samples: of each run, by its name in column run, the metrics of resampled images, which are the same for every
            run (`bootstrap_ap`); metrics that they lack are compared over seeds alone.

    Returns:
        A row per metric and pair: first, second, metric, difference (first - second), low, high (95 %), p, p_adjusted
        (Holm over the pairs of a metric), verdict, seeds_first, seeds_second; and paired_difference, paired_low,
        paired_high, paired_p over the seeds that both have (paired_seeds), where these are two or more. No rows for
        fewer than two groups.

    Raises:
        ConfigError: a group or a column is missing.
        DataError: a group has several runs of one seed.
    """
    results = _by_seed(results, metrics)
    groups = list(dict.fromkeys(results["group"]))
    pairs = [tuple(pair) for pair in pairs or combinations(groups, 2)]
    unknown = {name for pair in pairs for name in pair} - set(groups)
    if unknown:
        raise ConfigError(f"no group {', '.join(sorted(unknown))}; there are {', '.join(groups)}")
    tables = []
    for metric in metrics:
        numbers = {group: part.set_index("seed")[metric].dropna() for group, part in results.groupby("group")}
        drawn = _group_samples(results, metric, samples or {})
        rows = []
        for a, b in pairs:
            over_images = float((drawn[a] - drawn[b]).var()) if drawn else 0.0
            compared = _compare_seeds(numbers[a], numbers[b], metric, over_images)
            rows.append({"first": a, "second": b, "metric": metric, **compared})
        tables.append(with_verdicts(pd.DataFrame(rows) if rows else NO_ROWS))
    return pd.concat(tables, ignore_index=True)


def _by_seed(results: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    missing = {"group", "seed", *metrics} - set(results.columns)
    if missing:
        raise ConfigError(f"no columns {sorted(missing)} in the results; there are {list(results.columns)}")
    twice = results[results.duplicated(["group", "seed"])]
    if len(twice):
        group, seed = twice[["group", "seed"]].iloc[0]
        raise DataError(f"group {group} has several runs of seed {seed}; leave all but one out, or name them apart")
    return results


def _group_samples(results: pd.DataFrame, metric: str, samples: Mapping[str, pd.DataFrame]) -> dict[str, pd.Series]:
    """Of each group, the mean over its runs in every sample of the images; none where the metric was not resampled."""
    if not all(metric in samples.get(run, ()) for run in results.get("run", [None])):
        return {}
    return {
        group: sum(samples[run][metric] for run in part["run"]) / len(part) for group, part in results.groupby("group")
    }


def _compare_seeds(first: pd.Series, second: pd.Series, metric: str, over_images: float) -> dict:
    """One row of `compare_groups` of what is indexed by seed; over_images: variance of the difference, known well."""
    row = {"difference": first.mean() - second.mean(), "low": np.nan, "high": np.nan, "p": np.nan}
    if min(len(first), len(second)) > 1 and max(np.ptp(first), np.ptp(second)) > 0:
        parts = [(numbers.var() / len(numbers), len(numbers) - 1) for numbers in (first, second)]
        over_seeds = sum(part for part, _ in parts)
        freedom = over_seeds**2 / sum(part**2 / degrees for part, degrees in parts)  # Satterthwaite 1946
        test = stats.t(freedom, scale=np.sqrt(over_seeds + over_images))
        row["p"] = float(2 * test.sf(abs(row["difference"])))
        row |= within_reach(row["difference"] + np.array(test.interval(1 - LEVEL)), metric)
    shared = first.index.intersection(second.index)
    gaps = first[shared] - second[shared]
    row |= {"seeds_first": len(first), "seeds_second": len(second), "paired_seeds": len(shared)}
    row |= dict.fromkeys(("paired_difference", "paired_low", "paired_high", "paired_p"), np.nan)
    if len(shared) > 1:
        row["paired_difference"] = gaps.mean()
        if np.ptp(gaps) > 0:
            test = stats.ttest_1samp(gaps, 0)
            ends = within_reach(test.confidence_interval(1 - LEVEL), metric)
            row |= {"paired_p": float(test.pvalue), **{f"paired_{end}": value for end, value in ends.items()}}
    return row


# Planning


def power(difference: float, std: float, seeds: int, level: float = LEVEL) -> float:
    """The probability that a two-sided t test of two groups of so many seeds establishes a true difference.

    Args:
        difference: of the means, as large as it really is.
        std: standard deviation over seeds, the same in both groups.
        seeds: of each group, two or more.
        level: of the test; for the first of m comparisons that Holm corrects, 0.05 / m.

    Source: Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences", chapter 2, for the square of t,
    which follows a noncentral F distribution.
    """
    if not difference:
        return level
    freedom, shift = 2 * (seeds - 1), seeds / 2 * (difference / std) ** 2
    return float(stats.ncf.sf(stats.f.isf(level, 1, freedom), 1, freedom, shift))


def seeds_needed(difference: float, std: float, level: float = LEVEL) -> int:
    """How many seeds of each group establish a difference with a probability of 0.8 (`power`); 1000 at most."""
    low, high = 2, MOST_SEEDS
    while low < high:  # power grows with the seeds
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, std, middle, level) >= POWER else (middle + 1, high)
    return low


def plan(results: pd.DataFrame, metric: str = "AP", difference: float = 0.01, comparisons: int = 1) -> pd.DataFrame:
    """How many seeds it would take to establish a difference, at the spread of these runs.

    The spread is that within groups, pooled over those of two seeds or more, as if it were the same in all. It is known
    from few runs only, so the number of seeds is given for the ends of its 95 % interval, too. Images count as fixed.

    Args:
        results: as of `seed_table`.
        metric: one of its columns.
        difference: that is to be established.
        comparisons: how many are corrected for.

    Returns:
        A row for one comparison, and one for `comparisons` of them if these are more, named by the index: std, std_low,
        std_high; seeds, seeds_low, seeds_high (needed of each group); and seeds_there (the fewest of a group) with
        power_there, the probability that they establish it. No rows where no two seeds differ.
    """
    spread = seed_table(results, [metric]).query("n > 1")
    if not spread["std"].any():
        return pd.DataFrame()
    freedom = int((spread["n"] - 1).sum())
    variance = float(((spread["n"] - 1) * spread["std"] ** 2).sum()) / freedom
    ends = {"": variance}
    for name, share in (("_low", 1 - LEVEL / 2), ("_high", LEVEL / 2)):
        ends[name] = variance * freedom / stats.chi2.ppf(share, freedom)
    there, rows = int(spread["n"].min()), {}
    for count in dict.fromkeys((1, comparisons)):
        level = LEVEL / count
        row = {f"std{name}": np.sqrt(value) for name, value in ends.items()}
        row |= {f"seeds{name}": seeds_needed(difference, np.sqrt(value), level) for name, value in ends.items()}
        rows[count] = row | {"seeds_there": there, "power_there": power(difference, np.sqrt(variance), there, level)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("comparisons")
