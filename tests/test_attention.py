"""Attention transforms and multi-head attention.

Gradients against finite differences, values against an algorithm of another kind, padding against leaving the
keys out, and the softmax case against `torch.nn.MultiheadAttention`.
"""

import pytest
import torch
from entmax import entmax_bisect
from torch import nn

from detrlib.attention import TRANSFORMS, AlphaEntmax, MultiheadAttention, Transform, attend, build_transform
from detrlib.attention.multihead import ConditionalCrossAttention
from detrlib.config import Attention, Model
from detrlib.models import alpha_modules, build_model

HEADS = 3
SPARSE = [name for name in TRANSFORMS if name != "softmax"]
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def make(name: str, alpha: float = 1.3) -> Transform:
    """A transform of HEADS heads; learnable alphas differ from head to head."""
    transform = build_transform(name, HEADS, alpha)
    if isinstance(transform, AlphaEntmax):
        with torch.no_grad():
            transform.pre_alpha.copy_(torch.linspace(-1.5, 2.0, HEADS))
    return transform


def random_scores(*shape: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def keys_padding() -> torch.Tensor:
    """[2,1,1,7]: keys hidden in the middle of one image and at the end of the other."""
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, [1, 4]] = True
    padding[1, 5:] = True
    return padding[:, None, None]


