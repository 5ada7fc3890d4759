"""From settings to a model: what every family has in common, and what an import costs."""

import subprocess
import sys

import pytest
import torch

from detrlib.errors import ConfigError
from detrlib.models import build_model, transform_modules

REFINE = {"refine": True}
TWO_STAGE = REFINE | {"two_stage": True}
EFFICIENT = TWO_STAGE | {"query_init": "memory", "class_specific_proposals": True}
SPARSE = EFFICIENT | {"rho": 0.3, "encoder_auxiliary": True}
TINY = {"levels": 2, "stages": [1, 4], "encoder_points": 3, "decoder_points": 2}


BACKBONE = {"name": "tiny", "weights": "none"}
DEFORMABLE = {"architecture": "deformable", "classification": "sigmoid"}
FAMILIES = {
    "detr": {},
    "resnet": {"backbone": {"name": "resnet18", "weights": "none"}},
    "swin": {"backbone": {"name": "swin_t", "weights": "none"}},
    "official padding": {"compatibility": {"padding": "official"}},
    "pre-norm, learned positions": {"norm": "pre", "position": "learned"},
    "anchors": {"queries": "anchor", "classification": "sigmoid"},
    "conditional": {"queries": "conditional", "classification": "sigmoid"},
    "alpha-entmax": {"attention": dict.fromkeys(("encoder_self", "decoder_self", "decoder_cross"), "alpha_entmax")},
    "tvmax": {"attention": {"encoder_self": "tvmax", "decoder_cross": "tvmax"}},
    "null keys": {"attention": {"null_key": "learned"}},
    "gates, differences, registers": {"attention": {"gate": "channel", "differential": True}, "registers": 3},
    "poll and pool": {"polling": {"ratio": 0.3, "pooled": 4}},
    "deformable": DEFORMABLE | {"deformable": TINY},
    "efficient": DEFORMABLE | {"deformable": TINY | EFFICIENT},
    "sparse": DEFORMABLE | {"deformable": TINY | SPARSE},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_says_what_a_mask_of_no_padding_says(family, small):
    """To rounding: with a mask, attention and group norms take other kernels, which differ between processors."""
    model = small(**FAMILIES[family])
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        without = model(images, need_attention=True)
        masked = model(images, torch.zeros(2, 96, 128, dtype=torch.bool), need_attention=True)
    for one, other in zip((*without.auxiliary, without), (*masked.auxiliary, masked), strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=1e-4)
    for site in ("encoder_self", "decoder_self", "decoder_cross"):
        for one, other in zip(getattr(without.attention, site), getattr(masked.attention, site), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert without.attention.valid_grid(1) == masked.attention.valid_grid(1)
    if without.polled is None:
        assert without.attention.key_padding is None and not masked.attention.key_padding.any()


COMPILED = ("detr", "swin", "anchors", "conditional", "poll and pool", "deformable", "efficient", "sparse")
COMPILED += ("gates, differences, registers",)
QUICK = ("gates, differences, registers", "sparse")  # the others are much like them


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMPILED]
)
def test_models_are_one_graph(family, small, padded_batch):
    """No step of the way depends on numbers in tensors: in training with padding, in evaluation without."""
    images, padding_mask = padded_batch((70, 101), (96, 64), canvas=(96, 128))
    for training, given in ((True, (images, padding_mask)), (False, (images, None))):
        model = small(**FAMILIES[family], dropout=0.0, encoder_layers=2, decoder_layers=2).train(training)
        torch._dynamo.reset()
        graph = torch.compile(model, fullgraph=True, backend="eager")
        torch.manual_seed(0)
        expected = model(*given)
        torch.manual_seed(0)
        found = graph(*given)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-4)


def test_settings_that_need_data_are_refused(model_settings):
    with pytest.raises(ConfigError, match=r"model\.num_classes"):
        build_model(model_settings(backbone=BACKBONE))
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights"):
        build_model(model_settings(backbone=BACKBONE | {"weights": "crops"}, num_classes=2))


def test_models_are_imported_without_tables():
    """Importing them costs little more than importing torch."""
    program = "import sys, detrlib.models; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "detrlib.models" in loaded and not {"pandas", "pyarrow", "pycocotools"} & set(loaded)


NULL_KEY = {"null_key": "learned", "null_key_sites": ["encoder_self", "decoder_cross"]}


def test_null_keys_add_a_score_for_each_head_where_they_stand_and_nothing_elsewhere(small):
    plain, model = (set(small(attention=attention).state_dict()) for attention in ({}, NULL_KEY))
    layers = [f"transformer.encoder.layers.{layer}.self_attn" for layer in range(2)]
    layers += [f"transformer.decoder.layers.{layer}.multihead_attn" for layer in range(3)]
    assert model - plain == {f"{layer}.transform.null_score" for layer in layers}
    assert plain <= model
    assert set(small(attention={"null_key": "zero"}).state_dict()) == plain


@pytest.mark.parametrize("family", ("detr", "anchors", "conditional", *QUICK, "poll and pool", "deformable"))
def test_null_keys_are_learned_in_every_family(family, small, padded_batch):
    settings = FAMILIES[family]
    model = small(**settings | {"attention": settings.get("attention", {}) | {"null_key": "learned"}})
    scores = {layer: module.null_score for layer, module in transform_modules(model).items()}
    assert {layer.split(".")[0] for layer in scores} >= {"decoder_self"}
    model(*padded_batch((70, 101), (128, 64), canvas=(128, 160))).logits.square().sum().backward()
    assert all(score.grad is not None and score.grad.any() for score in scores.values())
