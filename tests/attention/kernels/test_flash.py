"""The fused operator against attention by way of all weights, computed in float64."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from detrlib.attention import build_transform, mixing
from detrlib.attention.entmax import entmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# NumPy warns about what is no number, where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def small_blocks(flash, monkeypatch):
    """The smallest tiles, so that small inputs have many."""
    monkeypatch.setattr(flash, "BLOCKS", {2: 16, 4: 16})


def explicit(query, key, value, alpha, padding=None, factor=1.0):
    """[B,H,Q,V] by way of all weights, times a factor; an image of nothing but padding gives zeros."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    mask = torch.zeros_like(scores, dtype=torch.bool) if padding is None else padding[:, None, None].expand_as(scores)
    hidden = mask & ~mask.all(-1, keepdim=True)
    alpha = alpha[:, None, None] if isinstance(alpha, torch.Tensor) else alpha
    return (entmax(scores.masked_fill(hidden, float("-inf")), alpha).masked_fill(mask, 0.0) * factor) @ value


@pytest.fixture(scope="session")
def used_weights(flash):
    def used_weights(query, key, alpha, padding=None, dropout: float = 0.0, seed: int = 0) -> torch.Tensor:
        """[B,H,Q,K] that the fused operator mixes values by: what it makes of the identity."""
        torch.manual_seed(seed)
        identity = torch.eye(key.shape[2], dtype=key.dtype, device=DEVICE).expand(*key.shape[:3], -1)
        return flash.sparse_attention(query, key, identity, alpha, padding, dropout)

    return used_weights


@pytest.fixture(scope="session")
def check_attention(close, flash, gradients, grows, random, used_weights):
    def check_attention(
        query, key, value, alpha, padding=None, atol: float = 1e-5, dropout: float = 0.0
    ) -> torch.Tensor:
        """Compare the mixed values and all gradients with the explicit computation; give back the mixed values."""
        factor = (used_weights(query, key, alpha, padding, dropout) > 0) / (1 - dropout) if dropout else 1.0
        inputs, exact = [query, key, value, alpha], grows(query, key, value, alpha)
        expected = explicit(*exact, padding, factor)
        weighting = random(*expected.shape, seed=9).to(query.dtype)
        wanted = gradients(expected, weighting.double(), exact)
        inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
        torch.manual_seed(0)
        mixed = flash.sparse_attention(*inputs, padding, dropout)
        found = gradients(mixed, weighting, inputs)
        assert mixed.dtype == query.dtype
        close(mixed, expected, atol)
        for x, y in zip(found[:3], wanted[:3], strict=True):
            close(x, y, 3 * atol)
        if isinstance(alpha, torch.Tensor):
            close(found[3], wanted[3], atol=10 * atol, rtol=max(1e-4, atol))
        return mixed

    return check_attention


def some_padding(images: int, keys: int) -> torch.Tensor:
    """[B,K]: a hole wider than a block in the first image, the end of the last."""
    padding = torch.zeros(images, keys, dtype=torch.bool, device=DEVICE)
    padding[0, 3:38] = True
    padding[-1, -5:] = True
    return padding


@pytest.mark.parametrize("padded", [False, True])
def test_fused_attention_is_the_explicit_one(alpha, padded, check_attention, random, spread):
    query, key, value = random(2, 2, 19, 16, scale=2), random(2, 2, 45, 16, seed=1), random(2, 2, 45, 24, seed=2)
    check_attention(query, key, value, spread(alpha, 2), some_padding(2, 45) if padded else None)


@pytest.mark.parametrize("sizes", [(1, 1, 8, 8), (16, 16, 32, 16), (17, 33, 5, 40)])
def test_fused_attention_of_odd_sizes(sizes, check_attention, random, spread):
    queries, keys, channels, value_channels = sizes
    query, key = random(1, 3, queries, channels, scale=2), random(1, 3, keys, channels, seed=1)
    check_attention(query, key, random(1, 3, keys, value_channels, seed=2), spread("learned", 3))


