"""One table of names, read in both directions; heads that files repeat are one, in whatever places they are stored."""

import pytest
import torch
from official import (
    DEFORMABLE,
    MODELS,
    SPARSE,
    of_small,
    official_deformable_names,
    official_detr_names,
    without_memory,
)

from detrlib.checkpoints.files import export_official
from detrlib.checkpoints.names import official_name, own_name, own_state
from detrlib.checkpoints.official import settings_of
from detrlib.errors import WeightsError


@pytest.mark.parametrize("name", MODELS)
def test_every_name_of_every_model_comes_back(name):
    own = list(without_memory(MODELS[name][0]).state_dict())
    official = [official_name(entry) for entry in own]
    assert [own_name(entry) for entry in official] == own
    assert len(set(official)) == len(own)
    assert not any(entry.startswith(("backbone.body.", "position.")) or ".transform." in entry for entry in official)


@pytest.mark.parametrize(("name", "pre_norm"), [("detr-r50", False), ("detr-pre-norm", True)])
def test_official_names_of_detr(name, pre_norm):
    assert set(export_official(without_memory(MODELS[name][0]))) == official_detr_names(pre_norm)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deformable", {}),
        ("deformable-refine", {"refine": True}),
        ("deformable-two-stage", {"refine": True, "two_stage": True}),
        ("sparse", {"refine": True, "two_stage": True, "sparse": True}),
    ],
)
def test_official_names_of_the_deformable_family(name, options):
    names = official_deformable_names(**options)
    state = export_official(without_memory(MODELS[name][0]))
    assert len(names) == MODELS[name][1]
    assert set(state) == names
    assert len({id(value) for value in state.values()}) == len(without_memory(MODELS[name][0]).state_dict())


def test_official_shapes():
    shapes = {key: tuple(value.shape) for key, value in export_official(without_memory(SPARSE)).items()}
    assert shapes["transformer.pos_trans.weight"] == (256, 512)
    assert shapes["transformer.encoder.layers.0.self_attn.sampling_offsets.weight"] == (256, 256)
    assert shapes["transformer.decoder.layers.5.cross_attn.attention_weights.weight"] == (128, 256)
    shapes = {key: tuple(value.shape) for key, value in export_official(without_memory(DEFORMABLE)).items()}
    assert shapes["query_embed.weight"] == (300, 512)
    assert shapes["class_embed.5.weight"] == (91, 256)
    assert shapes["transformer.level_embed"] == (4, 256)


@pytest.mark.parametrize("name", ["refine", "two-stage", "sparse"])
def test_heads_may_be_stored_once_only(name):
    model, told = of_small(name)
    state = export_official(model)
    places = (
        "transformer.decoder.class",
        "transformer.decoder.bbox",
        "transformer.encoder.class",
        "transformer.encoder.b",
    )
    once = {key: value for key, value in state.items() if not key.startswith(places)}
    assert len(once) < len(state)
    found, expected = own_state(once), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert settings_of(once, told)["model.deformable.refine"] is True


def test_copies_of_a_head_that_differ_are_refused():
    state = export_official(of_small("refine")[0])
    state["transformer.decoder.bbox_embed.1.layers.0.bias"] = torch.zeros(32)
    with pytest.raises(WeightsError, match=r"decoder\.bbox_embed\.1\.layers\.0\.bias.*one head.*differ"):
        own_state(state)
