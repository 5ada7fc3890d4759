"""Settings of detectors of transformers: what they tell, and what is refused before any long work."""

import json
import subprocess
import sys

import pytest

from detrlib.config import PROJECT, load_config, replace, save_config
from detrlib.config.huggingface import KINDS, HuggingFace
from detrlib.errors import ConfigError, WeightsError
from detrlib.models import build_model

FAMILY = {"model.architecture": "huggingface"}


@pytest.fixture(scope="module", autouse=True)
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", KINDS)
def test_what_other_code_asks_has_a_value(huggingface_settings, kind):
    model = load_config(overrides=huggingface_settings(kind)).model
    assert (model.kind, model.num_heads, model.num_queries, model.decoder_layers) == (kind, 4, 11, 2)
    assert model.encoder_layers == (1 if "rt_" in kind or kind == "d_fine" else 2)
    cross = "softmax" if kind in ("detr", "conditional_detr", "dab_detr") else "deformable"
    assert model.transform_at("decoder_cross") == cross
    assert model.cells_ask == (kind != "deformable_detr")
    assert model.proposal_head is None


def test_a_complete_configuration_is_read_without_transformers(huggingface_settings, tmp_path, monkeypatch):
    cfg = load_config(overrides=huggingface_settings("d_fine"))
    cfg = cfg.model_copy(update={"model": cfg.model.completed()})
    save_config(cfg, tmp_path / "config.yaml")
    monkeypatch.setitem(sys.modules, "transformers", None)
    read = load_config(tmp_path / "config.yaml")
    assert read == cfg
    assert read.model.num_queries == 11 and read.model.options["backbone_config"]["depths"] == [1, 1, 1, 1]


def test_without_transformers_one_line_says_how_to_get_it(huggingface_settings, monkeypatch):
    model = load_config(overrides=huggingface_settings("detr")).model
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers.*detrlib\[huggingface\]"):
        _ = model.num_queries


def test_a_whole_run_needs_transformers_to_build_its_model_and_says_so(huggingface_settings, monkeypatch):
    model = load_config(overrides=huggingface_settings("detr")).model.completed()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers.*detrlib\[huggingface\]"):
        build_model(model)


def test_everything_else_works_without_transformers():
    """Models, the command line and every module can be imported where it is not installed."""
    program = """
import pkgutil, sys
sys.modules["transformers"] = None
import detrlib, detrlib.models, detrlib.__main__
for module in pkgutil.walk_packages(detrlib.__path__, "detrlib."):
    if "benchmarks" not in module.name and "kernels" not in module.name:
        __import__(module.name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"model\.source or model\.type"),
        ({"model.type": "rt_detrv2"}, r"model\.type.*did you mean 'rt_detr_v2'"),
        ({"model.type": "detr", "model.options.id2label": 3}, r"model\.options\.id2label"),
        ({"model.type": "detr", "model.hidden_dim": 64}, r"model\.hidden_dim.*model\.options"),
        ({"model.type": "d_fine", "model.square": 100}, r"model\.square"),
        ({"model.type": "d_fine", "model.options": 3}, r"model\.options"),
        ({"model.type": "detr", "model.attention.decoder_self": "tvmax"}, r"model\.attention\.decoder_self"),
        ({"model.type": "d_fine", "loss.auxiliary": False}, r"loss\.auxiliary.*d_fine"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=FAMILY | settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_querys": 3}, "num_querys.*num_queries"), ({"d_model": "wide"}, "d_model"), ({"foo": 1}, "foo.*d_fine")],
)
def test_options_that_the_type_lacks_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        _ = HuggingFace(type="d_fine", options=options).num_queries


def test_options_of_one_family_are_not_those_of_another():
    with pytest.raises(ConfigError, match=r"model\.type.*detr.*huggingface"):
        load_config(overrides={"model.type": "d_fine"})
    assert load_config(overrides={"model.square": 640}).model.architecture == "detr"


def test_options_are_merged_leaf_by_leaf_and_changed_one_by_one(huggingface_settings):
    cfg = load_config(overrides=huggingface_settings("rt_detr_v2"))
    other = replace(cfg, {"model.options.backbone_config.depths": "[2, 1, 1, 1]", "model.options.num_queries": 7})
    assert other.model.options["backbone_config"]["depths"] == [2, 1, 1, 1]
    assert cfg.model.options["backbone_config"]["depths"] == [1, 1, 1, 1]
    assert (cfg.model.num_queries, other.model.num_queries) == (11, 7)


def test_a_source_tells_its_type_and_sizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rt_detr_v2", "num_queries": 13}))
    model = load_config(overrides=FAMILY | {"model.source": str(tmp_path)}).model
    assert (model.kind, model.num_queries, model.decoder_layers) == ("rt_detr_v2", 13, 6)
    completed = model.completed()
    assert completed.source == str(tmp_path) and completed.type == "rt_detr_v2"
    with pytest.raises(ConfigError, match=r"model\.type detr"):
        _ = load_config(overrides=FAMILY | {"model.source": str(tmp_path), "model.type": "detr"}).model.configuration


def test_the_backbone_of_old_files_is_transformers_own_resnet(tmp_path):
    """timm is not needed, and not asked for."""
    old = {"model_type": "detr", "backbone": "resnet101", "use_timm_backbone": True, "dilation": False}
    (tmp_path / "config.json").write_text(json.dumps(old))
    model = load_config(overrides=FAMILY | {"model.source": str(tmp_path)}).model
    backbone = model.configuration["backbone_config"]
    assert (backbone["model_type"], backbone["depths"], backbone["out_features"]) == (
        "resnet",
        [3, 4, 23, 3],
        ["stage4"],
    )
    for change in ({"dilation": True}, {"backbone": "convnext_tiny"}):
        (tmp_path / "config.json").write_text(json.dumps(old | change))
        with pytest.raises(WeightsError, match="timm"):
            _ = load_config(overrides=FAMILY | {"model.source": str(tmp_path)}).model.configuration


def test_sources_that_are_not_there_are_one_sentence(tmp_path):
    """Tests are offline (HF_HUB_OFFLINE)."""
    for source, name in (
        ("owner/name", "owner/name"),
        (str(tmp_path / "none"), "none"),
        (str(tmp_path), "config.json"),
    ):
        with pytest.raises(WeightsError, match=name) as refusal:
            _ = HuggingFace(source=source).num_queries
        assert "\n" not in str(refusal.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "yolos"}))
    with pytest.raises(WeightsError, match="yolos"):
        _ = HuggingFace(source=str(tmp_path)).num_queries