def test_fused_attention_of_heads_that_are_views(check_attention, random):
    query, key, value = (random(2, n, 2, 8, seed=n).transpose(1, 2) for n in (18, 20, 20))
    check_attention(query, key, value, 1.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
@pytest.mark.parametrize("alpha", [1.5, "learned"])
def test_fused_attention_in_half_precision(dtype, alpha, check_attention, random, spread):
    """The interpreter has no product of bfloat16."""
    query, key, value = (random(1, 2, n, 16, seed=n).to(dtype) for n in (18, 35, 35))
    check_attention(query, key, value, spread(alpha, 2), some_padding(1, 35), atol=2e-2)


@pytest.mark.parametrize("alpha", [2.0, 1.5, "learned"])
def test_fused_attention_of_nothing_but_padding_is_zero(alpha, check_attention, gradients, random, spread):
    query, key, value = random(2, 2, 5, 16), random(2, 2, 20, 16, seed=1), random(2, 2, 20, 16, seed=2)
    padding = torch.zeros(2, 20, dtype=torch.bool, device=DEVICE)
    padding[0] = True
    mixed = check_attention(query, key, value, spread(alpha, 2), padding)
    assert (mixed[0] == 0).all()
    for gradient in gradients(mixed, random(*mixed.shape, seed=3), [query, key, value]):
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).any()


@pytest.mark.parametrize("alpha", [2.0, 1.5, "learned"])
def test_tiles_without_weight_are_skipped(alpha, check_attention, flash, random):
    """Each block of queries looks at one block of keys: the values of all others are never touched."""
    blocks = torch.arange(64, device=DEVICE) // 16
    places = torch.nn.functional.one_hot(blocks, 16).float()[None, None]  # [1,1,64,16]
    query, key, value = 12 * places, 12 * places + random(1, 1, 64, 16, scale=0.05), random(1, 1, 64, 16, seed=2)
    alpha = torch.tensor([1.4], device=DEVICE) if alpha == "learned" else alpha
    mixed = check_attention(query, key, value, alpha, atol=1e-4)  # scores of 36 have but so many digits
    live = mixed.grad_fn.saved_tensors[-1]
    assert torch.equal(live[0].bool(), torch.eye(4, dtype=torch.bool, device=DEVICE))

    spoilt = value.detach().clone()
    spoilt[:, :, 32:] = float("nan")  # would spread to every query as 0 * NaN
    again = flash.sparse_attention(query, key, spoilt, alpha)
    torch.testing.assert_close(again[:, :, :32], mixed[:, :, :32])
    assert torch.autograd.grad(again[:, :, :32].sum(), query)[0][:, :, :32].isfinite().all()


def test_tiles_die_during_the_search_for_the_threshold(check_attention, random):
    """Blocks well above the first threshold, which is 1 / (alpha - 1) below the largest score, but below the last."""
    key = torch.zeros(1, 1, 48, 16, device=DEVICE)
    key[..., 0] = torch.tensor([0.0, -0.5, -0.9], device=DEVICE).repeat_interleave(16)
    query = torch.zeros(1, 1, 3, 16, device=DEVICE)
    query[..., 0] = 4.0  # scores are then those numbers
    mixed = check_attention(query, key, random(1, 1, 48, 16), 2.0)
    assert mixed.grad_fn.saved_tensors[-1].flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.3])
def test_a_query_that_is_no_number_shows(alpha, flash, random):
    query, key, value = (random(1, 1, n, 16, seed=n) for n in (20, 40, 40))
    query[0, 0, [3, 16, 17, 18, 19], 2] = float("nan")  # one of a block, and all of a block
    mixed = flash.sparse_attention(query, key, value, alpha)
    assert mixed[0, 0, [3, 16, 17, 18, 19]].isnan().all()
    assert mixed[0, 0, [2, 4, 15]].isfinite().all()


