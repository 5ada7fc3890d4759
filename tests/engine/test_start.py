"""Weights that training starts from: what is taken over, what is made anew, and what does not fit."""

import json
import shutil
from dataclasses import replace as changed
from pathlib import Path

import pytest
import torch

from detrlib.attention.transforms import Entmax
from detrlib.checkpoints.adapted import write_adapted
from detrlib.config import load_config, replace
from detrlib.engine.evaluate import evaluate_run, load_model
from detrlib.engine.loop import train
from detrlib.engine.predict import predict
from detrlib.engine.start import initial_model, take_over
from detrlib.errors import ModelError, WeightsError
from detrlib.experiments.explain import faithfulness_run
from detrlib.experiments.intervene import intervene_run, plan
from detrlib.files import load_checkpoint
from detrlib.models import build_model
from detrlib.runs.examples import load_examples
from detrlib.runs.folder import read_metrics
from detrlib.runs.sources import Source

NAMES = {1: "circle", 2: "blue square", 3: "ring"}
OTHERS = {0: "ring", 1: "cell", 4: "Blue_Square"}  # ring was 3, blue square 2
SIGMOID = {"model.classification": "sigmoid", "model.queries": "anchor"}
DEFORMABLE = {"model.architecture": "deformable", "model.classification": "sigmoid", "model.deformable.levels": 2}
REFINED = DEFORMABLE | {"model.deformable": {"levels": 2, "refine": True, "two_stage": True, "encoder_auxiliary": True}}
REFINED |= {"model.encoder_layers": 3}
SPECIFIC = REFINED | {"model.deformable": REFINED["model.deformable"] | {"class_specific_proposals": True}}


@pytest.fixture(scope="module")
def source_of(tiny_config):
    def source_of(overrides=None, names=NAMES):
        """A model of another seed as a source."""
        cfg = tiny_config({"model.num_classes": 4, "train.seed": 7} | (overrides or {}))
        return Source("other", cfg, initial_model(cfg).state_dict(), names, Path("last.pt"))

    return source_of


@pytest.fixture(scope="module")
def started(tiny_config):
    def started(source, overrides=None, names=OTHERS):
        """A fresh model as it was, what it has become, and the report."""
        cfg = tiny_config({"model.num_classes": 5} | (overrides or {}))
        model = initial_model(cfg)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        start = take_over(model, source, cfg.model, names)
        return before, model.state_dict(), start

    return started


@pytest.mark.parametrize("overrides", [{}, SIGMOID, REFINED], ids=["detr", "anchors", "two stages"])
def test_a_model_of_the_same_classes_is_taken_over_whole(source_of, started, overrides):
    for names in (NAMES, None):  # unknown names are taken for the same
        source = source_of(overrides, names)
        _, after, start = started(source, overrides | {"model.num_classes": 4}, NAMES)
        assert after.keys() == source.state.keys()
        assert all(torch.equal(after[name], value) for name, value in source.state.items())
        assert sorted(start.loaded) == sorted(after) and start.remade == start.initialised == start.left_out == []
        assert start.settings == {} and start.classes["kept"] == list(NAMES.values())


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ({}, {0: 3, 4: 2, 5: 4}),  # the last one says that there is no object
        (SIGMOID, {0: 3, 4: 2}),
        (DEFORMABLE, {0: 3, 4: 2}),
    ],
    ids=["detr", "anchors", "deformable"],
)
def test_rows_of_classes_of_the_same_name_are_kept(source_of, started, overrides, rows):
    source = source_of(overrides)
    before, after, start = started(source, overrides)
    heads = [name for name in after if name.startswith("class_embed.")]
    assert start.remade == heads and len(heads) == 2
    for name in heads:
        assert len(after[name]) == 5 + ("classification" not in str(overrides))
        for row, value in enumerate(after[name]):
            expected = source.state[name][rows[row]] if row in rows else before[name][row]
            assert torch.equal(value, expected), (name, row)
    assert start.classes == {"kept": ["ring", "Blue_Square"], "new": ["cell"], "left_out": ["circle"]}
    assert all(torch.equal(after[name], source.state[name]) for name in start.loaded)
    assert sorted(start.loaded + heads) == sorted(after)


def test_the_head_of_proposals_keeps_the_class_that_stands_for_all(source_of, started):
    source = source_of(REFINED)
    before, after, start = started(source, REFINED)
    assert len(start.remade) == 2 * (2 + 1 + 2)  # layers of the decoder, proposals, layers of the encoder but one
    for number, rows in {0: {0: 3, 4: 2}, 1: {0: 3, 4: 2}, 2: {0: 0}, 3: {0: 3, 4: 2}, 4: {0: 3, 4: 2}}.items():
        name = f"class_embed.{number}.weight"
        for row, value in enumerate(after[name]):
            assert torch.equal(value, source.state[name][rows[row]] if row in rows else before[name][row])
    before, after, _ = started(source, SPECIFIC)  # whose proposals have classes
    assert torch.equal(after["class_embed.2.weight"], before["class_embed.2.weight"])
    before, after, _ = started(source, SPECIFIC | {"model.num_classes": 4}, NAMES)
    assert torch.equal(after["class_embed.2.weight"], before["class_embed.2.weight"])
    assert torch.equal(after["class_embed.1.weight"][1:], source.state["class_embed.1.weight"][1:])


