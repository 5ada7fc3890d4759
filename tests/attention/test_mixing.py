"""All ways of attending compute the same: written down, by PyTorch, in parts; with padding, dropout and null keys."""

import pytest
import torch

from detrlib.attention import TRANSFORMS, attend, mixing
from detrlib.attention.transforms import Softmax

HEADS = 3  # of the transforms that `make` gives

every_transform = pytest.mark.parametrize("name", TRANSFORMS)


@pytest.mark.parametrize("padded", [False, True])
def test_fused_attention_is_the_explicit_one(padded, keys_padding, make, random_scores):
    query, key, value = (random_scores(2, HEADS, n, 8, seed=n) for n in (5, 7, 7))
    padding = keys_padding()[:, 0, 0] if padded else None
    fused, none = attend(query, key, value, make("softmax"), padding)
    explicit, weights = attend(query, key, value, make("softmax"), padding, need_weights=True)
    assert none is None
    assert weights.shape == (2, HEADS, 5, 7)
    torch.testing.assert_close(fused, explicit)


@every_transform
@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_acts_on_mixing_and_not_on_the_returned_weights(name, need_weights, make, random_scores):
    torch.manual_seed(0)
    query, key = random_scores(1, HEADS, 50, 8, scale=0.5).float(), random_scores(1, HEADS, 40, 8, seed=1).float()
    value = torch.eye(40).expand(1, HEADS, 40, 40)  # mixing them shows the weights that were used
    clean = attend(query, key, value, make(name), grid=(4, 10), need_weights=True)[1]
    mixed, weights = attend(query, key, value, make(name), None, (4, 10), 0.25, need_weights)
    dropped = (mixed == 0) & (clean > 0)
    assert 0.2 < dropped.sum() / (clean > 0).sum() < 0.3
    torch.testing.assert_close(mixed[~dropped], clean[~dropped] / 0.75)
    if need_weights:
        assert torch.equal(weights, clean)


# Without maps: few scores at a time, the same result


@every_transform
@pytest.mark.parametrize("padded", [False, True])
def test_queries_in_parts_give_the_same(monkeypatch, name, padded, keys_padding, make, random_scores):
    query, key, value = (random_scores(2, HEADS, n, 8, seed=n) for n in (5, 7, 7))
    padding = keys_padding()[:, 0, 0] if padded else None
    transform = make(name).double()
    inputs = [x.requires_grad_() for x in (query, key, value)] + list(transform.parameters())

    def run():
        mixed, _ = attend(query, key, value, transform, padding, (1, 7))
        return mixed, torch.autograd.grad((mixed * random_scores(*mixed.shape, seed=9)).sum(), inputs)

    whole, wanted = run()
    monkeypatch.setattr(mixing, "MOST_SCORES", 2 * HEADS * 7 * 2)  # two queries at a time, the last one alone
    parts, found = run()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(found, wanted)


def test_parts_bound_the_scores(monkeypatch, random_scores):
    """The transform never sees more than the limit."""
    seen = []

    class Counting(Softmax):
        padding_adds_one = True  # keeps away from torch's own fused softmax

        def weights(self, scores, grid):
            seen.append(scores.numel())
            return super().weights(scores, grid)

    monkeypatch.setattr(mixing, "MOST_SCORES", 1000)
    query, key = random_scores(2, HEADS, 50, 8), random_scores(2, HEADS, 60, 8, seed=1)
    attend(query, key, key, Counting())
    assert max(seen) <= 1000
    assert sum(seen) == 2 * HEADS * 50 * 60


def test_dropout_is_the_same_when_a_part_is_computed_again(monkeypatch, make, random_scores):
    monkeypatch.setattr(mixing, "MOST_SCORES", 1)
    query, key = random_scores(1, HEADS, 4, 8), random_scores(1, HEADS, 30, 8, seed=1)
    value = torch.eye(30, dtype=torch.float64).expand(1, HEADS, 30, 30).clone().requires_grad_()
    mixed, _ = attend(query, key, value, make("entmax15"), dropout=0.5)
    # d sum(mixed) / d value[k] is the sum of the used weights of key k: those of the forward pass.
    (gradient,) = torch.autograd.grad(mixed.sum(), value)
    torch.testing.assert_close(gradient[..., 0], mixed.sum(2))


# Null keys: as one more key, or in the transform, the same result

NULL_KEYS = pytest.mark.parametrize("null_key", ["zero", "learned"])


@every_transform
@NULL_KEYS
@pytest.mark.parametrize("padded", [False, True])
def test_ways_agree_on_a_null_key(monkeypatch, name, null_key, padded, keys_padding, make, random_scores):
    """Written down; without weights, where softmax is PyTorch's; in parts. With an image of nothing but padding."""
    query, key, value = (random_scores(2, HEADS, n, 8, seed=n) for n in (5, 7, 7))
    padding = keys_padding()[:, 0, 0] if padded else None
    if padded:
        padding[1] = True
    transform = make(name, null_key=null_key).double()
    inputs = [x.requires_grad_() for x in (query, key, value)] + list(transform.parameters())

    def run(**how):
        mixed, _ = attend(query, key, value, transform, padding, (1, 7), **how)
        return mixed, *torch.autograd.grad((mixed * random_scores(*mixed.shape, seed=9)).sum(), inputs)

    written = run(need_weights=True)
    torch.testing.assert_close(run(), written)
    monkeypatch.setattr(mixing, "MOST_SCORES", 2 * HEADS * 7 * 2)
    torch.testing.assert_close(run(), written)
    weights = transform(query @ key.mT / 8**0.5, None if padding is None else padding[:, None, None], (1, 7))
    torch.testing.assert_close(written[0], weights @ value)
    if padded:
        assert not written[0][1].any()


@every_transform
@NULL_KEYS
def test_dropout_leaves_a_null_key_alone(name, null_key, make, random_scores):
    torch.manual_seed(0)
    query, key = random_scores(1, HEADS, 50, 8, scale=0.5).float(), random_scores(1, HEADS, 40, 8, seed=1).float()
    value, transform = torch.eye(40).expand(1, HEADS, 40, 40), make(name, null_key=null_key)
    clean = attend(query, key, value, transform, grid=(4, 10), need_weights=True)[1]
    mixed, _ = attend(query, key, value, transform, None, (4, 10), 0.25)
    dropped = (mixed == 0) & (clean > 0)
    assert 0.2 < dropped.sum() / (clean > 0).sum() < 0.3
    torch.testing.assert_close(mixed[~dropped], clean[~dropped] / 0.75)


@pytest.mark.parametrize("name", ["softmax", "sparsemax", "alpha_entmax"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_padding_can_add_one(name, need_weights, keys_padding, make, random_scores):
    query, key, value = (random_scores(2, HEADS, n, 8, seed=n) for n in (5, 7, 7))
    padding, transform = keys_padding()[:, 0, 0], make(name).double()
    hidden = attend(query, key, value, transform, padding)[0]
    transform.padding_adds_one = True
    mixed, weights = attend(query, key, value, transform, padding, need_weights=need_weights)
    scores = query @ key.mT / 8**0.5 + padding[:, None, None, :].double()
    torch.testing.assert_close(mixed, make(name).double()(scores) @ value)
    assert (mixed - hidden).abs().max() > 0.01
    if need_weights:
        assert (weights[..., 5:] > 0).any()
