"""Multi-scale deformable attention.

Legend: B images, S tokens, H heads, D channels per head, Q queries, L levels, P points. Values against a loop written
from the definition, gradients against finite differences, the module against an independent implementation.
"""

import math

import pytest
import torch

from detrlib.attention.deformable import DeformableAttention, Samples, sample_and_mix, splat

SHAPES = [(4, 5), (2, 3), (1, 1)]  # of the samples that fixtures make
TOKENS = sum(h * w for h, w in SHAPES)


# Sampling


@pytest.mark.parametrize("shapes", [SHAPES, [(3, 4)], [(1, 7), (6, 1)]])
@pytest.mark.parametrize("points", [1, 3])
def test_values_are_those_of_the_definition(shapes, points, by_loops, draw, make_samples):
    values = draw(2, sum(h * w for h, w in shapes), 3, 4)
    samples = make_samples(shapes, points=points)
    torch.testing.assert_close(sample_and_mix(values, shapes, *samples), by_loops(values, shapes, *samples))


@pytest.mark.parametrize("shapes", [SHAPES, [(2, 3)]])
def test_gradient_is_that_of_finite_differences(shapes, draw, make_samples):
    values = draw(2, sum(h * w for h, w in shapes), 3, 2).requires_grad_()
    samples = [x.requires_grad_() for x in make_samples(shapes, queries=3)]
    assert torch.autograd.gradcheck(lambda v, x, w: sample_and_mix(v, shapes, x, w), (values, *samples))


def test_the_centre_of_a_cell_is_its_token(draw):
    values = draw(1, 6, 1, 2)
    centres = torch.tensor([(x, y) for y in (0.25, 0.75) for x in (1 / 6, 0.5, 5 / 6)], dtype=torch.float64)
    found = sample_and_mix(values, [(2, 3)], centres.view(1, 6, 1, 1, 1, 2), torch.ones(1, 6, 1, 1, 1))
    torch.testing.assert_close(found, values[:, :, 0])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("distance", [2.0, 1e4, 1e30, math.inf])
def test_places_far_outside_give_nothing(distance, axis, draw, make_samples):
    values = draw(1, TOKENS, 3, 4, dtype=torch.float32).requires_grad_()
    locations, weights = make_samples(images=1, dtype=torch.float32)
    locations[..., axis] = locations[..., axis].sign() * distance
    inputs = (values, locations.requires_grad_(), weights.requires_grad_())
    mixed = sample_and_mix(values, SHAPES, *inputs[1:])
    gradients = torch.autograd.grad(mixed.sum(), inputs)
    assert all((x == 0).all() for x in (mixed, *gradients))


def test_a_place_that_is_no_number_shows(draw, make_samples):
    values, (locations, weights) = draw(1, TOKENS, 3, 4), make_samples(images=1)
    locations[0, 1, 2, 0, 0, 1] = math.nan
    mixed = sample_and_mix(values, SHAPES, locations, weights).unflatten(2, (3, 4))
    assert mixed[0, 1, 2].isnan().all()
    assert mixed.isnan().sum() == 4


def test_values_that_are_views_and_no_queries_at_all(draw, make_samples):
    values, samples = draw(2, 3, TOKENS, 4).transpose(1, 2).requires_grad_(), make_samples()
    mixed = sample_and_mix(values, SHAPES, *samples)
    torch.testing.assert_close(mixed, sample_and_mix(values.contiguous(), SHAPES, *samples))
    assert torch.autograd.grad(mixed.sum(), values)[0].shape == values.shape
    mixed = sample_and_mix(values, SHAPES, *make_samples(queries=0))
    assert mixed.shape == (2, 0, 12)
    assert (torch.autograd.grad(mixed.sum(), values)[0] == 0).all()


def test_shapes_that_do_not_fit_are_refused(draw, make_samples):
    with pytest.raises(ValueError, match="shapes"):
        sample_and_mix(draw(2, TOKENS + 1, 3, 4), SHAPES, *make_samples())
    with pytest.raises(ValueError, match="levels"):
        sample_and_mix(draw(2, TOKENS, 3, 4), SHAPES, *make_samples(SHAPES[:2]))


# What tokens receive


def test_splat_is_the_gradient_of_what_was_mixed(draw, make_samples):
    samples = make_samples()
    values = draw(2, TOKENS, 3, 1).requires_grad_()
    mixed = sample_and_mix(values, SHAPES, *samples)  # [B,Q,H]
    by_head = torch.autograd.grad(mixed.sum(), values, retain_graph=True)[0].squeeze(3).mT  # [B,H,S]
    torch.testing.assert_close(splat(samples, SHAPES), by_head.sum(1))
    torch.testing.assert_close(splat(samples, SHAPES, keep_heads=True), by_head)
    for query in range(5):
        expected = torch.autograd.grad(mixed[:, query].sum(), values, retain_graph=True)[0].squeeze(3).mT
        received = splat(samples, SHAPES, keep_queries=True, keep_heads=True)[:, query]
        torch.testing.assert_close(received, expected)
        torch.testing.assert_close(splat(samples, SHAPES, keep_queries=True)[:, query], expected.sum(1))


def test_splat_loses_only_what_is_outside(make_samples):
    locations, weights = make_samples()
    inside = Samples(0.5 + 0 * locations, weights)
    torch.testing.assert_close(splat(inside, SHAPES, keep_queries=True).sum(-1), weights.sum((2, 3, 4)))
    assert (splat(Samples(locations + 9, weights), SHAPES) == 0).all()


