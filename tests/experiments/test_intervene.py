"""Runs under interventions: rows hold what contexts entered by hand find, and files keep what was measured."""

import numpy as np
import pandas as pd
import pytest
import torch

from detrlib.data import collate
from detrlib.engine.loop import train
from detrlib.errors import ConfigError, ModelError, RunError
from detrlib.experiments import intervene as interventions
from detrlib.experiments.ablations import without_layers
from detrlib.experiments.intervene import intervene_run, plan, prune_order, query_order
from detrlib.experiments.interventions import learned_alphas, pruned, swapped
from detrlib.experiments.parts import stack_of
from detrlib.experiments.planned import (
    fixed_alphas,
    gradual,
    rearranged_alphas,
    single_heads,
    single_layers,
    swaps,
)
from detrlib.models import build_model
from detrlib.runs import load_results
from detrlib.runs.results import interventions_frame


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_config):
    """A trained run with learned alphas and an encoder whose maps training does not measure."""
    folder = tmp_path_factory.mktemp("runs") / "alpha_entmax-run"
    cfg = tiny_config({"model.attention.decoder_cross": "alpha_entmax", "train.epochs": 1})
    train(cfg, folder)
    return folder


@pytest.fixture
def fresh(run_dir):
    """The run without results of interventions."""
    (run_dir / interventions.RESULTS).unlink(missing_ok=True)
    return run_dir


def loaded(run_dir):
    return interventions.load_model(run_dir)


def test_without_interventions_a_run_finds_what_it_found(fresh):
    results = load_results(fresh)
    (row,) = intervene_run(fresh, []).to_dict("records")
    assert (row["kind"], row["site"], row["images"]) == ("none", "decoder_cross", results["images"])
    assert row["AP"] == results["detection"]["AP"] and row["AP50"] == results["detection"]["AP50"]
    assert row["gini"] == np.mean(results["attention"]["decoder_cross"]["gini"])
    assert row["zeros"] == np.mean(results["attention"]["decoder_cross"]["zeros"])
    assert row["paibb"] == results["paibb"]["all"]


def test_rows_are_kept_and_replaced_by_key(fresh):
    cross = "decoder_cross"
    first = intervene_run(fresh, fixed_alphas(cross, [1, 2]) + gradual(cross, [(0, 1), (1, 0), (0, 2)]), images=5)
    assert list(first["value"]) == ["", "1", "2", "1", "2", "3"] and set(first["images"]) == {5}
    assert first[["layer", "head"]].iloc[-1].tolist() == [0, 2]
    second = intervene_run(fresh, fixed_alphas(cross, [2, 1.5]) + gradual(cross, [(1, 1)]), images=5)
    stored = interventions_frame([fresh])
    assert sorted(stored["kind"] + stored["value"]) == ["alpha1", "alpha1.5", "alpha2", "heads1", "none"]
    assert stored["head"].dropna().tolist() == [1]
    pd.testing.assert_frame_equal(stored.tail(len(second))[second.columns].reset_index(drop=True), second)
    assert first["loss"].iloc[2] == second["loss"].iloc[1]  # alpha 2, measured twice
    intervene_run(fresh, [], images=4)
    with pytest.raises(RunError, match=r"measured on \[4, 5\] images"):
        interventions_frame([fresh])
    assert list(interventions_frame([fresh], images=4)["kind"]) == ["none"]
    with pytest.raises(RunError, match="no interventions of checkpoint best on 4 images are stored"):
        interventions_frame([fresh], images=4, checkpoint="best")


