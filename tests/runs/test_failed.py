"""What went wrong in saved runs, from their predictions and the annotation file of their data."""

import json
import logging
import shutil

import pytest

from detrlib.errors import DamagedFile, RunError
from detrlib.experiments.predictions import evaluate_predictions
from detrlib.metrics.curves import ALL
from detrlib.metrics.failures import CAUSES, TOTALS, find_failures, lost_ap
from detrlib.runs.failed import curves_frame, failed_runs, lost_frame, objects_frame, open_failures


@pytest.fixture
def evaluated(tmp_path, write_layout):
    """The run of detections in a small folder: each object's box with another class, and with its own."""
    write_layout(tmp_path / "data", "coco", train=2, val=3)
    path = next((tmp_path / "data" / "annotations").glob("*val2017.json"))
    truth = json.loads(path.read_text())
    ids = [category["id"] for category in truth["categories"]]
    found = []
    for one in truth["annotations"]:
        other = ids[(ids.index(one["category_id"]) + 1) % len(ids)]
        found += [
            {"image_id": one["image_id"], "category_id": category, "bbox": one["bbox"], "score": score}
            for category, score in ((other, 0.9), (one["category_id"], 0.6))
        ]
    (tmp_path / "found.json").write_text(json.dumps(found))
    evaluate_predictions(tmp_path / "mine", tmp_path / "found.json", tmp_path / "data")
    return tmp_path / "mine", truth, found


def test_a_run_is_opened_again(evaluated):
    run_dir, truth, found = evaluated
    run = open_failures(run_dir)
    expected = lost_ap(find_failures(truth, found))
    assert lost_ap(run.failures).to_dict() == pytest.approx(expected.to_dict(), nan_ok=True)
    assert expected["class"] > 0
    assert run.categories == {category["id"]: category["name"] for category in truth["categories"]}
    image = truth["images"][0]
    assert run.image(image["id"]).shape == (image["height"], image["width"], 3)
    curves = curves_frame([run_dir], failed_runs([run_dir]))
    assert set(curves["run"]) == {"mine"} and set(curves["class"]) - {ALL} <= set(run.categories.values())
    (run_dir / "measures" / "matches.parquet").unlink()  # as of evaluations that stored none
    assert curves_frame([run_dir], failed_runs([run_dir])).equals(curves)
    objects = objects_frame(failed_runs([run_dir]))
    assert (
        objects["area"].tolist() == [one["bbox"][2] * one["bbox"][3] for one in truth["annotations"]]
        and not objects["crowd"].any()
    )
    assert objects["category"].tolist() == [run.categories[one["category_id"]] for one in truth["annotations"]]
    frame = lost_frame([run_dir], failed_runs([run_dir]))
    assert frame["run"].tolist() == ["mine"] and set(frame.columns) == {"run", "group", "seed", *CAUSES, *TOTALS}


def test_runs_without_their_data_are_left_out(evaluated, caplog):
    run_dir = evaluated[0]
    shutil.rmtree(run_dir.parent / "data")
    with caplog.at_level(logging.WARNING):
        assert failed_runs([run_dir]) == {} and f"data that have moved, in {run_dir / 'config.yaml'}" in caplog.text
    assert lost_frame([run_dir], {}).empty and objects_frame({}).empty and curves_frame([run_dir], {}).empty


def test_missing_and_damaged_predictions_are_named(evaluated):
    path = evaluated[0] / "predictions.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(DamagedFile, match=r"predictions\.json"):
        open_failures(evaluated[0])
    path.unlink()
    assert failed_runs([evaluated[0]]) == {}
    with pytest.raises(RunError, match=r"predictions\.json"):
        open_failures(evaluated[0])
