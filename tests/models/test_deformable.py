"""Deformable DETR and its relatives: parameters, names, another implementation, padding, gradients, refusals.

Legend: B images, L levels, S tokens of all levels, Q queries, C classes.
"""

import pytest
import torch
from torch import nn

from detrlib.models import build_model
from detrlib.models.deformable import proposal_cells

R50 = {"name": "resnet50", "weights": "none", "freeze_stem": True}
REFINE = {"refine": True}
TWO_STAGE = REFINE | {"two_stage": True}
EFFICIENT = TWO_STAGE | {"query_init": "memory", "class_specific_proposals": True}
SPARSE = EFFICIENT | {"rho": 0.3, "encoder_auxiliary": True}
VARIANTS = {"plain": {}, "refine": REFINE, "two-stage": TWO_STAGE, "efficient": EFFICIENT, "sparse": SPARSE}
SIZES, CANVAS = [(70, 101), (128, 64), (97, 160)], (128, 160)


each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="session")
def full(model_settings):
    def full(**options) -> nn.Module:
        """A model at full size, with the 91 classes of COCO, without memory behind its parameters."""
        settings = {"architecture": "deformable", "classification": "sigmoid", "num_queries": 300, "num_classes": 91}
        with torch.device("meta"):
            return build_model(model_settings(backbone=R50, feedforward_dim=1024, deformable=options, **settings))

    return full


# Parameters and names


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 39_847_265),
        (REFINE, 40_627_260),
        (TWO_STAGE, 40_959_129),
        ({"levels": 1}, 33_844_193),
        (EFFICIENT, 40_827_289),
        (SPARSE | {"rho": 0.1}, 41_714_805),
    ],
)
def test_number_of_trainable_parameters(options, expected, full, trainable):
    assert trainable(full(**options)) == expected


def test_dilation_adds_no_parameters(model_settings, trainable):
    options = {"deformable": {"levels": 1}, "num_queries": 300, "num_classes": 91, "feedforward_dim": 1024}
    with torch.device("meta"):
        settings = model_settings(
            architecture="deformable", classification="sigmoid", backbone=R50 | {"dilation": True}, **options
        )
        assert trainable(build_model(settings)) == 33_844_193


def official_names(variant: str) -> set[str]:
    """Entries of official checkpoints of ResNet-50 models, backbone aside and shared heads named once."""

    def both(*modules: str) -> list[str]:
        return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]

    def sampled(module: str) -> list[str]:
        return both(
            *(f"{module}.{part}" for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"))
        )

    names = ["transformer.level_embed", *both(*(f"input_proj.{level}.{part}" for level in range(4) for part in (0, 1)))]
    for i in range(6):
        encoder, decoder = f"transformer.encoder.layers.{i}", f"transformer.decoder.layers.{i}"
        names += sampled(f"{encoder}.self_attn") + sampled(f"{decoder}.cross_attn")
        names += both(*(f"{encoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2")))
        names += both(*(f"{decoder}.{part}" for part in ("linear1", "linear2", "norm1", "norm2", "norm3")))
        names += [f"{decoder}.self_attn.in_proj_{kind}" for kind in ("weight", "bias")]
        names += both(f"{decoder}.self_attn.out_proj")
    heads = {"plain": 1, "refine": 6, "two-stage": 7, "efficient": 7, "sparse": 12}[variant]
    for i in range(heads):
        names += both(f"class_embed.{i}", *(f"bbox_embed.{i}.layers.{j}" for j in range(3)))
    if variant in ("plain", "refine"):
        names += ["query_embed.weight", *both("transformer.reference_points")]
    else:
        parts = ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
        names += both(*(f"transformer.{part}" for part in parts))
    if variant == "sparse":
        parts = ("layer1.0", "layer1.1", "layer2.0", "layer2.2", "layer2.4")
        names += both(*(f"transformer.enc_mask_predictor.{part}" for part in parts))
    return set(names)


@each_variant
def test_entries_are_those_of_official_checkpoints(variant, full):
    state = full(**VARIANTS[variant]).state_dict()
    names = {name for name in state if not name.startswith("backbone.")}
    assert names == official_names(variant)
    # Official files name heads that are shared, and those of the decoder, once more.
    aliases = {"plain": 5 * 8, "refine": 6 * 6, "two-stage": 7 * 8, "efficient": 7 * 8, "sparse": 12 * 8 + 5 * 8}
    entries = {"plain": 561, "refine": 597, "two-stage": 630, "efficient": 630, "sparse": 760}
    assert len(state) + aliases[variant] == entries[variant]
    assert state["transformer.encoder.layers.0.self_attn.sampling_offsets.weight"].shape == (256, 256)
    assert state["transformer.encoder.layers.0.self_attn.attention_weights.weight"].shape == (128, 256)
    if variant in ("efficient", "sparse"):
        assert state["transformer.pos_trans.weight"].shape == (256, 512)


