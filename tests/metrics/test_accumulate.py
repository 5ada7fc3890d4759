"""Attention measured over a data set: independent computations, processes put together, tables, untrained models."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import detrlib.engine.loop as training
from detrlib.config import replace
from detrlib.data import Batch
from detrlib.engine.evaluate import evaluate_run, load_model
from detrlib.errors import ConfigError, RunError
from detrlib.losses import Criterion, match
from detrlib.metrics import localisation, sinks, sparsity
from detrlib.metrics.accumulate import SELECTIONS, AttentionMeasures, alphas_in_effect
from detrlib.runs.folder import load_results
from detrlib.runs.results import layer_frame, located_table, paibb_table, sparsity_table
from detrlib.runs.sinks import sinks_table

SIZES = [(70, 101), (128, 64), (97, 160)]
MODELS = {
    "sparse everywhere": {
        "attention": {"encoder_self": "sparsemax", "decoder_self": "entmax15", "decoder_cross": "alpha_entmax"}
    },
    "differential": {"attention": {"differential": True}},
    "deformable": {
        "architecture": "deformable",
        "classification": "sigmoid",
        "deformable": {"levels": 2, "stages": (3, 4)},
    },
}


@pytest.fixture(scope="session")
def batch_of(padded_batch):
    def batch_of(sizes=SIZES) -> Batch:
        """Padded images with 2, 0, 1, ... objects; the files were twice as large."""
        images, padding = padded_batch(*sizes, canvas=(128, 160))
        targets = []
        for number, size in enumerate(sizes):
            count = (2, 0, 1)[number % 3]
            corners = torch.rand(count, 4, generator=torch.Generator().manual_seed(number))
            boxes = torch.cat([0.3 + 0.4 * corners[:, :2], 0.05 + 0.5 * corners[:, 2:]], 1)
            size = torch.tensor(size)
            target = {"boxes": boxes, "labels": torch.arange(count), "image_id": 40 + number}
            targets.append(target | {"size": size, "original_size": 2 * size})
        return Batch(images, padding, targets)

    return batch_of


@pytest.fixture(scope="session")
def setup(batch_of, small, tiny_config):
    def setup(kind: str, **evaluate):
        """A model, its settings, a batch, predictions with maps, and indices of its match."""
        model, batch = small(**MODELS[kind]), batch_of()
        settings = {"num_heads": 4, "encoder_layers": 2, "decoder_layers": 3, "hidden_dim": 32, "num_classes": 5}
        overrides = {f"model.{key}": value for key, value in (MODELS[kind] | settings).items()}
        cfg = replace(tiny_config(overrides), {f"evaluate.{key}": value for key, value in evaluate.items()})
        with torch.no_grad():
            predictions = model(batch.images, batch.padding_mask, need_attention=True)
        return cfg, batch, predictions, match(predictions, batch.targets, Criterion(**dict(cfg.loss)).costs)

    return setup


@pytest.fixture(scope="session")
def measured(setup):
    def measured(kind: str, folder=None, **evaluate):
        cfg, batch, predictions, indices = setup(kind, **evaluate)
        looks = AttentionMeasures(cfg, folder)
        looks.add(predictions, batch, indices)
        looks.close()
        looks.merge([looks.sums()])
        learned = {f"decoder_cross.{layer}": [1.1, 1.2, 1.3, 1.4] for layer in range(3)}
        return looks.summary(learned), batch, predictions, indices

    return measured


@pytest.mark.parametrize("kind", MODELS)
def test_sparsity_is_that_of_single_images(kind, tmp_path, measured, setup):
    """Loops over images, layers, heads and queries without padding give what batches give."""
    threshold = setup(kind)[2].class_scores().amax(-1).median().item()
    summary, _, predictions, indices = measured(kind, tmp_path, confident_score=threshold)
    maps, scores = predictions.attention, predictions.class_scores().amax(-1)
    keys = ["site", "queries", "image_id", "layer", "head"]
    table = pd.read_parquet(tmp_path / "sparsity").astype({"site": str, "queries": str})
    table = table.set_index(keys).sort_index()
    expected_rows = 0
    sites = ["encoder_self", "decoder_self", "decoder_cross"] if kind == "sparse everywhere" else ["decoder_cross"]
    assert list(summary["sparsity"]) == list(summary["attention"]) == sites
    for site in sites:
        for selection in SELECTIONS[:1] if site == "encoder_self" else SELECTIONS:
            per_image = []
            for image in range(len(SIZES)):
                valid = ~maps.key_padding[image]
                chosen = {"matched": indices[image][0], "confident": scores[image] > threshold}
                rows = chosen.get(selection, slice(None))
                rows = valid if site == "encoder_self" else rows
                columns = slice(None) if site == "decoder_self" else valid
                weights = torch.stack([layer[image][:, rows][..., columns] for layer in getattr(maps, site)])
                if weights.shape[2] == 0:
                    assert (site, selection, 40 + image) not in table.index
                    continue
                found = sparsity.sparsity(weights)  # [L,H,rows]
                per_image.append(torch.stack([found[name].mean(-1) for name in sparsity.MEASURES]))
                for layer, head in np.ndindex(per_image[-1].shape[1:]):
                    row = table.loc[(site, selection, 40 + image, layer, head)]
                    np.testing.assert_allclose(row, per_image[-1][:, layer, head], rtol=1e-4, atol=1e-5)
                    expected_rows += 1
            entry = summary["sparsity"][site][selection]
            assert entry["images"] == len(per_image)
            values = torch.stack(per_image).double()
            for i, name in enumerate(sparsity.MEASURES):
                over_heads = values[:, i].mean(-1)
                assert entry[name]["mean"] == pytest.approx(over_heads.mean(0).tolist(), rel=1e-4, abs=1e-5)
                if len(values) > 1:
                    assert entry[name]["std"] == pytest.approx(over_heads.std(0).tolist(), rel=1e-2, abs=1e-5)
                np.testing.assert_allclose(entry[name]["heads"], values[:, i].mean(0), rtol=1e-4, atol=1e-5)
            if selection == "all":
                assert summary["attention"][site]["gini"] == entry["gini"]["mean"]
    assert len(table) == expected_rows


@pytest.mark.parametrize("mode", ["exact", "thesis"])
@pytest.mark.parametrize("kind", MODELS)
def test_localisation_is_that_of_single_objects(kind, mode, tmp_path, measured):
    summary, batch, predictions, indices = measured(kind, tmp_path, paibb=mode)
    maps = predictions.attention
    table = pd.read_parquet(tmp_path / "located")
    assert len(table) == 3 * 3 * 5  # objects, layers, heads and their mean
    table = table.set_index(["image_id", "object", "layer", "head"])
    values, sizes = [], []
    for image, target in enumerate(batch.targets):
        rows, columns = maps.valid_grid(image)
        stride = 128 / maps.grid[0], 160 / maps.grid[1]
        extent = tuple(s / t for s, t in zip(target["size"].tolist(), stride, strict=True))
        for query, index in zip(*(side.tolist() for side in indices[image]), strict=True):
            box = target["boxes"][index : index + 1]
            area = (box[0, 2:] * target["original_size"].flip(0)).prod().item()
            for layer in range(3):
                heads = maps.as_images("decoder_cross", layer)[image, :, query, :rows, :columns].abs()
                for head, one in zip(range(-1, 4), [heads.mean(0), *heads], strict=True):
                    found = localisation.locate(one[None], box, extent, mode, target["original_size"])
                    expected = [found[name].item() for name in localisation.MEASURES]
                    row = table.loc[(40 + image, index, layer, head)]
                    given = row[list(localisation.MEASURES)].astype(float)
                    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)
                    assert row["area"] == pytest.approx(area, rel=1e-5)
                    assert row["size"] == localisation.object_size(area)
                    assert (row["label"], row["score"]) == (
                        target["labels"][index],
                        pytest.approx(predictions.class_scores()[image, query].max().item()),
                    )
                    if (layer, head) == (2, -1):
                        values.append(expected[0])
                        sizes.append(row["size"])
    assert summary["paibb"]["all"] == pytest.approx(np.mean(values), rel=1e-5)
    assert summary["paibb"]["pairs"] == summary["localisation"]["all"]["pairs"] == 3
    for size in localisation.SIZES:
        of_size = [value for value, this in zip(values, sizes, strict=True) if this == size]
        assert summary["localisation"][size]["pairs"] == len(of_size)
        assert summary["paibb"][size] == (pytest.approx(np.mean(of_size), rel=1e-5) if of_size else None)


def test_weights_with_signs_are_measured_by_their_magnitudes(setup):
    """All that is reported of a differential model is that of a model whose weights have lost their signs."""
    cfg, batch, predictions, indices = setup("differential")
    found = []
    for _ in range(2):
        looks = AttentionMeasures(cfg, sites=("encoder_self", "decoder_self"))
        looks.add(predictions, batch, indices)
        found.append(looks.summary({}))
        for site in looks.sites:
            assert all((layer < 0).any() for layer in getattr(predictions.attention, site)) == (len(found) == 1)
            setattr(predictions.attention, site, [layer.abs() for layer in getattr(predictions.attention, site)])
    for summary in found:  # what a head puts out does have signs
        for site in summary["sinks"].values():
            del site["output_share"]
    assert json.dumps(found[0]) == json.dumps(found[1])
    assert 0 < found[0]["paibb"]["all"] < 1


@pytest.fixture
def resting(setup):
    """The sums of a model whose heads rest on a corner in the first image, and on nothing in half of the other rows."""
    cfg, batch, predictions, indices = setup("sparse everywhere")
    maps, corner = predictions.attention, maps_without_gradients(predictions.attention)
    for weights in corner.decoder_cross:
        weights[0] *= 0.5
        weights[0, ..., 0] += 0.5
        weights[1:, :, ::2] = 0.0
    looks = AttentionMeasures(cfg)
    looks.add(replace_attention(predictions, corner), batch, indices)
    return looks.summary({f"decoder_cross.{layer}": [1.5] * 4 for layer in range(3)}), maps, corner, batch, indices


def maps_without_gradients(maps):
    return dataclasses.replace(maps, decoder_cross=[weights.clone() for weights in maps.decoder_cross])


def replace_attention(predictions, maps):
    return dataclasses.replace(predictions, attention=maps)


def test_paibb_without_the_sink_is_that_of_the_rest(resting):
    summary, _, maps, batch, indices = resting
    expected, with_sinks = [], []
    for image, target in enumerate(batch.targets):
        rows, columns = maps.valid_grid(image)
        extent = tuple(side / 8 for side in target["size"].tolist())
        for query, index in zip(*(side.tolist() for side in indices[image]), strict=True):
            heads = maps.as_images("decoder_cross", 2)[image, :, query, :rows, :columns].clone()
            for cells, name in ((heads, with_sinks), (heads.clone(), expected)):
                if name is expected and image == 0:
                    cells[:, 0, 0] = 0.0
                box = target["boxes"][index : index + 1]
                name.append(localisation.paibb(cells.mean(0)[None], box, extent).item())
    for name, values in {"paibb": with_sinks, "paibb_without_sink": expected}.items():
        assert summary["localisation"]["all"][name]["mean"][2] == pytest.approx(np.mean(values), rel=1e-4)
    assert np.mean(expected) > np.mean(with_sinks)


def test_empty_rows_are_counted_and_left_out_of_shapes(resting):
    summary, before, _, batch, _ = resting
    measured = summary["sparsity"]["decoder_cross"]["all"]
    queries = before.decoder_cross[0].shape[2]
    empty = np.mean([0.0, *[len(range(0, queries, 2)) / queries] * (len(batch.targets) - 1)])
    assert measured["empty"]["mean"] == [pytest.approx(empty)] * 3
    assert measured["mass"]["mean"] == [pytest.approx(1 - empty, rel=1e-5)] * 3
    gini = []
    for image in range(1, len(batch.targets)):
        valid = ~before.key_padding[image]
        gini.append(sparsity.gini(before.decoder_cross[0][image][:, 1::2, valid]).mean().item())
    first = ~before.key_padding[0]
    weights = before.decoder_cross[0][0][..., first] * 0.5
    weights[..., 0] += 0.5
    gini.append(sparsity.gini(weights).mean().item())
    assert measured["gini"]["mean"][0] == pytest.approx(np.mean(gini), rel=1e-4)
    assert summary["sinks"]["decoder_cross"]["null_mass"]["mean"] == [pytest.approx(empty, abs=1e-5)] * 3
    assert "NaN" not in json.dumps(summary)


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        ({"attention": {"decoder_cross": "softmax", "null_key": "zero"}}, 0.0, 1.0),
        ({"attention": {"decoder_cross": "sparsemax", "null_key": "learned"}}, 0.0, 1.0),
        ({"attention": {"decoder_cross": "softpick"}}, 0.0, 1.0),
        ({"attention": {"decoder_cross": "budget"}}, 1.0, 2.0),
        ({"attention": {"decoder_cross": "sigmoid"}}, 0.0, math.inf),
        ({"attention": {"decoder_cross": "relu"}}, 0.0, math.inf),
        ({"registers": 3}, 1.0, 1.0),
    ],
    ids=["softmax, null key", "sparsemax, null key", "softpick", "budget", "sigmoid", "relu", "registers"],
)
def test_rows_of_any_sum_are_measured(settings, least, most, batch_of, small, tiny_config):
    """The mass is that of the rows, shares stay shares, and nothing is NaN but what is not known."""
    model, batch = small(**settings), batch_of()
    own = {"num_heads": 4, "encoder_layers": 2, "decoder_layers": 3, "hidden_dim": 32, "num_classes": 5}
    cfg = tiny_config({f"model.{key}": value for key, value in (settings | own).items()})
    looks = AttentionMeasures(cfg, sites=("encoder_self", "decoder_self"))
    with torch.no_grad():
        predictions = model(batch.images, batch.padding_mask, need_attention=True)
    looks.add(predictions, batch, match(predictions, batch.targets, Criterion(**dict(cfg.loss)).costs))
    summary = looks.summary({})
    assert "NaN" not in json.dumps(summary)
    for layer, weights in enumerate(predictions.attention.decoder_cross):
        total = weights.sum(-1)
        assert least - 1e-5 <= total.min() and total.max() <= most + 1e-5
        assert summary["attention"]["decoder_cross"]["mass"][layer] == pytest.approx(total.mean().item(), rel=1e-4)
        missing = (1 - total).clamp(min=0).mean().item()
        found = summary["sinks"]["decoder_cross"]
        assert found["null_mass"]["mean"][layer] == pytest.approx(missing, rel=1e-3, abs=1e-5)
        assert 0 <= found["weight"]["mean"][layer] <= 1
    for name in ("paibb", "paibb_without_sink", "pointing"):
        assert all(0 <= value <= 1 + 1e-5 for value in summary["localisation"]["all"][name]["mean"])
    if "registers" in settings:  # which take a part of what cells look at
        assert max(summary["attention"]["encoder_self"]["mass"]) < 1
        assert min(summary["sinks"]["encoder_self"]["null_mass"]["mean"]) > 0


def test_the_sites_measured_are_those_of_the_settings(setup, tiny_config):
    cfg = setup("sparse everywhere")[0]
    every = ["encoder_self", "decoder_self", "decoder_cross"]
    assert AttentionMeasures(cfg).sites == every
    assert AttentionMeasures(cfg, sites=["decoder_self"]).sites == ["decoder_self", "decoder_cross"]
    assert AttentionMeasures(replace(cfg, {"evaluate.sites": []})).sites == ["decoder_cross"]
    plain = {"model.attention": {}, "evaluate.sites": every}
    assert AttentionMeasures(tiny_config(plain)).sites == every
    assert AttentionMeasures(tiny_config()).sites == ["decoder_cross"]
    assert AttentionMeasures(replace(setup("deformable")[0], {"evaluate.sites": every})).sites == every[1:]


def test_counting_padding_changes_the_number_of_keys_alone(measured, setup):
    """Gini indices and zeros as if columns of padding were keys without weight."""
    left_out, counted = (measured("sparse everywhere", count_padding=flag)[0] for flag in (False, True))
    _, _, predictions, _ = setup("sparse everywhere")
    maps = predictions.attention
    assert maps.key_padding.any()
    expected = [sparsity.gini(weights).mean().item() for weights in maps.decoder_cross]
    assert counted["attention"]["decoder_cross"]["gini"] == pytest.approx(expected, rel=1e-5)
    for name in ("support", "entropy"):
        np.testing.assert_allclose(*(x["attention"]["decoder_cross"][name] for x in (left_out, counted)), rtol=1e-5)
    for name in ("gini", "zeros"):
        for few, many in zip(*(x["attention"]["decoder_cross"][name] for x in (left_out, counted)), strict=True):
            assert many > few


def test_processes_put_together_are_one(tmp_path, setup, small):
    cfg, batch, predictions, indices = setup("sparse everywhere")
    whole = AttentionMeasures(cfg, tmp_path / "whole")
    whole.add(predictions, batch, indices)
    shards = [AttentionMeasures(cfg, tmp_path / "parts", process, 3) for process in range(3)]  # the last has no images
    model = small(**MODELS["sparse everywhere"])
    for looks, images in zip(shards, ([0, 2], [1]), strict=False):
        part = Batch(batch.pixels[images], batch.padding_mask[images], [batch.targets[i] for i in images])
        with torch.no_grad():
            found = model(part.images, part.padding_mask, need_attention=True)
        looks.add(found, part, match(found, part.targets, Criterion(**dict(cfg.loss)).costs))
    for looks in (whole, *shards):
        looks.close()
    whole.merge([whole.sums()])
    shards[0].merge([looks.sums() for looks in shards])
    for together, alone in zip(shards[0].sums(), whole.sums(), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    for name, keys in {
        "sparsity": ["site", "queries", "image_id", "layer", "head"],
        "located": ["image_id", "object", "layer", "head"],
        "sinks": ["site", "image_id", "layer", "head"],
    }.items():
        one, parts = (
            pd.read_parquet(tmp_path / folder / name).sort_values(keys, ignore_index=True)
            for folder in ("whole", "parts")
        )
        pd.testing.assert_frame_equal(one, parts, rtol=1e-3, atol=1e-5)
        assert len(list((tmp_path / "parts" / name).iterdir())) == 3


def test_alphas_in_effect(tiny_config):
    def settings(**attention):
        return tiny_config({"model.attention": attention}).model

    names = {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0}
    for name, alpha in names.items():
        assert alphas_in_effect(settings(decoder_cross=name), "decoder_cross", {}) == [[alpha] * 4] * 2
    assert alphas_in_effect(settings(encoder_self="entmax", alpha=1.7), "encoder_self", {}) == [[1.7] * 4]
    assert alphas_in_effect(settings(decoder_cross="tvmax"), "decoder_cross", {}) is None
    learned = {"decoder_cross.0": [1.1, 1.2], "decoder_cross.1": [1.3, 1.4], "encoder_self.0": [2.0, 2.0]}
    found = alphas_in_effect(settings(decoder_cross="alpha_entmax"), "decoder_cross", learned)
    assert found == [[1.1, 1.2], [1.3, 1.4]]


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config):
    """A trained run, and the weights that its training started from."""
    folder, started = tmp_path_factory.mktemp("measures") / "run", {}
    original = training.Trainer.run

    def remember(self):
        started.update({name: value.clone() for name, value in self.state.model.state_dict().items()})
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "run", remember)
        cfg = tiny_config({"model.attention.decoder_cross": "alpha_entmax", "train.epochs": 1, "train.seed": 5})
        results = training.train(cfg, folder)
    return SimpleNamespace(folder=folder, started=started, results=results)


def test_tables_of_a_run_agree_with_its_results(run):
    results = load_results(run.folder)
    assert results == run.results
    assert results["evaluate"]["paibb"] == "exact"
    assert results["sparsity"]["decoder_cross"]["alpha"] == [results["alpha"][f"decoder_cross.{i}"] for i in (0, 1)]
    table = sparsity_table([run.folder])
    assert table.columns[0] == "run" and set(table.run) == {"run"}
    per_image = table[table.queries == "all"].groupby(["layer", "image_id"])[list(sparsity.MEASURES)].mean()
    for name in sparsity.MEASURES:
        means = per_image[name].groupby("layer").mean().tolist()
        assert results["attention"]["decoder_cross"][name] == pytest.approx(means, rel=1e-4)
    located = located_table([run.folder])
    assert list(located.columns[:2]) == ["run", "image_id"]
    last = located[(located["layer"] == 1) & (located["head"] == -1)]
    assert len(last) == results["paibb"]["pairs"] == results["localisation"]["all"]["pairs"]
    assert results["paibb"]["all"] == pytest.approx(last.paibb.mean(), rel=1e-5)
    for name in localisation.MEASURES:
        entry = results["localisation"]["all"][name]
        assert entry["mean"][1] == pytest.approx(last[name].mean(), rel=1e-4)
        assert entry["std"][1] == pytest.approx(last[name].std(), rel=1e-4, abs=1e-6)
    resting, found = sinks_table([run.folder]), results["sinks"]["decoder_cross"]
    assert len(resting) == 13 * 2 * 4
    for name in sinks.MEASURES:
        means = resting.groupby(["layer", "head"], observed=True)[name].mean().unstack().to_numpy()
        expected = np.array(found[name]["heads"], dtype=float)
        np.testing.assert_allclose(expected, means, rtol=1e-4, atol=1e-6)
    most = resting.groupby(["layer", "head"])[["row", "column"]].agg(lambda x: list(x)).loc[(1, 2)]
    share = max(Counter(zip(*most, strict=True)).values()) / 13
    assert found["agreement"]["heads"][1][2] == pytest.approx(share)


def test_untrained_is_the_model_that_training_started_from(run):
    model = load_model(run.folder, "untrained")
    state = model.state_dict()
    assert state.keys() == run.started.keys()
    assert all(torch.equal(value, run.started[name]) for name, value in state.items())
    before = torch.random.get_rng_state()
    load_model(run.folder, "untrained")
    assert torch.equal(before, torch.random.get_rng_state())
    trained = load_model(run.folder).state_dict()
    assert any(not torch.equal(value, trained[name]) for name, value in state.items())


def test_an_untrained_evaluation_is_a_run_folder_of_its_own(run):
    kept = (run.folder / "results.json").read_bytes()
    results = evaluate_run(run.folder, "untrained")
    assert (run.folder / "results.json").read_bytes() == kept
    assert (results["checkpoint"], results["epoch"], results["global_step"]) == ("untrained", 0, 0)
    both = [run.folder, run.folder / "untrained"]
    for frame in (sparsity_table(both), located_table(both), layer_frame(both)):
        assert list(dict.fromkeys(frame.run)) == ["run", "untrained"]
    assert paibb_table(both)["pairs"].nunique() == 1  # the same objects
    alphas = results["sparsity"]["decoder_cross"]["alpha"]
    assert alphas == [[pytest.approx(1.5)] * 4] * 2
    assert (run.folder / "untrained" / "config.yaml").exists() and (run.folder / "untrained" / "examples").is_dir()


def test_settings_of_an_evaluation_can_be_overridden(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    exact = json.loads((folder / "results.json").read_text())
    thesis = evaluate_run(folder, overrides={"evaluate.paibb": "thesis", "evaluate.confident_score": "0.9"})
    assert thesis["evaluate"]["paibb"] == "thesis"
    assert thesis["paibb"]["pairs"] == exact["paibb"]["pairs"]
    assert 0 < abs(thesis["paibb"]["all"] - exact["paibb"]["all"]) < 0.05
    with pytest.raises(ConfigError, match=r"model\.dropout cannot change in an evaluation"):
        evaluate_run(folder, overrides={"model.dropout": 0.5})


def test_runs_without_tables_say_what_to_do(tmp_path):
    with pytest.raises(RunError, match=r"measure the run \(again\)"):
        sparsity_table([tmp_path])
    with pytest.raises(RunError, match="located"):
        located_table([tmp_path])