@pytest.mark.parametrize("learned", [False, True])
def test_the_last_step_is_small_enough_where_the_curvature_has_no_bound(
    learned, by_bisection, close, hard, used_weights
):
    query = torch.zeros(1, 1, 1, 16, device=DEVICE)
    query[..., :5] = 4 * hard  # of a scale of 1 / 4: times the identity, those scores
    key = torch.eye(5, 16, device=DEVICE)[None, None]
    alpha = torch.tensor([1.99], device=DEVICE) if learned else 1.99
    close(used_weights(query, key, alpha)[0, 0], by_bisection(hard, 1.99), atol=2e-7)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("channels", "alpha"), [(32, 2.0), (32, 1.5), (32, "learned"), (64, 1.5), (128, "learned")])
def test_fused_attention_at_its_real_size(
    dtype, atol, channels, alpha, monkeypatch, check_attention, flash, random, spread
):
    monkeypatch.setattr(flash, "BLOCKS", {2: 64, 4: 32})
    query, key = (random(2, 4, n, channels, seed=n).to(dtype) for n in (700, 900))
    check_attention(query, key, random(2, 4, 900, 32).to(dtype), spread(alpha, 4), some_padding(2, 900), atol)


# Dropout


@pytest.fixture(scope="session")
def dropout_inputs(random):
    def dropout_inputs(images: int = 2, queries: int = 32, keys: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of 2 heads, in several blocks of 16; near alpha = 1 every key has a weight."""
        return random(images, 2, queries, 16), random(images, 2, keys, 16, seed=1)

    return dropout_inputs


def test_dropout_drops_its_share_of_weights_and_scales_the_others(close, dropout_inputs, used_weights):
    query, key = dropout_inputs()
    weights, used = (used_weights(query, key, 1.05, dropout=dropout) for dropout in (0.0, 0.2))
    assert (weights > 0).all()
    assert abs((used == 0).double().mean() - 0.2) < 0.02  # of 6144 weights, so four standard deviations
    close(used, weights / 0.8 * (used > 0))


def test_dropout_differs_between_images_heads_blocks_queries_keys_and_calls(dropout_inputs, used_weights):
    query, key = dropout_inputs()
    kept, other = (used_weights(query, key, 1.05, dropout=0.5, seed=seed) > 0 for seed in (0, 1))
    tiles = torch.cat([kept, other]).unfold(2, 16, 16).unfold(3, 16, 16)  # [B,H,2,3,16,16]
    tiles = torch.cat([tiles, tiles.mT]).reshape(-1, 16 * 16).double()
    for some in (tiles, kept[0, 0].double(), kept[0, 0].double().T):
        likeness = (2 * some - 1) @ (2 * some - 1).T / some.shape[1]  # 1: the same, 0: half of it, -1: the opposite
        assert likeness.fill_diagonal_(0).abs().max() < 5 / some.shape[1] ** 0.5


def test_dropout_depends_on_the_generator_for_the_cpu_and_leaves_it_alone_where_there_is_none(
    dropout_inputs, flash, used_weights
):
    query, key = dropout_inputs(1, 5, 20)
    first = used_weights(query, key, 1.3, dropout=0.3)
    second = flash.sparse_attention(query, key, key, 1.3, None, 0.3)
    assert torch.equal(first, used_weights(query, key, 1.3, dropout=0.3))
    assert torch.equal(second, flash.sparse_attention(query, key, key, 1.3, None, 0.3))
    assert not torch.equal(second, flash.sparse_attention(query, key, key, 1.3, None, 0.3))
    state = torch.get_rng_state()
    flash.sparse_attention(query, key, key, 1.3)
    assert torch.equal(state, torch.get_rng_state())


def test_the_backward_pass_drops_the_same_weights(close, dropout_inputs, flash, gradients, random, used_weights):
    """Where the gradient of the mixed values is the identity, that of the values is the weights."""
    query, key = dropout_inputs(1, 20, 40)
    used = used_weights(query, key, 1.3, dropout=0.4)
    value = random(1, 2, 40, 20).requires_grad_()
    torch.manual_seed(0)
    mixed = flash.sparse_attention(query, key, value, 1.3, None, 0.4)
    (to_value,) = gradients(mixed, torch.eye(20, device=DEVICE), [value])
    assert torch.equal(to_value.mT > 0, used > 0)
    close(to_value.mT, used)


@pytest.mark.parametrize(("alpha", "padded"), [(2.0, False), (1.5, True), ("learned", False), ("learned", True)])
def test_gradients_with_dropout_are_the_explicit_ones(alpha, padded, check_attention, random, spread):
    query, key, value = random(2, 2, 18, 16, scale=2), random(2, 2, 32, 16, seed=1), random(2, 2, 32, 24, seed=2)
    check_attention(query, key, value, spread(alpha, 2), some_padding(2, 32) if padded else None, dropout=0.3)


def test_dropout_is_the_same_when_a_checkpoint_computes_it_again(dropout_inputs, flash, gradients, random):
    query, key = dropout_inputs(1, 5, 20)
    found = []
    for run in (flash.sparse_attention, partial(checkpoint, flash.sparse_attention, use_reentrant=False)):
        value = random(1, 2, 20, 16, seed=2).requires_grad_()
        torch.manual_seed(0)
        mixed = run(query, key, value, 1.5, None, 0.5)
        torch.rand(3)  # what comes later moves the generator on
        found.append(gradients(mixed, mixed.detach(), [value])[0])
    assert torch.equal(*found)


def test_dropout_of_everything_leaves_nothing_and_more_is_refused(dropout_inputs, flash, gradients, random):
    query, key = (x.requires_grad_() for x in dropout_inputs(1, 5, 20))
    mixed = flash.sparse_attention(query, key, key, 1.5, None, 1.0)
    assert (mixed == 0).all()
    assert all((x == 0).all() for x in gradients(mixed, random(1, 2, 5, 16), [query, key]))
    with pytest.raises(ValueError, match="dropout"):
        flash.sparse_attention(query, key, key, 1.3, None, 1.5)


@pytest.mark.parametrize("name", ["entmax15", "alpha_entmax", "sparsegen", "asentmax"])
@pytest.mark.parametrize("null_key", ["none", "zero", "learned"])
def test_null_keys_and_scales_come_in_by_keys_and_queries(name, null_key, close, flash, gradients, random):
    """What a transform does before entmax and beside it, `_plain` does to what the kernel is given."""
    torch.manual_seed(0)  # asentmax draws what it learns
    transform = build_transform(name, 2, null_key=null_key).to(DEVICE)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += torch.tensor([-0.3, 0.5], device=DEVICE)
    query, key, value = random(2, 2, 18, 16, scale=2), random(2, 2, 32, 16, seed=1), random(2, 2, 32, 24, seed=2)
    inputs = [x.requires_grad_() for x in (query, key, value)] + list(transform.parameters())
    padding = some_padding(2, 32)
    expected = mixing.mix(query, key, value, transform, padding)[0]
    *plain, mask = mixing._plain(query, key, value, padding, transform)
    mixed = flash.sparse_attention(*plain, transform.alpha, mask)
    close(mixed, expected, 1e-5)
    weighting = expected.detach()
    for own, wanted in zip(gradients(mixed, weighting, inputs), gradients(expected, weighting, inputs), strict=True):
        close(own, wanted, 1e-4, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("alpha", [2.0, 1.5, "learned"])
def test_dropout_at_its_real_size(dtype, atol, alpha, monkeypatch, check_attention, flash, random, spread):
    monkeypatch.setattr(flash, "BLOCKS", {2: 64, 4: 32})
    query, key, value = (random(2, 4, n, 32, seed=n).to(dtype) for n in (700, 128, 128))
    check_attention(query, key, value, spread(alpha, 4), some_padding(2, 128), atol, dropout=0.1)
