"""Two runs on the same images."""

import itertools

import numpy as np
import pandas as pd
import pytest

from detrlib.errors import ConfigError, DataError
from detrlib.metrics import bootstrap, statistics
from detrlib.metrics.bootstrap import average_precision
from detrlib.metrics.detection import coco_ap, match_detections
from detrlib.metrics.statistics import compare, compare_runs, comparison_table, holm


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says(monkeypatch):
    monkeypatch.setitem(statistics.MEAN_SAMPLING, "n_resamples", 400)
    random, covered = np.random.default_rng(0), 0
    for number in range(60):
        values = pd.Series(random.normal(1, 1, 60))
        result = compare(values, 0 * values, seed=number)
        covered += result["low"] <= 1 <= result["high"]
    assert 51 <= covered <= 60  # 57 expected


def test_comparing_a_run_with_itself_and_with_a_worse_one(random_detection_task, worse):
    truth, detections = random_detection_task(2)
    good, same, bad = (match_detections(truth, worse(detections, share)) for share in (0, 0, 0.8))
    equal = compare(good, same, resamples=50)
    assert (equal["difference"], equal["low"], equal["high"], equal["p"], equal["images"]) == (0, 0, 0, 1, 12)
    for metric in ("AP", "AP50"):
        result = compare(good, bad, metric, resamples=300)
        gap = average_precision(good)[metric] - average_precision(bad)[metric]
        assert result["difference"] == pytest.approx(gap) and gap > 0.2
        assert 0 < result["low"] < gap < result["high"] and result["p"] < 0.03
        back = compare(bad, good, metric, resamples=300)
        assert [back["low"], back["high"]] == pytest.approx([-result["high"], -result["low"]])


def test_exchanging_images_is_evaluating_exchanged_results(random_detection_task, worse):
    """p of four images against all sixteen exchanges, each of them evaluated by faster-coco-eval."""
    truth, detections = random_detection_task(5)
    ids = [image["id"] for image in truth["images"][1:5]]
    truth = {name: truth[name] for name in truth} | {
        "images": [image for image in truth["images"] if image["id"] in ids],
        "annotations": [one for one in truth["annotations"] if one["image_id"] in ids],
    }
    one = [entry for entry in detections if entry["image_id"] in ids]
    other = worse(one, 0.5)
    gaps = []
    for kept in itertools.product((True, False), repeat=4):
        stays = dict(zip(ids, kept, strict=True))
        lists = [
            [entry for entry in mine if stays[entry["image_id"]]] + [e for e in theirs if not stays[e["image_id"]]]
            for mine, theirs in ((one, other), (other, one))
        ]
        gaps.append(coco_ap(truth, lists[0])["AP"] - coco_ap(truth, lists[1])["AP"])
    exact = np.mean(np.abs(gaps) >= abs(gaps[0]) - 1e-12)
    result = compare(match_detections(truth, one), match_detections(truth, other), resamples=2000)
    assert result["difference"] == pytest.approx(gaps[0])
    assert 0.1 < exact < 0.9 and result["p"] == pytest.approx(exact, abs=0.04)


def test_means_are_compared_by_flipping_signs():
    random = np.random.default_rng(0)
    table = pd.DataFrame({"image_id": np.repeat(range(8), 2), "layer": 8 * [0, 1], "gini": random.random(16)})
    other = table.assign(gini=table["gini"] - 0.3 + 0.1 * random.random(16))
    result = compare(table, other, "gini")
    means = (table["gini"] - other["gini"]).to_numpy().reshape(8, 2).mean(1)
    flips = np.array(list(itertools.product((1, -1), repeat=8))) @ means / 8
    assert result["difference"] == pytest.approx(means.mean()) and result["images"] == 8
    assert result["p"] == pytest.approx(np.mean(np.abs(flips) >= abs(means.mean()) - 1e-12))
    assert result["low"] < means.mean() < result["high"]
    single = compare(table.set_index("image_id")["gini"], other.set_index("image_id")["gini"])
    assert single == result
    constant = compare(single_values(1.0), single_values(0.5))
    assert (constant["low"], constant["high"]) == (0.5, 0.5)