# Another implementation


@pytest.fixture(scope="session")
def transformers_state(transformers_backbone_name):
    def transformers_state(state: dict[str, torch.Tensor], decoder_layers: int) -> dict[str, torch.Tensor]:
        """Our entries under the names of `transformers`, a shared head once for every layer."""
        renamed = {}
        for name, value in state.items():
            if name.startswith("backbone.body."):
                renamed["model." + transformers_backbone_name(name.removeprefix("backbone.body."))] = value
            elif name.startswith(("class_embed", "bbox_embed")):
                head, number, rest = name.split(".", 2)
                for i in [number] if f"{head}.1.{rest}" in state else range(decoder_layers):
                    renamed[f"{head}.{i}.{rest}"] = value
            else:
                renamed |= transformers_entry("model." + name.removeprefix("transformer."), value)
        return renamed

    return transformers_state


def transformers_entry(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    swaps = [("linear1", "mlp.fc1"), ("linear2", "mlp.fc2"), ("cross_attn", "encoder_attn"), ("out_proj", "o_proj")]
    norms = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    if "decoder" in name:
        norms = {"norm1": "encoder_attn_layer_norm", "norm2": "self_attn_layer_norm", "norm3": "final_layer_norm"}
    for ours, theirs in [*swaps, *norms.items(), ("query_embed", "query_position_embeddings")]:
        name = name.replace(f".{ours}.", f".{theirs}.")
    if "in_proj_" not in name:
        return {name: value}
    return {
        name.replace("in_proj_", f"{letter}_proj."): part for letter, part in zip("qkv", value.chunk(3), strict=True)
    }


@pytest.mark.parametrize("variant", ["plain", "refine", "two-stage", "single-scale"])
def test_agreement_with_transformers(variant, assert_as_transformers, deformable, padded_batch, transformers_state):
    transformers = pytest.importorskip("transformers")
    options = {"levels": 1} if variant == "single-scale" else VARIANTS[variant] | {"levels": 4}
    model, exact = (
        deformable(
            options=options | {"stages": None, "encoder_points": 2, "decoder_points": 2},
            backbone={"name": "resnet18", "weights": "none"},
            compatibility={"padding": padding},
            hidden_dim=64,
        )
        for padding in ("official", "exact")
    )
    features = ["stage4"] if variant == "single-scale" else ["stage2", "stage3", "stage4"]
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone_config=transformers.ResNetConfig(
            layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], out_features=features
        ),
        d_model=64,
        encoder_layers=2,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=7,
        num_labels=5,
        num_feature_levels=options["levels"],
        encoder_n_points=2,
        decoder_n_points=2,
        with_box_refine=options.get("refine", False),
        two_stage=options.get("two_stage", False),
        two_stage_num_proposals=7,
    )
    reference = transformers.DeformableDetrForObjectDetection(config).eval()
    missing = reference.load_state_dict(transformers_state(model.state_dict(), 4), strict=False)
    assert missing.unexpected_keys == []
    for name in missing.missing_keys:  # heads that the decoder names again
        assert name.startswith(("model.decoder.bbox_embed", "model.decoder.class_embed"))
    for part in ("bbox_embed", "class_embed"):
        if getattr(reference.model.decoder, part) is not None:
            setattr(reference.model.decoder, part, getattr(reference, part))
    assert_as_transformers(model, reference, exact, (103, 189), (193, 67))
    images, padding = padded_batch((103, 189), (193, 67), canvas=(193, 189))
    with torch.no_grad():
        ours = model(images.double(), padding)
        theirs = reference(pixel_values=images.double(), pixel_mask=(~padding).long())
    assert ours.logits.std(1).min() > 0.01 and ours.boxes.std(1).min() > 0.001  # queries differ
    if variant == "two-stage":
        torch.testing.assert_close(ours.proposals.logits, theirs.enc_outputs_class, rtol=0, atol=1e-5)
        boxes = theirs.enc_outputs_coord_logits.sigmoid()
        torch.testing.assert_close(ours.proposals.boxes, boxes, rtol=0, atol=1e-5, check_dtype=False)
        assert 0.1 < (boxes == 1).all(-1).double().mean() < 0.7  # padding and what lies at the border


