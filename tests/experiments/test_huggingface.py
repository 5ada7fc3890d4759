"""The table of sinks and zeros: what it measures, of which weights, and that the models are left as they were."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from detrlib.checkpoints.adapted import write_adapted
from detrlib.checkpoints.source import Source
from detrlib.config import load_config
from detrlib.config.huggingface import KINDS
from detrlib.errors import ConfigError, DataError, WeightsError
from detrlib.experiments import huggingface
from detrlib.experiments.huggingface import attention_passes, attention_table, open_detector, page
from detrlib.metrics.sparsity import zeros_ratio
from detrlib.models import build_model

transformers = pytest.importorskip("transformers")
TRANSFORMS = ["softmax", "sparsemax", "entmax15", "entmax", "alpha_entmax", "tvmax"]


@pytest.fixture
def tiny_models(monkeypatch, huggingface_settings):
    """Types open as small detectors."""

    def small(overrides):
        settings = huggingface_settings(overrides["model"]["type"])["model"] | overrides["model"]
        return load_config(overrides=overrides | {"model": settings})

    monkeypatch.setattr(huggingface, "load_config", small)


@pytest.fixture
def trained(tmp_path, huggingface_settings):
    """A folder of weights, as `from_pretrained` reads it, of a detector that saw pictures of a size of its own."""
    torch.manual_seed(0)
    cfg = load_config(overrides=huggingface_settings("detr") | {"data.image_size": 96})
    model = build_model(cfg.model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.normal_(0, 0.2)
    names = {0: "dog", 1: "aeroplane", 2: "cat", 3: "couch", 4: "bird"}
    write_adapted(Source("theirs", cfg, model.state_dict(), names, tmp_path), tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def table(*given, **options):
    """A row for each site, of one model and transform."""
    return attention_table(attention_passes(*given, cpu=True, **options)).set_index("site")


def test_every_site_under_every_transform(tiny_models):
    passes = attention_passes(["detr", "rt_detr_v2"], TRANSFORMS, size=128, alpha=1.25, cpu=True)
    rows = attention_table(passes).set_index(["model", "site", "transform"])
    keys = rows["keys"].groupby(level=[0, 1]).first()
    assert keys["detr"].to_dict() == {"encoder_self": 16, "decoder_self": 11, "decoder_cross": 16}
    assert keys["rt_detr_v2"].to_dict() == {"encoder_self": 16, "decoder_self": 11, "decoder_cross": 12}
    grids = {("detr", "encoder_self"), ("detr", "decoder_cross"), ("rt_detr_v2", "encoder_self")}
    for (model, site), own in rows.groupby(level=[0, 1]):
        zeros = own["zeros"].droplevel([0, 1])
        assert zeros["softmax"] < 0.01 < zeros["entmax"] < zeros["entmax15"] < zeros["sparsemax"] < 1
        assert ("tvmax" in zeros) == ((model, site) in grids)
        assert zeros["alpha_entmax"] == pytest.approx(zeros["entmax15"], abs=1e-3)  # where it starts
        assert own["value_norm"].notna().all() == ((model, site) != ("rt_detr_v2", "decoder_cross"))


def test_null_keys_take_weight_where_keys_are_scored(tiny_models):
    both = [table(["rt_detr_v2"], null_keys=[null_key], size=128)["null_mass"] for null_key in ("none", "zero")]
    assert list(both[1].index) == ["encoder_self", "decoder_self"] and list(both[0].index)[:2] == list(both[1].index)
    assert both[0][:2].max() < 1e-5 < 1e-3 < both[1].min()


def test_as_they_are_all_sites_are_measured_in_one_pass(trained, picture):
    options = {"pictures": [picture], "cpu": True}
    (one,) = attention_passes([str(trained)], **options)
    assert one["changed"] == ["encoder_self", "decoder_self", "decoder_cross"] == list(one["sites"])
    found = attention_passes([str(trained)], ["softmax", "sparsemax"], sites=["decoder_self"], **options)
    assert [each["changed"] for each in found] == [["decoder_self"]] * 2
    expected = one["sites"]["decoder_self"]["sinks"]["weight"]["mean"]
    assert found[0]["sites"]["decoder_self"]["sinks"]["weight"]["mean"] == pytest.approx(expected, rel=1e-5)


def test_points_are_measured_as_the_model_weighs_them(tiny_models, picture):
    row = table(["rt_detr_v2"], ["sparsemax"], sites=["decoder_cross"], pictures=[picture], size=128)
    detector = open_detector("rt_detr_v2", 128)
    images = detector.batch([(one, *one.read()) for one in huggingface.find_pictures([picture])]).images
    change = huggingface.use("sparsemax", detector.model, "decoder_cross")
    with torch.no_grad(), change, huggingface.watched(detector.model, ["decoder_cross"], huggingface.SHARPEN):
        samples = detector.model(images, need_attention=True).attention.decoder_cross.samples
    weights = torch.stack([one.weights.flatten(3) for one in samples])
    assert row["zeros"].item() == pytest.approx(zeros_ratio(weights).mean().item(), abs=1e-5)


def test_scores_of_random_weights_are_sharpened_and_others_if_told(tiny_models, trained, picture):
    def zeros(model, sharpen):
        return table([model], ["sparsemax"], sites=["encoder_self"], pictures=[picture], size=96, sharpen=sharpen)[
            "zeros"
        ].item()

    assert zeros("detr", 0.1) < zeros("detr", 1.0) < zeros("detr", 8.0)
    assert zeros("detr", None) == pytest.approx(zeros("detr", huggingface.SHARPEN))
    assert zeros(str(trained), None) < zeros(str(trained), 50.0)


def test_a_model_is_left_as_it_was(tiny_models, huggingface_detector):
    model = huggingface_detector("dab-detr")
    classes = [type(module) for module in model.modules()]
    change = huggingface.use("alpha_entmax", model, "decoder_self")
    with pytest.raises(ValueError, match="channel"), change, huggingface.watched(model, ["decoder_self"], 2.0):
        model(torch.rand(1, 1, 128, 128))
    assert [type(module) for module in model.modules()] == classes


def test_trained_weights_are_taken_as_they_are_and_see_pictures(trained, picture):
    row = table([str(trained)], ["sparsemax"], pictures=[picture])
    assert row["keys"]["encoder_self"] == 3 * 5  # 96 x 144 pixels
    inputs = transformers.AutoImageProcessor.from_pretrained(trained)(images=Image.open(picture), return_tensors="pt")
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(trained, attn_implementation="eager").eval()
    with torch.no_grad(), huggingface.use("sparsemax", theirs, "decoder_cross"):
        maps = torch.stack(theirs(**inputs, output_attentions=True).cross_attentions)
    expected = zeros_ratio(maps).mean().item()
    assert row["zeros"]["decoder_cross"] == pytest.approx(expected, abs=0.02)  # libraries scale alike to a rounding


def test_pictures_for_random_weights(tiny_models, picture):
    both = [table(["detr"], ["sparsemax"], pictures=p, size=128) for p in ((), [picture])]
    assert both[0]["keys"].tolist() == [4 * 4, 11, 4 * 4]
    assert both[1]["keys"].tolist() == [4 * 6, 11, 4 * 6]  # 128 x 192 pixels


def test_data_with_objects_give_ap_and_paibb(trained, write_layout, tmp_path):
    data = write_layout(tmp_path / "data", "coco", val=3)
    row = table([str(trained)], data=data, limit=2)
    assert (row["images"] == 2).all() and row["AP"].between(0, 1).all()
    assert row["paibb"].notna().tolist() == [False, False, True]
    shown = page(row.reset_index())
    assert shown.index.name == "model" and {"site", "keys", "zeros", "agreement", "paibb", "AP"} <= set(shown)
    assert not {"null_key", "transform", "images"} & set(shown)


def test_classes_are_matched_by_the_names_of_both(trained, write_layout, tmp_path):
    data = write_layout(tmp_path / "data", "coco", val=3)
    path = data / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"cat"', '"airplane"'))  # their name of it is aeroplane
    detector = open_detector(str(trained))
    huggingface._on(detector, detector.cfg, data, None, None, tmp_path)
    written = json.loads((tmp_path / "annotations.json").read_text())
    assert {one["id"]: one["name"] for one in written["categories"]} == {0: "dog", 1: "aeroplane"}


def test_finished_passes_are_not_repeated(tiny_models, monkeypatch, tmp_path):
    options = {"size": 128, "cpu": True, "keep": tmp_path / "kept.json"}
    first = attention_passes(["detr"], ["softmax"], **options)
    made, real = [], huggingface._pass
    monkeypatch.setattr(huggingface, "_pass", lambda *given: made.append(given) or real(*given))
    again = attention_passes(["detr"], ["softmax"], **options)
    pd.testing.assert_frame_equal(attention_table(again), attention_table(first))
    assert not made
    both = attention_passes(["detr"], ["softmax", "sparsemax"], **options, sites=["decoder_self"])
    assert len(made) == len(both) == 2  # softmax at one site alone is another pass
    assert len(json.loads((tmp_path / "kept.json").read_text())["passes"]) == 3
    with pytest.raises(ConfigError, match=r"kept.json.*size 128"):
        attention_passes(["detr"], **options | {"size": 96})
    (tmp_path / "kept.json").write_text("{")
    with pytest.raises(DataError, match="kept"):
        attention_passes(["detr"], **options)


def test_random_weights_of_every_type_need_nothing_but_transformers():
    for name in KINDS:
        with torch.device("meta"):
            model = open_detector(name, device="meta").model
        assert set(huggingface.sites_of(model)) == {"encoder_self", "decoder_self", "decoder_cross"}


def test_random_weights_are_drawn_apart_from_the_caller(tiny_models):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again = (open_detector("detr").model.state_dict().values() for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("models", "options", "error", "name"),
    [
        (["detr"], {"transforms": ["soft"]}, ConfigError, "soft"),
        (["detr"], {"null_keys": ["one"]}, ConfigError, "one"),
        (["detr"], {"sites": ["cross"]}, ConfigError, "cross"),
        (["detr"], {"transforms": ["entmax"], "alpha": 3.0}, ConfigError, "alpha 3.0"),
        (["detr"], {"sharpen": 0.0}, ConfigError, "sharpen 0.0"),
        (["detr"], {"split": "val"}, ConfigError, "--split"),
        (["detr"], {"data": "a", "pictures": ["b.jpg"]}, ConfigError, "--data.*--pictures"),
        (["rt_detr_v2"], {"size": 64}, ConfigError, "64 x 64 pixels have 84 cells.*300.*--size"),
        (["nosuch"], {}, WeightsError, "nosuch"),
        (["nobody/nosuch"], {}, WeightsError, "nobody/nosuch"),
        (["detr"], {"pictures": ["nosuch.jpg"]}, DataError, "nosuch.jpg"),
        (["detr"], {"data": "nosuch"}, DataError, "nosuch"),
    ],
)
def test_faults_name_what_is_wrong(models, options, error, name):
    with pytest.raises(error, match=name) as caught:
        attention_passes(models, cpu=True, **options)
    assert "\n" not in str(caught.value)


def test_data_of_other_classes_are_named(tiny_models, trained, write_layout, tmp_path):
    data = write_layout(tmp_path / "data", "coco", val=3)
    path = data / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"cat"', '"tree"').replace('"dog"', '"house"'))
    with pytest.raises(DataError, match=r"instances_val2017.*tree.*--pictures"):
        attention_passes([str(trained)], data=data, cpu=True)
    path.write_text(path.read_text().replace('"id": 1, "name"', '"id": 99, "name"').replace('ry_id": 1', 'ry_id": 99'))
    with pytest.raises(DataError, match=r"instances_val2017.*99"):
        attention_passes(["detr"], data=data, size=64, cpu=True)


def test_folders_that_hold_no_detector_are_named(trained):
    weights = trained / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=trained.name):
        open_detector(str(trained))
    (trained / "config.json").unlink()
    with pytest.raises(WeightsError, match=trained.name):
        open_detector(str(trained))
