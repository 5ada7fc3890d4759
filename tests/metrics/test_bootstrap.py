"""AP of any images from matches, and what resampling says of it."""

import numpy as np
import pandas as pd
import pytest

from detrlib.errors import ConfigError, DataError
from detrlib.metrics.bootstrap import AP_METRICS, RankedDetections, ap_table, average_precision, bootstrap_ap, interval
from detrlib.metrics.detection import UNDEFINED, coco_ap, match_detections


def six(numbers):
    """Of COCO's numbers the six AP, undefined ones missing."""
    return {name: np.nan if numbers[name] == UNDEFINED else numbers[name] for name in AP_METRICS}


@pytest.mark.parametrize("task", ["random_detection_task", "crowded_task"])
@pytest.mark.parametrize("seed", range(6))
def test_ap_from_matches_is_that_of_faster_coco_eval(request, task, seed):
    truth, detections = request.getfixturevalue(task)(seed)
    result = average_precision(match_detections(truth, detections))
    assert result == pytest.approx(six(coco_ap(truth, detections)), rel=0, abs=1e-9, nan_ok=True)
    assert 0 < result["AP"] < 1


def test_ap_from_matches_is_the_published_one(published):
    truth, detections, reference = published
    expected = pytest.approx(six(reference["expected"]), rel=0, abs=1e-9, nan_ok=True)
    assert average_precision(match_detections(truth, detections)) == expected


def test_ap_from_matches_at_the_ends(random_detection_task):
    truth, detections = random_detection_task(1)
    nothing = average_precision(match_detections(truth, []))
    assert nothing == six(coco_ap(truth, [])) and nothing["AP"] == 0
    without = match_detections(truth | {"annotations": []}, detections)
    assert np.isnan(list(average_precision(without).values())).all()
    assert bootstrap_ap(without, 3).isna().all(axis=None)
    with pytest.raises(DataError, match="not in the ground truth, such as 999"):
        match_detections(truth, [detections[0] | {"image_id": 999}])


@pytest.mark.parametrize("at_once", [1, 2**19])
def test_a_weight_is_a_number_of_copies(monkeypatch, at_once, random_detection_task):
    """The fast way against the literal one: repeat images with everything in them, and match anew."""
    monkeypatch.setattr("detrlib.metrics.bootstrap.NUMBERS_AT_ONCE", at_once)
    truth, detections = random_detection_task(4)
    ranked = RankedDetections(match_detections(truth, detections))
    weights = np.random.default_rng(0).integers(0, 4, (5, len(ranked.image_ids)))
    numbers = ranked.ap(weights, AP_METRICS)
    for row, counts in enumerate(weights):
        copies = {int(i): [int(i) + 1000 * n for n in range(c)] for i, c in zip(ranked.image_ids, counts, strict=True)}
        repeated = {
            name: [one | {key: new, "area": one.get("area")} for one in truth[name] for new in copies[one[key]]]
            for name, key in (("images", "id"), ("annotations", "image_id"))
        }
        found = [one | {"image_id": new} for one in detections for new in copies[one["image_id"]]]
        expected = six(coco_ap(truth | repeated, found))
        assert {name: numbers[name][row] for name in AP_METRICS} == pytest.approx(expected, nan_ok=True)


def test_the_bootstrap_draws_images(monkeypatch, random_detection_task):
    matches = match_detections(*random_detection_task(0))
    samples = bootstrap_ap(matches, 60, seed=1)
    assert list(samples.columns) == list(AP_METRICS) and len(samples) == 60
    pd.testing.assert_frame_equal(samples, bootstrap_ap(matches, 60, seed=1))
    assert not samples.equals(bootstrap_ap(matches, 60, seed=2))
    pd.testing.assert_frame_equal(samples[["AP75"]], bootstrap_ap(matches, 60, seed=1, metrics=["AP75"]))
    monkeypatch.setattr("detrlib.metrics.bootstrap.IMAGES_AT_ONCE", 240)  # a few samples at a time
    pd.testing.assert_frame_equal(samples, bootstrap_ap(matches, 60, seed=1))
    with pytest.raises(ConfigError, match="AR"):
        bootstrap_ap(matches, 3, metrics=["AR"])


def test_bootstrap_of_two_images_is_the_list_of_all_samples(random_detection_task):
    truth, detections = random_detection_task(0)
    truth = truth | {"images": truth["images"][1:3]}
    ids = [image["id"] for image in truth["images"]]
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] in ids]
    matches = match_detections(truth, [one for one in detections if one["image_id"] in ids])
    every = RankedDetections(matches).ap(np.array([[2, 0], [1, 1], [0, 2]]), ["AP"])["AP"]
    samples = bootstrap_ap(matches, 400)["AP"].to_numpy()
    shares = [np.isclose(samples, value).mean() for value in every]
    assert len(set(every.round(9))) == 3 and np.allclose(shares, [0.25, 0.5, 0.25], atol=0.08)


def test_the_basic_interval_mirrors_percentiles(random_detection_task):
    samples = pd.DataFrame({"a": np.linspace(0, 1, 1001), "b": np.linspace(2, 4, 1001)})
    ends = interval(pd.Series({"a": 0.4, "b": 3.0}), samples)
    assert ends["a"].tolist() == pytest.approx([0.8 - 0.975, 0.8 - 0.025])
    assert ends["b"].tolist() == pytest.approx([2.05, 3.95])
    table = ap_table(match_detections(*random_detection_task(0)), 200)
    assert list(table.index) == list(AP_METRICS) and (table["low"] < table["high"]).all()


def test_intervals_of_ap_stay_within_0_and_1(random_detection_task):
    """Of few images, most of them all right, the basic interval alone would pass 1."""
    ground_truth = random_detection_task(5)[0]
    perfect = [
        {name: row[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for row in ground_truth["annotations"][:-1]
    ]
    table = ap_table(match_detections(ground_truth, perfect), 100)
    assert table[["low", "high"]].stack().between(0, 1).all() and (table["high"] == 1).any()
