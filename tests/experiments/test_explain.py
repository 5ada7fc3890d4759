"""Runs explained: what is measured and remembered, and the pictures of explained detections."""

import json
import logging

import numpy as np
import pandas as pd
import pytest

from detrlib.boxes import cxcywh_to_xyxy, to_pixels
from detrlib.config import load_config
from detrlib.data import build_dataset, collate
from detrlib.engine.evaluate import load_model
from detrlib.engine.launch import launch
from detrlib.errors import ConfigError, RunError
from detrlib.experiments import explain as module
from detrlib.experiments.attribution import METHODS
from detrlib.experiments.explain import detections_to_explain, explained_detections, faithfulness_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    launch(tiny_config({"train.epochs": 1}), folder, gpus=0)
    return folder


def test_a_run_is_measured_and_remembers_how(run_dir):
    settings = {"images": 3, "steps": 3, "min_score": 0.0}
    frame = faithfulness_run(run_dir, methods=["raw", "relevance", "random"], **settings)
    pd.testing.assert_frame_equal(pd.read_parquet(run_dir / "measures" / "faithfulness.parquet"), frame)
    detections = frame[["image_id", "query"]].drop_duplicates()
    assert len(frame) == 3 * len(detections) and frame["image_id"].nunique() == 3
    assert set(frame["size"]) <= {"small", "medium", "large"} and frame["category"].notna().all()
    curves = pd.read_parquet(run_dir / "measures" / "faithfulness_curves.parquet")
    assert len(curves) == 3 * 2 * 3 * 4
    known = json.loads((run_dir / "measures" / "faithfulness.json").read_text())
    assert known["passes"] == 3 * 2 + len(frame) * 2 * 2 and known["detections"] == len(detections)
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
    with pytest.raises(RunError, match=r"none.*results\.json"):
        faithfulness_run(tmp_path / "none")


def test_a_run_that_finds_nothing_may_have_an_empty_table(run_dir, caplog):
    before = (run_dir / "measures" / "faithfulness.parquet").read_bytes()
    with caplog.at_level(logging.WARNING):
        frame = faithfulness_run(run_dir, 2, min_score=1.1, allow_empty=True)
    assert frame.empty and "tiny" in caplog.text and "min_score" in caplog.text
    assert (run_dir / "measures" / "faithfulness.parquet").read_bytes() == before


# Pictures of explained detections


@pytest.fixture
def finding(run_dir, monkeypatch):
    """The run, as if all that it finds were good enough for an example."""
    monkeypatch.setattr(module, "EXAMPLE_SCORE", 0.0)
    return run_dir


def test_explained_detections_are_the_best_of_an_image_with_a_map_for_every_method(finding):
    dataset = build_dataset(load_config(finding / "config.yaml").data, "val")
    index = next(index for index in range(len(dataset)) if len(dataset.objects(index)[1]) > 2)
    images, boxes, titles, maps, extents, given, classes = explained_detections(finding, image=index, most=2)
    assert len(images) == len(titles) == len(extents) == 2 and boxes.shape == (2, 4)
    batch = collate([dataset[index]])
    model = load_model(finding)
    predictions = model(batch.images, batch.padding_mask, need_attention=True)
    queries, labels, _ = detections_to_explain(predictions, batch, load_config(finding / "config.yaml"), 0.0, True)
    scores = predictions.class_scores()[0, queries, labels].detach()
    best = scores.argsort(descending=True)[:2]
    assert list(given) == labels[best].tolist() and classes == dataset.names
    names = [dataset.names[label] for label in labels[best].tolist()]
    assert titles == [f"{name} {score:.2f}" for name, score in zip(names, scores[best].tolist(), strict=True)]
    expected = to_pixels(cxcywh_to_xyxy(predictions.boxes[0, queries[best]]), batch.targets[0]["size"])
    np.testing.assert_allclose(boxes, expected.detach().numpy(), rtol=1e-5)
    assert tuple(maps) == METHODS
    raw = predictions.attention.as_images("decoder_cross", -1)[0].mean(0)[queries[best]].detach().numpy()
    np.testing.assert_allclose(np.stack(maps["raw"]), raw, rtol=1e-4)
    assert images[0].shape == (64, 64, 3) and images[0].dtype == np.uint8
    assert tuple(extents[0]) == predictions.attention.grid  # shapes fill their batch


def test_images_without_detections_are_passed_over_until_none_is_left(finding, monkeypatch):
    found, asked = module.detections_to_explain, []

    def nothing_before_the_third(predictions, batch, *arguments):
        asked.append(batch.targets[0]["image_id"])
        queries, labels, areas = found(predictions, batch, *arguments)
        return (queries, labels, areas) if len(asked) == 3 else (queries[:0], labels[:0], areas[:0])

    monkeypatch.setattr(module, "detections_to_explain", nothing_before_the_third)
    third = explained_detections(finding, image=1)
    assert asked == [2, 3, 4]
    monkeypatch.setattr(module, "detections_to_explain", found)
    assert third[2] == explained_detections(finding, image=3)[2]
    monkeypatch.setattr(module, "EXAMPLE_SCORE", 1.1)
    with pytest.raises(RunError, match=r"tiny: .* from image 2 on"):
        explained_detections(finding, image=2)
