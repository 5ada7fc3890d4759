"""What training has logged as tables."""

import pytest

from detrlib import runs
from detrlib.errors import RunError
from detrlib.runs import history


def record(step, epoch, **values):
    return {"global_step": step, "epoch": epoch} | values


def test_metrics_and_alphas_as_tidy_tables(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for run_dir in (a, b):
        run_dir.mkdir()
    alphas = {"alpha/decoder_cross.layer_0-head_3": 1.25, "alpha/encoder_self.layer_11-head_0": 1.5}
    alphas["alpha/decoder_self"] = 1.125  # annealed, not learned
    runs.append_metrics(a, record(4, 1, **{"train/loss": 2.0}, **alphas))
    runs.append_metrics(b, record(8, 2, **{"train/loss": float("nan"), "val/AP": 0.25}))
    frame = history.metrics_frame([a, b])
    assert list(frame.columns) == ["run", "global_step", "epoch", "metric", "value"]
    assert frame[frame.metric == "train/loss"].values.tolist() == [["a", 4, 1, "train/loss", 2.0]]
    assert frame[frame.run == "b"].values.tolist() == [["b", 8, 2, "val/AP", 0.25]]
    rows = history.alpha_frame([a, b])[["run", "epoch", "site", "layer", "head", "value"]].values.tolist()
    assert rows == [["a", 1, "decoder_cross", 0, 3, 1.25], ["a", 1, "encoder_self", 11, 0, 1.5]]
    assert len(history.alpha_frame([b])) == 0 and len(history.metrics_frame([])) == 0


def test_numbers_that_coco_calls_undefined_are_left_out(tmp_path):
    runs.append_metrics(tmp_path, record(4, 1, **{"detection/AP": 0.5, "detection/AP_small": -1, "extra/x": -1}))
    assert history.metrics_frame([tmp_path]).metric.tolist() == ["detection/AP", "extra/x"]


def test_published_curves(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_text("metric,model,epoch,value\nmAP,softmax,0,0.1\nmAP,softmax,1,0.2\n")
    curves = history.published_curves(path)
    assert curves.to_dict("list") == {
        "run": ["softmax"] * 2,
        "epoch": [0, 1],
        "metric": ["mAP"] * 2,
        "value": [0.1, 0.2],
    }
    path.write_text("metric,epoch,value\n")
    with pytest.raises(RunError, match=r"curves.csv lacks run; expected columns metric, model"):
        history.published_curves(path)
    with pytest.raises(RunError, match=r"none.csv is no table of curves"):
        history.published_curves(tmp_path / "none.csv")
