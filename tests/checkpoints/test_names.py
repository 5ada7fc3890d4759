"""One table of names, read in both directions; heads that files repeat are one, in whatever places they are stored."""

import pytest
import torch

from detrlib.checkpoints.files import export_official
from detrlib.checkpoints.names import official_name, own_name, own_state
from detrlib.checkpoints.official import settings_of
from detrlib.errors import WeightsError


def both(*modules: str) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def official_detr_names(pre_norm: bool = False, learned_position: bool = False) -> set[str]:
    """Entries of an official DETR R50 checkpoint."""

    def norm(module: str) -> list[str]:
        return [*both(module), f"{module}.running_mean", f"{module}.running_var"]

    def attention(module: str) -> list[str]:
        return [f"{module}.in_proj_weight", f"{module}.in_proj_bias", *both(f"{module}.out_proj")]

    names = ["query_embed.weight", *both("class_embed", *(f"bbox_embed.layers.{i}" for i in range(3)))]
    names += both("input_proj", "transformer.decoder.norm")
    for i in range(6):
        encoder, decoder = f"transformer.encoder.layers.{i}", f"transformer.decoder.layers.{i}"
        names += attention(f"{encoder}.self_attn")
        names += both(*(f"{encoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2")))
        names += attention(f"{decoder}.self_attn") + attention(f"{decoder}.multihead_attn")
        names += both(*(f"{decoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2", "norm3")))
    body = "backbone.0.body"
    names += [f"{body}.conv1.weight", *norm(f"{body}.bn1")]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            place = f"{body}.layer{stage}.{block}"
            for i in (1, 2, 3):
                names += [f"{place}.conv{i}.weight", *norm(f"{place}.bn{i}")]
        names += [f"{body}.layer{stage}.0.downsample.0.weight", *norm(f"{body}.layer{stage}.0.downsample.1")]
    if pre_norm:
        names += both("transformer.encoder.norm")
    if learned_position:
        names += ["backbone.1.row_embed.weight", "backbone.1.col_embed.weight"]
    assert len(names) == len(set(names))
    return set(names)


def official_deformable_names(refine: bool = False, two_stage: bool = False, sparse: bool = False) -> set[str]:
    """Entries of an official file of Deformable DETR R50; `sparse`: of Sparse DETR with auxiliary encoder heads."""
    names = {name for name in official_detr_names() if name.startswith("backbone")} | {"transformer.level_embed"}
    for i in range(4):
        names |= both(f"input_proj.{i}.0", f"input_proj.{i}.1")
    deformable = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    for i in range(6):
        encoder, decoder = f"transformer.encoder.layers.{i}", f"transformer.decoder.layers.{i}"
        names |= both(*(f"{encoder}.self_attn.{part}" for part in deformable))
        names |= both(*(f"{decoder}.cross_attn.{part}" for part in deformable))
        names |= both(*(f"{encoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2")))
        names |= both(*(f"{decoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2", "norm3")))
        names |= {f"{decoder}.self_attn.in_proj_weight", f"{decoder}.self_attn.in_proj_bias"}
        names |= both(f"{decoder}.self_attn.out_proj")

    def heads(kind: str, place: str, count: int) -> set[str]:
        parts = [""] if kind == "class" else [f".layers.{j}" for j in range(3)]
        return both(*(f"{place}{kind}_embed.{i}{part}" for i in range(count) for part in parts))

    count = 6 + two_stage + 5 * sparse
    names |= heads("class", "", count) | heads("bbox", "", count)
    if refine:
        names |= heads("bbox", "transformer.decoder.", count)
    if two_stage:
        names |= heads("class", "transformer.decoder.", count)
        names |= both(*(f"transformer.{part}" for part in ("enc_output", "enc_output_norm")))
        names |= both("transformer.pos_trans", "transformer.pos_trans_norm")
    else:
        names |= both("transformer.reference_points") | {"query_embed.weight"}
    if sparse:
        names |= heads("class", "transformer.encoder.", 5) | heads("bbox", "transformer.encoder.", 5)
        scoring = "transformer.enc_mask_predictor"
        names |= both(*(f"{scoring}.{part}" for part in ("layer1.0", "layer1.1", "layer2.0", "layer2.2", "layer2.4")))
    return names


def test_every_name_of_every_model_comes_back(published, without_memory):
    own = list(without_memory(published[0]).state_dict())
    official = [official_name(entry) for entry in own]
    assert [own_name(entry) for entry in official] == own
    assert len(set(official)) == len(own)
    assert not any(entry.startswith(("backbone.body.", "position.")) or ".transform." in entry for entry in official)


@pytest.mark.parametrize(
    ("name", "kind", "entries"),
    [
        ("detr-r50", {}, 458),
        ("detr-pre-norm", {"pre_norm": True}, 460),
        ("detr-learned-position", {"learned_position": True}, 460),
    ],
)
def test_official_names_of_detr(name, kind, entries, without_memory):
    names = set(export_official(without_memory(name)))
    assert names == official_detr_names(**kind) and len(names) == entries


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deformable", {}),
        ("deformable-refine", {"refine": True}),
        ("deformable-two-stage", {"refine": True, "two_stage": True}),
        ("sparse", {"refine": True, "two_stage": True, "sparse": True}),
    ],
)
def test_official_names_of_the_deformable_family(name, options, without_memory):
    names = official_deformable_names(**options)
    state = export_official(without_memory(name))
    assert set(state) == names
    assert len({id(value) for value in state.values()}) == len(without_memory(name).state_dict())


def test_official_shapes(without_memory):
    shapes = {key: tuple(value.shape) for key, value in export_official(without_memory("sparse")).items()}
    assert shapes["transformer.pos_trans.weight"] == (256, 512)
    assert shapes["transformer.encoder.layers.0.self_attn.sampling_offsets.weight"] == (256, 256)
    assert shapes["transformer.decoder.layers.5.cross_attn.attention_weights.weight"] == (128, 256)
    shapes = {key: tuple(value.shape) for key, value in export_official(without_memory("deformable")).items()}
    assert shapes["query_embed.weight"] == (300, 512)
    assert shapes["class_embed.5.weight"] == (91, 256)
    assert shapes["transformer.level_embed"] == (4, 256)


@pytest.mark.parametrize("name", ["refine", "two-stage", "sparse"])
def test_heads_may_be_stored_once_only(name, of_small):
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


def test_copies_of_a_head_that_differ_are_refused(of_small):
    state = export_official(of_small("refine")[0])
    state["transformer.decoder.bbox_embed.1.layers.0.bias"] = torch.zeros(32)
    with pytest.raises(WeightsError, match=r"decoder\.bbox_embed\.1\.layers\.0\.bias.*one head.*differ"):
        own_state(state)
