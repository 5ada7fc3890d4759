"""The floor of a run: kept by training, made later where it is missing, and left out where nothing is to be had."""

import shutil

import pytest

from detrlib.config import load_config, replace, save_config
from detrlib.data import build_dataset
from detrlib.engine.evaluate import evaluate_run
from detrlib.engine.floor import TABLE, floor_in_words, run_floor
from detrlib.engine.loop import train
from detrlib.metrics.detection import UNDEFINED
from detrlib.metrics.floor import fixed_boxes, floor
from detrlib.runs.folder import load_results, load_table


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config({"train.epochs": 1}), folder)
    return folder


def test_the_floor_is_that_of_the_training_split(run_dir):
    cfg = load_config(run_dir / "config.yaml")
    fixed = fixed_boxes(build_dataset(cfg.data, "train"))
    assert load_table(run_dir, TABLE).equals(fixed)
    expected = floor(fixed, build_dataset(cfg.data, "val"))
    assert load_results(run_dir)["floor"] == evaluate_run(run_dir)["floor"] == expected


def test_an_older_run_gets_its_floor_with_its_next_evaluation(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "old")
    (tmp_path / "old" / "measures" / f"{TABLE}.parquet").unlink()
    assert evaluate_run(tmp_path / "old")["floor"] == load_results(run_dir)["floor"]


def test_without_the_training_split_there_is_none(run_dir, tmp_path):
    """As for weights of others that are evaluated on a split of one's own."""
    cfg = load_config(run_dir / "config.yaml")
    dataset = build_dataset(cfg.data, "val")
    (tmp_path / "run").mkdir()
    save_config(replace(cfg, {"data.train_images": str(tmp_path / "nowhere")}), tmp_path / "run" / "config.yaml")
    assert run_floor(tmp_path / "run", dataset, "faster_coco_eval") == {} and floor_in_words({}) == []


def test_the_floor_and_signs_of_collapse_in_words():
    numbers = {"AP": 0.25, "AP50": 0.5, "images": 40}
    first, second = floor_in_words({"floor": numbers, "detection": {"AP": 0.2}})
    assert "0.250" in first and "40 images" in first and second.startswith("warning: AP 0.200")
    assert len(floor_in_words({"floor": numbers, "detection": {"AP": 0.3}})) == 1
    undefined = {"AP": UNDEFINED, "AP50": UNDEFINED, "images": 40}  # a split without objects
    assert floor_in_words({"floor": undefined, "detection": {"AP": UNDEFINED}}) == []