def test_heads_that_say_classes_in_another_way_are_made_anew(source_of, started):
    """Five rows here and there: four classes and no-object, and five classes."""
    source = source_of({"model.classification": "softmax"})
    before, after, start = started(source, {"model.classification": "sigmoid"})
    for name in ("class_embed.weight", "class_embed.bias"):
        assert after[name].shape == source.state[name].shape and torch.equal(after[name], before[name])
    assert start.classes["kept"] == [] and start.settings["model.classification"] == ["softmax", "sigmoid"]


def test_unknown_names_of_another_number_of_classes_keep_no_row(source_of, started):
    source = source_of(names=None)
    before, after, start = started(source)
    assert torch.equal(after["class_embed.weight"][:5], before["class_embed.weight"][:5])
    assert torch.equal(after["class_embed.weight"][5], source.state["class_embed.weight"][4])
    assert start.classes == {"kept": [], "new": ["ring", "cell", "Blue_Square"], "left_out": []}


def test_another_transform_is_no_obstacle(source_of, started):
    learned = {"model.attention.decoder_cross": "alpha_entmax", "model.attention.alpha_init": 1.25}
    alphas = [f"transformer.decoder.layers.{layer}.multihead_attn.transform.pre_alpha" for layer in (0, 1)]
    before, after, start = started(source_of(), learned | {"model.num_classes": 4}, NAMES)
    assert start.initialised == alphas and start.left_out == [] and start.remade == []
    assert all(torch.equal(after[name], before[name]) for name in alphas)
    assert start.settings["model.attention.decoder_cross"] == ["softmax", "alpha_entmax"]

    source = source_of(learned)
    _, after, start = started(source, {"model.attention.decoder_cross": "sparsemax"})
    assert start.left_out == alphas and start.initialised == []
    _, after, start = started(source, learned)
    assert all(torch.equal(after[name], source.state[name]) for name in alphas)
    for part in ("starts from other", "class_embed.weight", "kept: ring, Blue_Square", "alpha_init"):
        assert part in str(changed(start, settings={"model.attention.alpha_init": [1.25, 1.5]}))


def test_everything_that_does_not_fit_is_named_at_once(source_of, started):
    other = {"model.num_queries": 12, "model.feedforward_dim": 16, "model.decoder_layers": 3}
    with pytest.raises(WeightsError, match=r"train\.start: other") as caught:
        started(source_of(other))
    said = str(caught.value)
    named = ["query_embed.weight", "model.num_queries 10, there 12", "model.decoder_layers 2, there 3"]
    named += [f"transformer.{layer}.linear1.bias is (16,)" for layer in ("encoder.layers.0", "decoder.layers.1")]
    named += ["unexpected transformer.decoder.layers.2.norm3.bias"]
    assert [part for part in named if part not in said] == [] and "\n" not in said
    with pytest.raises(WeightsError, match=r"model\.architecture detr, .* deformable"):
        started(source_of(), DEFORMABLE)


# --- as a part of training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_config({"train.epochs": 1, "train.ema": 0.5}), run_dir)
    return run_dir


def test_a_finished_run_is_trained_for_more_epochs_under_a_new_name(finished, tmp_path, capsys, tiny_config):
    cfg = tiny_config({"train.epochs": 1, "train.start": str(finished), "train.seed": 3})
    results = train(cfg, tmp_path)
    start = json.loads((tmp_path / "start.json").read_text())
    assert start["remade"] == [] and start["source"] in capsys.readouterr().out
    source = load_checkpoint(finished / "checkpoints" / "last.pt")
    untrained = load_model(tmp_path, "untrained").state_dict()
    assert all(torch.equal(value, source["average"][name]) for name, value in untrained.items())
    moved = load_checkpoint(tmp_path / "checkpoints" / "last.pt")["model"]
    assert not torch.equal(moved["class_embed.weight"], untrained["class_embed.weight"])
    assert results["epoch"] == 1 and "detection" in results


def test_other_classes_a_backbone_of_its_own_and_sparse_attention(finished, tmp_path, tiny_config):
    """Labels without gaps, nothing pretrained, alpha on its way."""
    overrides = {"data.contiguous": True, "model.backbone.weights": "crops", "train.epochs": 1}
    sparse = {"model.attention.decoder_cross": "sparsemax", "model.attention.anneal.epochs": 0.75}
    train(tiny_config(overrides | sparse | {"train.start": str(finished)}), tmp_path)
    start = json.loads((tmp_path / "start.json").read_text())
    assert start["remade"] == ["class_embed.weight", "class_embed.bias"] and len(start["classes"]["kept"]) == 6
    there = load_checkpoint(finished / "checkpoints" / "last.pt")["average"]["class_embed.weight"]
    untrained = load_model(tmp_path, "untrained")
    assert torch.equal(untrained.class_embed.weight, there[1:])  # no class had label 0
    assert {t.alpha for t in untrained.modules() if isinstance(t, Entmax)} == {1.01}


