"""Detectors of transformers in and out of folders of Hugging Face's: the same numbers, whatever timm called them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from detrlib.checkpoints.adapted import adapted_source, write_adapted
from detrlib.checkpoints.export import export
from detrlib.checkpoints.huggingface_names import BODY, RESNET, THEIR_BODY, translated
from detrlib.checkpoints.source import Source, build_source
from detrlib.config import load_config
from detrlib.errors import ConfigError, WeightsError
from detrlib.models import build_model
from detrlib.runs.sources import open_source


@pytest.fixture(scope="module")
def source(huggingface_settings, tmp_path_factory):
    def source(kind: str, **settings) -> Source:
        torch.manual_seed(0)
        cfg = load_config(overrides=huggingface_settings(kind, **settings))
        cfg = cfg.model_copy(update={"model": cfg.model.completed()})
        names = {label: f"class {label}" for label in range(cfg.model.num_classes)}
        return Source(
            kind, cfg, build_model(cfg.model).state_dict(), names, tmp_path_factory.mktemp("source") / "last.pt"
        )

    return source


@pytest.mark.parametrize("kind", ["dab_detr", "d_fine"])
def test_out_and_in_again_gives_the_same_predictions(source, tmp_path, kind):
    before, images = source(kind), torch.randn(1, 3, 64, 64)
    write_adapted(before, tmp_path / "folder")
    after = adapted_source(tmp_path / "folder")
    assert after.names == before.names
    assert (after.cfg.model.kind, after.cfg.model.num_queries) == (kind, 11)
    with torch.no_grad():
        ours, read = build_source(before)(images), build_source(after)(images)
    torch.testing.assert_close(ours.logits, read.logits)
    torch.testing.assert_close(ours.boxes, read.boxes)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["id2label"]["1"] == "class 1" and config["architectures"][0].endswith("ForObjectDetection")


def test_a_file_of_its_own_and_names_that_find_it(source, tmp_path):
    before, images = source("rt_detr_v2", attention={"decoder_self": "alpha_entmax"}), torch.randn(1, 3, 64, 64)
    read = open_source(export(before, tmp_path / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(build_source(before)(images).logits, build_source(read)(images).logits)
    write_adapted(source("d_fine"), tmp_path / "folder")
    assert open_source(tmp_path / "folder").cfg.model.type == "d_fine"  # of which this library has no model itself
    for path, kind, error in (
        (tmp_path / "other", "pre_alpha", ConfigError),
        (tmp_path / "model.pth", "official code", WeightsError),
    ):
        with pytest.raises(error, match=kind):
            export(before, path)


def test_weights_that_timm_has_named(source, tmp_path):
    """As facebook/detr-resnet-50 was saved at first: transformers' own ResNet takes them over."""
    before, folder = source("detr"), tmp_path / "folder"
    write_adapted(before, folder)
    state, to_timm = load_file(folder / "model.safetensors"), RESNET
    named = {}
    for name, value in state.items():
        body = translated(name, to_timm)
        named[name if body == name else THEIR_BODY + body.removeprefix(BODY)] = value
    assert any(name.startswith(f"{THEIR_BODY}layer1.0.conv1") for name in named)
    named[f"{THEIR_BODY}bn1.num_batches_tracked"] = torch.tensor(1)
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, read = build_source(before)(images), build_source(adapted_source(folder))(images)
    torch.testing.assert_close(ours.logits, read.logits)


def test_files_that_do_not_fit_are_named(source, tmp_path):
    folder = tmp_path / "folder"
    write_adapted(source("rt_detr_v2"), folder)
    state = load_file(folder / "model.safetensors")
    lacking = {name: value for name, value in state.items() if "decoder.layers.1." not in name}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"model\.safetensors.*decoder\.layers\.1"):
        adapted_source(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        adapted_source(folder)
