"""Multi-head attention: the softmax case against `torch.nn.MultiheadAttention`, others against the explicit one."""

import pytest
import torch
from torch import nn

from detrlib.attention import TRANSFORMS, MultiheadAttention, build_transform
from detrlib.attention.multihead import ConditionalCrossAttention, ConditionalSelfAttention, merge_heads
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


@every_transform
def test_asking_for_weights_changes_nothing(name, keys_padding, make, random_scores):
    layer = MultiheadAttention(12, HEADS, make(name))
    x, padding = random_scores(2, 7, 12).float(), keys_padding()[:, 0, 0]
    torch.testing.assert_close(layer(x, x, x, padding, (1, 7))[0], layer(x, x, x, padding, (1, 7), True)[0])


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


# Switches for published weights


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
