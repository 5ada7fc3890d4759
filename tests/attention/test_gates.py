"""Gates and differences: against the formulas of their papers, head by head, in every kind of attention.

Legend: B = 2 images, H = 3 heads of D = 4 channels, Q = 5 queries, K = 7 keys.
"""

import math

import pytest
import torch
from torch import nn

from detrlib.attention import TRANSFORMS, ConditionalCrossAttention, ConditionalSelfAttention, MultiheadAttention
from detrlib.attention.gates import Difference, Gate
from detrlib.attention.mixing import mix
from detrlib.attention.multihead import split_heads

HEADS, E = 3, 12
KINDS = {"plain": MultiheadAttention, "conditional": ConditionalCrossAttention, "self": ConditionalSelfAttention}

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def layer_of(make):
    def layer_of(kind: str, transform: str = "softmax", gate: str | None = None, differential: bool = False):
        """A layer in float64 whose norms are not one, and what `compared` gives of its inputs."""
        torch.manual_seed(0)
        difference = Difference(E // HEADS, layer=2) if differential else None
        if differential:
            nn.init.uniform_(difference.norm.weight, 0.5, 1.5)
        gate = None if gate is None else Gate(E, HEADS, gate)
        options = {"gate": gate, "difference": difference} | ({"first": True} if kind == "conditional" else {})
        return KINDS[kind](E, HEADS, make(transform), **options).double()

    return layer_of


@pytest.fixture(scope="session")
def inputs_of(random_scores, keys_padding):
    def inputs_of(kind: str) -> tuple[dict, torch.Tensor | None]:
        """Inputs of a kind by name, and the padding of its keys."""
        shapes = {"content": 5, "position": 5, "spatial": 5, "memory": 7, "memory_position": 7}
        x = {name: random_scores(2, n, E, scale=1.0, seed=i) for i, (name, n) in enumerate(shapes.items())}
        if kind == "plain":
            return {"query": x["content"], "key": x["memory_position"], "value": x["memory"]}, keys_padding()[:, 0, 0]
        if kind == "self":
            return {name: x[name] for name in ("content", "position")}, None
        return x, keys_padding()[:, 0, 0]

    return inputs_of


def run(layer, inputs, padding, **options):
    """Output, and weights or None."""
    if padding is not None:
        options |= {"padding": padding, "grid": (1, 7)}
    output, mixing = layer(**inputs, **options)
    return output, None if mixing is None else mixing.weights


def projected(layer, inputs):
    """What queries are projected from, and the parts of queries and keys, and values: [B,N,E] each."""
    if isinstance(layer, MultiheadAttention):
        query, key, value = (
            nn.functional.linear(x, w, b)
            for x, w, b in zip(inputs.values(), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
        )
        return inputs["query"], [query], [key], value
    content, position = inputs["content"], inputs["position"]
    memory, there = inputs.get("memory", content), inputs.get("memory_position", position)
    query = layer.query_content(content) + layer.query_position(position)
    key, keyed = layer.key_content(memory) + layer.key_position(there), layer.key_position(there)
    more = isinstance(layer, ConditionalCrossAttention)
    queries, keys = ([query, layer.query_spatial(inputs["spatial"])], [key, keyed]) if more else ([query], [key])
    return content + position, queries, keys, layer.value(memory)


@every_kind
@pytest.mark.parametrize("name", ["head", "channel"])
def test_gates_let_through_a_share_of_what_heads_have_mixed(kind, name, layer_of, inputs_of):
    layer, (inputs, padding) = layer_of(kind, gate=name), inputs_of(kind)
    x, queries, keys, value = projected(layer, inputs)
    mixed = []
    for head in range(HEADS):
        part = slice(4 * head, 4 * head + 4)
        scores = sum(q[..., part] @ k[..., part].mT for q, k in zip(queries, keys, strict=True))
        scores = scores / (4 * len(queries)) ** 0.5
        scores = scores if padding is None else scores.masked_fill(padding[:, None], -torch.inf)
        rows = layer.gate.weight[head : head + 1] if name == "head" else layer.gate.weight[part]
        mixed.append(scores.softmax(-1) @ value[..., part] * torch.sigmoid(x @ rows.mT))
    expected = layer.out_proj(torch.cat(mixed, -1))
    for need_weights in (False, True):
        output, weights = run(layer, inputs, padding, need_weights=need_weights)
        torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))  # before the gate


@pytest.mark.parametrize(
    ("kind", "transform"), [(k, t) for k in KINDS for t in TRANSFORMS if (k, t) != ("self", "tvmax")]
)
def test_a_difference_is_two_attentions_by_half_of_the_channels(kind, transform, layer_of, inputs_of):
    layer, (inputs, padding) = layer_of(kind, transform, differential=True), inputs_of(kind)
    _, queries, keys, value = projected(layer, inputs)
    value, how = split_heads(value, HEADS), (layer.transform, padding, None if padding is None else (1, 7))
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        query, key = (torch.cat([split_heads(part, HEADS)[..., half] for part in p], -1) for p in (queries, keys))
        halves.append(mix(query, key, value, *how))
    (first, weights), (second, others) = halves
    difference = layer.difference
    vectors = {name: getattr(difference, f"lambda_{name}").tolist() for name in ("q1", "k1", "q2", "k2")}
    products = [sum(a * b for a, b in zip(vectors[f"q{i}"], vectors[f"k{i}"], strict=True)) for i in (1, 2)]
    start = 0.8 - 0.6 * math.exp(-0.3)  # of the second layer
    share = math.exp(products[0]) - math.exp(products[1]) + start
    assert difference.share().item() == pytest.approx(share)
    mixed = first - share * second  # [B,H,Q,D]
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * difference.norm.weight * (1 - start)
    expected = layer.out_proj(torch.cat(list(normed.unbind(1)), -1))
    output, none = run(layer, inputs, padding)
    again, signed = run(layer, inputs, padding, need_weights=True)
    assert none is None
    for found in (output, again):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(signed, weights - share * others)
    if transform == "softmax":
        torch.testing.assert_close(signed.sum(-1), torch.full_like(signed[..., 0], 1 - share))
    assert (signed < 0).any()
    if padding is not None:
        assert (signed.masked_select(padding[:, None, None]) == 0).all()