def by_bisection(scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """[(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1)) with tau found by halving an interval, in float64."""
    scores = (alpha - 1) * scores.double()
    high = scores.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(100):
        middle = (low + high) / 2
        enough = ((scores - middle).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return (scores - low).clamp(min=0) ** (1 / (alpha - 1))


# Gradients


@every_transform
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_is_that_of_finite_differences(name, padded):
    transform = make(name).double()
    scores = random_scores(2, HEADS, 2, 7).requires_grad_()
    padding = keys_padding() if padded else None
    assert torch.autograd.gradcheck(lambda z: transform(z, padding), scores)


def test_gradient_above_alpha_two():
    transform = build_transform("entmax", HEADS, alpha=1.25)
    assert torch.autograd.gradcheck(transform, random_scores(2, HEADS, 2, 7, seed=1).requires_grad_())


@pytest.mark.parametrize("padded", [False, True])
def test_gradient_of_alpha_is_that_of_finite_differences(padded):
    transform = make("alpha_entmax").double()
    scores, weighting = random_scores(2, HEADS, 4, 7), random_scores(2, HEADS, 4, 7, seed=1)
    padding = keys_padding() if padded else None

    def value(pre_alpha: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(transform, {"pre_alpha": pre_alpha}, (scores, padding)) * weighting).sum()

    pre_alpha = transform.pre_alpha.detach()
    found = torch.autograd.grad(value(pre_alpha.requires_grad_()), pre_alpha)[0]
    with torch.no_grad():
        steps = 1e-5 * torch.eye(HEADS, dtype=torch.float64)
        expected = torch.stack([value(pre_alpha + step) - value(pre_alpha - step) for step in steps]) / 2e-5
    assert found.abs().min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


# Values: two independent algorithms


@pytest.mark.parametrize(("name", "alpha"), [("sparsemax", 2.0), ("entmax15", 1.5), ("entmax", 1.3), ("entmax", 1.8)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_agree_with_bisection(name, alpha, scale, dtype):
    scores = random_scores(2, HEADS, 5, 60, scale=scale).to(dtype)
    weights = make(name, alpha)(scores)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.double(), by_bisection(scores, alpha), rtol=0, atol=tolerance)


def test_softmax_is_normalised_exponentials():
    scores = random_scores(2, HEADS, 5, 60)
    expected = scores.exp() / scores.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(make("softmax")(scores), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_learnable_alpha_agrees_with_long_bisection_head_by_head(dtype):
    transform = make("alpha_entmax").to(dtype)
    scores = random_scores(2, HEADS, 5, 60).to(dtype)
    weights = transform(scores)
    assert transform.alpha.unique().numel() == HEADS
    for head, alpha in enumerate(transform.alpha.double()):
        expected = entmax_bisect(scores[:, head].double(), alpha, dim=-1, n_iter=200)
        tolerance = 1e-10 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(weights[:, head].double(), expected, rtol=0, atol=tolerance)


def test_the_family_meets_at_its_named_members():
    scores = random_scores(2, HEADS, 5, 60)
    for alpha, name in [(1.5, "entmax15"), (2.0, "sparsemax")]:
        exact = make(name)(scores)
        torch.testing.assert_close(make("entmax", alpha)(scores), exact, rtol=0, atol=1e-10)
    learnable = build_transform("alpha_entmax", HEADS, alpha_init=1.5).double()
    torch.testing.assert_close(learnable(scores), make("entmax15")(scores), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SPARSE)
def test_only_sparse_transforms_give_exact_zeros(name):
    scores = random_scores(2, HEADS, 5, 60)
    assert (make("softmax")(scores) > 0).all()
    zeros = (make(name)(scores) == 0).double().mean()
    assert 0.1 < zeros < 1.0


@every_transform
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_weights_are_a_distribution_at_every_scale(name, scale):
    scores = random_scores(2, HEADS, 5, 950, scale=scale).float()
    weights = make(name)(scores)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.01, 1.05, 1.5, 1.9, 2.0])
def test_equal_scores_share_equally(alpha):
    scores = torch.linspace(-3, 3, 500)[:, None].expand(1, 1, 500, 1000)
    weights = build_transform("entmax", 1, alpha)(scores)
    torch.testing.assert_close(weights, torch.full_like(weights, 1e-3), rtol=1e-4, atol=0)


# Padding


@every_transform
def test_masking_is_leaving_the_keys_out(name):
    transform = make(name).double()
    scores, weighting = random_scores(2, HEADS, 4, 7), random_scores(2, HEADS, 4, 7, seed=1)
    padding = keys_padding()
    masked = scores.clone().requires_grad_()
    weights = transform(masked, padding)
    gradient = torch.autograd.grad((weights * weighting).sum(), [masked, *transform.parameters()])
    alpha_gradients = torch.zeros(HEADS, dtype=torch.float64)
    for image in range(2):
        valid = ~padding[image, 0, 0]
        short = scores[image, ..., valid][None].requires_grad_()
        expected = transform(short)
        wanted = torch.autograd.grad((expected * weighting[image, ..., valid]).sum(), [short, *transform.parameters()])
        torch.testing.assert_close(weights[image, ..., valid], expected[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient[0][image, ..., valid], wanted[0][0], rtol=0, atol=1e-9)
        alpha_gradients += sum(wanted[1:])
    assert (weights.masked_select(padding) == 0).all()
    assert (gradient[0].masked_select(padding) == 0).all()
    for found in gradient[1:]:
        torch.testing.assert_close(found, alpha_gradients, rtol=0, atol=1e-9)


@every_transform
def test_scores_of_padded_keys_do_not_matter(name):
    transform, scores, padding = make(name), random_scores(2, HEADS, 4, 7).float(), keys_padding()
    loud = scores.masked_fill(padding, 1e6)
    assert torch.equal(transform(scores, padding), transform(loud, padding))


@every_transform
def test_a_fully_padded_row_is_zero_and_has_no_gradient(name):
    transform = make(name)
    scores = random_scores(2, HEADS, 4, 7).float().requires_grad_()
    padding = keys_padding()
    padding[0] = True
    weights = transform(scores, padding)
    (weights * random_scores(2, HEADS, 4, 7, seed=1)).sum().backward()
    assert (weights[0] == 0).all()
    assert (scores.grad[0] == 0).all()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1].abs().sum() > 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in transform.parameters())


@every_transform
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_fully_padded_image_gives_finite_outputs_and_gradients(name, need_weights):
    layer = MultiheadAttention(12, HEADS, make(name))
    query = random_scores(2, 4, 12).float().requires_grad_()
    padding = torch.tensor([[True] * 5, [False] * 5])
    output, _ = layer(query, *[random_scores(2, 5, 12, seed=1).float()] * 2, padding, need_weights)
    output.sum().backward()
    torch.testing.assert_close(output[0], layer.out_proj.bias.expand(4, 12))
    assert torch.isfinite(query.grad).all()


# Precision


class Recording(Transform):
    """Uniform weights; remembers what it was computed with."""

    def weights(self, scores):
        self.dtype, self.autocast = scores.dtype, torch.is_autocast_enabled(scores.device.type)
        return torch.full_like(scores, 1 / scores.shape[-1])


def test_transforms_are_computed_outside_autocast():
    transform = Recording()
    with torch.autocast("cpu", torch.bfloat16):
        transform(torch.zeros(1, 1, 2, 3, dtype=torch.bfloat16))
        assert transform.dtype == torch.float32
        assert not transform.autocast
        assert torch.is_autocast_enabled("cpu")


@every_transform
def test_weights_are_float32_inside_autocast(name):
    layer = MultiheadAttention(12, HEADS, make(name))
    x = random_scores(2, 50, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = layer(x, x, x, need_weights=True)
        scores = random_scores(2, HEADS, 4, 50).bfloat16()
        direct = layer.transform(scores)
    assert output.dtype == torch.bfloat16
    assert weights.dtype == direct.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 50), rtol=0, atol=1e-6)
    assert torch.equal(direct, layer.transform(scores.float()))


