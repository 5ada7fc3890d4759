"""Attention as transformers asks for it, beside its own; which modules can be changed, and how."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detrlib.attention import AlphaEntmax
from detrlib.attention.transforms import Softmax, Sparsemax
from detrlib.errors import ModelError
from detrlib.models.huggingface_weights import (
    ByName,
    BySoftmax,
    SeesMap,
    attention,
    change,
    num_heads,
    original_of,
    samples_points,
    way_of,
)

LOWEST = torch.finfo(torch.float32).min


class TwiceAttention(nn.Module):
    """Calls softmax as often as told."""

    times = 1

    def forward(self, scores):
        for _ in range(self.times):
            scores = F.softmax(scores, -1, dtype=torch.float32)
        return scores


TwiceAttention.num_heads = 2


def with_transform(transform, **attributes):
    module = nn.Identity().eval()
    module.transform = transform
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def qkv():
    return rows(2, 3, 4, 8), rows(2, 3, 5, 8), rows(2, 3, 5, 6)


@pytest.fixture
def seen():
    seen = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    seen[0, ..., 3:] = seen[1, :, 2, :2] = False
    return seen


def additive(seen, lowest):
    return torch.zeros(seen.shape).masked_fill(~seen, lowest)


def test_softmax_is_that_of_transformers(qkv, seen):
    theirs = pytest.importorskip("transformers.models.detr.modeling_detr").eager_attention_forward
    module = with_transform(Softmax())
    for mask in (None, additive(seen, LOWEST), additive(seen, LOWEST) + rows(2, 1, 4, 5)):
        for scaling in (None, 0.2):
            expected = theirs(module, *qkv, mask, scaling=scaling)
            found = attention(module, *qkv, mask, scaling=scaling, output_attentions=True)
            torch.testing.assert_close(found, expected)
            assert found[0].is_contiguous()


@pytest.mark.parametrize("transform", [Softmax(), Sparsemax(), AlphaEntmax(3)])
def test_masks_of_all_kinds_hide_the_same_keys(qkv, seen, transform):
    module = with_transform(transform)
    expected, weights = attention(module, *qkv, seen)
    assert not weights[~seen.expand_as(weights)].any()
    for lowest in (LOWEST, float("-inf")):
        torch.testing.assert_close(attention(module, *qkv, additive(seen, lowest))[0], expected)
    query, key, value = qkv
    alone, _ = attention(module, query[:1], key[:1, :, :3], value[:1, :, :3], None)
    torch.testing.assert_close(expected[:1], alone)  # as if the columns were not there


def test_the_mask_of_denoising_has_no_images(qkv):
    mask = torch.zeros(4, 5)
    mask[:2, 2:] = float("-inf")
    weights = attention(with_transform(Sparsemax()), *qkv, mask)[1]
    assert not weights[:, :, :2, 2:].any()


@pytest.mark.parametrize("lowest", [None, LOWEST, float("-inf")])
def test_rows_of_nothing_but_padding_are_zero_with_finite_gradients(qkv, seen, lowest):
    seen[1, :, 1] = False
    query, key, value = (x.requires_grad_() for x in qkv)
    mixed, weights = attention(
        with_transform(AlphaEntmax(3)), query, key, value, seen if lowest is None else additive(seen, lowest)
    )
    mixed.square().sum().backward()
    assert not weights[1, :, 1].any()
    assert not mixed[1, 1].any()
    assert all(x.grad.isfinite().all() for x in qkv)


def test_half_precision_masks_are_understood(qkv, seen):
    half = [x.to(torch.bfloat16) for x in qkv]
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    mixed, weights = attention(with_transform(Sparsemax()), *half, mask)
    assert mixed.dtype == torch.bfloat16
    assert not weights[~seen.expand_as(weights)].any()


def test_dropout_is_of_training_and_not_in_the_weights(qkv):
    module = with_transform(Softmax())
    expected = attention(module, *qkv, None)
    torch.testing.assert_close(attention(module, *qkv, None, dropout=0.9), expected)
    mixed, weights = attention(module.train(), *qkv, None, dropout=0.9)
    torch.testing.assert_close(weights, expected[1])
    assert not torch.allclose(mixed, expected[0])


def test_one_softmax_is_answered_and_only_within_the_module():
    module = TwiceAttention()
    assert way_of(module) is BySoftmax
    module.transform = Sparsemax()
    change(module, BySoftmax)
    scores = 3 * rows(2, 2, 4, 5)
    torch.testing.assert_close(module(scores), Sparsemax()(scores))
    torch.testing.assert_close(module(scores.flatten(0, 1)), Sparsemax()(scores).flatten(0, 1))  # images and heads
    torch.testing.assert_close(module(scores.half()), Sparsemax()(scores.half()))  # in the type that was asked for
    torch.testing.assert_close(scores.softmax(-1).sum(-1), torch.ones(2, 2, 4))
    assert (scores.softmax(-1) > 0).all()
    hidden = scores.clone()
    hidden[..., 2:] += LOWEST
    assert not module(hidden)[..., 2:].any()
    for times in (0, 2):
        module.times = times
        with pytest.raises(ModelError, match="TwiceAttention"):
            module(scores)


def test_sampling_points_are_transformed_for_every_head():
    module = TwiceAttention()
    module.sampling_offsets = nn.Identity()
    module.transform = AlphaEntmax(3, torch.tensor([-4.0, 0.0, 4.0]))
    change(module, BySoftmax)
    scores = 2 * rows(2, 7, 3, 8)  # [B,Q,H,P]
    weights = module(scores)
    assert weights.shape == scores.shape
    zeros = (weights == 0).float().mean((0, 1, 3))
    assert zeros[0] < zeros[1] < zeros[2]  # alpha grows from head to head
    assert samples_points(module)


def test_modules_in_use_are_of_their_class_and_can_be_copied():
    module = TwiceAttention()
    module.transform = Sparsemax()
    change(module, BySoftmax)
    assert type(module) is not TwiceAttention
    assert isinstance(module, TwiceAttention)
    assert type(module).__name__ == "TwiceAttention"
    assert original_of(module) is TwiceAttention
    assert way_of(module) is BySoftmax
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert isinstance(other.transform, Sparsemax)
        torch.testing.assert_close(other(rows(2, 2, 4, 5)), module(rows(2, 2, 4, 5)))


@pytest.mark.parametrize("last", [True, False])
def test_a_subclass_of_others_keeps_its_own_ways(last):
    class DoubledAttention(TwiceAttention):
        def forward(self, scores):
            return 2 * super().forward(scores)

    class AttentionOver:
        def forward(self, scores):
            return 3 * super().forward(scores)

    module = DoubledAttention()
    module.transform = Sparsemax()
    change(module, BySoftmax)
    if last:
        module.__class__ = type("OtherAttention", (AttentionOver, type(module)), {})
    assert way_of(module) is BySoftmax
    before = type(module)
    change(module, BySoftmax)  # a use over a use
    assert type(module) is before
    scores = rows(2, 2, 4, 5)
    torch.testing.assert_close(module(scores), (6 if last else 2) * Sparsemax()(scores))


def test_a_map_is_noted():
    layer = nn.Conv2d(3, 4, 1)
    change(layer, SeesMap)
    assert layer(rows(1, 3, 5, 6)).shape == (1, 4, 5, 6)
    assert layer.grid == (5, 6)


def test_names_in_the_code_tell_the_way(huggingface_detector):
    detr = huggingface_detector("detr").model
    layer = detr.decoder.layers[0]
    assert way_of(layer.encoder_attn) is ByName
    assert way_of(layer) is None
    assert way_of(nn.MultiheadAttention(8, 2)) is None
    assert num_heads(layer.encoder_attn) == 4
    layer.encoder_attn.transform = Softmax()
    change(layer.encoder_attn, ByName)
    assert layer.encoder_attn.config._attn_implementation == "detrlib"
    assert layer.encoder_attn.config.d_model == detr.config.d_model
    assert detr.config._attn_implementation == layer.self_attn.config._attn_implementation == "eager"