def single_values(value):
    return pd.Series(value, index=range(6))


def test_runs_on_other_images_are_not_compared(random_detection_task):
    values = pd.Series([0.1, 0.2, 0.3], index=[1, 2, 3])
    with pytest.raises(DataError, match="1 images are in one run only, such as 3"):
        compare(values, values.replace(0.3, np.nan))
    with pytest.raises(DataError, match="mine and yours: 1 images"):
        compare_runs({"mine": values.to_frame("gini"), "yours": values[:2].to_frame("gini")}, "gini")
    with pytest.raises(DataError, match="defined for 1 images"):
        compare(values[:1], values[:1])
    with pytest.raises(ConfigError, match="zeros"):
        compare(values.to_frame("gini"), values.to_frame("gini"), "zeros")
    truth, detections = random_detection_task(0)
    fewer = match_detections(truth | {"annotations": truth["annotations"][1:]}, detections)
    with pytest.raises(DataError, match="annotations"):
        compare(match_detections(truth, detections), fewer)


def test_holm_adjusts_from_the_smallest_up():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, np.nan, 0.04])[[0, 2]].tolist() == pytest.approx([0.5, 0.08])
    assert holm([0.9, 0.8]).tolist() == [1, 1] and holm([]).tolist() == [] and np.isnan(holm([np.nan])).all()


def test_holm_bounds_false_findings():
    """With ten comparisons and nothing to find, a finding in at most one family of twenty."""
    p_values = np.random.default_rng(0).random((2000, 10))
    false = np.mean([(holm(row) <= 0.05).any() for row in p_values])
    assert false == pytest.approx(0.05, abs=0.015) and (p_values <= 0.05).any(1).mean() > 0.35


def test_several_runs_are_judged_together(random_detection_task, worse):
    truth, detections = random_detection_task(2)
    found = {
        name: match_detections(truth, worse(detections, share)) for name, share in zip("abc", (0, 0, 0.8), strict=True)
    }
    table = compare_runs(found, resamples=100)
    assert list(zip(table["first"], table["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert table["verdict"].tolist() == ["not established", "established", "established"]
    assert (table["p_adjusted"] >= table["p"]).all()
    assert len(compare_runs(found, pairs=[("c", "a")], resamples=10)) == 1
    words = comparison_table(table)
    assert words["verdict"].tolist()[:2] == ["not established (12 images)", "established (12 images)"]
    assert words["difference"].iloc[0] == "+0.000" and words.index[1] == "a − c"


def test_a_run_is_resampled_once_however_many_it_is_compared_with(monkeypatch, random_detection_task, worse):
    truth, detections = random_detection_task(2)
    found = {
        name: match_detections(truth, worse(detections, share))
        for name, share in zip("abc", (0, 0.5, 0.8), strict=True)
    }
    table, drawn, real = compare_runs(found, resamples=20, seed=3), [], bootstrap.bootstrap_ap

    def counted(matches, **arguments):
        drawn.append(matches)
        return real(matches, **arguments)

    monkeypatch.setattr(bootstrap, "bootstrap_ap", counted)
    compare_runs(found, resamples=20, seed=3)
    assert len(drawn) == 3
    samples = bootstrap.bootstrap_runs(found, 20, 3, ["AP", "AP50"])
    assert list(samples) == list("abc") and len(drawn) == 6
    pd.testing.assert_frame_equal(compare_runs(found, resamples=20, seed=3, samples=samples), table)
    assert len(drawn) == 6
    for row in table.to_dict("records"):
        alone = compare(found[row["first"]], found[row["second"]], resamples=20, seed=3)
        assert {name: row[name] for name in alone} == alone


def test_intervals_end_where_numbers_cannot_be():
    shares = [pd.Series([1.0] * 9 + [0.0]), pd.Series([0.0] * 10)]
    assert compare(*shares, "gini")["high"] <= 1