# Learnable alpha


@pytest.mark.parametrize("pre_alpha", [-15.0, -5.0, 0.0, 5.0, 10.0])
def test_alpha_stays_in_its_range_and_never_loses_its_gradient(pre_alpha):
    transform = AlphaEntmax(HEADS)
    nn.init.constant_(transform.pre_alpha, pre_alpha)
    assert (transform.alpha >= torch.tensor(1.01)).all()
    assert (transform.alpha < 2.0).all()
    weights = transform(random_scores(1, HEADS, 4, 20).float())
    (weights * random_scores(1, HEADS, 4, 20, seed=1)).sum().backward()
    assert torch.isfinite(transform.pre_alpha.grad).all()
    assert (transform.pre_alpha.grad != 0).all()


@pytest.mark.parametrize("initial", [1.02, 1.5, 1.99])
def test_alpha_starts_where_asked(initial):
    torch.testing.assert_close(AlphaEntmax(HEADS, initial).alpha, torch.full((HEADS,), initial), rtol=0, atol=1e-5)


@pytest.mark.parametrize("initial", [1.0, 1.01, 2.0, 2.5])
def test_alpha_cannot_start_outside_its_range(initial):
    with pytest.raises(ValueError, match=f"{initial}.*between 1.01 and 2.0.*'normal'"):
        AlphaEntmax(HEADS, initial)


def test_every_layer_starts_on_its_own():
    sites = dict.fromkeys(("encoder_self", "decoder_self", "decoder_cross"), "alpha_entmax")
    settings = Model(
        backbone={"name": "tiny", "weights": "none"},
        attention=Attention(**sites, alpha_init="normal"),
        hidden_dim=16,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=3,
        feedforward_dim=8,
        num_classes=2,
    )
    model = build_model(settings)
    places = alpha_modules(model)
    assert set(places) == {
        *(f"encoder_self.{i}" for i in range(2)),
        *(f"decoder_self.{i}" for i in range(3)),
        *(f"decoder_cross.{i}" for i in range(3)),
    }
    assert places["decoder_cross.2"] is model.transformer.decoder.layers[2].multihead_attn.transform
    assert torch.cat([place.pre_alpha for place in places.values()]).unique().numel() == 8 * 4
    for layers in (model.transformer.encoder.layers, model.transformer.decoder.layers):
        first, second = (layer.self_attn.in_proj_weight for layer in layers[:2])
        assert not torch.equal(first, second)


def test_unknown_transform_names_those_there_are():
    with pytest.raises(ValueError, match="'sparsmax'") as error:
        build_transform("sparsmax", HEADS)
    assert all(name in str(error.value) for name in TRANSFORMS)


