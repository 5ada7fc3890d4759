"""Attention transforms.

Gradients against finite differences, values against an algorithm of another kind, padding against leaving the keys out.
"""

import math

import pytest
import torch
from entmax import entmax_bisect
from torch import nn

from detrlib.attention import TRANSFORMS, AlphaEntmax, MultiheadAttention, Transform, build_transform
from detrlib.attention.entmax import entmax
from detrlib.attention.transforms import Entmax
from detrlib.models import alpha_modules, build_model

HEADS = 3  # of the transforms that `make` gives


def weights_of(transform: Transform, scores: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    """For tvmax the keys are a feature map one cell high."""
    return transform(scores, padding, (1, scores.shape[-1]))


SPARSE = [name for name in TRANSFORMS if name not in ("softmax", "ssmax", "sigmoid")]
# What rows sum to, from and to, where it is not one.
SUMS = {"budget": (1.5, 1.5), "softpick": (0, 1), "sigmoid": (0, math.inf), "relu": (0, math.inf)}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


# Gradients


@every_transform
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("null_key", ["none", "learned"])
def test_gradients_are_those_of_finite_differences(name, null_key, padded, keys_padding, make, random_scores):
    """Of scores, and of all that transforms learn."""
    transform = make(name, null_key=null_key).double()
    scores = random_scores(2, HEADS, 1, 7).requires_grad_()
    padding = keys_padding() if padded else None
    names, learned = list(dict(transform.named_parameters())), list(transform.parameters())

    def weights(z: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(transform, dict(zip(names, learned, strict=True)), (z, padding, (1, 7)))

    assert torch.autograd.gradcheck(weights, (scores, *(own.detach().requires_grad_() for own in learned)))


def test_gradient_of_entmax_with_a_power_above_two(random_scores):
    transform = build_transform("entmax", HEADS, alpha=1.25)
    assert torch.autograd.gradcheck(transform, random_scores(2, HEADS, 2, 7, seed=1).requires_grad_())


@pytest.mark.parametrize("padded", [False, True])
def test_gradient_of_alpha_is_that_of_finite_differences(padded, keys_padding, make, random_scores):
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
def test_values_agree_with_bisection(name, alpha, scale, dtype, by_bisection, make, random_scores):
    scores = random_scores(2, HEADS, 5, 60, scale=scale).to(dtype)
    weights = make(name, alpha)(scores)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.double(), by_bisection(scores, alpha), rtol=0, atol=tolerance)


def test_softmax_is_normalised_exponentials(make, random_scores):
    scores = random_scores(2, HEADS, 5, 60)
    expected = scores.exp() / scores.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(make("softmax")(scores), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_learnable_alpha_agrees_with_long_bisection_head_by_head(dtype, make, random_scores):
    transform = make("alpha_entmax").to(dtype)
    scores = random_scores(2, HEADS, 5, 60).to(dtype)
    weights = transform(scores)
    assert transform.alpha.unique().numel() == HEADS
    for head, alpha in enumerate(transform.alpha.double()):
        expected = entmax_bisect(scores[:, head].double(), alpha, dim=-1, n_iter=200)
        tolerance = 1e-10 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(weights[:, head].double(), expected, rtol=0, atol=tolerance)


def test_the_family_meets_at_its_named_members(make, random_scores):
    scores = random_scores(2, HEADS, 5, 60)
    for alpha, name in [(1.5, "entmax15"), (2.0, "sparsemax")]:
        exact = make(name)(scores)
        torch.testing.assert_close(make("entmax", alpha)(scores), exact, rtol=0, atol=1e-10)
    learnable = build_transform("alpha_entmax", HEADS, alpha_init=1.5).double()
    torch.testing.assert_close(learnable(scores), make("entmax15")(scores), rtol=0, atol=1e-6)


def test_an_alpha_that_training_moves_begins_at_softmax(random_scores):
    scores, moved = random_scores(2, 3, 5, 16), Entmax(1.5)
    for alpha, expected in ((1.0, scores.softmax(-1)), (1.01, entmax(scores, 1.01)), (1.5, entmax(scores, 1.5))):
        moved.alpha = alpha
        assert torch.equal(moved(scores), expected)


@pytest.mark.parametrize("name", SPARSE)
def test_only_sparse_transforms_give_exact_zeros(name, make, random_scores):
    scores = random_scores(2, HEADS, 5, 60)
    assert (make("softmax")(scores) > 0).all()
    zeros = (weights_of(make(name), scores) == 0).double().mean()
    assert 0.1 < zeros < 1.0


@every_transform
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_weights_are_a_distribution_at_every_scale(name, scale, make, random_scores):
    scores = random_scores(2, HEADS, 5, 950, scale=scale).float()
    weights = weights_of(make(name), scores)
    assert (weights >= 0).all()
    (least, most), sums = SUMS.get(name, (1, 1)), weights.sum(-1)
    assert ((sums >= least - 1e-5) & (sums <= most + 1e-5) & sums.isfinite()).all()


@pytest.mark.parametrize("alpha", [1.01, 1.05, 1.5, 1.9, 2.0])
def test_equal_scores_share_equally(alpha):
    scores = torch.linspace(-3, 3, 500)[:, None].expand(1, 1, 500, 1000)
    weights = build_transform("entmax", 1, alpha=alpha)(scores)
    torch.testing.assert_close(weights, torch.full_like(weights, 1e-3), rtol=1e-4, atol=0)


# Null keys

every_null_key = pytest.mark.parametrize("null_key", ["zero", "learned"])


def null_scores(transform, scores):
    """[B,H,Q,1]."""
    return torch.as_tensor(transform.null_score, dtype=scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)


@every_transform
@every_null_key
def test_a_null_key_is_one_column_more_that_is_not_returned(name, null_key, make, random_scores):
    scores, transform = random_scores(2, HEADS, 5, 7), make(name, null_key=null_key).double()
    weights = weights_of(transform, scores)
    beside, plain = torch.cat([scores, null_scores(transform, scores)], -1), make(name).double()
    expected = plain.weights(plain.scaled(beside, None, 7), (1, 7))  # there are still seven keys
    torch.testing.assert_close(weights, expected[..., :-1], rtol=0, atol=1e-12)
    if name not in SUMS:
        torch.testing.assert_close(1 - weights.sum(-1), expected[..., -1], rtol=0, atol=1e-12)


def test_a_null_key_makes_softmax1_and_the_learned_sink_of_softmax(make, random_scores):
    """Miller 2023; gpt-oss, where the score of the sink is one for each head."""
    scores = random_scores(2, HEADS, 5, 60)
    exponentials = scores.exp()
    softmax1 = exponentials / (1 + exponentials.sum(-1, keepdim=True))
    torch.testing.assert_close(make("softmax", null_key="zero")(scores), softmax1, rtol=1e-12, atol=0)
    sinks = make("softmax", null_key="learned").double()
    with_sinks = exponentials / (sinks.null_score.exp()[:, None, None] + exponentials.sum(-1, keepdim=True))
    torch.testing.assert_close(sinks(scores), with_sinks, rtol=1e-12, atol=0)


def test_the_null_key_of_tvmax_is_no_neighbour_of_the_cells(random_scores):
    """Cells that cost too much to tell apart share their mean, and what they have beside 0 is sparsemax of both."""
    scores = random_scores(1, HEADS, 20, 6, scale=0.1)
    transform = build_transform("tvmax", HEADS, tv_lambda=100.0, null_key="zero")
    mean = scores.mean(-1, keepdim=True)  # six cells with m - tau, one with 0 - tau
    each = ((1 + mean) / 7).clamp(min=0, max=1 / 6)
    torch.testing.assert_close(transform(scores, None, (2, 3)), each.expand_as(scores), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "tvmax"])
def test_a_head_that_has_nothing_to_say_is_exactly_silent(name, make, random_scores):
    scores = random_scores(2, HEADS, 5, 60, scale=0.1) - 4
    assert (weights_of(make(name, null_key="zero"), scores) == 0).all()
    assert (weights_of(make("softmax", null_key="zero"), scores) > 0).all()


# Padding


@every_transform
@pytest.mark.parametrize("null_key", ["none", "learned"])
def test_masking_is_leaving_the_keys_out(name, null_key, keys_padding, make, random_scores):
    transform = make(name, null_key=null_key).double()
    scores, weighting = random_scores(2, HEADS, 4, 7), random_scores(2, HEADS, 4, 7, seed=1)
    padding = keys_padding()
    if name == "tvmax":  # left out in the middle, a key would leave its neighbours side by side
        padding[0] = torch.arange(7) > 3
    masked = scores.clone().requires_grad_()
    weights = weights_of(transform, masked, padding)
    gradient = torch.autograd.grad((weights * weighting).sum(), [masked, *transform.parameters()])
    learned = [torch.zeros_like(parameter) for parameter in transform.parameters()]
    for image in range(2):
        valid = ~padding[image, 0, 0]
        short = scores[image, ..., valid][None].requires_grad_()
        expected = weights_of(transform, short)
        wanted = torch.autograd.grad((expected * weighting[image, ..., valid]).sum(), [short, *transform.parameters()])
        torch.testing.assert_close(weights[image, ..., valid], expected[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient[0][image, ..., valid], wanted[0][0], rtol=0, atol=1e-9)
        learned = [total + own for total, own in zip(learned, wanted[1:], strict=True)]
    assert (weights.masked_select(padding) == 0).all()
    assert (gradient[0].masked_select(padding) == 0).all()
    torch.testing.assert_close(list(gradient[1:]), learned, rtol=0, atol=1e-9)


@every_transform
def test_scores_of_padded_keys_do_not_matter(name, keys_padding, make, random_scores):
    transform, scores, padding = make(name), random_scores(2, HEADS, 4, 7).float(), keys_padding()
    loud = scores.masked_fill(padding, 1e6)
    assert torch.equal(weights_of(transform, scores, padding), weights_of(transform, loud, padding))


@every_transform
@pytest.mark.parametrize("null_key", ["none", "zero", "learned"])
def test_a_fully_padded_row_is_zero_and_has_no_gradient(name, null_key, keys_padding, make, random_scores):
    transform = make(name, null_key=null_key)
    scores = random_scores(2, HEADS, 4, 7).float().requires_grad_()
    padding = keys_padding()
    padding[0] = True
    weights = weights_of(transform, scores, padding)
    (weights * random_scores(2, HEADS, 4, 7, seed=1)).sum().backward()
    assert (weights[0] == 0).all()
    assert (scores.grad[0] == 0).all()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1].abs().sum() > 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in transform.parameters())


