"""Attention of many layers put together, against loops over layers and cells and against a joint matrix.

Legend: B images, H heads, K keys, Q queries.
"""

import pytest
import torch

from detrlib.errors import ModelError
from detrlib.experiments.propagation import Layers, mean_over_heads, relevance, rollout, weighted_by_gradient
from detrlib.models import AttentionMaps, Predictions


def random_layers(encoder=2, decoder=3, images=2, queries=4, keys=6, sparse=False):
    """Rows of float64 that sum to one, some of them with zeros."""
    generator = torch.Generator().manual_seed(0)

    def maps(count, *shape):
        found = [torch.rand(images, *shape, generator=generator, dtype=torch.float64) for _ in range(count)]
        found = [(one - 0.6 * sparse).clamp(min=0) + 1e-300 for one in found]
        return [one / one.sum(-1, keepdim=True) for one in found]

    return Layers(maps(encoder, keys, keys), maps(decoder, queries, queries), maps(decoder, queries, keys))


def relevance_by_loops(encoder_self, decoder_self, decoder_cross):
    """Chefer, Gur & Wolf 2021, Eq. 6 to 10, of one image, entry by entry: -> [Q,K]."""
    queries, keys = decoder_cross[0].shape

    def product(a, b):
        return [[sum(a[i][m] * b[m][j] for m in range(len(b))) for j in range(len(b[0]))] for i in range(len(a))]

    def added(a, b):
        return [[x + y for x, y in zip(u, v, strict=True)] for u, v in zip(a, b, strict=True)]

    def normalised(matrix):
        rows = []
        for i, row in enumerate(matrix):
            rest = [value - (i == j) for j, value in enumerate(row)]
            total = sum(rest)
            rows.append([(value / total if total else 0.0) + (i == j) for j, value in enumerate(rest)])
        return rows

    r_ii = [[float(i == j) for j in range(keys)] for i in range(keys)]
    r_qq = [[float(i == j) for j in range(queries)] for i in range(queries)]
    r_qi = [[0.0] * keys for _ in range(queries)]
    for a in encoder_self:
        r_ii = added(r_ii, product(a.tolist(), r_ii))
    for own, cross in zip(decoder_self, decoder_cross, strict=True):
        old = r_qq, r_qi
        r_qq, r_qi = (added(one, product(own.tolist(), one)) for one in old)
        transposed = [list(column) for column in zip(*normalised(r_qq), strict=True)]
        r_qi = added(r_qi, product(product(transposed, cross.tolist()), normalised(r_ii)))
    return torch.tensor(r_qi, dtype=torch.float64)


def rollout_of_one_sequence(encoder_self, decoder_self, decoder_cross):
    """Products of (I + A) / 2 over one sequence, queries before cells; what attends to nothing keeps all of itself."""
    queries, keys = decoder_cross[0].shape
    product = torch.eye(queries + keys, dtype=torch.float64)

    def step(first, last, sources, attention):
        matrix = torch.eye(queries + keys, dtype=torch.float64)
        matrix[first:last, sources] += attention.double()
        return matrix / matrix.sum(-1, keepdim=True)  # "re-normalize the weights"

    cells, own = slice(queries, queries + keys), slice(0, queries)
    for a in encoder_self:
        product = step(queries, queries + keys, cells, a) @ product
    for a, cross in zip(decoder_self, decoder_cross, strict=True):
        product = step(0, queries, cells, cross) @ step(0, queries, own, a) @ product
    return product[:queries, queries:], product[:queries]


@pytest.mark.parametrize("encoder", [0, 2])
@pytest.mark.parametrize("sparse", [False, True])
def test_relevance_against_loops(encoder, sparse):
    layers = random_layers(encoder, sparse=sparse)
    found = relevance(layers)
    for image in range(2):
        expected = relevance_by_loops(*([one[image] for one in site] for site in layers))
        torch.testing.assert_close(found[image], expected, rtol=1e-12, atol=1e-14)


def test_relevance_of_rows_without_gradient_is_nothing_and_finite():
    layers = Layers(*([torch.zeros_like(one) for one in site] for site in random_layers()))
    assert (relevance(layers) == 0).all()


def test_relevance_of_one_layer_is_its_weighted_attention():
    layers = random_layers(encoder=0, decoder=1)
    layers = layers._replace(decoder_self=[torch.zeros(2, 4, 4, dtype=torch.float64)])
    torch.testing.assert_close(relevance(layers), layers.decoder_cross[0])


