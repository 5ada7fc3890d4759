"""Statistics of results: AP of any images from matches, what resampling says, and what seeds do."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from drawn import leaves_nothing_behind, texts  # noqa: F401
from scipy import stats
from test_detection import CASES, PUBLISHED, random_detection_task
from tiny import tiny_config

from detrlib import runs
from detrlib.config import save_config
from detrlib.engine.evaluate import save_results
from detrlib.errors import RunError
from detrlib.files import write_json
from detrlib.metrics import statistics
from detrlib.metrics.bootstrap import AP_METRICS, Curves, ap_table, average_precision, bootstrap_ap, interval
from detrlib.metrics.detection import Matches, coco_ap, match_detections
from detrlib.metrics.statistics import (
    compare,
    compare_groups,
    compare_runs,
    comparison_table,
    holm,
    seed_table,
)
from detrlib.runs import results as frames
from detrlib.runs.results import load_matches


def six(numbers):
    return {name: numbers[name] for name in AP_METRICS}


# --- AP from matches -------------------------------------------------------------------------------------------


def crowded_task(seed):
    """Equal scores, equal IoU, areas at the ends of ranges, more than 100 detections of one class in an image."""
    truth, detections = random_detection_task(seed)
    random = np.random.default_rng(seed)
    annotations = [one | {"image_id": 11, "category_id": 3} for one in truth["annotations"] if random.random() < 0.7]
    annotations += [one | {"area": float(random.choice([500, 1024, 9216]))} for one in annotations[:9]]  # twice
    moved = [
        one | {"bbox": np.clip(np.add(one["bbox"], random.normal(0, 2, 4)), 0, None).tolist()} for one in 6 * detections
    ]
    crowd = [one | {"image_id": 11, "category_id": 3, "score": round(random.random(), 2)} for one in moved]
    assert len(crowd) > 150
    detections = [one | {"score": round(one["score"], 1)} for one in detections]
    return truth | {"annotations": truth["annotations"] + annotations}, crowd + detections


@pytest.mark.parametrize("task", [random_detection_task, crowded_task])
@pytest.mark.parametrize("seed", range(6))
def test_ap_from_matches_is_that_of_faster_coco_eval(task, seed):
    truth, detections = task(seed)
    result = average_precision(match_detections(truth, detections))
    assert result == pytest.approx(six(coco_ap(truth, detections)), rel=0, abs=1e-9)
    assert 0 < result["AP"] < 1


@pytest.mark.parametrize(("case", "truth", "detections", "lowest_score"), PUBLISHED)
def test_ap_from_matches_is_the_published_one(case, truth, detections, lowest_score):
    folder = CASES / case
    if not folder.is_dir():
        pytest.skip(f"published evaluation cases are not at {CASES}")
    reference = json.loads((folder / "expected.json").read_text())
    kept = [one for one in json.loads((folder / detections).read_text()) if one["score"] >= lowest_score]
    expected = six(reference["expected"])
    assert average_precision(match_detections(folder / truth, kept)) == pytest.approx(expected, rel=0, abs=1e-9)


def test_ap_from_matches_at_the_ends():
    truth, detections = random_detection_task(1)
    nothing = average_precision(match_detections(truth, []))
    assert nothing == six(coco_ap(truth, [])) and nothing["AP"] == 0
    without = match_detections(truth | {"annotations": []}, detections)
    assert set(average_precision(without).values()) == {-1}
    assert bootstrap_ap(without, 3).isna().all(axis=None)
    with pytest.raises(ValueError, match="not in the ground truth, such as 999"):
        match_detections(truth, [detections[0] | {"image_id": 999}])


def test_matching_in_small_parts_changes_nothing(monkeypatch):
    task = crowded_task(0)
    whole = match_detections(*task)
    monkeypatch.setattr("detrlib.metrics.detection.PAIRS_AT_ONCE", 7)
    for part, expected in zip(match_detections(*task), whole, strict=True):
        pd.testing.assert_frame_equal(part, expected)


def test_matches_list_every_image_and_compute_ap_of_any_of_them():
    truth, detections = random_detection_task(3)
    matches = match_detections(truth, detections)
    ids = [image["id"] for image in truth["images"]]
    assert sorted(set(matches.annotations["image_id"])) == ids
    some = ids[::2]
    subset = Matches(*(table[table["image_id"].isin(some)] for table in matches))
    kept = {
        "images": [image for image in truth["images"] if image["id"] in some],
        "annotations": [one for one in truth["annotations"] if one["image_id"] in some],
    }
    expected = coco_ap(truth | kept, [one for one in detections if one["image_id"] in some])
    assert average_precision(subset) == pytest.approx(six(expected), rel=0, abs=1e-9)


@pytest.mark.parametrize("at_once", [1, 2**19])
def test_a_weight_is_a_number_of_copies(monkeypatch, at_once):
    """The fast way against the literal one: repeat images with everything in them, and match anew."""
    monkeypatch.setattr("detrlib.metrics.bootstrap.NUMBERS_AT_ONCE", at_once)
    truth, detections = random_detection_task(4)
    curves = Curves(match_detections(truth, detections))
    weights = np.random.default_rng(0).integers(0, 4, (5, len(curves.image_ids)))
    numbers = curves.ap(weights, AP_METRICS)
    for row, counts in enumerate(weights):
        copies = {int(i): [int(i) + 1000 * n for n in range(c)] for i, c in zip(curves.image_ids, counts, strict=True)}
        repeated = {
            name: [one | {key: new, "area": one.get("area")} for one in truth[name] for new in copies[one[key]]]
            for name, key in (("images", "id"), ("annotations", "image_id"))
        }
        found = [one | {"image_id": new} for one in detections for new in copies[one["image_id"]]]
        expected = six(coco_ap(truth | repeated, found))
        assert {name: np.nan_to_num(numbers[name][row], nan=-1) for name in AP_METRICS} == pytest.approx(expected)


# --- resampling ------------------------------------------------------------------------------------------------


def worse(detections, share, seed=0):
    """Boxes moved aside in a share of the detections."""
    random = np.random.default_rng(seed)
    return [
        one | {"bbox": [one["bbox"][0] + 0.3 * one["bbox"][2], *one["bbox"][1:]]} if random.random() < share else one
        for one in detections
    ]


def test_the_bootstrap_draws_images(monkeypatch):
    matches = match_detections(*random_detection_task(0))
    samples = bootstrap_ap(matches, 60, seed=1)
    assert list(samples.columns) == list(AP_METRICS) and len(samples) == 60
    pd.testing.assert_frame_equal(samples, bootstrap_ap(matches, 60, seed=1))
    assert not samples.equals(bootstrap_ap(matches, 60, seed=2))
    pd.testing.assert_frame_equal(samples[["AP75"]], bootstrap_ap(matches, 60, seed=1, metrics=["AP75"]))
    monkeypatch.setattr("detrlib.metrics.statistics.IMAGES_AT_ONCE", 240)  # a few samples at a time
    pd.testing.assert_frame_equal(samples, bootstrap_ap(matches, 60, seed=1))
    with pytest.raises(ValueError, match="'AR' is none of AP, AP50"):
        bootstrap_ap(matches, 3, metrics=["AR"])


def test_bootstrap_of_two_images_is_the_list_of_all_samples():
    truth, detections = random_detection_task(0)
    truth = truth | {"images": truth["images"][1:3]}
    ids = [image["id"] for image in truth["images"]]
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] in ids]
    matches = match_detections(truth, [one for one in detections if one["image_id"] in ids])
    every = Curves(matches).ap(np.array([[2, 0], [1, 1], [0, 2]]), ["AP"])["AP"]
    samples = bootstrap_ap(matches, 400)["AP"].to_numpy()
    shares = [np.isclose(samples, value).mean() for value in every]
    assert len(set(every.round(9))) == 3 and np.allclose(shares, [0.25, 0.5, 0.25], atol=0.08)


def test_the_basic_interval_mirrors_percentiles():
    samples = pd.DataFrame({"a": np.linspace(0, 1, 1001), "b": np.linspace(2, 4, 1001)})
    ends = interval(pd.Series({"a": 0.4, "b": 3.0}), samples)
    assert ends["a"].tolist() == pytest.approx([0.8 - 0.975, 0.8 - 0.025])
    assert ends["b"].tolist() == pytest.approx([2.05, 3.95])
    table = ap_table(match_detections(*random_detection_task(0)), 200)
    assert list(table.index) == list(AP_METRICS) and (table["low"] < table["high"]).all()


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says(monkeypatch):
    monkeypatch.setitem(statistics.MEAN_SAMPLING, "n_resamples", 400)
    random, covered = np.random.default_rng(0), 0
    for number in range(60):
        values = pd.Series(random.normal(1, 1, 60))
        result = compare(values, 0 * values, seed=number)
        covered += result["low"] <= 1 <= result["high"]
    assert 51 <= covered <= 60  # 57 expected


# --- two runs --------------------------------------------------------------------------------------------------


def test_comparing_a_run_with_itself_and_with_a_worse_one():
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


def test_exchanging_images_is_evaluating_exchanged_results():
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


def test_runs_on_other_images_are_not_compared():
    values = pd.Series([0.1, 0.2, 0.3], index=[1, 2, 3])
    with pytest.raises(ValueError, match="1 images are in one run only, such as 3; evaluate both runs on the same"):
        compare(values, values.replace(0.3, np.nan))
    with pytest.raises(ValueError, match="defined for 1 images"):
        compare(values[:1], values[:1])
    with pytest.raises(ValueError, match=r"no column 'zeros'; there are \['gini'\]"):
        compare(values.to_frame("gini"), values.to_frame("gini"), "zeros")
    truth, detections = random_detection_task(0)
    fewer = match_detections(truth | {"annotations": truth["annotations"][1:]}, detections)
    with pytest.raises(ValueError, match="the annotations of the runs differ"):
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


def test_several_runs_are_judged_together():
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


# --- several seeds ---------------------------------------------------------------------------------------------


def seeds(**groups):
    """A row per run from {group: AP of its seeds 1, 2, ...}."""
    rows = [(group, seed, ap) for group, values in groups.items() for seed, ap in enumerate(values, 1)]
    return pd.DataFrame(rows, columns=["group", "seed", "AP"])


def test_seed_table():
    table = seed_table(seeds(a=[0.3, 0.5, -1], b=[0.4]).assign(gini=1.0), ["AP", "gini"])
    rows = table.set_index(["group", "metric"])
    assert rows.loc["a", "AP"].tolist() == pytest.approx([0.4, np.std([0.3, 0.5], ddof=1), 0.3, 0.5, 2])
    assert rows.loc["b", "AP"].isna().tolist() == [False, True, False, False, False]
    assert rows.loc["a", "gini"]["n"] == 3
    with pytest.raises(ValueError, match="group a has several runs of seed 1"):
        seed_table(pd.concat([seeds(a=[0.3]), seeds(a=[0.4])]), ["AP"])
    with pytest.raises(ValueError, match=r"no columns \['AR'\]"):
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
    with pytest.raises(ValueError, match="no group z; there are a, b, c"):
        compare_groups(table, ["AP"], [("a", "z")])


def test_one_good_seed_establishes_a_model_but_no_method():
    truth, detections = random_detection_task(2)
    lists = {name: worse(detections, share) for name, share in (("a", 0), ("b", 0.8))}
    models = compare_runs({name: match_detections(truth, found) for name, found in lists.items()}, resamples=100)
    ap = {name: coco_ap(truth, found)["AP"] for name, found in lists.items()}
    methods = compare_groups(seeds(a=[ap["a"], ap["b"]], b=[ap["b"], ap["a"]]), ["AP"])
    assert models["verdict"].tolist() == ["established"] and methods["verdict"].tolist() == ["not established"]


# --- run folders -----------------------------------------------------------------------------------------------


def test_evaluation_stores_matches(tmp_path):
    truth, detections = random_detection_task(0)
    save_results(tmp_path, {"detection": coco_ap(truth, detections)}, detections, truth)
    stored, made = load_matches(tmp_path), match_detections(truth, detections)
    for back, before in zip(stored, made, strict=True):
        pd.testing.assert_frame_equal(back, before)
    assert average_precision(stored) == pytest.approx(six(runs.load_results(tmp_path)["detection"]))
    (tmp_path / "measures" / "matches.parquet").write_bytes(b"cut short")
    with pytest.raises(RunError, match=r"matches\.parquet is not readable .* delete it, then: python -m detrlib"):
        load_matches(tmp_path)
    with pytest.raises(RunError, match=r"no .*/matches\.parquet; measure the run \(again\): python -m detrlib"):
        load_matches(tmp_path / "other")


def test_groups_are_names_without_the_seed():
    labels = [
        "study/softmax-seed1",
        "softmax_seed12",
        "softmax-seed1/test2017",
        "seed3",
        "softmax-seed1-long",
        "softmax-seeds",
    ]
    groups = ["study/softmax", "softmax", "softmax/test2017", "seed3", "softmax-seed1-long", "softmax-seeds"]
    assert [frames.group_of(label) for label in labels] == groups


def test_results_frame(tmp_path):
    for number in (1, 2):
        folder = tmp_path / f"sparse-seed{number}"
        folder.mkdir()
        save_config(
            tiny_config({"train.seed": number, "model.attention.decoder_cross": "sparsemax"}), folder / "config.yaml"
        )
        located = {"all": {"pairs": 4, "paibb": {"mean": [0.1, 0.5]}}}
        results = {"detection": {"AP": 0.1 * number, "per_class": {}}, "images": 13, "localisation": located}
        write_json(folder / "results.json", results | {"attention": {"decoder_cross": {"gini": [0.2, 0.4]}}})
    frame = frames.results_frame(sorted(tmp_path.iterdir()))
    assert frame["group"].tolist() == ["sparse", "sparse"] and frame["seed"].tolist() == [1, 2]
    row = frame.iloc[1].to_dict()
    expected = {"run": "sparse-seed2", "AP": 0.2, "decoder_cross": "sparsemax", "decoder_self": "softmax", "images": 13}
    assert {name: row[name] for name in expected} == expected
    assert row["decoder_cross/gini"] == pytest.approx(0.3) and row["paibb/all"] == 0.5
    assert seed_table(frame, ["AP"])["n"].tolist() == [2]
