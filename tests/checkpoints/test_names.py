"""Official checkpoints: names, shapes and numbers are those published, and files of other kinds are named."""

import argparse

import pytest
import torch
from small import padded_batch, small, trainable
from test_transformer import official_names, transformers_state
from torch import nn

from detrlib.checkpoints import files as checkpoints
from detrlib.checkpoints.files import export_official, family_of, load_official, read_official, settings_of
from detrlib.checkpoints.names import own_state
from detrlib.config import Config, replace
from detrlib.errors import WeightsError
from detrlib.models import build_model

OFFICIAL_BACKBONE = {
    "model.backbone.weights": "none",
    "model.backbone.freeze_stem": True,
    "model.backbone.mask_padding": False,
}
COCO = {"model.num_classes": 91} | OFFICIAL_BACKBONE
DEFORMABLE = COCO | {
    "model.architecture": "deformable",
    "model.classification": "sigmoid",
    "model.num_queries": 300,
    "model.feedforward_dim": 1024,
}
TWO_STAGE = DEFORMABLE | {"model.deformable.refine": True, "model.deformable.two_stage": True}
EFFICIENT = TWO_STAGE | {
    "model.deformable.query_init": "memory",
    "model.deformable.class_specific_proposals": True,
}
SPARSE = EFFICIENT | {
    "model.deformable.rho": 0.1,
    "model.deformable.encoder_auxiliary": True,
    "model.deformable.token_scores": "official",
    "model.deformable.dam": "official",
}
SWIN = {"model.backbone.name": "swin_t"}
THESIS = COCO | {"model.norm": "pre", "model.attention.padding": "add_one"}
ALPHA = THESIS | {"model.attention.decoder_cross": "alpha_entmax", "model.attention.alpha_clamped": True}

# settings, entries of the official file, trainable parameters, and what the file cannot tell
MODELS = {
    "detr-r50": (COCO, 458, 41_302_368, {}),
    "detr-r50-dc5": (COCO | {"model.backbone.dilation": True}, 458, 41_302_368, {"model.backbone.dilation": True}),
    "detr-r101": (COCO | {"model.backbone.name": "resnet101"}, None, 60_242_272, {}),
    "detr-r18": (COCO | {"model.backbone.name": "resnet18"}, None, 28_686_688, {}),
    "detr-pre-norm": (COCO | {"model.norm": "pre"}, 460, 41_302_880, {}),
    "detr-learned-position": (COCO | {"model.position": "learned"}, 460, 41_315_168, {}),
    "thesis-alpha": (ALPHA, 466, 41_302_928, {}),
    "deformable": (DEFORMABLE, 561, 39_847_265, {}),
    "deformable-refine": (DEFORMABLE | {"model.deformable.refine": True}, 597, 40_627_260, {}),
    "deformable-two-stage": (TWO_STAGE, 630, 40_959_129, {}),
    "deformable-single-scale": (DEFORMABLE | {"model.deformable.levels": 1}, None, 33_844_193, {}),
    "efficient": (EFFICIENT, None, 40_827_289, {}),
    "sparse": (SPARSE, 760, 41_714_805, {"model.deformable.rho": 0.1}),
    "detr-swin-t": (COCO | SWIN, None, 44_957_444, {}),
    "deformable-swin-t": (DEFORMABLE | SWIN, None, 40_308_613, {}),
    "deformable-swin-t-two-stage": (TWO_STAGE | SWIN, None, 41_420_477, {}),
    "sparse-swin-t": (SPARSE | SWIN, 682, 42_176_153, {"model.deformable.rho": 0.1}),
}


def without_memory(settings: dict) -> nn.Module:
    with torch.device("meta"):
        return build_model(replace(Config(), settings).model)


