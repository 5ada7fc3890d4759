"""Dropout by bits: how much is set to zero, what is left of it, and its gradient."""

import pytest
import torch

from detrlib.attention.dropout import Dropout, dropout
from detrlib.attention.mixing import attend, mix
from detrlib.attention.transforms import Softmax


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_is_zero_wherever_it_lies_in_a_draw(share):
    torch.manual_seed(0)
    zero = dropout(torch.ones(400_000), share) == 0
    shares = torch.stack([part.double().mean() for part in zero.view(-1, 4).unbind(1)])  # four come from one draw
    assert (shares - share).abs().max() < 0.005
    together = (zero[:-1] & zero[1:]).double().mean()
    assert abs(together - share**2) < 0.005  # neighbours are drawn apart


def test_what_is_left_and_its_gradient_are_divided_by_what_is_left_of_one():
    torch.manual_seed(0)
    x = torch.randn(7, 31, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0.0))
    torch.testing.assert_close(x.grad, kept / 0.75)


def test_nothing_all_and_evaluation():
    x = torch.randn(5)
    assert torch.equal(dropout(x, 0.0), x)
    assert not dropout(x, 1.0).any()
    assert torch.equal(attend(*torch.randn(3, 1, 2, 5, 4), Softmax(), dropout=1.0)[0], torch.zeros(1, 2, 5, 4))
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_softmax_with_dropout_is_that_of_mix_for_the_same_draw():
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, length, 4, requires_grad=True) for length in (5, 6, 6))
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = padding[2] = True  # the last image is nothing but padding
    results = []
    for attention in (attend, mix):
        torch.manual_seed(1)
        mixed, _ = attention(query, key, value, Softmax(), padding, dropout=0.3)
        results.append((mixed, *torch.autograd.grad(mixed.square().sum(), (query, key, value))))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    assert not results[0][0][2].any()
