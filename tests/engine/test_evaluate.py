"""A pass over a data set: which attention is measured, what losses are means of, and runs that cannot be evaluated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from detrlib.config import Data, load_config, replace, save_config
from detrlib.data import build_dataset, collate
from detrlib.data.formats import find_split
from detrlib.engine.evaluate import FIXED_BOXES, evaluate, evaluate_run, load_model, results_folder, run_floor
from detrlib.engine.loop import train
from detrlib.engine.start import initial_model
from detrlib.errors import ConfigError, DataError, RunError
from detrlib.files import write_json
from detrlib.losses.criterion import Criterion
from detrlib.metrics.floor import fixed_boxes, floor
from detrlib.runs.folder import load_results, load_table


@pytest.fixture(scope="module")
def untrained(tiny_config):
    """Settings, a model, and a data set of 13 images."""
    cfg = tiny_config({"model.num_classes": 7, "evaluate.batch_size": 5})
    return cfg, initial_model(cfg).eval(), build_dataset(cfg.data, "val")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_config({"train.epochs": 1}), folder)
    return folder


@pytest.mark.parametrize(
    ("sites", "measured"),
    [
        (None, {"decoder_cross"}),
        (["encoder_self"], {"encoder_self", "decoder_cross"}),
        (["decoder_self", "encoder_self"], {"encoder_self", "decoder_self", "decoder_cross"}),
        ((), None),
    ],
)
def test_attention_is_measured_at_the_sites_asked_for(untrained, sites, measured):
    """Whatever the transforms are: those of this model are softmax."""
    cfg, model, dataset = untrained
    results, detections = evaluate(model, dataset, cfg, Accelerator(cpu=True), sites=sites)
    assert results["images"] == 13 and set(detections["image_id"]) == set(dataset.image_ids)
    if measured is None:
        assert "attention" not in results and "paibb" not in results
    else:
        assert set(results["attention"]) == set(results["sparsity"]) == measured


def test_losses_do_not_depend_on_how_images_share_batches(untrained):
    cfg, model, dataset = untrained
    cfg = replace(cfg, {"loss.auxiliary": True})
    criterion = Criterion(**dict(cfg.loss))
    losses = []
    for size in (5, 13):
        sized = replace(cfg, {"evaluate.batch_size": size})
        results, _ = evaluate(model, dataset, sized, Accelerator(cpu=True), criterion=criterion, sites=())
        losses.append(results["loss"])
    batch = collate([dataset[index] for index in range(13)])
    with torch.no_grad():
        terms = criterion(model(batch.images, batch.padding_mask), batch.targets)[1]
    assert losses[0].keys() == losses[1].keys() == terms.keys()
    for name, value in terms.items():
        assert losses[0][name] == pytest.approx(value.item(), rel=1e-4), name
        assert losses[1][name] == pytest.approx(value.item(), rel=1e-4), name


def test_another_split_has_a_folder_of_its_own(run_dir):
    own = (run_dir / "results.json").read_bytes()
    results = evaluate_run(run_dir, split="train2017")
    assert results["images"] == 32 and load_results(run_dir / "train2017") == results
    assert (run_dir / "results.json").read_bytes() == own
    for name in ("checkpoints", ".."):
        with pytest.raises(RunError, match=name):
            evaluate_run(run_dir, split=name)


@pytest.mark.parametrize("layout", ["coco", "roboflow", "yolo", "voc"])
def test_data_that_have_moved(tmp_path, tiny_config, write_layout, layout):
    """An evaluation is told where they are now: the same data, or it is refused; and other splits there."""
    root = write_layout(tmp_path / "here", layout)
    settings = {"data.root": str(root), "train.epochs": 1, "train.batch_size": 2, "evaluate.examples": 0}
    before = train(tiny_config(settings), tmp_path / "run")
    assert before["names"] == {
        str(label): name for label, name in build_dataset(Data(root=str(root)), "val").names.items()
    }
    root.rename(tmp_path / "there")
    moved = {"data.root": str(tmp_path / "there")}
    assert {**evaluate_run(tmp_path / "run", overrides=moved), "seconds": 0} == {**before, "seconds": 0}
    assert evaluate_run(tmp_path / "run", split="test", overrides=moved)["images"] == 2
    assert load_config(tmp_path / "run" / "test" / "config.yaml").data.root == str(tmp_path / "there")
    write_layout(tmp_path / "other", layout, train=4, val=5)
    with pytest.raises(RunError, match=r"other data \(val images: 3, now 5.*--on"):
        evaluate_run(tmp_path / "run", overrides={"data.root": str(tmp_path / "other")})
    with pytest.raises(DataError, match=r"here: no such folder"):
        evaluate_run(tmp_path / "run")


def test_another_split_of_explicit_paths(tmp_path, tiny_config, write_layout):
    root = write_layout(tmp_path, "roboflow")
    explicit = {
        f"data.{part}_annotations": str(root / name / "_annotations.coco.json")
        for part, name in (("train", "train"), ("val", "valid"))
    }
    train(tiny_config(explicit | {"train.epochs": 1, "train.batch_size": 2}), tmp_path / "run")
    assert evaluate_run(tmp_path / "run", split="test")["images"] == 2
    assert evaluate_run(tmp_path / "run", split="train")["images"] == 4


def test_an_evaluation_again_says_the_same(run_dir):
    before = load_results(run_dir)
    assert {**evaluate_run(run_dir), "seconds": 0} == {**before, "seconds": 0}
    assert load_model(run_dir).training is False


def test_classes_of_evaluated_data_are_those_of_the_run_by_name(run_dir, tmp_path):
    """The same images with other numbers for the classes are the same data; a class of another name is refused."""
    cfg, before = load_config(run_dir / "config.yaml"), load_results(run_dir)
    assert cfg.data.classes[:3] == (None, "circle", "square") and before["names"]["6"] == "cross"
    images, annotations = find_split(cfg.data, "val")
    content = json.loads(annotations.read_text())
    for entry in content["categories"]:
        entry["id"] = 7 - entry["id"]
    for entry in content["annotations"]:
        entry["category_id"] = 7 - entry["category_id"]
    moved = {"data.val_images": str(images), "data.val_annotations": str(tmp_path / "a.json")}
    write_json(tmp_path / "a.json", content)
    found = evaluate_run(run_dir, overrides=moved)["detection"]
    for name, value in before["detection"].pop("per_class").items():
        assert found["per_class"][name] == pytest.approx(value)
    assert {name: found[name] for name in before["detection"]} == pytest.approx(before["detection"])
    evaluate_run(run_dir)  # what other tests look at
    content["categories"][0]["name"] = "wheel"
    write_json(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=r"a\.json: 'wheel' \(.* objects\)"):
        evaluate_run(run_dir, overrides=moved)


def test_what_cannot_be_evaluated_is_named(run_dir, tmp_path):
    with pytest.raises(RunError, match=r"config\.yaml"):
        evaluate_run(tmp_path)
    with pytest.raises(RunError, match=r"epoch-0007\.pt"):
        evaluate_run(run_dir, "epoch-0007")
    with pytest.raises(ConfigError, match=r"train\.lr"):
        evaluate_run(run_dir, overrides={"train.lr": 1})


@pytest.mark.parametrize("name", ["maps", "untrained", "..", "a/b"])
def test_a_split_cannot_take_a_folder_of_the_run(tmp_path, name):
    with pytest.raises(RunError, match="cannot name a folder of results"):
        results_folder(tmp_path, name)


def test_results_do_not_replace_those_on_other_data(tmp_path):
    assert results_folder(tmp_path, "test2017") == tmp_path / "test2017"
    write_json(tmp_path / "test2017" / "results.json", {"on": "elsewhere.json"})
    assert results_folder(tmp_path, "test2017", Path("elsewhere.json")) == tmp_path / "test2017"
    for other in (None, Path("nowhere.json")):
        with pytest.raises(RunError, match="test2017 holds results on other data"):
            results_folder(tmp_path, "test2017", other)


# The floor: kept by training, made later where it is missing, left out where nothing is to be had


def test_the_floor_is_that_of_the_training_split(run_dir):
    cfg = load_config(run_dir / "config.yaml")
    fixed = fixed_boxes(build_dataset(cfg.data, "train"))
    assert load_table(run_dir, FIXED_BOXES).equals(fixed)
    expected = floor(fixed, build_dataset(cfg.data, "val"))
    assert load_results(run_dir)["floor"] == evaluate_run(run_dir)["floor"] == expected


def test_an_older_run_gets_its_floor_with_its_next_evaluation(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "old")
    (tmp_path / "old" / "measures" / f"{FIXED_BOXES}.parquet").unlink()
    assert evaluate_run(tmp_path / "old")["floor"] == load_results(run_dir)["floor"]


def test_without_the_training_split_there_is_none(run_dir, tmp_path):
    """As for weights of others that are evaluated on a split of one's own."""
    cfg = load_config(run_dir / "config.yaml")
    dataset = build_dataset(cfg.data, "val")
    (tmp_path / "run").mkdir()
    save_config(replace(cfg, {"data.train_images": str(tmp_path / "nowhere")}), tmp_path / "run" / "config.yaml")
    assert run_floor(tmp_path / "run", dataset, "faster_coco_eval") == {}
