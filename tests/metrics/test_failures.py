"""What went wrong, against the definitions of TIDE written out one detection at a time, and oracles that mend files."""

import copy

import numpy as np
import pandas as pd
import pytest

from detrlib.errors import ConfigError, DataError
from detrlib.metrics.bootstrap import RankedDetections, bootstrap_ap
from detrlib.metrics.coco_format import coco_detections, coco_entries
from detrlib.metrics.detection import coco_ap, match_detections
from detrlib.metrics.failures import (
    CAUSES,
    TOTALS,
    compare_lost,
    find_failures,
    lost_ap,
    lost_samples,
    lost_table,
    mended,
    worst_images,
)
from detrlib.metrics.seeds import compare_groups
from detrlib.metrics.statistics import holm

SHARES = [*CAUSES, *TOTALS]


@pytest.fixture
def confused_task(random_detection_task):
    """Detections that fail in every way, also beside crowds, of which some objects have none."""

    def make(seed):
        truth, detections = random_detection_task(seed)
        random = np.random.default_rng(seed)
        more = []
        for one in truth["annotations"] * 2:
            x, y, w, h = one["bbox"]
            beside = [x + random.uniform(-0.7, 0.7) * w, y, w * random.uniform(0.8, 1.2), h]
            more.append((one["image_id"], beside, int(random.choice([one["category_id"], 3, 4, 9, 11]))))
        more += [(11, [380, 380, 15, 15], 3), (10, [5, 5, 40, 40], 9)]
        more = [
            {"image_id": image, "category_id": category, "bbox": box, "score": float(random.uniform(0, 0.8))}
            for image, box, category in more
        ]
        return truth, [one for one in detections + more if one["image_id"] not in (15, 16)]

    return make


def overlap(a, b):
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    inside = max(sides[0], 0) * max(sides[1], 0)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def causes_by_hand(truth, detections):
    """Causes of detections (None: true or ignored), what they are aimed at, and the fates of objects; by loops."""
    matched = match_detections(truth, detections).detections.set_index(["image_id", "category_id", "score"])
    objects = [one for one in truth["annotations"] if not one["iscrowd"]]
    order = sorted(range(len(detections)), key=lambda number: -detections[number]["score"])
    holders, causes, aims = {}, {}, {}
    for number in order:
        one = detections[number]
        near = [(overlap(one["bbox"], other["bbox"]), other) for other in objects if beside(one, other)]
        row = matched.loc[(one["image_id"], one["category_id"], one["score"])]
        own = [(iou, other) for iou, other in near if other["category_id"] == one["category_id"]]
        if row["true_all"] & 1:
            free = [pair for pair in own if pair[1]["id"] not in holders]
            holders[max(free, key=lambda pair: pair[0])[1]["id"]] = number
        elif not row["ignored_all"] & 1:
            others = [pair for pair in near if pair not in own]
            best, best_other = (max(pairs, key=lambda p: p[0], default=(0, None)) for pairs in (own, others))
            if 0.1 <= best[0] < 0.5:
                causes[number], aims[number] = "place", best[1]
            elif best_other[0] >= 0.5:
                causes[number], aims[number] = "class", best_other[1]
            elif best[0] >= 0.5:
                causes[number] = "duplicate"
            else:
                causes[number] = "both" if best_other[0] >= 0.1 else "background"
    fixes = {}
    for number in order:
        if number in aims and aims[number]["id"] not in holders:
            fixes.setdefault(aims[number]["id"], number)
    missed = [one["id"] for one in objects if one["id"] not in holders and one["id"] not in fixes]
    return causes, {number: aims[number] for number in fixes.values()}, holders, missed


def beside(one, other):
    return one["image_id"] == other["image_id"]


def lost_by_hand(truth, detections):
    """What an evaluator says of files in which one cause has been mended."""
    causes, fixes, holders, missed = causes_by_hand(truth, detections)
    files = {}
    for cause in CAUSES:
        kept = []
        for number, one in enumerate(detections):
            if causes.get(number) != cause:
                kept.append(one)
            elif number in fixes:
                kept.append(one | {key: fixes[number][key] for key in ("bbox", "category_id")})
        files[cause] = truth, kept
    objects = truth["annotations"]
    files["miss"] = truth | {"annotations": [one for one in objects if one["id"] not in missed]}, detections
    files["false positives"] = truth, [one for number, one in enumerate(detections) if number not in causes]
    held = [one for one in objects if one["id"] in holders or one["iscrowd"]]
    files["false negatives"] = truth | {"annotations": held}, detections
    whole = coco_ap(truth, detections)["AP50"]
    return {name: coco_ap(*file)["AP50"] - whole for name, file in files.items()}