@every_transform
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_fully_padded_image_gives_finite_outputs_and_gradients(name, need_weights, make, random_scores):
    layer = MultiheadAttention(12, HEADS, make(name))
    query = random_scores(2, 4, 12).float().requires_grad_()
    padding = torch.tensor([[True] * 5, [False] * 5])
    output, _ = layer(query, *[random_scores(2, 5, 12, seed=1).float()] * 2, padding, (1, 5), need_weights)
    output.sum().backward()
    torch.testing.assert_close(output[0], layer.out_proj.bias.expand(4, 12))
    assert torch.isfinite(query.grad).all()


def test_padding_costs_no_copy_of_the_weights(keys_padding, random_scores):
    """Only rows of nothing but padding have to be cleared, and there are hardly ever any."""

    class Kept(Transform):
        def weights(self, scores, grid):
            self.found = scores.softmax(-1)
            return self.found

    transform, scores, padding = Kept(), random_scores(2, HEADS, 4, 7), keys_padding()
    assert transform(scores, padding) is transform.found
    padding[0] = True
    assert transform(scores, padding) is not transform.found


# Precision


class Recording(Transform):
    """Uniform weights; remembers what it was computed with."""

    def weights(self, scores, grid):
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
def test_weights_are_float32_inside_autocast(name, make, random_scores):
    layer = MultiheadAttention(12, HEADS, make(name))
    x = random_scores(2, 50, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        output, (weights, _) = layer(x, x, x, grid=(5, 10), need_weights=True)
        scores = random_scores(2, HEADS, 4, 50).bfloat16()
        direct = weights_of(layer.transform, scores)
    assert output.dtype == torch.bfloat16
    assert weights.dtype == direct.dtype == torch.float32
    if name not in SUMS:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 50), rtol=0, atol=1e-6)
    assert torch.equal(direct, weights_of(layer.transform, scores.float()))


