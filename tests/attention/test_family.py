"""Relatives of softmax and entmax: each against another algorithm, a formula, or the library of entmax."""

import math

import entmax
import pytest
import torch

from detrlib.attention import build_transform, reference
from detrlib.attention.family import SSMax

HEADS = 3
EXACT = {torch.float64: 1e-10, torch.float32: 2e-6}
every_precision = pytest.mark.parametrize("dtype", EXACT)


def by_sorting(scores: torch.Tensor, k: int) -> torch.Tensor:
    """softmax of the k largest, all others apart."""
    order = scores.argsort(-1, descending=True)
    kept = scores.gather(-1, order[..., :k]).softmax(-1)
    return torch.zeros_like(scores).scatter(-1, order[..., :k], kept)


def softpick(beyond: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return beyond.relu() / (beyond.abs().sum(-1, keepdim=True) + eps)


def by_definition(name: str, s: torch.Tensor, transform) -> torch.Tensor:
    """Weights of scores s [B,H,Q,n] in float64, all keys valid, with the settings of `make`."""
    n = s.shape[-1]
    learned = {key: own.detach().double()[:, None, None] for key, own in transform.named_parameters()}
    if name == "ssmax":
        powers = n ** (learned["a"] * s)
        return powers / powers.sum(-1, keepdim=True)
    if name == "asentmax":
        factor = learned["delta"] + learned["beta"] * math.log(n) ** learned["gamma"]
        return entmax.entmax_bisect(s * factor, 1.3, n_iter=100)
    return {
        "normmax": lambda: entmax.normmax_bisect(s, 2, n_iter=100),
        "budget": lambda: entmax.budget_bisect(s, 1.5, n_iter=100),
        "sparsegen": lambda: reference.entmax(s / (1 - 0.3), 2.0),
        "softpick": lambda: (
            (s.exp() - 1).relu() / ((s.exp() - 1).abs().sum(-1, keepdim=True) + 1e-8 * s.amax(-1, keepdim=True).exp())
        ),
        "topk": lambda: by_sorting(s, 3),
        "sigmoid": lambda: 1 / (1 + n * (-s).exp()),
        "relu": lambda: s.clamp(min=0) / n,
    }[name]()


NAMES = ("normmax", "budget", "sparsegen", "ssmax", "asentmax", "softpick", "topk", "sigmoid", "relu")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.1, 2.0])
@every_precision
def test_values_are_those_of_the_definition(name, scale, dtype, make, random_scores):
    scores, transform = random_scores(2, HEADS, 5, 60, scale=scale).to(dtype), make(name).to(dtype)
    expected = by_definition(name, scores.double(), transform)
    torch.testing.assert_close(transform(scores).double(), expected, rtol=0, atol=EXACT[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_n_is_the_number_of_valid_keys_of_each_image(name, make, random_scores):
    """Scores of an image are weighed as if there were no padding, whatever the batch is padded to."""
    scores, transform = random_scores(2, HEADS, 5, 60), make(name).double()
    padding = torch.zeros(2, 1, 1, 60, dtype=torch.bool)
    padding[1, ..., 20:] = True
    weights = transform(scores, padding)
    torch.testing.assert_close(weights[:1], by_definition(name, scores[:1], transform), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        weights[1:, ..., :20], by_definition(name, scores[1:, ..., :20], transform), rtol=0, atol=1e-7
    )


def test_the_largest_weight_of_ssmax_does_not_fade():
    """Fig. 1 there: one key ahead of all others, whose number grows."""
    transform, softmax = SSMax(1, initial=0.43), build_transform("softmax", 1)
    first, last = (
        [
            make(torch.full((1, 1, 1, n), -2.0).index_fill(-1, torch.tensor(0), 3.0)).max()
            for make in (transform, softmax)
        ]
        for n in (100, 10000)
    )
    assert first[0] > 0.99 and last[0] > 0.99
    assert first[1] > 0.5 and last[1] < 0.02


def test_keys_that_tie_with_the_last_of_the_largest_count_too():
    weights = build_transform("topk", 1, topk=2)(torch.tensor([[[[3.0, 1.0, 1.0, 0.0]]]]))
    assert (weights > 0).tolist() == [[[[True, True, True, False]]]]
    assert weights[..., 1] == weights[..., 2]


def test_fewer_keys_than_k_are_a_softmax(random_scores):
    scores = random_scores(2, HEADS, 5, 7)
    for k in (7, 10**12):  # which nobody writes down
        torch.testing.assert_close(build_transform("topk", HEADS, topk=k)(scores), scores.softmax(-1))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("normmax", {"normmax_alpha": 1.0}),
        ("budget", {"budget": 0.0}),
        ("sparsegen", {"sparsegen_lambda": 1.0}),
        ("topk", {"topk": 0}),
    ],
)
def test_settings_out_of_range_are_named(name, settings):
    ((setting, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{setting} {value}"):
        build_transform(name, HEADS, **settings)