def test_splat_without_shift_is_half_a_cell_off():
    centre = Samples(torch.tensor([0.5, 0.5]).view(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))
    assert splat(centre, [(3, 3)]).tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0]]
    quarter = splat(centre, [(3, 3)], shift=0.0).tolist()
    assert quarter == [[0, 0, 0, 0, 0.25, 0.25, 0, 0.25, 0.25]]


# The module


@pytest.mark.parametrize("size", [2, 4])
def test_module_is_that_of_another_implementation(size, make_batch, make_module):
    other = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    from transformers import DeformableDetrConfig

    config = DeformableDetrConfig(d_model=32, num_feature_levels=3)
    theirs = other.DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=2)
    ours = make_module()
    theirs.load_state_dict(ours.state_dict())
    query, references, tokens, padding = make_batch(size)
    query.requires_grad_(), tokens.requires_grad_()
    found, samples = ours(query, references, tokens, SHAPES, padding, need_samples=True)
    expected, weights = theirs(
        query,
        attention_mask=~padding,
        encoder_hidden_states=tokens,
        reference_points=references,
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=SHAPES,
    )
    assert padding.any()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(samples.weights, weights)
    inputs = [query, tokens]
    pairs = zip(
        torch.autograd.grad(found.square().sum(), [*inputs, *ours.parameters()]),
        torch.autograd.grad(expected.square().sum(), [*inputs, *theirs.parameters()]),
        strict=True,
    )
    for mine, their in pairs:
        torch.testing.assert_close(mine, their, atol=1e-4, rtol=1e-4)


def test_what_is_under_padding_does_not_matter(make_batch, make_module):
    module = make_module()
    query, references, tokens, padding = make_batch(2)
    output, samples = module(query, references, tokens, SHAPES, padding)
    assert samples is None
    spoilt = tokens.masked_fill(padding.unsqueeze(-1), 1e4)
    assert torch.equal(module(query, references, spoilt, SHAPES, padding)[0], output)
    assert not torch.allclose(module(query, references, spoilt, SHAPES)[0], output)


def test_initial_weights_look_in_a_ring(draw):
    module = DeformableAttention(embed_dim=32, num_heads=8, levels=2, points=3)
    assert {name: tuple(x.shape) for name, x in module.named_parameters()} == {
        "sampling_offsets.weight": (96, 32),
        "sampling_offsets.bias": (96,),
        "attention_weights.weight": (48, 32),
        "attention_weights.bias": (48,),
        "value_proj.weight": (32, 32),
        "value_proj.bias": (32,),
        "output_proj.weight": (32, 32),
        "output_proj.bias": (32,),
    }
    query, references = draw(1, 1, 32, dtype=torch.float32), torch.full((1, 1, 2, 2), 0.5)
    locations, weights = module.samples(query, references, [(10, 20), (5, 10)])
    cells = (locations - 0.5)[0, 0] * torch.tensor([(20, 10), (10, 5)])[:, None]  # [H,L,P,2]
    ring = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
    expected = ring[:, None, None] * torch.tensor([1.0, 2, 3])[:, None]
    torch.testing.assert_close(cells, expected.expand(-1, 2, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


def test_offsets_from_boxes_are_in_parts_of_them():
    module = DeformableAttention(embed_dim=32, num_heads=4, levels=3, points=2)
    box = torch.tensor([0.4, 0.6, 0.2, 0.1]).expand(1, 1, 3, 4)
    locations, _ = module.samples(torch.zeros(1, 1, 32), box, SHAPES)
    right = locations[0, 0, 0, 0]  # of the first head, whose points are 1 and 2 units to the right
    torch.testing.assert_close(right, torch.tensor([[0.45, 0.6], [0.5, 0.6]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 4])
def test_autocast_keeps_the_digits_of_locations(dtype, size, make_batch, make_module):
    module = make_module()
    query, references, tokens, padding = make_batch(size)
    exact, samples = module(query, references, tokens, SHAPES, padding, need_samples=True)
    with torch.autocast("cpu", dtype):
        output, found = module(query, references, tokens, SHAPES, padding, need_samples=True)
        output.sum().backward()
    assert output.dtype == dtype
    assert found.weights.dtype == found.locations.dtype == torch.float32
    assert torch.equal(found.locations, samples.locations)
    torch.testing.assert_close(found.weights.sum((3, 4)), torch.ones(2, 6, 4))
    torch.testing.assert_close(output.float(), exact, atol=0.05, rtol=0)
    assert all(x.grad.isfinite().all() for x in module.parameters())


def test_module_in_half_precision_places_samples_in_float32(make_batch, make_module):
    module = make_module().bfloat16()
    query, references, tokens, padding = make_batch(2)
    output, samples = module(query.bfloat16(), references, tokens.bfloat16(), SHAPES, padding, need_samples=True)
    assert (output.dtype, samples.locations.dtype) == (torch.bfloat16, torch.float32)


def test_sizes_that_do_not_fit_are_refused(make_batch, make_module):
    with pytest.raises(ValueError, match="multiple"):
        DeformableAttention(embed_dim=30, num_heads=4, levels=3, points=2)
    query, references, tokens, _ = make_batch(3)
    with pytest.raises(ValueError, match="reference_points"):
        make_module()(query, references, tokens, SHAPES)
