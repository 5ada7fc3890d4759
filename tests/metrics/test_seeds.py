"""Several runs of each way of training: their spread, what of their differences is established, how many it takes."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from detrlib.errors import ConfigError, DataError
from detrlib.metrics.bootstrap import bootstrap_ap
from detrlib.metrics.detection import coco_ap, match_detections
from detrlib.metrics.seeds import compare_groups, plan, power, seed_table, seeds_needed
from detrlib.metrics.statistics import compare_runs, comparison_table


def seeds(**groups):
    """A row per run from {group: AP of its seeds 1, 2, ...}."""
    rows = [(group, seed, ap) for group, values in groups.items() for seed, ap in enumerate(values, 1)]
    return pd.DataFrame(rows, columns=["group", "seed", "AP"])


def test_seed_table():
    table = seed_table(seeds(a=[0.3, 0.5, np.nan], b=[0.4]).assign(gini=1.0), ["AP", "gini"])
    rows = table.set_index(["group", "metric"])
    assert rows.loc["a", "AP"].tolist() == pytest.approx([0.4, np.std([0.3, 0.5], ddof=1), 0.3, 0.5, 2])
    assert rows.loc["b", "AP"].isna().tolist() == [False, True, False, False, False]
    assert rows.loc["a", "gini"]["n"] == 3
    with pytest.raises(DataError, match="group a has several runs of seed 1"):
        seed_table(pd.concat([seeds(a=[0.3]), seeds(a=[0.4])]), ["AP"])
    with pytest.raises(ConfigError, match="AR"):
        seed_table(seeds(a=[0.3]), ["AR"])


def test_groups_are_compared_over_seeds():
    first, second = [0.50, 0.52, 0.54, 0.51], [0.48, 0.49, 0.52]
    (row,) = compare_groups(seeds(a=first, b=second), ["AP"]).to_dict("records")
    # Welch's formulas, written out
    spread_a, spread_b = np.var(first, ddof=1) / 4, np.var(second, ddof=1) / 3
    freedom = (spread_a + spread_b) ** 2 / (spread_a**2 / 3 + spread_b**2 / 2)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(spread_a + spread_b)
    gap = np.mean(first) - np.mean(second)
    assert [row["difference"], row["low"], row["high"]] == pytest.approx([gap, gap - half, gap + half])
    assert row["p"] == pytest.approx(2 * stats.t.sf(gap / np.sqrt(spread_a + spread_b), freedom))
    paired = np.subtract(first[:3], second)
    half = stats.t.ppf(0.975, 2) * np.std(paired, ddof=1) / np.sqrt(3)
    mean = paired.mean()
    assert [row[f"paired_{name}"] for name in ("difference", "low", "high")] == pytest.approx(
        [mean, mean - half, mean + half]
    )
    assert (row["seeds_first"], row["seeds_second"], row["paired_seeds"]) == (4, 3, 3)
    assert row["verdict"] == "not established"


def test_what_seeds_can_establish():
    table = seeds(a=[0.50, 0.51, 0.49], b=[0.70, 0.71, 0.72], c=[0.9], d=[0.8, 0.8], e=[0.6, 0.6], f=[0.3, 0.31])
    found = compare_groups(table, ["AP"], [("a", "b"), ("a", "c"), ("d", "e"), ("f", "a")])
    assert found["verdict"].tolist() == ["established", *["not established"] * 2, "established"]
    assert found["p"].isna().tolist() == [False, True, True, False]
    assert comparison_table(found)["verdict"].tolist()[:2] == ["established (3 seeds)", "not established (1 seed)"]
    with pytest.raises(ConfigError, match="no group z"):
        compare_groups(table, ["AP"], [("a", "z")])


def test_one_good_seed_establishes_a_model_but_no_method(random_detection_task, worse):
    truth, detections = random_detection_task(2)
    lists = {name: worse(detections, share) for name, share in (("a", 0), ("b", 0.8))}
    models = compare_runs({name: match_detections(truth, found) for name, found in lists.items()}, resamples=100)
    ap = {name: coco_ap(truth, found)["AP"] for name, found in lists.items()}
    methods = compare_groups(seeds(a=[ap["a"], ap["b"]], b=[ap["b"], ap["a"]]), ["AP"])
    assert models["verdict"].tolist() == ["established"] and methods["verdict"].tolist() == ["not established"]


def test_intervals_end_where_numbers_cannot_be():
    """Welch's interval of two seeds each reaches far beyond; losses and distances have no such end."""
    seeds = {"group": ["a", "a", "b", "b"], "seed": [1, 2, 1, 2], "AP": [0.1, 0.9, 0.1, 0.2]}
    frame = pd.DataFrame(seeds).assign(**{"encoder_self/zeros": lambda t: t["AP"], "distance/all": lambda t: t["AP"]})
    table = compare_groups(frame, ["AP", "encoder_self/zeros", "distance/all"]).set_index("metric")
    for metric in ("AP", "encoder_self/zeros"):
        row = table.loc[metric]
        assert (row["low"], row["high"]) == (-1, 1) and -1 <= row["paired_low"] < row["paired_high"] <= 1
    assert table.loc["distance/all", "low"] < -1 and table.loc["distance/all", "high"] > 1