@pytest.mark.parametrize(("layer", "start"), [(1, 0.2), (2, 0.8 - 0.6 * math.exp(-0.3)), (100, 0.8)])
def test_lambda_starts_by_the_number_of_the_layer(layer, start):
    torch.manual_seed(0)
    difference = Difference(4000, layer)
    assert difference.start == pytest.approx(start)
    drawn = torch.stack([parameter.detach() for name, parameter in difference.named_parameters() if "lambda" in name])
    assert drawn.shape == (4, 2000) and 0.095 < drawn.std() < 0.105
    assert (difference.norm.weight == 1).all()


@pytest.mark.parametrize(("name", "shares"), [("head", 8), ("channel", 64)])
def test_gates_start_around_one_half(name, shares):
    torch.manual_seed(0)
    gate = Gate(64, 8, name)
    assert [(n, p.shape) for n, p in gate.named_parameters()] == [("weight", (shares, 64))]
    assert gate.weight.abs().max() <= (6 / (64 + shares)) ** 0.5
    found = gate(torch.randn(4, 100, 64))
    assert found.shape == (4, 8, 100, shares // 8)
    assert 0.48 < found.mean() < 0.52 and 0.1 < found.std() < 0.4


def test_an_odd_number_of_channels_has_no_halves():
    with pytest.raises(ValueError, match="5 channels"):
        Difference(5, 1)


@pytest.mark.parametrize("kind", ["plain", "conditional"])
@pytest.mark.parametrize("transform", ["softmax", "alpha_entmax"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients(kind, transform, need_weights, layer_of, inputs_of):
    """Of all parameters and inputs, in float64, beside differences of outputs."""
    layer, (inputs, padding) = layer_of(kind, transform, gate="channel", differential=True), inputs_of(kind)
    names = [name for name, _ in layer.named_parameters()]
    changing = [x.detach().clone().requires_grad_() for x in (*inputs.values(), *layer.parameters())]
    options = {"padding": padding, "grid": (1, 7), "need_weights": need_weights}

    def output(*values):
        own = dict(zip(inputs, values, strict=False))
        state = dict(zip(names, values[len(inputs) :], strict=True))
        return torch.func.functional_call(layer, state, kwargs=own | options)[0]

    assert torch.autograd.gradcheck(output, changing, fast_mode=True)


def test_maps_that_are_returned_are_what_the_layer_goes_on_with(layer_of, inputs_of):
    """Moving a weight moves the output as the gradient of that weight says."""
    layer, (inputs, padding) = layer_of("plain", gate="head", differential=True), inputs_of("plain")
    output, weights = run(layer, inputs, padding, need_weights=True)
    score = output.square().sum()
    (gradient,) = torch.autograd.grad(score, weights)
    value = split_heads(projected(layer, inputs)[3], HEADS)
    moved = (weights.detach() + 1e-6 * torch.sign(gradient)).requires_grad_()
    normed = layer.difference.norm(moved @ value) * (1 - layer.difference.start) * layer.gate(inputs["query"])
    found = layer.out_proj(normed.transpose(1, 2).flatten(-2)).square().sum()
    assert (found - score).item() == pytest.approx(1e-6 * gradient.abs().sum().item(), rel=1e-3)


def test_dropout_of_a_difference_is_not_in_the_weights_and_leaves_the_mean(random_scores, make):
    torch.manual_seed(0)
    difference = Difference(40, 1)
    difference.norm = nn.Identity()
    layer = MultiheadAttention(40, 1, make("softmax"), 0.25, difference=difference)
    x = random_scores(2000, 6, 40, scale=0.3).float()[:1].expand(2000, -1, -1)
    clean, mixing = layer.eval()(x, x, x, need_weights=True)
    for need_weights in (False, True):
        dropped, seen = layer.train()(x, x, x, need_weights=need_weights)
        assert (dropped[0] - clean[0]).abs().max() > 1e-3
        torch.testing.assert_close(dropped.mean(0), clean[0], rtol=0, atol=0.02)
        assert seen is None or torch.equal(seen.weights, mixing.weights)


def test_a_head_without_weights_stays_nothing(layer_of, inputs_of):
    """The norm of a difference does not make something of nothing, as where a head is pruned."""

    class Nothing(nn.Module):
        def forward(self, scores, padding=None, grid=None):
            return torch.zeros_like(scores)

    layer, (inputs, padding) = layer_of("plain", gate="head", differential=True), inputs_of("plain")
    layer.transform = Nothing()
    output, _ = run(layer, inputs, padding)
    torch.testing.assert_close(output, layer.out_proj.bias.expand_as(output))