# Padding


@each_variant
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"options": {"levels": 3}},
        {"options": {"levels": 1, "stages": [4]}},
        {"position": "learned"},
    ],
    ids=["two-stages", "extra-level", "single-scale", "learned-position"],
)
def test_an_image_alone_is_predicted_as_in_a_padded_batch(variant, settings, assert_alone_as_in_batch, deformable):
    assert_alone_as_in_batch(deformable(variant, **settings))


@pytest.mark.parametrize("backbone", [{"name": "resnet18"}, {"name": "resnet50", "dilation": True}])
def test_padding_changes_nothing_at_the_strides_of_resnets(backbone, deformable, padded_batch):
    model = deformable("sparse", {"levels": 4, "stages": None}, backbone=backbone | {"weights": "none"})
    images, padding = padded_batch(*SIZES, canvas=CANVAS)
    with torch.no_grad():
        together = model(images, padding)
        alone = model(images[:1, :, :70, :101], padding[:1, :70, :101])
    scale = together.logits.abs().max().item()
    torch.testing.assert_close(alone.logits[0], together.logits[0], rtol=0, atol=1e-4 * max(1.0, scale))
    torch.testing.assert_close(alone.boxes[0], together.boxes[0], rtol=0, atol=1e-4)


# Geometry


def test_proposals_grow_from_level_to_level_and_keep_off_the_border(half_padded, pyramid_of):
    wide = torch.zeros(1, 2, 120, dtype=torch.bool)
    cells = proposal_cells(pyramid_of(wide, wide[:, :1, ::2], wide[:, :1, ::4]))
    sides = cells.logits.sigmoid()[0, :, 2:]
    for start, stop, side in [(0, 240, 0.05), (240, 300, 0.1), (300, 330, 0.2)]:
        torch.testing.assert_close(sides[start:stop], torch.full((stop - start, 2), side))
    assert not cells.valid[0, 0] and cells.valid[0, 1]  # centres at 0.5 / 120 and 1.5 / 120
    assert torch.isfinite(cells.logits).all()
    padded = proposal_cells(pyramid_of(half_padded()))
    assert padded.valid[0].all() and padded.valid[1].sum() == 12


# What models return


@each_variant
def test_every_layer_predicts(variant, deformable, padded_batch):
    model = deformable(variant)
    predictions = model(*padded_batch((70, 101), (96, 128), canvas=(96, 128)))
    assert len(predictions.auxiliary) == 3
    for layer in (*predictions.auxiliary, predictions):
        assert layer.logits.shape == (2, 7, 5) and layer.boxes.shape == (2, 7, 4)
        assert layer.classification == "sigmoid" and layer.boxes.dtype == torch.float32
        assert ((layer.boxes > 0) & (layer.boxes < 1)).all()
    tokens = 24 * 32 + 12 * 16
    if variant in ("plain", "refine"):
        assert predictions.proposals is None
    else:
        assert predictions.proposals.logits.shape == (2, tokens, 5)
        assert predictions.proposals.any_object == (variant == "two-stage")
    assert len(predictions.encoder_auxiliary) == (2 if variant == "sparse" else 0)
    assert (predictions.tokens is not None) == (variant == "sparse")


@each_variant
def test_every_parameter_learns(variant, deformable, padded_batch):
    model = deformable(variant).train()
    predictions = model(*padded_batch((70, 101), (96, 128), canvas=(96, 128)))
    layers = [*predictions.auxiliary, predictions, *predictions.encoder_auxiliary]
    layers += [predictions.proposals] if predictions.proposals else []
    loss = sum(layer.logits.square().sum() + layer.boxes.square().sum() for layer in layers)
    if predictions.tokens is not None:
        loss = loss + predictions.tokens.logits.square().sum()
    loss.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert still == []


@each_variant
def test_boxes_keep_their_precision_inside_autocast(variant, deformable, padded_batch):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predictions = deformable(variant)(*padded_batch((64, 64), (70, 101), canvas=(96, 128)))
    assert all(layer.boxes.dtype == torch.float32 for layer in (*predictions.auxiliary, predictions))


def test_too_many_queries_for_the_tokens_of_an_image(deformable, padded_batch):
    with pytest.raises(ValueError, match=r"500 queries cannot be proposed by the 320 tokens.*model\.num_queries"):
        deformable("two-stage", num_queries=500)(*padded_batch((64, 64), canvas=(64, 64)))
