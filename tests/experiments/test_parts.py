"""Where parts of models are, which numbers they have, and that what was exchanged comes back."""

import pytest
import torch
from torch import nn

from detrlib.errors import ModelError
from detrlib.experiments.parts import attention_at, chosen_layers, exchanged, kept_numbers, stack_of, without


def test_layers_keep_their_numbers_whatever_is_left_out():
    layers = nn.ModuleList(nn.Linear(n, n) for n in range(1, 6))
    shorter = without(without(layers, [3]), [1, 2])
    assert kept_numbers(shorter) == [0, 4] and shorter.total == 5
    assert [layer.in_features for layer in shorter] == [1, 5] and kept_numbers(layers) == list(range(5))


def test_layers_asked_for_are_those_that_are_still_there(small):
    model = small()
    stack = stack_of(model, "decoder")
    assert (stack.numbers(), stack.total()) == ([0, 1, 2], 3)
    with exchanged(model, [(*stack, without(stack.layers(), [1]))]):
        assert chosen_layers(stack, [2, 1, 2], "decoder") == [2] and chosen_layers(stack, None, "decoder") == [0, 2]
        assert list(attention_at(model, "decoder_cross")) == [0, 2]
        with pytest.raises(ModelError, match=r"layers \[3\] at decoder: the model has 3"):
            chosen_layers(stack, [3], "decoder")
    assert stack.numbers() == [0, 1, 2]


def test_every_site_is_found_in_every_family(small, huggingface_settings, model_settings):
    from detrlib.models import build_model

    deformable = small(architecture="deformable", deformable={"levels": 2})
    theirs = build_model(model_settings(**huggingface_settings("rt_detr")["model"]))
    for model, layers in ((small(), (2, 3, 3)), (deformable, (2, 3, 3)), (theirs, (1, 2, 2))):
        sites = "encoder_self", "decoder_self", "decoder_cross"
        assert tuple(len(attention_at(model, site)) for site in sites) == layers
    with pytest.raises(ModelError, match="no encoder layers"):
        attention_at(small(encoder_layers=0), "encoder_self")


def test_what_comes_back_is_where_the_model_is_and_in_its_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    first = model[0]
    with pytest.raises(KeyError), exchanged(model, [(model, "0", nn.Identity()), (first, "in_features", 7)]):
        assert isinstance(model[0], nn.Identity) and first.in_features == 7
        model.to(torch.float64).to("meta").train()
        raise KeyError
    assert model[0] is first and first.in_features == 2 and first.training
    assert first.weight.device.type == "meta"