@pytest.mark.parametrize("seed", range(4))
def test_causes_and_shares_are_those_of_oracles(seed, confused_task):
    truth, detections = confused_task(seed)
    given = copy.deepcopy((truth, detections))
    failures = find_failures(truth, detections)
    assert (truth, detections) == given
    causes, fixes, _, missed = causes_by_hand(truth, detections)
    by_score = failures.detections.set_index("score")
    assert by_score[~by_score["cause"].isin(["true", "ignored"])]["cause"].to_dict() == {
        detections[number]["score"]: cause for number, cause in causes.items()
    }
    assert set(causes.values()) == set(CAUSES) - {"miss"} and missed and fixes
    assert set(by_score.index[by_score["mends"]]) == {detections[number]["score"] for number in fixes}
    assert (failures.annotations["fate"] == "missed").sum() == len(missed)
    expected = lost_by_hand(truth, detections)
    assert list(expected) == SHARES
    assert lost_ap(failures).to_dict() == pytest.approx(expected, abs=1e-9)


def test_nothing_mended_is_ap50_of_published_cases(published):
    truth, detections, reference = published
    one = mended(find_failures(truth, detections))["AP50"]
    weights = np.ones((1, one.annotations["image_id"].nunique()), np.int32)
    assert RankedDetections(one).ap(weights, ("AP50",))["AP50"] == pytest.approx(
        reference["expected"]["AP50"], abs=1e-9
    )


def test_numbers_of_the_authors_program(shared_data):
    """tidecv 1.0.1, with the mean over classes that have objects; its grid of recalls is off by up to 0.0002 of AP."""
    folder = shared_data / "coco_eval_cases" / "cocoapi_val2014_100"
    detections = pd.read_json(folder / "instances_val2014_fakebbox100_results.json").to_dict("records")
    failures = find_failures(folder / "instances_val2014_100.json", detections)
    counts = {"class": 83, "place": 1, "both": 0, "duplicate": 1, "background": 0, "miss": 97}
    shares = {"class": 0.16743, "place": 0.00247, "both": 0, "duplicate": 0.00021, "background": 0, "miss": 0.10507}
    totals = {"false positives": 0.07406, "false negatives": 0.20612}
    table = lost_table(failures, lost_samples(failures, 5))
    assert table["failures"][list(CAUSES)].to_dict() == counts
    assert table["lost"].to_dict() == pytest.approx(shares | totals, abs=2e-4)


def test_one_of_each_cause():
    """Two objects side by side: four true statements about each can be made by eye."""
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "area": 10000, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [200, 0, 100, 100], "area": 10000, "iscrowd": 0},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0},
    ]
    categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    truth = {"images": [{"id": 1}, {"id": 2}], "categories": categories, "annotations": annotations}
    boxes = [[0, 0, 100, 100], [5, 0, 105, 100], [60, 0, 160, 100], [200, 0, 300, 100], [260, 0, 360, 100]]
    boxes += [[500, 500, 600, 600]]
    found = coco_entries(coco_detections(1, boxes, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1] * 6))
    failures = find_failures(truth, found)
    assert failures.detections["cause"].tolist() == ["true", "duplicate", "place", "class", "both", "background"]
    assert failures.detections["annotation"].tolist() == [0, 0, 0, 1, 1, -1]
    assert failures.detections["mends"].tolist() == [False, False, False, True, False, False]
    assert failures.annotations["fate"].tolist() == ["detected", "misjudged", "missed"]
    # Half of the ants found (51 of 101 recall levels), no bee; the class mended finds the only bee, and so on.
    lost = lost_ap(failures)
    assert lost["class"] == pytest.approx((51 / 101 + 1) / 2 - 51 / 202)
    assert lost["miss"] == pytest.approx((1 + 0) / 2 - 51 / 202)
    assert (lost[["place", "duplicate", "both", "background"]] == 0).all()
    assert worst_images(failures, "miss").to_dict("index") == {2: {"failures": 1, "score": 1.0}}
    assert worst_images(failures, "place").to_dict("index") == {1: {"failures": 1, "score": pytest.approx(0.7)}}
    assert worst_images(failures, "both").index.tolist() == [1]
    with pytest.raises(ConfigError, match="posture"):
        worst_images(failures, "posture")


def test_ends(random_detection_task):
    truth, detections = random_detection_task(1)
    nothing = find_failures(truth, [])
    expected = dict.fromkeys(SHARES, 0.0) | {"miss": np.nan, "false negatives": np.nan}  # nothing left to detect
    assert lost_ap(nothing).to_dict() == pytest.approx(expected, nan_ok=True)
    bare = find_failures(truth | {"annotations": []}, detections)
    assert set(bare.detections["cause"]) == {"background"} and lost_ap(bare).isna().all()
    with pytest.raises(DataError, match="999"):
        find_failures(truth, [detections[0] | {"image_id": 999}])