# Learnable alpha


@pytest.mark.parametrize("pre_alpha", [-15.0, -5.0, 0.0, 5.0, 10.0, 14.0])
def test_alpha_stays_in_its_range_and_never_loses_its_gradient(pre_alpha, random_scores):
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


@pytest.mark.parametrize("pre_alpha", [-6.0, -1.0, 0.5, 9.0])
def test_clamped_alpha_is_the_published_one(pre_alpha):
    transform = AlphaEntmax(HEADS, clamped=True)
    nn.init.constant_(transform.pre_alpha, pre_alpha)
    torch.testing.assert_close(
        transform.alpha, torch.clamp(1 + torch.sigmoid(torch.full((HEADS,), pre_alpha)), 1.01, 2)
    )
    assert AlphaEntmax(HEADS, 1.3, clamped=True).alpha.tolist() == pytest.approx([1.3] * HEADS)


def test_every_layer_starts_on_its_own(model_settings):
    sites = dict.fromkeys(("encoder_self", "decoder_self", "decoder_cross"), "alpha_entmax")
    settings = model_settings(
        backbone={"name": "tiny", "weights": "none"},
        attention={**sites, "alpha_init": "normal"},
        hidden_dim=16,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=3,
        feedforward_dim=8,
        num_classes=2,
    )
    model = build_model(settings)
    learnable = alpha_modules(model)
    assert set(learnable) == {
        *(f"encoder_self.{i}" for i in range(2)),
        *(f"decoder_self.{i}" for i in range(3)),
        *(f"decoder_cross.{i}" for i in range(3)),
    }
    assert learnable["decoder_cross.2"] is model.transformer.decoder.layers[2].multihead_attn.transform
    assert torch.cat([module.pre_alpha for module in learnable.values()]).unique().numel() == 8 * 4
    for layers in (model.transformer.encoder.layers, model.transformer.decoder.layers):
        first, second = (layer.self_attn.in_proj_weight for layer in layers[:2])
        assert not torch.equal(first, second)


