"""Tested explanations of several runs: areas and gains, and runs that differ in one setting."""

import numpy as np
import pandas as pd
import pytest

from detrlib.config import load_config, save_config
from detrlib.errors import ConfigError, RunError
from detrlib.metrics.statistics import comparison_table
from detrlib.runs.explained import compare_explained, effect_of, explained_frame


@pytest.fixture
def explained_run(tmp_path):
    def explained_run(name, shift=0.0, images=range(6), methods=("raw", "odam", "box"), **settings):
        """A run folder with the areas of three methods, of which raw is `shift` worse than 0.2 and better than 0.6."""
        run_dir, random = tmp_path / name, np.random.default_rng(0)
        (run_dir / "measures").mkdir(parents=True)
        save_config(load_config(overrides=settings), run_dir / "config.yaml")
        rows = [
            {"image_id": i, "method": method, "deletion_similarity": d + own, "insertion_similarity": 0.6 - d - own}
            for i, d in zip(images, 0.2 + 0.1 * random.random(len(images)), strict=True)
            for method, own in {"raw": shift, "odam": 0.1, "box": -0.05}.items()
            if method in methods
        ]
        pd.DataFrame(rows).to_parquet(run_dir / "measures" / "faithfulness.parquet")
        return run_dir

    return explained_run


def groups(make):
    """Three seeds each of two transforms, by the second of which raw attention explains worse."""
    return [
        make(f"{name}-seed{seed}", worse + 0.002 * seed, **{"model.attention.decoder_cross": name, "train.seed": seed})
        for name, worse in (("softmax", 0.0), ("sparsemax", 0.05))
        for seed in (1, 2, 3)
    ]


def test_areas_and_gains_of_every_run_and_method(explained_run):
    runs = groups(explained_run)
    frame = explained_frame(runs)
    assert len(frame) == 6 * 3 and set(frame["group"]) == {"softmax", "sparsemax"} and (frame["images"] == 6).all()
    row = frame[(frame["run"] == "sparsemax-seed2") & (frame["method"] == "raw")].iloc[0]
    assert row["seed"] == 2 and row["deletion gain"] == pytest.approx(-0.05 - 0.054)
    assert row["insertion gain"] == pytest.approx(-0.05 - 0.054)
    areas = pd.read_parquet(runs[4] / "measures" / "faithfulness.parquet").query("method == 'raw'")
    assert row["deletion"] == pytest.approx(areas["deletion_similarity"].mean())
    without = explained_frame([explained_run("boxless", methods=("raw",))])
    assert without["deletion gain"].isna().all() and without["deletion"].notna().all()
    assert explained_frame([]).empty


def test_runs_that_differ_in_one_setting_are_compared_over_seeds_and_images(explained_run):
    runs = groups(explained_run)
    table = effect_of(runs, "model.attention.decoder_cross").set_index("metric")
    assert list(table.index) == ["deletion", "insertion", "deletion gain", "insertion gain"]
    assert (table["first"] == "sparsemax").all() and (table["second"] == "softmax").all()
    for metric, sign in (("deletion", 1), ("insertion", -1), ("deletion gain", -1), ("insertion gain", -1)):
        row = table.loc[metric]
        assert row["difference"] == pytest.approx(sign * 0.05) and row["paired_seeds"] == 3
        assert row["low"] < row["difference"] < row["high"] and row["verdict"] == "established"
        # The same images, moved by the same: no spread over images.
        assert (row["images"], row["images_low"], row["images_high"]) == pytest.approx((6, sign * 0.05, sign * 0.05))
    same = effect_of(runs, "model.attention.decoder_cross", "odam")
    assert same["difference"].abs().max() == pytest.approx(0.0)


def test_groups_that_are_named_are_compared_as_those_found_by_a_setting(explained_run):
    runs = groups(explained_run)
    found = compare_explained(runs, [("sparsemax", "softmax"), ("sparsemax", "absent")])
    pd.testing.assert_frame_equal(found, effect_of(runs, "model.attention.decoder_cross"))
    gains = compare_explained(runs, metrics=["insertion gain"])  # all pairs, in the order of the runs
    assert gains[["first", "second", "metric"]].values.tolist() == [["softmax", "sparsemax", "insertion gain"]]
    assert gains["difference"].tolist() == pytest.approx([0.05])
    assert "over images, seeds fixed" in comparison_table(gains)
    assert compare_explained(runs[:2]).empty and comparison_table(compare_explained([])).empty


def test_only_images_that_both_were_explained_on_count(explained_run):
    runs = [
        explained_run("a-seed1", 0.0, range(6), **{"train.seed": 1}),
        explained_run("b-seed1", 0.1, range(2, 9), **{"train.seed": 1, "model.attention.decoder_cross": "sparsemax"}),
    ]
    table = effect_of(runs, "model.attention.decoder_cross")
    assert (table["images"] == 4).all() and table["low"].isna().all() and table["images_low"].notna().all()


def test_null_keys_and_registers_are_compared_with_runs_that_have_none(explained_run):
    sites = {"model.attention.null_key_sites": ["decoder_cross"]}
    runs = [explained_run("plain-seed1", 0.1)]
    runs += [explained_run(f"{key}-seed1", **{"model.attention.null_key": key} | sites) for key in ("zero", "learned")]
    runs += [explained_run("registers-seed1", 0.2, **{"model.registers": 4})]
    null_keys = effect_of(runs, "model.attention.null_key")
    assert set(zip(null_keys["first"], null_keys["second"], strict=True)) == {("zero", "plain"), ("learned", "plain")}
    assert null_keys.query("metric == 'insertion gain'")["difference"].tolist() == pytest.approx([0.1, 0.1])
    registers = effect_of(runs, "model.registers").set_index("metric")
    assert registers.loc["insertion gain", "first"] == "registers"
    assert registers.loc["insertion gain", "difference"] == pytest.approx(-0.1)


def test_runs_without_a_counterpart_are_left_out(explained_run):
    runs = [*groups(explained_run), explained_run("wide-seed1", **{"model.hidden_dim": 512})]
    assert set(effect_of(runs, "model.attention.decoder_cross")["first"]) == {"sparsemax"}
    assert effect_of(runs[:3], "model.attention.decoder_cross").empty
    assert effect_of([], "model.attention.decoder_cross").empty
    assert effect_of(runs, "model.attention.decoder_cross", "relevance").empty


def test_settings_and_runs_that_are_not_there_are_named(explained_run, tmp_path):
    run = explained_run("one")
    with pytest.raises(ConfigError, match=r"config\.yaml: no setting 'model\.nonsense'"):
        effect_of([run], "model.nonsense")
    (run / "measures" / "faithfulness.parquet").unlink()
    with pytest.raises(RunError, match="detrlib explain"):
        explained_frame([run])