# Multi-head attention


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
def test_softmax_attention_is_that_of_torch(pair, padded, need_weights):
    reference, ours = pair
    query, key, value = (torch.randn(2, n, 24) for n in (5, 7, 7))
    padding = keys_padding()[:, 0, 0] if padded else None
    ours.train(), reference.train()
    output, weights = ours(query, key, value, padding, need_weights)
    wanted, wanted_weights = reference(query, key, value, padding, need_weights, average_attn_weights=False)
    torch.testing.assert_close(output, wanted)
    if need_weights:
        torch.testing.assert_close(weights, wanted_weights)
    else:
        assert weights is None
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
def test_fused_attention_is_the_explicit_one(padded):
    query, key, value = (random_scores(2, HEADS, n, 8, seed=n) for n in (5, 7, 7))
    padding = keys_padding()[:, 0, 0] if padded else None
    fused, none = attend(query, key, value, make("softmax"), padding)
    explicit, weights = attend(query, key, value, make("softmax"), padding, need_weights=True)
    assert none is None
    assert weights.shape == (2, HEADS, 5, 7)
    torch.testing.assert_close(fused, explicit)


@every_transform
def test_asking_for_weights_changes_nothing(name):
    layer = MultiheadAttention(12, HEADS, make(name))
    x, padding = random_scores(2, 7, 12).float(), keys_padding()[:, 0, 0]
    torch.testing.assert_close(layer(x, x, x, padding)[0], layer(x, x, x, padding, need_weights=True)[0])


@every_transform
@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_acts_on_mixing_and_not_on_the_returned_weights(name, need_weights):
    torch.manual_seed(0)
    query, key = random_scores(1, HEADS, 50, 8, scale=0.5).float(), random_scores(1, HEADS, 40, 8, seed=1).float()
    value = torch.eye(40).expand(1, HEADS, 40, 40)  # mixing them shows the weights that were used
    clean = attend(query, key, value, make(name), need_weights=True)[1]
    mixed, weights = attend(query, key, value, make(name), dropout=0.25, need_weights=need_weights)
    dropped = (mixed == 0) & (clean > 0)
    assert 0.2 < dropped.sum() / (clean > 0).sum() < 0.3
    torch.testing.assert_close(mixed[~dropped], clean[~dropped] / 0.75)
    if need_weights:
        assert torch.equal(weights, clean)


def conditional_attention() -> ConditionalCrossAttention:
    return ConditionalCrossAttention(12, 3, make("entmax15"), dropout=0.5)


@pytest.mark.parametrize("build", [lambda: MultiheadAttention(12, 3, make("entmax15"), 0.5), conditional_attention])
def test_layers_drop_in_training_only(build):
    torch.manual_seed(0)
    layer = build()
    x = torch.randn(2, 5, 12)
    inputs = (x, x, x) if isinstance(layer, MultiheadAttention) else (x, x, x, x, x)
    runs = {}
    for mode in (True, False):
        layer.train(mode)
        runs[mode] = [layer(*inputs, need_weights=True) for _ in range(2)]
    assert not torch.equal(runs[True][0][0], runs[True][1][0])
    assert torch.equal(runs[False][0][0], runs[False][1][0])
    assert torch.equal(runs[True][0][1], runs[False][0][1])


def test_conditional_attention_adds_two_scaled_dot_products():
    torch.manual_seed(0)
    content, position, spatial = torch.randn(3, 2, 5, 12)
    memory, memory_position = torch.randn(2, 2, 7, 12)
    padding = keys_padding()[:, 0, 0]
    for first in (False, True):
        layer = ConditionalCrossAttention(12, 3, build_transform("softmax", 3), first=first)
        output, weights = layer(content, position, spatial, memory, memory_position, padding, need_weights=True)
        query, key = layer.query_content(content), layer.key_content(memory)
        if first:
            query, key = query + layer.query_position(position), key + layer.key_position(memory_position)
        where, there = layer.query_spatial(spatial), layer.key_position(memory_position)
        mixed = []
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            scores = query[..., part] @ key[..., part].mT + where[..., part] @ there[..., part].mT
            expected = (scores / 8**0.5).masked_fill(padding[:, None], float("-inf")).softmax(-1)
            torch.testing.assert_close(weights[:, head], expected)
            mixed.append(expected @ layer.value(memory)[..., part])
        torch.testing.assert_close(output, layer.out_proj(torch.cat(mixed, -1)))


def test_heads_must_divide_the_embedding():
    with pytest.raises(ValueError, match="embed_dim 10 is not a multiple of num_heads 3"):
        MultiheadAttention(10, 3, make("softmax"))