@pytest.mark.parametrize("tv_lambda", [-0.1, float("nan")])
def test_the_price_of_a_step_is_not_negative(tv_lambda):
    with pytest.raises(ValueError, match=f"tv_lambda {tv_lambda}"):
        build_transform("tvmax", HEADS, tv_lambda=tv_lambda)


@every_transform
def test_one_graph_holds_a_transform_and_its_gradients(name):
    """Compiled, and exported for any number of keys."""
    torch.compiler.reset()  # it keeps a few graphs of a function, and `forward` is one
    layer, grid = build_transform(name, num_heads=4, alpha=1.3), (6, 12)
    scores = (2 * torch.randn(2, 4, 5, 72)).requires_grad_()
    padding = torch.zeros(2, 1, 1, 72, dtype=torch.bool)
    padding[1, ..., 40:] = True
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    upstream, inputs = torch.randn_like(scores), [scores, *layer.parameters()]
    found = [
        [weights, *torch.autograd.grad(weights, inputs, upstream)]
        for weights in (layer(scores, padding, grid), compiled(scores, padding, grid))
    ]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)

    half = torch.export.Dim("half", min=3, max=2000)
    graph = torch.export.export(
        Gridded(layer), (scores.detach(), padding), dynamic_shapes=({3: 2 * half}, {3: 2 * half})
    )
    other = torch.randn(2, 4, 5, 34), padding[..., 10:44]
    torch.testing.assert_close(graph.module()(*other), Gridded(layer)(*other), atol=1e-5, rtol=0)


class Gridded(torch.nn.Module):
    """A transform of keys in two rows of cells."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, scores, padding):
        return self.layer(scores, padding, (2, scores.shape[-1] // 2))
