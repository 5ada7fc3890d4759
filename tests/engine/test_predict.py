"""Any picture through any detector: the detections of an evaluation, maps of what is asked for, and faults named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrlib.config import load_config
from detrlib.data import build_dataset
from detrlib.data.pictures import find_pictures
from detrlib.engine import predict as module
from detrlib.engine.evaluate import load_model
from detrlib.engine.loop import train
from detrlib.engine.predict import (
    check_view,
    chosen_device,
    models_and_pictures,
    open_detector,
    open_detectors,
    predict,
    predict_each,
    sites_of,
)
from detrlib.errors import ConfigError, DataError, ModelError, RunError, WeightsError
from detrlib.runs.examples import load_examples


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_config):
    """A finished run whose evaluation has stored the maps of its examples at two sites."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    sites = {"evaluate.store_sites": ["decoder_cross", "encoder_self"]}
    train(tiny_config({"train.epochs": 1, "model.attention.decoder_cross": "sparsemax"} | sites), folder)
    return folder


@pytest.fixture(scope="module")
def drawn(run_dir):
    """The folder of the run's validation pictures: drawn shapes, as PNG."""
    return build_dataset(load_config(run_dir / "config.yaml").data, "val").images_path


@pytest.fixture
def photos(tmp_path):
    """Two pictures of other sizes than those of the run."""
    random = np.random.default_rng(0)
    for name, shape in {"a.png": (50, 90, 3), "b.png": (120, 40, 3)}.items():
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def test_drawn_shapes_give_the_detections_of_an_evaluation(run_dir, drawn):
    evaluated = json.loads((run_dir / "predictions.json").read_text())
    pictures = predict(run_dir, drawn, min_score=0, progress=False)
    assert len(pictures) == 13 and all(isinstance(one.picture, str) for one in pictures)
    for one in pictures:
        before = [row for row in evaluated if row["image_id"] == one.image_id]
        assert len(before) == len(one) > 0
        for row, then in zip(one.to_coco(), before, strict=True):
            assert row["score"] == pytest.approx(then["score"], abs=1e-5)
        # Where scores are all but equal their order may differ.
        own = {(row["category_id"], round(row["score"], 3)): row["bbox"] for row in one.to_coco()[:5]}
        for row in before[:3]:
            key = row["category_id"], round(row["score"], 3)
            if sum(round(other["score"], 3) == key[1] for other in before) == 1 and key in own:
                assert own[key] == pytest.approx(row["bbox"], abs=1e-2)


@pytest.mark.gpu
def test_a_gpu_sees_what_the_cpu_sees(run_dir, drawn, gpu):
    here, there = (predict(run_dir, drawn, min_score=0, device=name, progress=False) for name in ("cpu", gpu.type))
    for one, other in zip(here, there, strict=True):
        assert np.allclose(one.scores, other.scores, atol=1e-4)
        ours, theirs = (sorted(zip(x.queries, x.labels, x.boxes.tolist(), strict=True)) for x in (one, other))
        assert [row[:2] for row in ours] == [row[:2] for row in theirs]
        assert np.allclose([row[2] for row in ours], [row[2] for row in theirs], atol=0.05)


def test_maps_are_those_that_an_evaluation_stores(run_dir, drawn):
    stored = load_examples(run_dir)[0]
    path = drawn / f"{stored.image_id:012d}.png"
    (one,) = predict(run_dir, path, min_score=0, attention=["encoder_self"], progress=False)
    assert one.example.sites == ["decoder_cross", "encoder_self"] and np.allclose(one.example.extent, stored.extent)
    assert np.allclose(one.example.maps("encoder_self"), stored.maps("encoder_self"), atol=2e-3)
    (query, other), *_ = np.argwhere(one.queries[:, None] == stored.queries)
    assert np.allclose(one.example.maps()[:, :, query], stored.maps()[:, :, other], atol=2e-3)
    assert one.example.shape() == one.example.maps().shape and not len(one.example.true_boxes)
    assert np.allclose(one.example.boxes, one.boxes), "the picture is small: it is kept as it is"


def test_sparsity_is_that_of_the_picture(run_dir, photos):
    (one, _) = predict(run_dir, photos, min_score=0, attention=["decoder_self", "encoder_self"], progress=False)
    table = one.sparsity.set_index(["site", "layer", "queries"])
    cells = np.prod(one.example.shape()[-2:])
    for layer in (0, 1):
        row, maps = table.loc[("decoder_cross", layer, "all")], one.example.maps(layer=layer)
        assert row["keys"] == cells
        assert row["support"] == pytest.approx((maps > 0).sum((2, 3)).mean(), rel=1e-4), "every query is detected"
        assert row["zeros"] == pytest.approx((maps == 0).mean(), rel=1e-4) and 0 < row["gini"] < 1
    assert table.loc[("decoder_self", 0, "all"), "keys"] == 10
    assert table.loc[("encoder_self", 0, "all"), "support"] == pytest.approx(cells)


