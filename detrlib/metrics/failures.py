"""What goes wrong, and the AP that is lost to it: every false positive and every missed object has one cause.

The causes and their shares are those of TIDE (Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object
Detection Errors", arXiv 2008.08115, sections 2.2 and 2.3), at an IoU of 0.5: the share of a cause is what AP50 would
gain if an oracle mended it and nothing else. Shares do not add up to what AP50 lacks, since mending one cause changes
what another costs. Unlike its authors' program, detections that COCO ignores have no cause, a class of which nothing is
left to be detected has no AP instead of zero, and a share below zero stays what it is.

Legend: D detections, G annotations, R resamples.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product
from os import PathLike
from typing import NamedTuple

import numpy as np
import pandas as pd

from detrlib.config.machine import cores
from detrlib.errors import ConfigError
from detrlib.metrics.bootstrap import LEVEL, RankedDetections, bootstrap_runs, interval
from detrlib.metrics.detection import AREAS, BOX, IOU_THRESHOLDS, Matches, count_objects, match_boxes, overlapping
from detrlib.metrics.statistics import NO_ROWS, exchanged, p_value, same_images, with_verdicts

CAUSES = {
    "class": "on an object, but its class is another",
    "place": "the right class near an object, but an IoU below 0.5",
    "both": "near an object of another class, at an IoU below 0.5",
    "duplicate": "on an object that a detection of higher score has",
    "background": "an IoU below 0.1 with every object",
    "miss": "an object that no detection has, and none misjudges in class or place",
}
# What all false positives cost, whatever their cause, and all objects that no detection has.
TOTALS = {
    "false positives": "every detection that has no object",
    "false negatives": "every object without a detection",
}
NEAR = 0.1  # IoU from which a detection is about an object
FEW = 5  # exchanges as extreme as what was seen: a p value of fewer is not known well
Task = tuple[tuple[str, str], str]  # two runs, and what is lost


class Failures(NamedTuple):
    """Every detection and every object with what became of it.

    detections: a row per detection that counts, by image, class and falling score: image_id, category_id, score, its
    box x, y, w, h, `cause` ("true", "ignored" or one of CAUSES), `annotation`, the row of the annotation that it has,
    duplicates or misjudges (-1: none), and `mends`: whether it would have that annotation if its cause was mended, as
    no detection has it and no other of higher score misjudges it.
    annotations: a row per annotation by image and class: image_id, category_id, x, y, w, h, area, iscrowd, a column per
    area range, and `fate`: "detected", "misjudged" (class or place), "missed", or "ignored".
    image_ids: of all images.
    """

    detections: pd.DataFrame
    annotations: pd.DataFrame
    image_ids: np.ndarray


def find_failures(ground_truth: Mapping | str | PathLike, detections: Sequence[Mapping] | pd.DataFrame) -> Failures:
    """Say of every detection that is not true, and of every object that is not detected, what went wrong.

    What is true and what is ignored is what `match_detections` says at an IoU of 0.5, so that the AP that shares are
    measured from is AP50.

    Args:
        ground_truth, detections: as of `coco_ap`; boxes are in pixels of the image file.

    Returns:
        Tables of detections and annotations, see `Failures`.

    Raises:
        DataError: a detection belongs to an image that the ground truth does not list.
    """
    detected, annotated, image_ids = match_boxes(ground_truth, detections)
    objects, half = annotated["all"].to_numpy() > 0, IOU_THRESHOLDS[0]
    d, g, iou = overlapping(detected, annotated, ("image_id",), NEAR)
    same = detected["category_id"].to_numpy()[d] == annotated["category_id"].to_numpy()[g]
    own, own_row = _best(d, g, iou, objects[g] & same, len(detected))
    other, other_row = _best(d, g, iou, objects[g] & ~same, len(detected))
    true, ignored = ((detected[f"{kind}_all"].to_numpy() & 1) > 0 for kind in ("true", "ignored"))
    # In the order of the paper's authors: what is near an object of its class is misplaced, whatever else it is on.
    cases = [true, ignored, (own >= NEAR) & (own < half), other >= half, own >= half, other >= NEAR]
    cause = np.select(cases, ["true", "ignored", "place", "class", "duplicate", "both"], "background")
    rows = [detected["annotation"], -1, own_row, other_row, own_row, other_row]
    annotation = np.select(cases, rows, -1)
    fate = np.where(objects, "missed", "ignored").astype("U10")
    could = np.isin(cause, ["class", "place"])
    fate[annotation[could]] = "misjudged"
    fate[annotation[true]] = "detected"
    could &= np.append(fate, "")[annotation] == "misjudged"  # without an annotation: ""
    first = np.flatnonzero(could)
    first = first[np.lexsort((-detected["score"].to_numpy()[first], annotation[first]))]
    mends = np.zeros(len(detected), bool)
    mends[first[np.unique(annotation[first], return_index=True)[1]]] = True
    columns = ["image_id", "category_id", "score", *BOX]
    found = detected[columns].assign(cause=cause, annotation=annotation, mends=mends)
    return Failures(found.astype({"cause": "category"}), annotated.assign(fate=fate), image_ids)


def _best(
    d: np.ndarray, g: np.ndarray, iou: np.ndarray, among: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """[D] the highest IoU of every detection among some of the pairs, 0 without, and [D] its annotation, -1 without."""
    best, row = np.zeros(count), np.full(count, -1)
    d, g, iou = d[among], g[among], iou[among]
    order = np.lexsort((-g, iou, d))  # of what is assigned to one place, the last counts
    best[d[order]], row[d[order]] = iou[order], g[order]
    return best, row


def worst_images(failures: Failures, cause: str) -> pd.DataFrame:
    """List the images behind a share.

    Args:
        failures: of one run.
        cause: one of CAUSES.

    Returns:
        A row per image that has such failures, image_id being the index, the worst first: failures, how many, and
        score, the highest of theirs: false positives cost the more the higher they score. Of missed objects it is 1.

    Raises:
        ConfigError: there is no such cause.
    """
    table = failures_of(failures, cause)
    table = table.assign(score=1.0) if cause == "miss" else table
    images = table.groupby("image_id")["score"].agg(["size", "max"]).set_axis(["failures", "score"], axis=1)
    return images.sort_values(["score", "failures"], ascending=False, kind="stable")


def failures_of(failures: Failures, cause: str) -> pd.DataFrame:
    """The detections that failed for a cause, or the annotations that were missed. Raises ConfigError for another."""
    if cause not in CAUSES:
        raise ConfigError(f"cause {cause!r} is none of {', '.join(CAUSES)}")
    if cause == "miss":
        return failures.annotations[failures.annotations["fate"] == "missed"]
    return failures.detections[failures.detections["cause"] == cause]


# The AP that is lost


def mended(failures: Failures) -> dict[str, Matches]:
    """What would be matched if a cause was mended, by cause and total, beside "AP50", where nothing is.

    A detection of the wrong class or place becomes true where it `mends`, and otherwise goes, as do those of the other
    causes; missed objects go from those to be detected.
    """
    table = failures.detections[failures.detections["cause"] != "ignored"]
    fates = failures.annotations[failures.annotations["fate"] != "ignored"]
    cause, true = table["cause"].to_numpy(), (table["cause"] == "true").to_numpy()
    results = {"AP50": _matches(failures, table, true, fates)}
    meant = np.append(failures.annotations["category_id"], -1)[table["annotation"]]
    for name in CAUSES:
        kept, mends = cause != name, table["mends"].to_numpy() & (cause == name)
        renamed = table.assign(category_id=np.where(mends, meant, table["category_id"]))
        left = fates[fates["fate"] != "missed"] if name == "miss" else fates
        results[name] = _matches(failures, renamed[kept | mends], (true | mends)[kept | mends], left)
    results["false positives"] = _matches(failures, table[true], true[true], fates)
    results["false negatives"] = _matches(failures, table, true, fates[fates["fate"] == "detected"])
    return results


def _matches(failures: Failures, table: pd.DataFrame, true: np.ndarray, objects: pd.DataFrame) -> Matches:
    """Matches that hold at an IoU of 0.5 for objects of all sizes."""
    flags = {f"true_{area}": true.astype(np.uint16) for area in AREAS}
    flags |= {f"ignored_{area}": np.zeros(len(table), np.uint16) for area in AREAS}
    objects = objects.assign(**dict.fromkeys(AREAS, 1))
    return Matches(
        table[["image_id", "category_id", "score"]].assign(**flags), count_objects(objects, failures.image_ids)
    )


def lost_ap(failures: Failures) -> pd.Series:
    """What AP50 loses to each cause and total, as a fraction; missing where there is nothing to be detected."""
    once = np.ones((1, len(failures.image_ids)), np.int32)
    ap = {name: RankedDetections(one).ap(once, ("AP50",))["AP50"] for name, one in mended(failures).items()}
    return _lost(pd.DataFrame(ap)).iloc[0].rename("lost")


def lost_samples(failures: Failures, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """`lost_ap` of samples of the images, drawn as by `bootstrap_ap`: rows are samples, columns causes and totals."""
    drawn = bootstrap_runs(mended(failures), resamples, seed, ("AP50",))
    return _lost(pd.DataFrame({name: one["AP50"] for name, one in drawn.items()}))


def _lost(ap: pd.DataFrame) -> pd.DataFrame:
    return ap.drop(columns="AP50").sub(ap["AP50"], axis=0)


def lost_table(failures: Failures, samples: pd.DataFrame | None = None) -> pd.DataFrame:
    """What is lost to each cause, with its 95 % interval over images.

    Args:
        failures: of one run.
        samples: as of `lost_samples`; None: they are drawn.

    Returns:
        A row per cause and total, named by the index: lost (AP50, a fraction), low, high, failures (how many
        detections, or objects) and images (with such).
    """
    lost = lost_ap(failures)
    ends = interval(lost, lost_samples(failures) if samples is None else samples)
    table = ends.T.assign(lost=lost)[["lost", "low", "high"]]
    wrong, fate = failures.detections["cause"], failures.annotations["fate"]
    parts = {cause: failures_of(failures, cause) for cause in CAUSES}
    parts["false positives"] = failures.detections[~wrong.isin(["true", "ignored"])]
    parts["false negatives"] = failures.annotations[fate.isin(["misjudged", "missed"])]
    table["failures"] = [len(parts[name]) for name in table.index]
    return table.assign(images=[parts[name]["image_id"].nunique() for name in table.index])


def compare_lost(
    runs: Mapping[str, Failures],
    causes: Sequence[str] = (*CAUSES,),
    pairs: Sequence[tuple[str, str]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    samples: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Compare what runs lose to each cause, on the same images; over seeds, `seeds.compare_groups` does.

    Intervals and p values are those of `statistics.compare`: images are resampled for both runs at once, and exchanged
    between them at random.

    Args:
        runs: failures by name.
        causes: some of CAUSES and TOTALS.
        pairs: names of the runs to compare, of which those that `runs` lacks are left out; None, or none: all.
        resamples, seed: of the bootstrap and the permutations. Where hardly any of these is as extreme as what was seen
            there are 40 for each row: with fewer, of many rows none could be established, whatever the difference.
        samples: by name, as of `lost_samples` with these `resamples` and `seed`, where they are drawn already.

    Returns:
        A row per cause and pair, as of `statistics.compare_runs`; p values are adjusted over all rows (Holm), since
        whoever looks for what differs looks at all causes.

    Raises:
        DataError: the images of two runs differ.
    """
    pairs = [tuple(pair) for pair in pairs or combinations(runs, 2) if set(pair) <= set(runs)]
    compared = {name: runs[name] for name in dict.fromkeys(name for pair in pairs for name in pair)}
    drawn = {name: (samples or {}).get(name) for name in compared}
    drawn |= {name: lost_samples(compared[name], resamples, seed) for name, own in drawn.items() if own is None}
    oracles, lost = ({name: make(one) for name, one in compared.items()} for make in (mended, lost_ap))
    for first, second in pairs:
        same_images(compared[first].image_ids, compared[second].image_ids)

    def draw(tasks: Collection[Task], count: int) -> dict[Task, np.ndarray]:
        def swapped(task: Task) -> np.ndarray:
            return exchanged(*(oracles[name][task[1]] for name in task[0]), "AP50", count, seed)

        with ThreadPoolExecutor(cores()) as pool:
            return dict(zip(tasks, pool.map(swapped, tasks), strict=True))

    def row(pair: tuple[str, str], cause: str) -> dict:
        (one, other), gap = (drawn[name][cause] for name in pair), lost[pair[0]][cause] - lost[pair[1]][cause]
        # The same images are exchanged each time, so that this is the difference of what is lost.
        p = p_value(gap, swaps[pair, cause] - swaps[pair, "AP50"])
        ends = {**interval(gap, one - other), "p": p, "images": len(compared[pair[0]].image_ids)}
        return {"first": pair[0], "second": pair[1], "metric": cause, "difference": gap} | ends

    swaps = draw(list(product(pairs, ("AP50", *causes))), resamples)
    rows = {(pair, cause): row(pair, cause) for cause in causes for pair in pairs}
    if (enough := round(2 / LEVEL) * len(rows)) > resamples:
        few = [task for task, told in rows.items() if told["p"] * resamples < FEW]
        swaps |= draw([*few, *dict.fromkeys((pair, "AP50") for pair, _ in few)], enough)
        rows |= {task: row(*task) for task in few}
    return with_verdicts(pd.DataFrame([*rows.values()]) if rows else NO_ROWS)
