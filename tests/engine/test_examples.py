"""Any validation image of a run as an example: stored ones are read, others computed as the evaluation would have."""

import shutil

import numpy as np
import pytest
from PIL import Image

from detrlib import runs
from detrlib.config import load_config, replace, save_config
from detrlib.engine import examples
from detrlib.engine.evaluate import evaluate_run
from detrlib.engine.examples import OwnPictures, ValidationImages, one_image, open_images
from detrlib.engine.loop import train
from detrlib.errors import DataError, RunError
from detrlib.files import write_json
from detrlib.metrics.detection import errors_by_image
from detrlib.runs.results import load_matches

SITES = ("decoder_cross", "decoder_self", "encoder_self")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_config):
    """A run that has stored all maps of all its images."""
    folder = tmp_path_factory.mktemp("examples") / "run"
    overrides = {"model.attention.decoder_cross": "sparsemax", "train.epochs": 1, "evaluate.examples": 13}
    train(tiny_config(overrides | {"evaluate.store_sites": list(SITES)}), folder)
    return folder


@pytest.fixture
def without_examples(run_dir, tmp_path):
    """The same run, of which only two images are stored."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    for path in sorted((folder / "examples").glob("*.npz"))[2:]:
        path.unlink()
    return folder


def test_images_that_are_not_stored_are_computed_as_the_evaluation_has_them(run_dir, without_examples):
    stored, computed = ValidationImages(run_dir), ValidationImages(without_examples)
    assert len(stored.stored) == 13 and len(computed.stored) == 2 and list(stored) == list(computed)
    for image_id, before in stored.items():
        after = computed[image_id]
        assert after.image_id == image_id and after.sites == before.sites == list(SITES)
        for name in ("image", "true_boxes", "true_labels", "labels", "matched", "queries", "extent"):
            assert np.array_equal(getattr(before, name), getattr(after, name)), name
        np.testing.assert_allclose(before.boxes, after.boxes, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(before.scores, after.scores, rtol=1e-4, atol=1e-5)
        for site in SITES:
            assert before.shape(site) == after.shape(site) == after.maps(site).shape
            np.testing.assert_allclose(before.maps(site), after.maps(site), rtol=2**-9, atol=1e-4)


def test_stored_images_need_neither_model_nor_data(without_examples):
    shutil.rmtree(without_examples / "checkpoints")
    images = ValidationImages(without_examples)
    assert all(images[image_id] is example for image_id, example in images.stored.items())
    other = next(image_id for image_id in images if image_id not in images.stored)
    with pytest.raises(RunError, match=r"last\.pt"):
        images[other]


def test_the_worst_come_first(run_dir):
    images, errors = ValidationImages(run_dir), errors_by_image(load_matches(run_dir))
    assert list(images) == errors.index.tolist() and errors["missed"].is_monotonic_decreasing


def test_runs_without_matches_have_their_stored_images(without_examples):
    shutil.rmtree(without_examples / "measures")
    images = ValidationImages(without_examples)
    assert list(images) == list(images.stored)


def test_other_sites_are_computed_and_the_last_images_are_kept(run_dir, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "KEPT", 2)
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    config = folder / "config.yaml"
    save_config(replace(load_config(config), {"evaluate.store_sites": ["decoder_cross"]}), config)
    assert evaluate_run(folder)["images"] == 13
    images = ValidationImages(folder, ("decoder_self",))
    for image_id in images:
        assert images[image_id].sites == ["decoder_self"] and images[image_id] is images[image_id]
    assert list(images._computed) == list(images)[-2:]
    assert ValidationImages(folder)[1].sites == ["decoder_cross"]


def test_results_inside_a_run_are_those_of_its_model(run_dir):
    evaluate_run(run_dir, "untrained")
    images = ValidationImages(run_dir / "untrained", ("decoder_cross",))
    stored = ValidationImages(run_dir)[1].maps()
    assert len(images) == 13 and not np.allclose(images._compute(1).maps()[:, :, 0], stored[:, :, 0], atol=1e-3)


def test_one_image_in_every_run(run_dir, without_examples, tmp_path):
    images = {"all": ValidationImages(run_dir), "two": ValidationImages(without_examples)}
    chosen = one_image(images)
    most = max(images["all"].stored.values(), key=lambda example: len(example.true_boxes))
    assert {run: example.image_id for run, example in chosen.items()} == {"all": most.image_id, "two": most.image_id}
    assert one_image(images, 5)["two"].image_id == 5
    blind = tmp_path / "blind"
    shutil.copytree(run_dir, blind)
    write_json(blind / "results.json", {"detection": {}})
    shutil.rmtree(blind / "examples")
    assert list(one_image(images | {"blind": ValidationImages(blind)}, 5)) == ["all", "two"]
    with pytest.raises(RunError, match="blind"):
        one_image({"blind": ValidationImages(blind)})
    with pytest.raises(RunError, match=r"all, two: .*999"):
        one_image(images, 999)
    assert one_image({}) == {}


def test_data_that_changed_and_runs_that_are_not_finished_are_refused(without_examples, tmp_path):
    config = without_examples / "config.yaml"
    save_config(replace(load_config(config), {"data.val_limit": 3}), config)
    images = ValidationImages(without_examples)
    with pytest.raises(DataError, match="no image 13"):
        images[13]
    with pytest.raises(KeyError):
        images[14]
    runs.open_run(load_config(config), tmp_path / "begun")
    with pytest.raises(RunError, match=r"results\.json"):
        ValidationImages(tmp_path / "begun")


def test_pictures_of_ones_own_are_examples_without_objects(run_dir, tmp_path):
    assert isinstance(open_images(run_dir), ValidationImages)
    random = np.random.default_rng(0)
    for name, shape in {"a.png": (50, 90, 3), "b.png": (80, 40, 3)}.items():
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    own = open_images(run_dir, ["encoder_self"], tmp_path)
    assert isinstance(own, OwnPictures) and list(own) == [1, 2] == list(own.stored) and own.title(2) == "b.png"
    assert own[2].image.shape == (80, 40, 3) and own[2].sites == ["decoder_cross", "encoder_self"]
    assert own.errors["detections"].tolist() == [len(own[1].boxes), len(own[2].boxes)]
    assert one_image({"one": own, "two": own}) == {"one": own[1], "two": own[1]}
    assert len(open_images(run_dir, pictures=str(tmp_path / "b.png"))) == 1
    with pytest.raises(DataError, match=r"absent\.jpg"):
        open_images(run_dir, pictures=[tmp_path / "absent.jpg"])
