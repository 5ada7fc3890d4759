"""Weights with their settings: what is built of them, and when they do not fit."""

from pathlib import Path

import pytest
import torch

from detrlib.checkpoints.source import Source, build_source, coco_names, fitting, read_tensors, write_tensors
from detrlib.config import Config, flat_settings, replace
from detrlib.errors import RunError, WeightsError


@pytest.fixture
def source(small, model_settings):
    """Of a small model with anchor queries, whose initialisation computes with numbers."""
    chosen = {"queries": "anchor", "num_classes": 5, "backbone": {"name": "tiny", "weights": "none"}}
    model = small(**chosen)
    sizes = {"hidden_dim": 32, "num_heads": 4, "encoder_layers": 2, "decoder_layers": 3, "feedforward_dim": 48}
    settings = model_settings(**sizes | chosen | {"num_queries": 7})
    cfg = replace(Config(), flat_settings(settings, "model."))
    return model, Source("small", cfg, model.state_dict(), None, Path("small.pt"))


def test_a_source_is_built_number_for_number(source):
    model, given = source
    built, images = build_source(given), torch.randn(1, 3, 64, 64)
    assert not built.training
    with torch.no_grad():
        torch.testing.assert_close(built(images).logits, model(images).logits)


def test_weights_that_do_not_fit_are_refused(source):
    _, given = source
    assert fitting(given, "a small model") is given
    del given.state["query_embed.weight"]
    with pytest.raises(RunError, match=r"small\.pt.*missing query_embed\.weight"):
        build_source(given)
    with pytest.raises(WeightsError, match=r"small\.pt.*a small model.*missing query_embed\.weight"):
        fitting(given, "a small model")


def test_names_of_coco_go_by_category_id():
    names = coco_names(91)
    assert len(names) == 80 and (names[1], names[13], names[90]) == ("person", "stop sign", "toothbrush")
    assert 12 not in names and coco_names(80) is None and coco_names(None) is None


def test_a_changed_number_or_setting_in_a_safetensors_file_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    state = {"half": torch.ones(3, dtype=torch.bfloat16), "count": torch.tensor(7), "weight": torch.arange(12.0)}
    write_tensors(path, state, {"detrlib.epoch": "12"})
    found, metadata = read_tensors(path)
    assert metadata == {"detrlib.epoch": "12"} and all(torch.equal(found[name], state[name]) for name in state)
    whole = path.read_bytes()
    for part in (state["weight"].numpy().tobytes(), state["count"].numpy().tobytes(), b'"12"', b"half"):
        changed = bytearray(whole)
        changed[whole.index(part) + 1] ^= 2
        path.write_bytes(changed)
        with pytest.raises(WeightsError, match=r"model\.safetensors: damaged"):
            read_tensors(path)