def test_a_picture_alone_and_beside_others(run_dir, photos):
    """Padding changes nothing, and boxes are in pixels of the picture."""
    together = predict(run_dir, photos, min_score=0, batch_size=2, progress=False)
    alone = predict(run_dir, photos, min_score=0, batch_size=1, progress=False)
    assert [one.size for one in together] == [(50, 90), (120, 40)]
    for one, other in zip(together, alone, strict=True):
        assert np.allclose(np.sort(one.scores), np.sort(other.scores), atol=1e-5)
        best = np.argmax(one.scores), np.argmax(other.scores)
        assert np.allclose(one.boxes[best[0]], other.boxes[best[1]], atol=1e-2)
        assert one.boxes[:, 2].max() < 1.6 * one.size[1]


def test_a_model_with_its_settings_and_names(run_dir, photos):
    cfg, model = load_config(run_dir / "config.yaml"), load_model(run_dir)
    best = predict(run_dir, photos / "a.png", min_score=0, progress=False)[0]
    given = predict((model, cfg, {}), photos / "a.png", min_score=0, progress=False)[0]
    assert given.names[0].isdecimal() and given.scores[0] == pytest.approx(best.scores[0], abs=1e-6)
    detector = open_detector((model, cfg, {2: "square"}))
    named = predict(detector, photos / "a.png", min_score=0, progress=False)[0]
    assert set(named.names) <= {"square"}, "labels without a name are no classes"


def test_several_models_side_by_side_and_files_that_cannot_be_decoded(run_dir, photos):
    content = (photos / "a.png").read_bytes()
    (photos / "cut.png").write_bytes(content[: len(content) // 2])
    detectors, pictures, left_out = open_detectors([str(run_dir), f"{run_dir}/"]), find_pictures(photos), {}
    assert len({each.label for each in detectors}) == 2
    options = {"min_score": 0, "progress": False}
    both = list(predict_each(detectors, pictures, left_out=left_out, **options))
    assert [[one.source.title for one in pair] for pair in both] == [["a.png"] * 2, ["b.png"] * 2]
    assert list(left_out) == [str(photos / "cut.png")] and "truncated" in left_out[str(photos / "cut.png")]
    with pytest.raises(DataError, match=r"cut\.png"):
        list(predict_each(detectors, pictures, **options))


def test_faults_are_named_before_a_model_is_run(run_dir, photos, monkeypatch):
    (photos / "text.jpg").write_text("no picture")
    monkeypatch.setattr(module, "_detected", None)
    with pytest.raises(DataError, match=r"text\.jpg"):
        predict(run_dir, photos)
    (photos / "text.jpg").unlink()
    with pytest.raises(WeightsError, match="no-such-run"):
        predict("no-such-run", photos)
    with pytest.raises(RunError, match="epoch-0007"):
        predict(run_dir, photos, checkpoint="epoch-0007")
    with pytest.raises(ConfigError, match="decoder"):
        predict(run_dir, photos, attention=["decoder"])
    with pytest.raises(ConfigError, match="min_score 2"):
        predict(run_dir, photos, min_score=2)
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(ConfigError, match=device):
            predict(run_dir, photos, device=device)


def test_sites_and_devices():
    assert sites_of(False) == () and sites_of(True) == ("decoder_cross",)
    assert sites_of("decoder_self") == ("decoder_cross", "decoder_self")
    assert chosen_device("cpu") == torch.device("cpu")


def test_views_that_a_model_does_not_have(run_dir, tiny_config, small):
    detector = open_detector(str(run_dir))
    check_view([detector], "encoder_self", 0, 3)
    for site, layer, head, words in (
        ("decoder_cross", 2, "mean", "no layer 2"),
        ("encoder_self", -2, "mean", "no layer -2"),
        ("decoder_cross", -1, 4, "no head 4"),
    ):
        with pytest.raises(ModelError, match=words):
            check_view([detector], site, layer, head)
    cfg = tiny_config({"model.encoder_layers": 0})
    with pytest.raises(ModelError, match="encoder_layers"):
        check_view([open_detector((small(encoder_layers=0), cfg, {}))], "encoder_self", -1, "mean")


def test_words_are_told_apart(run_dir, photos, monkeypatch):
    monkeypatch.chdir(photos)
    monkeypatch.setattr(module, "RUNS", run_dir.parent)
    assert models_and_pictures(["tiny", "detr-r50", "a.png", "*.png", "."]) == (
        ["tiny", "detr-r50"],
        ["a.png", "*.png", "."],
    )
    assert models_and_pictures([str(run_dir), "absent.jpg"]) == ([str(run_dir)], ["absent.jpg"]), "it is named later"
    for name in ("tiny", "detr-r50"):
        Path(name).mkdir()
        with pytest.raises(ConfigError, match=rf"'{name}' may be.*\./{name}"):
            models_and_pictures([name, "a.png"])
        assert models_and_pictures([str(run_dir), f"./{name}"])[1] == [f"./{name}"]
    with pytest.raises(ConfigError, match="no model is named"):
        models_and_pictures(["a.png"])
    with pytest.raises(ConfigError, match="no pictures are named beside detr-r101"):
        models_and_pictures(["detr-r101"])
