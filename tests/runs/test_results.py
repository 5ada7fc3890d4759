"""Saved results as tables, and tables as text."""

import pandas as pd
import pytest

from detrlib import runs
from detrlib.config import save_config
from detrlib.engine.evaluate import save_results, split_folder
from detrlib.errors import RunError
from detrlib.files import write_json
from detrlib.metrics.bootstrap import AP_METRICS, average_precision
from detrlib.metrics.detection import coco_ap, match_detections
from detrlib.metrics.statistics import seed_table
from detrlib.runs import results as frames
from detrlib.runs.results import load_matches


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


def test_objects_come_once(tmp_path):
    write_results(tmp_path, [0.5], [0.5])
    rows = [(7, 3, 64.0, layer, head) for layer in (0, 1) for head in (-1, 0)]
    located = pd.DataFrame(rows, columns=["image_id", "label", "area", "layer", "head"])
    runs.save_tables(tmp_path, {"located": located})
    assert frames.objects_frame([tmp_path / "none", tmp_path]).to_dict("records") == [
        {"image_id": 7, "area": 64.0, "category": "cup", "crowd": False}
    ]
    assert frames.objects_frame([]).empty


def test_published_curves(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_text("metric,model,epoch,value\nmAP,softmax,0,0.1\nmAP,softmax,1,0.2\n")
    curves = frames.published_curves(path)
    assert curves.to_dict("list") == {
        "run": ["softmax"] * 2,
        "epoch": [0, 1],
        "metric": ["mAP"] * 2,
        "value": [0.1, 0.2],
    }
    path.write_text("metric,epoch,value\n")
    with pytest.raises(RunError, match=r"curves.csv lacks run; expected columns metric, model"):
        frames.published_curves(path)
    with pytest.raises(RunError, match=r"none.csv is no table of curves"):
        frames.published_curves(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["maps", "untrained", "..", "a/b"])
def test_a_split_cannot_take_a_folder_of_the_run(tmp_path, name):
    with pytest.raises(RunError, match="cannot name a folder of results"):
        split_folder(tmp_path, name)


def test_a_split_does_not_replace_results_on_other_data(tmp_path):
    assert split_folder(tmp_path, "test2017") == tmp_path / "test2017"
    write_json(tmp_path / "test2017" / "results.json", {"on": "elsewhere.json"})
    with pytest.raises(RunError, match="holds results on other data"):
        split_folder(tmp_path, "test2017")


def test_evaluation_stores_matches(tmp_path):
    boxes = {7: [0, 0, 20, 20], 8: [5, 5, 40, 30]}
    truth = {
        "images": [{"id": image, "height": 64, "width": 64} for image in boxes],
        "categories": [{"id": 3, "name": "cup"}],
        "annotations": [
            {"id": image, "image_id": image, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for image, box in boxes.items()
        ],
    }
    detections = [{"image_id": image, "category_id": 3, "bbox": box, "score": 0.5} for image, box in boxes.items()]
    detections[1]["bbox"] = [9, 9, 40, 30]
    save_results(tmp_path, {"detection": coco_ap(truth, detections)}, detections, truth)
    stored, made = load_matches(tmp_path), match_detections(truth, detections)
    for back, before in zip(stored, made, strict=True):
        pd.testing.assert_frame_equal(back, before)
    assert average_precision(stored) == pytest.approx(
        {name: runs.load_results(tmp_path)["detection"][name] for name in AP_METRICS}
    )
    (tmp_path / "measures" / "matches.parquet").write_bytes(b"cut short")
    with pytest.raises(RunError, match=r"matches\.parquet"):
        load_matches(tmp_path)
    with pytest.raises(RunError, match=r"other.*matches\.parquet"):
        load_matches(tmp_path / "other")


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
