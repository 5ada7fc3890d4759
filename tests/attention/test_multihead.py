"""Multi-head attention: the softmax case against `torch.nn.MultiheadAttention`, others against the explicit one."""

import pytest
import torch
from torch import nn

from detrlib.attention import TRANSFORMS, MultiheadAttention, attend, build_transform, multihead
from detrlib.attention.multihead import ConditionalCrossAttention, ConditionalSelfAttention, merge_heads
from detrlib.attention.transforms import Softmax
from detrlib.errors import ConfigError

HEADS = 3  # of the transforms that `make` gives


every_transform = pytest.mark.parametrize("name", TRANSFORMS)


@pytest.fixture
def pair():
    """torch's module and ours with the same parameters, none of them zero."""
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(24, 4, batch_first=True)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(24, 4, build_transform("softmax", 4))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_softmax_attention_is_that_of_torch(pair, padded, need_weights, keys_padding):
    reference, ours = pair
    query, key, value = (torch.randn(2, n, 24) for n in (5, 7, 7))
    padding = keys_padding()[:, 0, 0] if padded else None
    ours.train(), reference.train()
    output, mixing = ours(query, key, value, padding, need_weights=need_weights)
    wanted, wanted_weights = reference(query, key, value, padding, need_weights, average_attn_weights=False)
    torch.testing.assert_close(output, wanted)
    if need_weights:
        torch.testing.assert_close(mixing.weights, wanted_weights)
        torch.testing.assert_close(ours.out_proj(merge_heads(mixing.weights @ mixing.values)), output)
        assert mixing.values._base is not None  # a view of what was projected
    else:
        assert mixing is None
    found = torch.autograd.grad(output.square().sum(), list(ours.parameters()))
    expected = torch.autograd.grad(wanted.square().sum(), list(reference.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_softmax_attention_starts_as_that_of_torch():
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(24, 4, batch_first=True).state_dict()
    ours = MultiheadAttention(24, 4, build_transform("softmax", 4)).state_dict()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in reference.items()}
    for name in reference:
        torch.testing.assert_close(ours[name].abs().max(), reference[name].abs().max(), rtol=0.1, atol=0)


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
def test_asking_for_weights_changes_nothing(name, keys_padding, make, random_scores):
    layer = MultiheadAttention(12, HEADS, make(name))
    x, padding = random_scores(2, 7, 12).float(), keys_padding()[:, 0, 0]
    torch.testing.assert_close(layer(x, x, x, padding, (1, 7))[0], layer(x, x, x, padding, (1, 7), True)[0])


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


@pytest.fixture(scope="session")
def conditional_attention(make):
    def conditional_attention() -> ConditionalCrossAttention:
        return ConditionalCrossAttention(12, 3, make("entmax15"), dropout=0.5)

    return conditional_attention


@pytest.mark.parametrize("conditional", [False, True])
def test_layers_drop_in_training_only(conditional, conditional_attention, make):
    torch.manual_seed(0)
    layer = conditional_attention() if conditional else MultiheadAttention(12, 3, make("entmax15"), 0.5)
    x = torch.randn(2, 5, 12)
    inputs = (x, x, x) if isinstance(layer, MultiheadAttention) else (x, x, x, x, x)
    runs = {}
    for mode in (True, False):
        layer.train(mode)
        runs[mode] = [layer(*inputs, need_weights=True) for _ in range(2)]
    assert not torch.equal(runs[True][0][0], runs[True][1][0])
    assert torch.equal(runs[False][0][0], runs[False][1][0])
    assert all(map(torch.equal, runs[True][0][1], runs[False][0][1]))


def test_conditional_attention_adds_two_scaled_dot_products(keys_padding):
    torch.manual_seed(0)
    content, position, spatial = torch.randn(3, 2, 5, 12)
    memory, memory_position = torch.randn(2, 2, 7, 12)
    padding = keys_padding()[:, 0, 0]
    for first in (False, True):
        layer = ConditionalCrossAttention(12, 3, build_transform("softmax", 3), first=first)
        output, mixing = layer(content, position, spatial, memory, memory_position, padding, need_weights=True)
        query, key = layer.query_content(content), layer.key_content(memory)
        if first:
            query, key = query + layer.query_position(position), key + layer.key_position(memory_position)
        where, there = layer.query_spatial(spatial), layer.key_position(memory_position)
        mixed = []
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            scores = query[..., part] @ key[..., part].mT + where[..., part] @ there[..., part].mT
            expected = (scores / 8**0.5).masked_fill(padding[:, None], float("-inf")).softmax(-1)
            torch.testing.assert_close(mixing.weights[:, head], expected)
            torch.testing.assert_close(mixing.values[:, head], layer.value(memory)[..., part])
            mixed.append(expected @ layer.value(memory)[..., part])
        torch.testing.assert_close(output, layer.out_proj(torch.cat(mixed, -1)))


def test_heads_must_divide_the_embedding(make):
    with pytest.raises(ValueError, match="embed_dim 10 is not a multiple of num_heads 3"):
        MultiheadAttention(10, 3, make("softmax"))


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
    monkeypatch.setattr(multihead, "MOST_SCORES", 2 * HEADS * 7 * 2)  # two queries at a time, the last one alone
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

    monkeypatch.setattr(multihead, "MOST_SCORES", 1000)
    query, key = random_scores(2, HEADS, 50, 8), random_scores(2, HEADS, 60, 8, seed=1)
    attend(query, key, key, Counting())
    assert max(seen) <= 1000
    assert sum(seen) == 2 * HEADS * 50 * 60


def test_dropout_is_the_same_when_a_part_is_computed_again(monkeypatch, make, random_scores):
    monkeypatch.setattr(multihead, "MOST_SCORES", 1)
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
    monkeypatch.setattr(multihead, "MOST_SCORES", 2 * HEADS * 7 * 2)
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


# Switches for published weights


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


def test_switches_reach_the_layers(small):
    attention = {"decoder_self": "alpha_entmax", "decoder_cross": "alpha_entmax", "alpha_init": "cloned"}
    model = small(attention=attention, compatibility={"alpha_clamped": True, "padding": "thesis"})
    layers = model.transformer.decoder.layers
    for site in ("self_attn", "multihead_attn"):
        first, *others = (getattr(layer, site).transform for layer in layers)
        assert first.clamped
        assert first.padding_adds_one is (site == "multihead_attn")
        assert all(torch.equal(first.pre_alpha, other.pre_alpha) for other in others)
        assert all(first.pre_alpha is not other.pre_alpha for other in others)
    assert not torch.equal(layers[0].self_attn.transform.pre_alpha, layers[0].multihead_attn.transform.pre_alpha)


def test_tvmax_needs_a_grid(make, random_scores, small):
    with pytest.raises(ConfigError, match="decoder_self"):
        small(attention={"decoder_self": "tvmax"})
    with pytest.raises(ValueError, match="grid"):
        make("tvmax")(random_scores(1, HEADS, 2, 7))


def test_conditional_self_attention_is_plain_where_content_and_position_share_their_matrices():
    torch.manual_seed(0)
    plain = MultiheadAttention(12, 3, build_transform("sparsemax", 3)).eval()
    layer = ConditionalSelfAttention(12, 3, build_transform("sparsemax", 3)).eval()
    weights, state = plain.in_proj_weight.chunk(3), {}
    for name, weight in zip(("query", "key"), weights, strict=False):
        for part in ("content", "position"):
            state |= {f"{name}_{part}.weight": weight, f"{name}_{part}.bias": torch.zeros(12)}
    state |= {"value.weight": weights[2], "value.bias": torch.zeros(12)}
    layer.load_state_dict(state | {f"out_proj.{name}": value for name, value in plain.out_proj.state_dict().items()})
    content, position = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    query = content + position
    torch.testing.assert_close(layer(content, position, True), plain(query, query, content, need_weights=True))
