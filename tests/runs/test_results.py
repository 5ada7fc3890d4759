"""Saved results as tables."""

import pandas as pd
import pytest

from detrlib import runs
from detrlib.config import load_config, save_config
from detrlib.engine.evaluate import save_results
from detrlib.errors import RunError
from detrlib.files import write_json
from detrlib.metrics.detection import match_detections
from detrlib.metrics.seeds import seed_table
from detrlib.runs import results as frames


def results(ap):
    detection = dict.fromkeys(("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"), ap)
    cross = {"gini": [0.2, 0.4], "zeros": [0.0, 0.5]}
    return {"detection": detection, "attention": {"decoder_cross": cross}, "paibb": {"all": 0.75}}


def test_tables_of_finished_runs(tmp_path):
    for name, ap in (("b", 0.5), ("a", 0.25)):
        write_json(tmp_path / name / "results.json", results(ap))
    (tmp_path / "unfinished").mkdir()
    found = [tmp_path / "a", tmp_path / "b"]
    table = frames.results_table(found)
    assert table.pop("floor").isna().all()  # results of older runs have none
    assert list(table.index) == ["a", "b"] and table.index.name == "run"
    assert table.loc["a"].to_dict() == pytest.approx(
        results(0.25)["detection"] | {"Gini": 0.3, "zeros": 0.25, "PAIBB": 0.75}
    )
    layers = frames.layer_frame(found[:1])[["run", "metric", "layer", "value"]].values.tolist()
    assert layers == [["a", "gini", 0, 0.2], ["a", "gini", 1, 0.4], ["a", "zeros", 0, 0.0], ["a", "zeros", 1, 0.5]]
    assert len(frames.layer_frame(found, "encoder_self")) == 0
    with pytest.raises(RunError, match=r"has no results\.json: not a run, or not finished"):
        frames.results_table([tmp_path / "unfinished"])


def test_what_coco_calls_undefined_is_missing_in_every_table(tmp_path):
    """results.json keeps COCO's -1, so that old runs are read the same."""
    numbers = results(0.5)
    numbers["detection"] |= {"AP_small": -1, "AR_small": -1.0, "per_class": {"a": {"AP": -1, "AP50": -1}}}
    numbers["detection"]["per_class"]["b"] = {"AP": 0.5, "AP50": 0.75}
    run_dir = tmp_path / "a"
    write_json(run_dir / "results.json", numbers)
    save_config(load_config(), run_dir / "config.yaml")
    assert frames.results_table([run_dir]).loc["a"].isna().to_dict()["AP_small"]
    assert frames.results_frame([run_dir]).iloc[0][["AP_small", "AR_small"]].isna().all()
    by_class = frames.class_table([run_dir])
    assert by_class["class"].tolist() == ["b", "a"] and by_class.AP.isna().tolist() == [False, True]
    assert by_class.note.tolist() == ["", frames.NO_OBJECTS]


def test_the_floor_stands_beside_ap(tmp_path):
    numbers = results(0.5) | {"floor": {"AP": 0.2, "AP50": 0.6, "AP_small": -1, "per_class": {"a": {"AP": 0.1}}}}
    numbers["detection"]["per_class"] = {"a": {"AP": 0.5, "AP50": 0.75}, "b": {"AP": 0.4, "AP50": 0.5}}
    write_json(tmp_path / "a" / "results.json", numbers)
    save_config(load_config(), tmp_path / "a" / "config.yaml")
    found = [tmp_path / "a"]
    assert frames.results_table(found).loc["a", "floor"] == frames.results_frame(found).loc[0, "floor"] == 0.2
    assert frames.floor_numbers(tmp_path / "a").dropna().to_dict() == {"AP": 0.2, "AP50": 0.6}
    by_class = frames.class_table(found)
    assert by_class["floor"].tolist()[0] == 0.1 and by_class["floor"].isna().tolist() == [False, True]


def write_results(folder, gini, paibb):
    located = {"all": {"pairs": 4, "paibb": {"mean": paibb}, "pointing": {"mean": [0.0, 1.0]}}}
    attention = {"decoder_cross": {"gini": gini}}
    write_json(folder / "results.json", {"attention": attention, "localisation": located, "names": {"3": "cup"}})


