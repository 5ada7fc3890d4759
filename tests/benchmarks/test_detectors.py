"""The model in plain PyTorch: the same as ours, written otherwise; and of all models the same parts are trained."""

import pytest
import torch

from detrlib.benchmarks import step
from detrlib.benchmarks.detectors import PlainDetr, transformers_model, transformers_step
from detrlib.benchmarks.synthetic import random_batch
from detrlib.benchmarks.training import SIZES
from detrlib.config import load_config
from detrlib.models import build_model


def test_the_plain_model_is_ours():
    """In evaluation, with the same weights by their order, for a batch without padding, which it treats otherwise."""
    torch.manual_seed(0)
    ours, plain = build_model(load_config(None, step.MODEL).model).eval(), PlainDetr().eval()
    convolutions = ([m for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d)] for model in (ours, plain))
    for own, other in zip(*convolutions, strict=True):
        other.load_state_dict(own.state_dict())
    pairs = [(ours.input_proj, plain.project), (ours.query_embed, plain.query_embed)]
    pairs += [(ours.class_embed, plain.class_embed), (ours.bbox_embed, plain.bbox_embed)]
    pairs += [(ours.transformer.decoder.norm, plain.norm)]
    for own, other in pairs:
        other.load_state_dict(own.state_dict())
    for own, other in zip(ours.transformer.encoder.layers, plain.encoder, strict=True):
        state = own.state_dict()
        state |= {f"norm3.{name}": state.pop(f"norm2.{name}") for name in ("weight", "bias")}
        other.load_state_dict(state, strict=False)
    for own, other in zip(ours.transformer.decoder.layers, plain.decoder, strict=True):
        other.load_state_dict(
            {name.replace("multihead_attn", "cross_attn"): value for name, value in own.state_dict().items()}
        )
    images = random_batch((96, 64), 2, "cpu").images / 100
    with torch.no_grad():
        found, expected = plain(images, torch.zeros_like(images[:, 0], dtype=torch.bool)), ours(images)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-3)
    assert len(found.auxiliary) == len(expected.auxiliary) == 5


@pytest.mark.parametrize("kind", ["detr", "deformable_detr"])
def test_of_transformers_models_all_but_the_stem_and_the_first_stage_is_trained(kind):
    """They come with a backbone that is frozen as a whole."""
    pytest.importorskip("transformers")
    model = transformers_model(kind, SIZES["cpu"].theirs, SIZES["cpu"].backbone)
    transformers_step(random_batch((64, 96), 2, "cpu", padded=True), model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all(".embedder." in name or ".stages.0." in name for name in frozen)
    assert {name.split("stages.")[1][0] for name in frozen if "stages." in name} == {"0"}