def test_samples_are_of_the_images_that_ap_is_resampled_with(confused_task):
    truth, detections = confused_task(3)
    failures = find_failures(truth, detections)
    samples = lost_samples(failures, 40, seed=5)
    ap = bootstrap_ap(match_detections(truth, detections), 40, 5, ("AP50",))["AP50"]
    gone = bootstrap_ap(mended(failures)["background"], 40, 5, ("AP50",))["AP50"]
    assert samples["background"].to_numpy() == pytest.approx((gone - ap).to_numpy(), nan_ok=True)
    table = lost_table(failures, samples)
    assert list(table.index) == SHARES and (table["low"] <= table["high"]).all()
    wrong = ~failures.detections["cause"].isin(["true", "ignored"])
    assert table["failures"]["false positives"] == wrong.sum() == table["failures"][list(CAUSES)[:-1]].sum()
    assert table["images"]["background"] == len(worst_images(failures, "background"))


def test_lists_with_other_objects_to_detect_are_weighed_apart(confused_task):
    """Some images as one run has left them, the others as another has, missed objects taken away in both."""
    truth, detections = confused_task(2)
    runs = [find_failures(truth, own) for own in (detections, detections[::2])]
    one, other = (mended(run)["miss"] for run in runs)
    ids = np.unique(one.annotations["image_id"])
    chosen = np.random.default_rng(0).integers(0, 2, len(ids), dtype=np.int32)
    mixed = RankedDetections(one, other).ap(np.hstack([chosen, 1 - chosen])[None], ("AP50",))["AP50"]
    merged = [
        pd.concat([a[a["image_id"].isin(ids[chosen > 0])], b[b["image_id"].isin(ids[chosen == 0])]])
        for a, b in zip(one, other, strict=True)
    ]
    expected = RankedDetections(type(one)(*merged)).ap(np.ones((1, len(ids)), np.int32), ("AP50",))["AP50"]
    assert mixed == pytest.approx(expected)


def test_differences_between_runs(random_detection_task, worse):
    truth, detections = random_detection_task(4)
    runs = {"good": detections, "same": detections, "moved": worse(worse(detections, 1.0), 1.0)}
    runs = {name: find_failures(truth, own) for name, own in runs.items()}
    rows = compare_lost(runs, ["place", "miss"], resamples=200)
    same = rows[(rows["first"] == "good") & (rows["second"] == "same")]
    assert (same[["difference", "low", "high"]] == 0).all(axis=None) and (same["p"] == 1).all()
    moved = rows.query("first == 'good' and second == 'moved' and metric == 'place'").iloc[0]
    assert moved["difference"] == pytest.approx(lost_ap(runs["good"])["place"] - lost_ap(runs["moved"])["place"])
    assert moved["high"] < 0 and moved["verdict"] == "established" and moved["images"] == 12
    assert rows["p_adjusted"].tolist() == pytest.approx(holm(rows["p"]))  # over both causes and all pairs
    assert compare_lost({"good": runs["good"]}).empty
    assert compare_lost({"good": runs["good"]}, pairs=[("good", "lacking")]).empty
    fewer = find_failures(truth | {"images": truth["images"][:-1]}, [one for one in detections if one["image_id"] < 21])
    with pytest.raises(DataError, match="evaluate both runs on the same images"):
        compare_lost({"good": runs["good"], "fewer": fewer}, resamples=5)


def test_what_is_certain_is_established_among_many_comparisons(random_detection_task, worse):
    """A p value cannot be below 1 / (1 + permutations), and Holm multiplies it by the number of rows."""
    truth, detections = random_detection_task(4)
    runs = {"good": detections, "again": detections, "moved": worse(worse(detections, 1.0), 1.0)}
    runs = {name: find_failures(truth, own) for name, own in runs.items()}
    rows = compare_lost(runs, ["place", "miss", "both"], resamples=20)
    assert len(rows) == 9
    assert rows.query("metric == 'place' and second == 'moved'")["verdict"].tolist() == ["established", "established"]


def test_shares_are_compared_over_seeds_too(confused_task):
    task = confused_task(6)
    failures = {f"r{part}": find_failures(task[0], task[1][part::3]) for part in range(3)}
    frame = pd.DataFrame({run: lost_ap(one) for run, one in failures.items()}).T.rename_axis("run").reset_index()
    frame = frame.assign(group=["a", "a", "b"], seed=[0, 1, 0])
    rows = compare_groups(frame, ["class"], samples={run: lost_samples(one, 20) for run, one in failures.items()})
    assert rows["difference"].item() == pytest.approx(frame["class"][:2].mean() - frame["class"][2])