def test_an_interval_over_images_too_is_wider_and_speaks_of_resampled_groups(random_detection_task, worse):
    truth, detections = random_detection_task(2)
    found = {
        f"{group}{seed}": match_detections(truth, worse(detections, share))
        for group, share in (("a", 0.1), ("b", 0.6))
        for seed in (1, 2)
    }
    samples = {run: bootstrap_ap(one, 200, metrics=("AP",)) for run, one in found.items()}
    table = seeds(a=[0.50, 0.52], b=[0.40, 0.43]).assign(run=list(found), other=lambda t: t["AP"])
    alone = compare_groups(table, ["AP"]).iloc[0]
    both = compare_groups(table, ["AP", "other"], samples=samples).set_index("metric")
    gap = (samples["a1"] + samples["a2"] - samples["b1"] - samples["b2"])["AP"] / 2
    parts = [np.var(group, ddof=1) / 2 for group in ([0.50, 0.52], [0.40, 0.43])]
    total, freedom = sum(parts) + gap.var(), sum(parts) ** 2 / sum(part**2 for part in parts)
    assert both.loc["AP", "p"] == pytest.approx(2 * stats.t.sf(0.095 / np.sqrt(total), freedom))
    assert both.loc["AP", "high"] == pytest.approx(min(1, 0.095 + stats.t.ppf(0.975, freedom) * np.sqrt(total)))
    assert both.loc["other", "p"] == pytest.approx(alone["p"])  # which was not resampled


def test_more_images_never_make_a_difference_more_certain():
    """Where images vary as much as seeds do, Satterthwaite's degrees of freedom would go from 2 to 8."""
    table = seeds(a=[0.50, 0.52, 0.48], b=[0.45, 0.45, 0.45]).assign(run=list("uvwxyz"))
    resampled = {run: pd.DataFrame({"AP": [0.02, -0.02] if run in "uvw" else [0.0, 0.0]}) for run in "uvwxyz"}
    alone, both = (compare_groups(table, ["AP"], samples=given).iloc[0] for given in (None, resampled))
    assert both["low"] < alone["low"] < alone["high"] < both["high"] and both["p"] > alone["p"]


def test_power_is_how_often_a_test_finds_what_is_there():
    random, found = np.random.default_rng(0), 0
    for _ in range(2000):
        first, second = random.normal(0.012, 0.01, 5), random.normal(0, 0.01, 5)
        found += stats.ttest_ind(first, second).pvalue <= 0.05
    assert found / 2000 == pytest.approx(power(0.012, 0.01, 5), abs=0.03)
    assert power(0, 0.01, 5) == pytest.approx(0.05)  # false findings
    assert seeds_needed(0.01, 0.02) == 64  # d = 0.5: table 2.4.1 of Cohen 1988
    needed = seeds_needed(0.01, 0.01, 0.005)
    assert power(0.01, 0.01, needed - 1, 0.005) < 0.8 <= power(0.01, 0.01, needed, 0.005)


def test_a_plan_pools_the_spread_within_groups():
    groups = {"a": [0.50, 0.52, 0.51], "b": [0.70, 0.74], "c": [0.2]}
    table = plan(seeds(**groups), difference=0.02, comparisons=10)
    variance = (2 * np.var(groups["a"], ddof=1) + np.var(groups["b"], ddof=1)) / 3
    assert table["std"].tolist() == pytest.approx([np.sqrt(variance)] * 2)
    low, high = np.sqrt(3 * variance / stats.chi2.ppf([0.975, 0.025], 3))
    assert table.loc[1, ["std_low", "std_high"]].tolist() == pytest.approx([low, high])
    assert table.loc[1, "seeds"] == seeds_needed(0.02, np.sqrt(variance)) < table.loc[10, "seeds"]
    assert table.loc[1, "seeds_low"] < table.loc[1, "seeds"] < table.loc[1, "seeds_high"]
    assert (table["seeds_there"] == 2).all() and table.loc[1, "power_there"] < 0.8
    assert len(plan(seeds(**groups))) == 1
    assert plan(seeds(a=[0.5], b=[0.6])).empty and plan(seeds(a=[0.5, 0.5])).empty