def test_a_run_that_goes_on_does_not_ask_for_what_it_started_from(finished, tmp_path, monkeypatch, tiny_config):
    source = tmp_path / "source"
    finished.rename(source)
    cfg = tiny_config({"train.epochs": 1, "train.start": str(source)})
    train(cfg, tmp_path / "run")
    source.rename(finished)
    (tmp_path / "run" / "results.json").unlink()
    assert train(cfg, tmp_path / "run")["epoch"] == 1
    assert (tmp_path / "run" / "start.json").exists()


def test_what_does_not_fit_is_refused_before_pictures_are_decoded(finished, tmp_path, tiny_config, monkeypatch):
    cfg = tiny_config({"model.num_queries": 11, "train.start": str(finished)})
    with monkeypatch.context() as patched, pytest.raises(WeightsError, match=r"query_embed\.weight"):
        patched.setattr("detrlib.engine.loop.look_over", lambda *_: pytest.fail("decoded"))
        train(cfg, tmp_path)
    assert list(tmp_path.iterdir()) == []
    train(replace(cfg, {"model.num_queries": 10, "train.epochs": 1}), tmp_path)  # nothing was begun


def test_the_model_that_training_starts_from_depends_on_the_seed_alone(tiny_config):
    cfg = tiny_config({"model.num_classes": 7})
    torch.rand(3)
    before = torch.get_rng_state()
    models = initial_model(cfg), initial_model(cfg), initial_model(replace(cfg, {"train.seed": 1}))
    assert torch.equal(torch.get_rng_state(), before)
    first, second, third = (next(model.transformer.parameters()) for model in models)
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_a_detector_of_transformers_is_fine_tuned_from_a_folder_and_looked_at(huggingface_settings, tmp_path, capsys):
    """Train from its weights with heads over other classes, stop, and evaluate, explain and predict what is left."""
    settings, folder, run_dir = huggingface_settings("rt_detr_v2"), tmp_path / "theirs", tmp_path / "run"
    torch.manual_seed(0)
    source_cfg = load_config(overrides=settings)
    names = {0: "circle", 1: "aardvark", 2: "ring", 3: "b", 4: "c"}
    write_adapted(Source("theirs", source_cfg, build_model(source_cfg.model).state_dict(), names, folder), folder)
    del settings["model"]["type"], settings["model"]["options"]
    settings["model"] |= {"source": str(folder), "num_classes": None}
    settings["model"]["attention"] = {"encoder_self": "entmax15", "decoder_self": "alpha_entmax"}
    data = {"root": "shapes", "shapes": {"train": 16, "val": 4, "size": 64}, "image_size": 64, "workers": 0}
    data |= {"contiguous": True, "augment": "flip"}
    settings |= {"data": data, "train": {"epochs": 1, "batch_size": 8, "log_every": 1, "ema": 0.5, "lr": 1e-3}}
    settings["evaluate"] = {"examples": 2, "store_sites": ["encoder_self", "decoder_self"]}
    results = train(load_config(overrides=settings), run_dir)
    start = json.loads((run_dir / "start.json").read_text())
    assert start["classes"]["kept"] == ["circle", "ring"] and "model.class_embed.0.weight" in start["remade"]
    assert "model.model.decoder.layers.0.self_attn.transform.pre_alpha" in start["initialised"]
    assert set(results["attention"]) == {"encoder_self", "decoder_self", "decoder_cross"}
    assert set(results["alpha"]) == {"decoder_self.0", "decoder_self.1"}
    assert any("alpha/decoder_self.layer_1-head_3" in record for record in read_metrics(run_dir))
    example = load_examples(run_dir)[0]
    assert example.shape("encoder_self")[2:] == (4, 2, 2) and example.shape("decoder_cross")[-2:] == (8, 8)
    shutil.rmtree(folder)  # the run is whole without it
    assert "model.class_embed.0.weight" in load_model(run_dir).state_dict()
    again = evaluate_run(run_dir)
    assert again["sparsity"]["decoder_self"]["alpha"] == list(results["alpha"].values())
    explained = faithfulness_run(run_dir, images=1, steps=2, min_score=0.0)
    assert set(explained["method"]) == {"raw", "gradient", "odam", "box", "random"}
    sharper = intervene_run(run_dir, plan(run_dir, "encoder_self", alphas=[2.0]), images=2)
    assert sharper["kind"].tolist() == ["none", "alpha"]
    with pytest.raises(ModelError, match="decoder_cross"):
        plan(run_dir, "decoder_cross", alphas=[1.0])
    (found,) = predict(run_dir, [example.image], min_score=0.0, attention=["encoder_self"], progress=False)
    assert set(found.example.sites) == {"decoder_cross", "encoder_self"}
