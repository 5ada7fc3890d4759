"""Runs explained: what is measured and remembered, and the pictures of explained detections."""

import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from detrlib.config import load_config
from detrlib.data import build_dataset
from detrlib.engine.launch import launch
from detrlib.engine.predict import open_detector, predict
from detrlib.errors import ConfigError, RunError
from detrlib.experiments import explain as module
from detrlib.experiments.attribution import METHODS, ON_REQUEST
from detrlib.experiments.explain import (
    explain_detected,
    explained_detections,
    explained_each,
    faithfulness_run,
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    launch(tiny_config({"train.epochs": 1}), folder, gpus=0)
    return folder


def test_a_run_is_measured_and_remembers_how(run_dir):
    settings = {"images": 3, "steps": 3, "min_score": 0.0}
    frame = faithfulness_run(run_dir, methods=["raw", "relevance", "drise"], masks=5, **settings)
    pd.testing.assert_frame_equal(pd.read_parquet(run_dir / "measures" / "faithfulness.parquet"), frame)
    detections = frame[["image_id", "query"]].drop_duplicates()
    assert len(frame) == 3 * len(detections) and frame["image_id"].nunique() == 3
    assert set(frame["size"]) <= {"small", "medium", "large"} and frame["category"].notna().all()
    curves = pd.read_parquet(run_dir / "measures" / "faithfulness_curves.parquet")
    assert len(curves) == 3 * 2 * 3 * 4
    known = json.loads((run_dir / "measures" / "faithfulness.json").read_text())
    assert known["passes"] == 3 * 2 + len(frame) * 2 * 2 and known["detections"] == len(detections)
    assert known["masks"] == 5 and known["passes_to_explain"]["drise"] == {"forward": 15, "backward": 0}
    again = faithfulness_run(run_dir, methods=["drise"], masks=5, batch_size=3, **settings)
    before = frame[frame["method"] == "drise"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, before, rtol=1e-4, atol=1e-5)
    faithfulness_run(run_dir, methods=["raw", "relevance", "drise"], masks=5, **settings)
    # The mean curve of a method has the area that its detections have on average, image by image.
    for method, own in frame.groupby("method"):
        chosen = (curves["method"] == method) & (curves["direction"] == "deletion") & (curves["measure"] == "score")
        area = np.trapezoid(curves[chosen]["mean"], curves[chosen]["fraction"])
        assert area == pytest.approx(own.groupby("image_id")["deletion_score"].mean().mean(), abs=1e-6)


def test_all_queries_are_explained_as_their_best_class(run_dir):
    frame = faithfulness_run(run_dir, 1, ["box"], 2, min_score=0.0, matched=False)
    assert sorted(frame["query"]) == list(range(10))


def test_runs_that_cannot_be_measured_are_refused(run_dir, tmp_path):
    with pytest.raises(RunError, match=r"tiny: .*min_score"):
        faithfulness_run(run_dir, 2, min_score=1.1)
    with pytest.raises(ConfigError, match="steps"):
        faithfulness_run(run_dir, 2, steps=1)
    with pytest.raises(ConfigError, match="0 masks"):
        faithfulness_run(run_dir, 2, masks=0)
    with pytest.raises(RunError, match=r"none.*config\.yaml"):
        faithfulness_run(tmp_path / "none")


def test_a_run_that_finds_nothing_may_have_an_empty_table(run_dir, caplog):
    before = (run_dir / "measures" / "faithfulness.parquet").read_bytes()
    with caplog.at_level(logging.WARNING):
        frame = faithfulness_run(run_dir, 2, min_score=1.1, allow_empty=True)
    assert frame.empty and "tiny" in caplog.text and "--min-score" in caplog.text
    assert (run_dir / "measures" / "faithfulness.parquet").read_bytes() == before


# Pictures of explained detections


@pytest.fixture
def finding(run_dir, monkeypatch):
    """The run, as if all that it finds were good enough for an example."""
    monkeypatch.setattr(module, "EXAMPLE_SCORE", 0.0)
    return run_dir


def test_the_best_detections_of_a_validation_image_are_explained_as_predictions_are(finding):
    dataset, detector = build_dataset(load_config(finding / "config.yaml").data, "val"), open_detector(str(finding))
    detected = explained_detections(finding, image=3, most=2)
    (predicted,) = predict(detector, dataset.image(3), min_score=0, attention=True, progress=False)
    np.testing.assert_allclose(detected.boxes, predicted.boxes, rtol=1e-5)
    assert detected.names == predicted.names and detected.image_id == dataset.image_ids[3]
    assert tuple(detected.explanations) == tuple(name for name in METHODS if name not in ON_REQUEST)
    assert {len(maps) for maps in detected.explanations.values()} == {2}
    raw = predicted.example.maps(layer=-1).mean(0)[:2]
    np.testing.assert_allclose(detected.explanations["raw"], raw, rtol=1e-4, atol=1e-6)


def test_images_without_detections_are_passed_over_until_none_is_left(finding, monkeypatch):
    tried, predict_each = [], module.predict_each

    def nothing_before_the_third(detectors, pictures, **options):
        tried.extend(picture.image_id for picture in pictures)
        yield from predict_each(detectors, pictures, **options | {"min_score": 0.0 if len(tried) == 3 else 1.0})

    monkeypatch.setattr(module, "predict_each", nothing_before_the_third)
    assert explained_detections(finding, image=1, most=1).image_id == 4 and tried == [2, 3, 4]
    monkeypatch.setattr(module, "predict_each", predict_each)
    monkeypatch.setattr(module, "EXAMPLE_SCORE", 1.0)
    with pytest.raises(RunError, match=r"tiny: .* from image 2 on"):
        explained_detections(finding, image=2)


def test_what_is_detected_in_a_picture_of_ones_own_is_explained(run_dir):
    """As `explain` does it, over the cells of the picture alone."""
    detector = open_detector(str(run_dir))
    noise = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    ((one,),) = [predict(detector, noise, min_score=0, attention=True, progress=False)]
    explained = explain_detected(detector, one, ["raw", "box"])
    rows, columns = one.example.shape()[-2:]
    assert {name: maps.shape for name, maps in explained.explanations.items()} == {
        name: (len(one), rows, columns) for name in ("raw", "box")
    }
    assert np.allclose(explained.explanations["raw"], one.example.maps(layer=-1).mean(0), atol=1e-5)
    ((again, none),) = explained_each([detector, detector], [(one, one_without_rows(one))], ["raw"])
    assert list(again.explanations) == ["raw"] and none.explanations == {}


def one_without_rows(detected):
    rows = ("boxes", "scores", "labels", "queries")
    return replace(detected, **{name: getattr(detected, name)[:0] for name in rows}, names=[])