def test_layers_before_and_after_training(tmp_path):
    write_results(tmp_path / "a-seed1", [0.8, 0.9], [0.4, 0.5])
    write_results(tmp_path / "a-seed1" / "untrained", [0.1, 0.2], [0.1, 0.1])
    write_results(tmp_path / "b", [0.7, 0.6], [0.3, 0.2])
    frame = frames.layer_frame([tmp_path / "a-seed1", tmp_path / "b"]).set_index(["group", "state", "metric", "layer"])
    assert frame.loc[("a", "untrained", "gini", 1), "value"] == 0.2
    assert frame.loc[("a", "trained", "paibb", 1), "value"] == 0.5
    assert frame.loc[("b", "trained", "pointing", 1), "value"] == 1.0
    assert ("b", "untrained", "gini", 0) not in frame.index


def test_runs_are_chosen_by_what_they_have_and_by_group(tmp_path):
    folders = [tmp_path / name for name in ("a-seed1", "a-seed2", "b_seed1")]
    runs.save_tables(folders[1], {"located": pd.DataFrame({"x": [1]})})
    assert frames.having(folders, "located") == folders[1:2]
    assert frames.first_of_groups(folders) == [folders[0], folders[2]]
    assert frames.measures(folders[1:2], "located").to_dict("list") == {"run": ["a-seed2"], "x": [1]}


def test_matches_come_back_as_they_were_stored(tmp_path):
    box = {"image_id": 1, "category_id": 3, "bbox": [4.0, 5.0, 40.0, 30.0]}
    truth = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 3, "name": "cup"}]}
    truth["annotations"] = [box | {"id": 1, "area": 1200.0, "iscrowd": 0}]
    detections = [box | {"score": 0.9}, box | {"score": 0.2, "image_id": 2}]
    save_results(tmp_path, {}, detections, truth)
    for back, made in zip(frames.load_matches(tmp_path), match_detections(truth, detections), strict=True):
        pd.testing.assert_frame_equal(back, made)
    with pytest.raises(RunError, match=r"matches\.parquet"):
        frames.load_matches(tmp_path / "other")


def test_groups_are_names_without_the_seed():
    labels = [
        "study/softmax-seed1",
        "softmax_seed12",
        "softmax-seed1/test2017",
        "seed3",
        "softmax-seed1-long",
        "softmax-seeds",
    ]
    groups = ["study/softmax", "softmax", "softmax/test2017", "seed3", "softmax-seed1-long", "softmax-seeds"]
    assert [frames.group_of(label) for label in labels] == groups


def test_results_frame(tmp_path, tiny_config):
    for number in (1, 2):
        folder = tmp_path / f"sparse-seed{number}"
        folder.mkdir()
        save_config(
            tiny_config({"train.seed": number, "model.attention.decoder_cross": "sparsemax"}), folder / "config.yaml"
        )
        located = {"all": {"pairs": 4, "paibb": {"mean": [0.1, 0.5]}}}
        results = {"detection": {"AP": 0.1 * number, "per_class": {}}, "images": 13, "localisation": located}
        write_json(folder / "results.json", results | {"attention": {"decoder_cross": {"gini": [0.2, 0.4]}}})
    frame = frames.results_frame(sorted(tmp_path.iterdir()))
    assert frame["group"].tolist() == ["sparse", "sparse"] and frame["seed"].tolist() == [1, 2]
    row = frame.iloc[1].to_dict()
    expected = {"run": "sparse-seed2", "AP": 0.2, "decoder_cross": "sparsemax", "decoder_self": "softmax", "images": 13}
    assert {name: row[name] for name in expected} == expected
    assert row["decoder_cross/gini"] == pytest.approx(0.3) and row["paibb/all"] == 0.5
    assert seed_table(frame, ["AP"])["n"].tolist() == [2]


def test_rows_by_site_are_those_of_sites_that_were_measured():
    columns = {"decoder_cross/gini": [0.5, 0.6], "encoder_self/gini": [0.7, None], "encoder_self/zeros": [0.1, None]}
    frame = pd.DataFrame({"group": ["a", "b"], "seed": [1, 2], **columns})
    table = frames.by_site(frame, ["gini", "zeros"]).set_index("group")
    assert list(table.index) == ["encoder_self: a", "decoder_cross: a", "decoder_cross: b"]
    assert table["gini"].tolist() == [0.7, 0.5, 0.6] and table["zeros"].isna().tolist() == [False, True, True]
    assert table["seed"].tolist() == [1, 1, 2]


def test_a_run_of_official_weights_has_no_results_before_it_is_evaluated(tmp_path):
    write_json(tmp_path / "results.json", {"imported": "detr-r50.pth"})
    for table in (frames.results_table, frames.results_frame, frames.final_alphas):
        with pytest.raises(RunError, match="not evaluated yet"):
            table([tmp_path])