@pytest.mark.parametrize("name", MODELS)
def test_published_models(name):
    """Number of entries and parameters are those published; the settings are found again from names and shapes."""
    settings, entries, parameters, told = MODELS[name]
    model = without_memory(settings)
    state = export_official(model)
    assert entries is None or len(state) == entries
    assert trainable(model) == parameters
    found = replace(Config(), settings_of(state, told))
    assert found.model == replace(Config(), settings).model
    again = own_state(state)
    assert {key: value.shape for key, value in again.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize(("name", "pre_norm"), [("detr-r50", False), ("detr-pre-norm", True)])
def test_official_names_of_detr(name, pre_norm):
    assert set(export_official(without_memory(MODELS[name][0]))) == official_names(pre_norm)


def both(*modules: str) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def official_deformable_names(refine: bool = False, two_stage: bool = False, sparse: bool = False) -> set[str]:
    """Entries of an official file of Deformable DETR R50; `sparse`: of Sparse DETR with auxiliary encoder heads."""
    names = {name for name in official_names() if name.startswith("backbone")} | {"transformer.level_embed"}
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


# Round trips, on small models with every number its own


R18 = {"name": "resnet18", "weights": "none", "freeze_stem": True, "mask_padding": False}
CHOICES = {
    "detr": {},
    "detr-pre-norm": {"norm": "pre"},
    "detr-learned": {"position": "learned"},
    "alpha": {"attention": {"decoder_cross": "alpha_entmax", "alpha_clamped": True, "padding": "add_one"}},
}
FAMILY = {
    "plain": {"levels": 3, "encoder_points": 2, "decoder_points": 3},
    "one-level": {"levels": 1},
    "refine": {"levels": 2, "refine": True},
    "two-stage": {"levels": 4, "refine": True, "two_stage": True},
    "efficient": {"refine": True, "two_stage": True, "query_init": "memory", "class_specific_proposals": True},
    "sparse": {
        "refine": True,
        "two_stage": True,
        "query_init": "memory",
        "class_specific_proposals": True,
        "encoder_auxiliary": True,
        "rho": 0.3,
        "token_scores": "official",
        "dam": "official",
    },
}
CHOICES |= {
    name: {"architecture": "deformable", "classification": "sigmoid", "deformable": chosen, "num_queries": 7}
    for name, chosen in FAMILY.items()
}
TOLD = {
    "model.num_heads": 4,
    "model.dropout": 0.1,
}


def of_small(name: str) -> tuple[nn.Module, dict]:
    """A small official-style model, and what its file would not tell."""
    told = dict(TOLD)
    if name in ("two-stage", "efficient", "sparse"):
        told["model.num_queries"] = 7
    if name == "sparse":
        told["model.deformable.rho"] = 0.3
    return small(backbone=R18, **CHOICES[name]), told


@pytest.mark.parametrize("name", CHOICES)
def test_a_model_comes_back_from_an_official_file(name, tmp_path):
    model, told = of_small(name)
    state = export_official(model)
    torch.save({"model": state, "epoch": 49}, tmp_path / "official.pth")
    again = load_official(tmp_path / "official.pth", told)
    assert not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    back = export_official(again)
    assert list(back) == list(state) and all(torch.equal(back[key], state[key]) for key in state)
    images, padding = padded_batch((96, 128), (128, 64), canvas=(128, 160))
    with torch.no_grad():
        torch.testing.assert_close(again(images, padding).logits, model(images, padding).logits)


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


def test_alphas_that_are_not_clamped_are_expressed_as_clamped_ones():
    model = small(backbone=R18, attention={"decoder_cross": "alpha_entmax", "alpha_init": "normal"})
    expected = [layer.multihead_attn.transform.alpha for layer in model.transformer.decoder.layers]
    state = export_official(model)
    assert state["transformer.decoder.layers.1.multihead_attn.pre_alpha"].shape == (4,)
    for i, alpha in enumerate(expected):
        clamped = (1 + state[f"transformer.decoder.layers.{i}.multihead_attn.pre_alpha"].sigmoid()).clamp(1.01, 2)
        torch.testing.assert_close(clamped, alpha, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"queries": "anchor", "backbone": R18}, "expected_size"),
        ({"attention": {"encoder_self": "alpha_entmax"}, "backbone": R18}, "encoder.*pre_alpha"),
        ({}, "backbone"),
    ],
)
def test_models_without_official_form_are_not_exported(settings, reason):
    with pytest.raises(WeightsError, match=reason):
        export_official(small(**settings))