@pytest.mark.parametrize("null_key", [False, True])
@pytest.mark.parametrize("encoder", [0, 2])
def test_rollout_against_one_sequence(encoder, null_key):
    """Also where rows sum to less than one, and some to nothing."""
    layers = random_layers(encoder)
    if null_key:
        for weights in (weights for site in layers for weights in site):
            weights *= torch.rand(weights.shape[:2], generator=torch.Generator().manual_seed(1)).double()[..., None]
            weights[:, 0] = 0.0
    found = rollout(layers)
    for image in range(2):
        expected, everything = rollout_of_one_sequence(*([one[image] for one in site] for site in layers))
        torch.testing.assert_close(found[image], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(everything.sum(-1), torch.ones(4, dtype=torch.float64))


def test_empty_rows_pass_all_through_the_residual_connection():
    """A layer that attends to nothing changes no rollout and no relevance."""
    layers = random_layers(1, decoder=1)
    empty = Layers(*([torch.zeros_like(site[0])] for site in layers))
    more = Layers(*([*site, *nothing] for site, nothing in zip(layers, empty, strict=True)))
    for explain in (rollout, relevance):
        torch.testing.assert_close(explain(more), explain(layers))
    assert (rollout(empty) == 0).all()


def predictions_of(weights):
    """Predictions whose logits [B,Q,C] are 1 to 3 times the squares of rows of cross-attention in sum."""
    attention = AttentionMaps([], [], [weights], (1, weights.shape[-1]), None)
    logits = weights.square().sum((1, 3))[..., None] * torch.arange(1.0, 4.0)
    return Predictions(logits, torch.zeros(*logits.shape[:2], 4), "sigmoid", attention=attention)


def test_registers_pass_on_what_they_have_of_cells():
    """Rows of a longer sequence, of which only what comes from cells is shown."""
    layers, keys = random_layers(keys=8), 6
    cross = [one[..., :keys] for one in layers.decoder_cross]  # the decoder does not look at the two registers
    hidden = [torch.cat([one, torch.zeros_like(one[..., :2])], -1) for one in cross]
    for found, by_hand in ((relevance, relevance_by_loops), (rollout, lambda *one: rollout_of_one_sequence(*one)[0])):
        shown = found(layers._replace(decoder_cross=cross))
        for image in range(2):
            sites = layers._replace(decoder_cross=hidden)
            expected = by_hand(*([one[image] for one in site] for site in sites))
            torch.testing.assert_close(shown[image], expected[:, :keys], rtol=1e-12, atol=1e-14)


def test_maps_are_averaged_over_heads_and_cut_off_from_gradients():
    weights = torch.rand(2, 3, 4, 6).softmax(-1).requires_grad_()
    (mean,) = mean_over_heads(predictions_of(weights).attention).decoder_cross
    torch.testing.assert_close(mean, weights.detach().mean(1))
    assert not mean.requires_grad


def test_signed_maps_are_magnitudes_and_at_most_shares():
    signed = torch.tensor([[0.6, -0.2, 0.0], [1.5, -0.5, 1.0]])[None, None]
    (mean,) = mean_over_heads(predictions_of(signed).attention).decoder_cross
    torch.testing.assert_close(mean[0], torch.tensor([[0.6, 0.2, 0.0], [0.5, 1 / 6, 1 / 3]]))


def test_gradients_are_those_of_each_detection_and_negative_products_are_nothing():
    weights = (torch.rand(1, 3, 4, 6) - 0.5).requires_grad_()
    queries, labels = torch.tensor([1, 3]), torch.tensor([0, 2])
    per_detection = list(weighted_by_gradient(predictions_of(weights), queries, labels))
    # The gradient of (c + 1) * sum of w^2 is 2 (c + 1) w, and its product with w is positive.
    square = weights.detach().square()
    for layers, query, factor in zip(per_detection, (1, 3), (2, 6), strict=True):
        expected = torch.zeros(1, 4, 6)
        expected[0, query] = factor * square[0, :, query].mean(0)
        torch.testing.assert_close(layers.decoder_cross[0], expected)
    with pytest.raises(ModelError, match="requires_grad_"):
        next(weighted_by_gradient(predictions_of(weights.detach()), queries, labels))
