"""Activations that are computed again: the same gradients, dropout included, from less memory."""

import pytest
import torch

from detrlib.errors import ConfigError
from detrlib.models import checkpoint_activations

PYRAMID = {"levels": 2, "stages": [3, 4]}
DEFORMABLE = {"architecture": "deformable", "deformable": PYRAMID}
SPARSE = PYRAMID | {"two_stage": True, "refine": True, "rho": 0.3, "encoder_auxiliary": True}
FAMILIES = {
    "detr": {"attention": {"encoder_self": "entmax15", "decoder_cross": "alpha_entmax"}},
    "pre-norm resnet": {"norm": "pre", "backbone": {"name": "resnet18", "weights": "none"}},
    "frozen stem": {"backbone": {"name": "resnet50", "weights": "none", "freeze_stem": True}},
    "swin": {"backbone": {"name": "swin_t", "weights": "none"}},
    "polled": {"polling": {"ratio": 0.4, "pooled": 5, "train_ratios": [0.3, 0.8]}},
    "deformable": DEFORMABLE,
    "sparse encoder": DEFORMABLE | {"deformable": SPARSE},
}


def looked_at(model, images, padding, **how):
    """Predictions, and gradients of all parameters, of a training pass with dropout."""
    torch.manual_seed(3)
    model.zero_grad()
    outputs = model.train()(images, padding, **how)
    layers = [*outputs.auxiliary, *outputs.encoder_auxiliary, outputs]
    sum((layer.logits.square().mean() + layer.boxes.mean()) for layer in layers).backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_gradients_are_those_of_activations_that_are_kept(settings, small, padded_batch):
    model = small(**settings, dropout=0.2)
    images, padding = padded_batch((64, 96), (80, 64), canvas=(80, 96))
    outputs, expected = looked_at(model, images, padding)
    names = set(model.state_dict())
    checkpoint_activations(model, True)
    again, gradients = looked_at(model, images, padding)
    torch.testing.assert_close(again.logits, outputs.logits)
    assert gradients.keys() == expected.keys() and set(model.state_dict()) == names
    for name, gradient in expected.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def kept_bytes(model, images, padding):
    """Of all tensors that a forward pass keeps for the backward pass, parameters aside."""
    kept, own = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(images, padding)
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("part, backbone, less", [("backbone", "resnet18", 0.6), ("encoder", "tiny", 0.6)])
def test_a_part_keeps_less(part, backbone, less, small, padded_batch):
    model = small(backbone={"name": backbone, "weights": "none"}, attention={"encoder_self": "sparsemax"})
    images, padding = padded_batch((256, 224), (192, 256), canvas=(256, 256))
    everything = kept_bytes(model, images, padding)
    checkpoint_activations(model, [part])
    assert kept_bytes(model, images, padding) < less * everything


@pytest.mark.parametrize("settings", [{}, DEFORMABLE], ids=["detr", "deformable"])
def test_maps_are_returned_and_carry_gradients(settings, small, padded_batch):
    """Also by a model in evaluation mode, where nothing is computed again."""
    images, padding = padded_batch((64, 96), (80, 64), canvas=(80, 96))
    plain, model = small(**settings), small(**settings)
    checkpoint_activations(model, ["encoder"])
    for one in (plain, model):
        one.requires_grad_(True)
    found = [one.eval()(images, padding, need_attention=True).attention for one in (plain, model)]
    torch.testing.assert_close(found[1].encoder_self[0], found[0].encoder_self[0])
    torch.manual_seed(0)
    maps = model.train()(images, padding, need_attention=True).attention.encoder_self[0]
    maps.square().sum().backward()
    assert next(model.transformer.encoder.parameters()).grad.abs().sum() > 0


def test_a_model_without_such_a_part_is_refused():
    with pytest.raises(ConfigError, match=r"train.checkpoint_activations: this model has no encoder"):
        checkpoint_activations(torch.nn.Linear(2, 2), ["encoder"])
    checkpoint_activations(torch.nn.Linear(2, 2), False)