# What files say beside their entries


def official_file(path, state: dict, **arguments):
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(**arguments), "optimizer": {"state": {}}}, path)
    return path


def test_arguments_in_the_file_are_used(tmp_path):
    state = export_official(without_memory(SPARSE))
    state = {key: torch.zeros(value.shape) for key, value in state.items()}
    path = official_file(tmp_path / "s.pth", state, rho=0.2, num_queries=100, nheads=8, eff_specific_head=False)
    checkpoint = read_official(path)
    assert (checkpoint.family, checkpoint.epoch) == ("sparse", 3)
    cfg = checkpoints.official_config(checkpoint)
    assert cfg.model.deformable.rho == 0.2
    assert not cfg.model.deformable.class_specific_proposals
    assert cfg.model.num_queries == 100
    assert checkpoints.official_config(checkpoint, {"model.deformable.rho": "0.4"}).model.deformable.rho == 0.4


def test_dilation_of_dc5_is_told_by_arguments_or_by_the_caller(tmp_path):
    model = small(backbone=R18 | {"name": "resnet50"})
    path = official_file(tmp_path / "dc5.pth", export_official(model), dilation=True, nheads=4)
    assert load_official(path).backbone.body.layer4[1].conv2.dilation == (2, 2)
    plain = load_official(path, {"model.backbone.dilation": False})
    assert plain.backbone.body.layer4[1].conv2.dilation == (1, 1)


def test_thesis_files_name_their_transform(tmp_path):
    model = small(backbone=R18, norm="pre", attention={"decoder_cross": "sparsemax", "padding": "add_one"})
    content = {"model": export_official(model), "hyperparams": {"decoder_act": "sparsemax", "nheads": 4}}
    torch.save(content, tmp_path / "thesis.pth")
    again = load_official(tmp_path / "thesis.pth")
    transform = again.transformer.decoder.layers[0].multihead_attn.transform
    assert type(transform).__name__ == "Sparsemax" and transform.padding_adds_one
    assert again.transformer.encoder.norm is not None


def test_sparse_detr_asks_for_its_share_of_tokens():
    state = export_official(without_memory(SPARSE))
    with pytest.raises(WeightsError, match=r"not written in the file; say it: model\.deformable\.rho=0\.3"):
        settings_of(state)


def test_counters_of_tools_are_ignored(tmp_path):
    model, told = of_small("detr")
    counters = {"total_params": torch.zeros(1), "transformer.total_ops": torch.zeros(1)}
    counters |= {"backbone.0.body.bn1.num_batches_tracked": torch.zeros(1)}
    torch.save({"model": export_official(model) | counters}, tmp_path / "counted.pth")
    assert load_official(tmp_path / "counted.pth", told).state_dict().keys() == model.state_dict().keys()


def test_families():
    assert family_of(export_official(without_memory(COCO))) == "detr"
    assert family_of(export_official(without_memory(DEFORMABLE))) == "deformable"
    assert family_of(export_official(without_memory(SPARSE))) == "sparse"


# Numbers


def test_official_weights_give_what_transformers_gives(tmp_path):
    """A file with official names, random numbers and a post-norm R18: the same logits and boxes on a padded batch."""
    transformers = pytest.importorskip("transformers")
    model, told = of_small("detr")
    torch.save({"model": export_official(model)}, tmp_path / "official.pth")
    ours = load_official(tmp_path / "official.pth", told).double()
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=transformers.ResNetConfig(
            layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], out_features=["stage4"]
        ),
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=7,
        num_labels=5,
    )
    theirs = transformers.DetrForObjectDetection(config).eval()
    theirs.load_state_dict(transformers_state(own_state(export_official(model))))
    images, padding = padded_batch((96, 128), (128, 64), canvas=(128, 160))
    with torch.no_grad():
        found = ours(images.double(), padding)
        expected = theirs.double()(pixel_values=images.double(), pixel_mask=(~padding).long())
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.pred_boxes, rtol=0, atol=1e-5, check_dtype=False)