def test_a_call_cut_short_loses_nothing(fresh, monkeypatch):
    cross, real, calls = "decoder_cross", interventions.evaluate, []
    before = intervene_run(fresh, fixed_alphas(cross, [2]) + gradual(cross, [(0, 1), (0, 2)]), images=3)

    def stopping(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(interventions, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        intervene_run(fresh, fixed_alphas(cross, [1, 2]) + gradual(cross, [(1, 0)]), images=3)
    stored = interventions_frame([fresh])[before.columns]
    expected = pd.concat([before.iloc[1:], stored.tail(2)], ignore_index=True)
    pd.testing.assert_frame_equal(stored, expected)
    assert stored["value"].tolist() == ["2", "1", "2", "", "1"]


def test_rows_measure_what_they_say(fresh):
    """Against contexts entered by hand; maps of the encoder are measured though they are of softmax."""
    model = loaded(fresh)
    site = "encoder_self"
    chosen = single_heads(model, site)[2:3] + fixed_alphas(site, [2], layer=0)
    chosen += rearranged_alphas(model, "decoder_cross") + swaps("decoder_cross", ["tvmax"], tv_lambda=0.2)
    rows = intervene_run(fresh, chosen, images=5).set_index(["kind", "site"])
    assert rows.loc[("none", site), "zeros"] == 0
    assert rows.loc[("head", site), "zeros"] == pytest.approx(1 / 4)
    assert rows.loc[("alpha", site), "zeros"] > 0.1
    assert rows.loc[("head", site), ["layer", "head"]].tolist() == [0, 2]
    assert rows.loc["learned_alpha"]["value"].tolist() == ["mean", "shuffled"]
    cfg = interventions.replace(interventions.run_config(fresh), {"data.val_limit": 5})
    dataset, accelerator = interventions.build_dataset(cfg.data, "val"), interventions.Accelerator()
    with swapped(model, "decoder_cross", "tvmax", tv_lambda=0.2):
        results, _ = interventions.evaluate(model, dataset, cfg, accelerator)
    row = rows.loc[("transform", "decoder_cross")]
    assert row["gini"] == np.mean(results["attention"]["decoder_cross"]["gini"])
    assert row["AP"] == results["detection"]["AP"]


def test_shuffled_alphas_are_those_of_the_layer_in_another_order(small):
    model = small(attention={"decoder_cross": "alpha_entmax", "alpha_init": "normal"})
    own = learned_alphas(model, "decoder_cross")
    mean, shuffled = (one.enter.keywords["alpha"] for one in rearranged_alphas(model, "decoder_cross"))
    assert torch.equal(shuffled.sort(1).values, own.sort(1).values) and not torch.equal(shuffled, own)
    assert mean == pytest.approx(own.mean().item())


def test_heads_are_put_in_order_of_the_loss_on_training_images(fresh):
    order = prune_order(fresh, "decoder_cross", images=6)
    cfg = interventions.run_config(fresh)
    assert sorted(order) == [(layer, head) for layer in range(2) for head in range(4)]
    dataset = interventions.build_dataset(
        interventions.replace(cfg, {"data.train_limit": 6}).data, "train", augment=False
    )
    batch = collate([dataset[index] for index in range(6)])
    last = interventions.Criterion(**dict(cfg.loss) | {"auxiliary": False})  # its layer alone
    model, losses = loaded(fresh), []
    for layer, head in order:
        with pruned(model, "decoder_cross", {layer: [head]}), torch.no_grad():
            losses.append(last(model(batch.images, batch.padding_mask), batch.targets)[0])
    assert losses == sorted(losses) and losses[0] < losses[-1]
    gone = gradual("decoder_cross", order)
    assert [one.value for one in gone] == list("12345678") and (gone[2].layer, gone[2].head) == order[2]
    assert sorted(
        (layer, head) for layer, heads in gone[-1].enter.keywords["heads"].items() for head in heads
    ) == sorted(order)


# --- parts taken out -----------------------------------------------------------------------------------------------


def test_everything_that_can_be_ablated_is_planned_and_measured(fresh):
    parts = ["queries", "embeddings", "layers", "sites", "feedforward"]
    planned = plan(fresh, sinks=["masked", "zeroed"], ablate=parts, order_images=3)
    counts = pd.Series([one.kind for one in planned]).value_counts().to_dict()
    assert counts == {"sink": 6, "queries": 25, "embeddings": 25, "layer": 3, "attention": 7, "feedforward": 3}
    chosen = [one for one in planned if one.kind not in ("queries", "embeddings") or "0.50" in one.value]
    rows = intervene_run(fresh, chosen, images=4)
    assert rows["kind"].tolist() == ["none", *(one.kind for one in chosen)]
    assert rows[["AP", "loss", "paibb", "zeros"]].notna().all(axis=None)
    gone = (rows["kind"] == "attention") & (rows["value"] == "decoder_cross") & rows["layer"].isna()
    assert rows.loc[gone, ["zeros", "paibb"]].values.tolist() == [[1, 0]]
    assert rows["gini"].isna().tolist() == gone.tolist()
    lost = rows.loc[0, "AP"] - rows["AP"]
    assert np.allclose(rows["AP_lost"][1:], lost[1:]) and np.isnan(rows["AP_lost"][0])
    assert (rows["AP_lost_low"] <= rows["AP_lost_high"])[1:].all()


def test_without_a_layer_measures_are_means_over_those_that_are_left(fresh):
    model = loaded(fresh)
    chosen = [one for site in ("decoder_cross", "encoder_self") for one in single_layers(model, site)]
    rows = intervene_run(fresh, chosen, images=4).set_index(["site", "value", "layer"])
    cfg = interventions.replace(interventions.run_config(fresh), {"data.val_limit": 4})
    dataset, accelerator = interventions.build_dataset(cfg.data, "val"), interventions.Accelerator()
    with without_layers(model, "decoder", [0]):
        left = interventions.replace(cfg, {"model.decoder_layers": 1})
        results, _ = interventions.evaluate(model, dataset, left, accelerator)
    row = rows.loc[("decoder_cross", "decoder", 0)]
    assert row["gini"] == results["attention"]["decoder_cross"]["gini"][0]
    assert (row["AP"], row["paibb"]) == (results["detection"]["AP"], results["paibb"]["all"])
    assert rows.loc[("encoder_self", "encoder", 0), ["gini", "zeros"]].isna().all()
    assert rows.loc[("encoder_self", "encoder", 0), "AP"] == rows.loc[("decoder_cross", "encoder", 0), "AP"]


def test_settings_follow_the_layers_of_every_family(small, huggingface_settings, model_settings, tiny_config):
    for settings in ({}, huggingface_settings("rt_detr")["model"]):
        cfg = tiny_config()
        cfg = cfg.model_copy(update={"model": model_settings(**settings) if settings else cfg.model})
        model = build_model(cfg.model.model_copy(update={} if settings else {"num_classes": 3}))
        with without_layers(model, "decoder", [1]), without_layers(model, "encoder", [0]):
            now = interventions._as_it_is(cfg, model).model
            assert (now.encoder_layers, now.decoder_layers) == (0, 1)
        assert (cfg.model.encoder_layers, cfg.model.decoder_layers) == (1, 2)
        assert stack_of(model, "decoder").total() == interventions._as_it_is(cfg, model).model.decoder_layers == 2


def test_queries_are_put_in_order_of_their_confidence_on_training_images(fresh):
    order = query_order(fresh, images=6)
    cfg = interventions.replace(interventions.run_config(fresh), {"data.train_limit": 6})
    dataset = interventions.build_dataset(cfg.data, "train", augment=False)
    batch = collate([dataset[index] for index in range(6)])
    with torch.no_grad():
        scores = loaded(fresh)(batch.images, batch.padding_mask).class_scores().amax(-1).mean(0)
    assert sorted(order) == list(range(10))
    assert (scores[order].diff() > -1e-6).all()


def test_mistakes_show_before_anything_is_measured(fresh, monkeypatch):
    monkeypatch.setattr(interventions, "evaluate", None)
    with pytest.raises(ModelError, match="layers"):
        intervene_run(fresh, fixed_alphas("decoder_cross", [1]) + fixed_alphas("decoder_cross", [1], layer=9))
    with pytest.raises(ConfigError, match="unknown ablation 'heads'; there are queries"):
        plan(fresh, ablate=["layers", "heads"])
    with pytest.raises(ModelError, match="no levels to ablate"):
        plan(fresh, ablate=["levels"])
    with pytest.raises(ModelError, match="unknown way 'hidden'"):
        plan(fresh, sinks=["hidden"])
    with pytest.raises(RunError, match=r"nothing has no config\.yaml"):
        intervene_run(fresh / "nothing", [])
    with pytest.raises(RunError, match="detrlib intervene"):
        interventions_frame([fresh])
    (fresh / interventions.RESULTS).parent.mkdir(exist_ok=True)
    (fresh / interventions.RESULTS).write_text("half a table")
    with pytest.raises(RunError, match=r"interventions.parquet is damaged .* delete it, then: detrlib intervene"):
        interventions_frame([fresh])
