"""A trained model with another attention: exactly what was asked for within a context, and nothing left of it after."""

import contextlib

import pytest
import torch

from detrlib.attention import AlphaEntmax, attend, build_transform
from detrlib.errors import ModelError
from detrlib.experiments.interventions import (
    ByHead,
    WithoutSink,
    attention_modules,
    fixed_alpha,
    learned_alphas,
    pruned,
    swapped,
    without_sinks,
)
from detrlib.metrics.sinks import sinks

SIZES = (96, 128), (70, 101)
SITES = ("encoder_self", "decoder_self", "decoder_cross")


@pytest.fixture(scope="session")
def model_with(small):
    def model_with(seed=0, **attention):
        return small(seed, attention=attention)

    return model_with


def alphas_of_their_own(model, site):
    """Learned alphas as after training: another one for every head."""
    for number, module in enumerate(attention_modules(model, site)):
        generator = torch.Generator().manual_seed(number)
        module.transform.pre_alpha.data = torch.randn(module.num_heads, generator=generator)
    return model


@pytest.fixture(scope="session")
def predict(padded_batch):
    @torch.no_grad()
    def predict(model):
        return model(*padded_batch(*SIZES, canvas=(96, 128)), need_attention=True)

    return predict


def tensors(found):
    maps = [weights for site in SITES for weights in getattr(found.attention, site)]
    return [found.logits, found.boxes, *maps]


def assert_same(one, other, **tolerance):
    for a, b in zip(tensors(one), tensors(other), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


# --- heads with gates and differences ---------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_interventions_reach_both_maps_of_a_difference_and_leave_gates_alone(site, predict, small, untouched):
    options = {"gate": "channel", "differential": True}
    model = small(attention=options, registers=2)
    other = small(attention=options | {site: "sparsemax"}, registers=2)
    other.load_state_dict(model.state_dict())
    with untouched(model):
        with swapped(model, site, "sparsemax"):
            assert_same(predict(model), predict(other))
        with pruned(model, site, {1: [0, 2]}):
            inside = predict(model)
        pruned_by_hand = small(attention=options, registers=2)
        pruned_by_hand.load_state_dict(model.state_dict())
        weight = attention_modules(pruned_by_hand, site)[1].out_proj.weight.data
        weight.unflatten(1, (4, -1))[:, [0, 2]] = 0.0
        torch.testing.assert_close(inside.logits, predict(pruned_by_hand).logits, rtol=0, atol=1e-5)
        assert (getattr(inside.attention, site)[1][:, [0, 2]] == 0).all()


# --- transforms and alphas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["learned", "anchor"])
@pytest.mark.parametrize("site", SITES)
def test_a_swapped_model_is_one_built_with_that_transform(site, queries, predict, small, untouched):
    for name in ("sparsemax", "entmax15", "tvmax", "softpick", "normmax"):
        if (site, name) == ("decoder_self", "tvmax"):
            continue
        model = small(queries=queries)
        other = small(queries=queries, attention={site: name, "tv_lambda": 0.3})
        other.load_state_dict(model.state_dict())
        with untouched(model):
            with swapped(model, site, name, tv_lambda=0.3):
                inside = predict(model)
                assert list(model.state_dict()) == list(other.state_dict())
            assert_same(inside, predict(other))
            assert not torch.allclose(inside.logits, predict(model).logits, rtol=0, atol=1e-5)


def test_what_a_transform_draws_is_the_same_every_time(predict, small):
    """asentmax: an intervention has one number, and draws nothing from what others draw from."""
    model, found = small(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with swapped(model, "decoder_cross", "asentmax"):
            found.append(predict(model))
    assert_same(*found)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(3), drawn)


@pytest.mark.parametrize("null_key", ["zero", "learned"])
@pytest.mark.parametrize("site", SITES)
def test_the_null_key_of_a_model_stays_unless_another_is_named(site, null_key, model_with, predict, untouched):
    model = model_with(null_key=null_key)
    with untouched(model):
        for name, way in (("sparsemax", fixed_alpha(model, site, 2.0)), ("entmax15", swapped(model, site, "entmax15"))):
            other = model_with(**{site: name}, null_key=null_key)
            other.load_state_dict(model.state_dict())
            with way:
                assert_same(predict(model), predict(other))
        elsewhere = [other for other in SITES if other != site]
        other = model_with(null_key=null_key, null_key_sites=elsewhere)
        other.load_state_dict(model.state_dict(), strict=False)
        with swapped(model, site, "softmax", null_key="none"):
            assert_same(predict(model), predict(other))


@pytest.mark.parametrize("site", SITES)
def test_alpha_one_is_softmax_two_is_sparsemax_and_learned_ones_are_the_model_itself(
    site, model_with, predict, untouched
):
    model = alphas_of_their_own(model_with(**{site: "alpha_entmax"}), site)
    with untouched(model):
        for alpha, name in ((1, "softmax"), (1.5, "entmax15"), (2.0, "sparsemax")):
            with fixed_alpha(model, site, alpha):
                fixed = predict(model)
            with swapped(model, site, name):
                assert_same(predict(model), fixed)
        with fixed_alpha(model, site, learned_alphas(model, site)):
            fixed = predict(model)
        assert_same(predict(model), fixed, rtol=1e-4, atol=1e-5)


def test_alphas_by_head_and_by_layer_go_where_they_belong(model_with, predict):
    model, alphas = model_with(), [1.0, 1.5, 2.0, 1.5]
    one_each = {}
    for alpha in set(alphas):
        with fixed_alpha(model, "decoder_cross", alpha, layers=[0]):
            one_each[alpha] = predict(model).attention.decoder_cross[0]
    with fixed_alpha(model, "decoder_cross", [alphas, [1.0] * 4, [2.0] * 4]):
        first = predict(model).attention.decoder_cross[0]
        transforms = [module.transform for module in attention_modules(model, "decoder_cross")]
    for head, alpha in enumerate(alphas):
        assert torch.equal(first[:, head], one_each[alpha][:, head])
    assert [type(transform).__name__ for transform in transforms] == ["ByHead", "Softmax", "Entmax"]
    with fixed_alpha(model, "decoder_cross", alphas):
        assert all(module.transform.heads == [[0], [1, 3], [2]] for module in attention_modules(model, "decoder_cross"))


def test_some_layers_and_heads_change_and_the_others_do_not(model_with, predict, untouched):
    model = alphas_of_their_own(model_with(decoder_cross="alpha_entmax"), "decoder_cross")
    with untouched(model):
        own = predict(model).attention.decoder_cross
        with swapped(model, "decoder_cross", "softmax", layers=[1], heads=[0, 3]):
            part = predict(model).attention.decoder_cross
        with swapped(model, "decoder_cross", "softmax", layers=[1]):
            whole = predict(model).attention.decoder_cross
    assert torch.equal(part[0], own[0]) and not torch.equal(part[2], own[2])
    assert torch.equal(part[1][:, [1, 2]], own[1][:, [1, 2]])  # each with its own alpha still
    assert torch.equal(part[1][:, [0, 3]], whole[1][:, [0, 3]])
    assert not torch.equal(part[1][:, [0, 3]], own[1][:, [0, 3]])


def test_padded_keys_are_treated_as_in_training(model_with, predict):
    model = model_with(decoder_cross="softmax", padding="add_one")
    sparse = model_with(decoder_cross="sparsemax", padding="add_one")
    with swapped(model, "decoder_cross", "sparsemax"):
        assert_same(predict(model), predict(sparse))
    with pruned(model, "decoder_cross", {0: range(4)}), swapped(model, "decoder_cross", "sparsemax", heads=[0, 1]):
        transforms = [module.transform for module in attention_modules(model, "decoder_cross")]
    assert all(transform.padding_adds_one for transform in transforms)


def test_transforms_by_head_pass_gradients():
    shared = build_transform("entmax15", 4)
    transform = ByHead([shared, None, AlphaEntmax(4, "normal").double(), shared], False)
    scores = torch.randn(2, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    padding[1, ..., 4:] = True
    assert torch.autograd.gradcheck(lambda x: transform(x, padding), scores)
    weights = transform(scores, padding)
    assert not weights[:, 1].any() and not weights[1, ..., 4:].any()
    torch.testing.assert_close(weights[:, [0, 2, 3]].sum(-1), torch.ones(2, 3, 2, dtype=torch.float64))
    assert transform(scores.detach().bfloat16()).dtype == torch.float32


# --- pruning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["learned", "anchor"])
@pytest.mark.parametrize("site", SITES)
def test_pruning_is_zeroing_columns_of_the_output_projection(site, queries, predict, small, untouched):
    model = small(queries=queries, attention={site: "alpha_entmax"})
    heads = {0: [1, 2], 1: [0, 1, 2, 3]}
    zeroed = small(queries=queries, attention={site: "alpha_entmax"})
    for layer, chosen in heads.items():
        weight = attention_modules(zeroed, site)[layer].out_proj.weight
        width = weight.shape[1] // 4
        for head in chosen:
            weight.data[:, head * width : (head + 1) * width] = 0
    with untouched(model):
        with pruned(model, site, heads):
            found = predict(model)
        expected = predict(zeroed)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.boxes, expected.boxes)
        for layer, weights in enumerate(getattr(found.attention, site)):
            gone = heads.get(layer, [])
            kept = [head for head in range(4) if head not in gone]
            assert not weights[:, gone].any()
            assert torch.equal(weights[:, kept], getattr(expected.attention, site)[layer][:, kept])


# --- sinks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("null_key", ["none", "learned"])
@pytest.mark.parametrize("name", ["softmax", "sparsemax", "entmax15", "alpha_entmax"])
def test_masking_a_sink_is_dropping_its_column(name, null_key):
    transform = build_transform(name, 3, null_key=null_key)
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64) * 2
    padding = torch.zeros(2, 1, 1, 7, dtype=torch.bool)
    padding[1, ..., 5:] = True
    with torch.no_grad():
        whole = transform(scores, padding)
        masked = WithoutSink(transform, "masked", None, False, 0)(scores, padding)
        zeroed = WithoutSink(transform, "zeroed", [0, 2], False, 0)(scores, padding)
        best = whole.mean(2).argmax(-1)
        for image in range(2):
            for head in range(3):
                kept = [key for key in range(7) if key != best[image, head]]
                dropped = transform(scores[..., kept], padding[..., kept])[image, head]
                torch.testing.assert_close(masked[image, head][:, kept], dropped)
                assert not masked[image, head, :, best[image, head]].any()
                own = whole[image, head].clone()
                own[:, best[image, head]] *= head == 1
                assert torch.equal(zeroed[image, head], own)


@pytest.mark.parametrize(
    "settings", [{}, {"queries": "anchor", "registers": 2}, {"polling": {"ratio": 0.4, "pooled": 3}}]
)
@pytest.mark.parametrize("site", SITES)
def test_the_sink_that_goes_is_the_one_that_is_measured(site, settings, predict, small, untouched):
    """The first layer sees the same in both; there, zeroing takes away exactly what the sink contributes."""
    model = small(**settings)
    with untouched(model):
        maps = predict(model).attention
        weights, padding = getattr(maps, site)[0], maps.padding_at(site)
        rows = ~padding if site == "encoder_self" else None
        key = sinks(maps, site, 0, weights, rows).key[:, :, None, None].expand(*weights.shape[:3], 1)
        with without_sinks(model, site, "zeroed"):
            zeroed = predict(model).attention
        with without_sinks(model, site):
            masked = predict(model).attention
    column = weights.gather(-1, key)
    torch.testing.assert_close(getattr(zeroed, site)[0], weights.scatter(-1, key, 0.0))
    value = maps.values[site][0].gather(2, key[:, :, :1].expand(-1, -1, 1, maps.values[site][0].shape[-1]))
    torch.testing.assert_close(zeroed.mixed(site, 0), maps.mixed(site, 0) - column * value, rtol=1e-4, atol=1e-5)
    left = weights.scatter(-1, key, 0.0)  # of it the others take their shares
    torch.testing.assert_close(getattr(masked, site)[0] * (1 - column), left, rtol=1e-4, atol=1e-5)


def test_sinks_stay_away_whatever_else_changes(model_with, predict, untouched):
    model = model_with(decoder_cross="alpha_entmax", padding="thesis")
    steps = [
        lambda: without_sinks(model, "decoder_cross", "zeroed", heads=[1, 2]),
        lambda: pruned(model, "decoder_cross", {0: [0], 1: [1]}),
        lambda: swapped(model, "decoder_cross", "tvmax", heads=[0, 1, 2]),
        lambda: without_sinks(model, "encoder_self", layers=[1]),
        lambda: fixed_alpha(model, "encoder_self", [1.0, 1.5, 2.0, 1.2]),
    ]
    found = []
    with untouched(model):
        own = predict(model)
        for order in (steps, steps[::-1]):
            with contextlib.ExitStack() as stack:
                for step in order:
                    stack.enter_context(step())
                found.append(predict(model))
        with without_sinks(model, "decoder_cross"), without_sinks(model, "decoder_cross"):
            assert (predict(model).attention.decoder_cross[0] > 0).any(-1).all()  # the two best are gone
    assert_same(*found)
    assert not torch.allclose(found[0].logits, own.logits, rtol=0, atol=1e-5)
    assert isinstance(attention_modules(model, "decoder_cross")[0].transform, AlphaEntmax)


def test_sinks_of_large_maps_are_those_of_all_queries(monkeypatch):
    monkeypatch.setattr("detrlib.attention.mixing.MOST_SCORES", 60)
    query, key, value = (torch.randn(2, 3, n, 4) for n in (9, 11, 11))
    transform = WithoutSink(build_transform("entmax15", 3), "masked", None, False, 0)
    written, _ = attend(query, key, value, transform, need_weights=True)
    torch.testing.assert_close(attend(query, key, value, transform)[0], written)


def test_maps_make_no_difference_to_what_is_found(model_with, padded_batch, predict):
    """Without maps, other code is used wherever a transform allows it."""
    model = model_with()
    with pruned(model, "decoder_cross", {0: [1]}), fixed_alpha(model, "encoder_self", [1, 1.2, 2, 1.5]):
        with torch.no_grad():
            without = model(*padded_batch(*SIZES, canvas=(96, 128)))
        torch.testing.assert_close(without.logits, predict(model).logits, rtol=1e-4, atol=1e-5)


def test_the_order_of_contexts_does_not_matter(model_with, predict, untouched):
    model = model_with(decoder_cross="entmax15")
    prune = {0: [0], 2: [1, 3]}
    steps = [
        lambda: pruned(model, "decoder_cross", prune),
        lambda: swapped(model, "decoder_cross", "sparsemax"),
        lambda: fixed_alpha(model, "encoder_self", 1.3),
    ]
    found = []
    with untouched(model):
        for order in (steps, steps[::-1]):
            with contextlib.ExitStack() as stack:
                for step in order:
                    stack.enter_context(step())
                found.append(predict(model))
    assert_same(*found)
    assert not found[0].attention.decoder_cross[2][:, [1, 3]].any()


def test_an_exception_leaves_nothing_behind(model_with, untouched):
    model = alphas_of_their_own(model_with(decoder_cross="alpha_entmax"), "decoder_cross")
    with untouched(model):
        with (
            pytest.raises(ZeroDivisionError),
            swapped(model, "decoder_cross", "tvmax"),
            pruned(model, "decoder_cross", {1: [0]}),
            fixed_alpha(model, "encoder_self", 2),
        ):
            raise ZeroDivisionError
        with (
            pytest.raises(ModelError),
            fixed_alpha(model, "encoder_self", 2),
            pruned(model, "decoder_cross", {0: [1], 7: [0]}),
        ):
            raise AssertionError("an impossible context was entered")


def test_a_model_that_moves_within_takes_its_transforms_along(model_with):
    model = model_with(decoder_cross="alpha_entmax")
    with swapped(model, "decoder_cross", "softmax"):
        model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (lambda m: swapped(m, "decoder", "softmax"), "unknown site 'decoder'; there are encoder_self"),
        (
            lambda m: swapped(m, "decoder_cross", "softmax", layers=[3]),
            r"layers \[3\] at decoder_cross: the model has 3",
        ),
        (lambda m: swapped(m, "decoder_cross", "softmax", heads=[4]), r"heads \[4\]: a layer has 4"),
        (lambda m: swapped(m, "decoder_cross", "sofmax"), "unknown attention transform 'sofmax'; there are softmax"),
        (lambda m: swapped(m, "decoder_self", "tvmax"), "tvmax needs keys that form a grid"),
        (lambda m: fixed_alpha(m, "decoder_cross", 2.5), "alpha 2.5 must lie between 1"),
        (lambda m: fixed_alpha(m, "decoder_cross", float("nan")), "alpha nan must lie between 1"),
        (lambda m: fixed_alpha(m, "decoder_cross", [1.5] * 3), r"alpha has shape \[3\]; give one number, .* \[4\], or"),
        (lambda m: pruned(m, "encoder_self", {-1: [0]}), r"layers \[-1\] at encoder_self: the model has 2"),
        (lambda m: without_sinks(m, "encoder_self", "hidden"), "unknown way 'hidden' to remove a sink"),
        (lambda m: without_sinks(m, "encoder_self", heads=[4]), r"heads \[4\]: a layer has 4"),
    ],
)
def test_what_a_model_lacks_is_said(context, message, model_with):
    with pytest.raises(ValueError, match=message), context(model_with()):
        raise AssertionError("entered")


def test_sites_without_scores_or_layers_are_refused(model_with, small):
    deformable = small(architecture="deformable", classification="sigmoid", deformable={"levels": 2})
    for site in ("encoder_self", "decoder_cross"):
        with pytest.raises(ModelError, match=f"{site} of this model is deformable.*use decoder_self"):
            attention_modules(deformable, site)
    assert len(attention_modules(deformable, "decoder_self")) == 3
    with pytest.raises(ModelError, match="differential"), without_sinks(model_with(differential=True), "decoder_cross"):
        raise AssertionError("entered")
    with pytest.raises(ModelError, match="no encoder layers"):
        attention_modules(small(encoder_layers=0), "encoder_self")
    with pytest.raises(ModelError, match="learned no alphas at decoder_cross"):
        learned_alphas(model_with(), "decoder_cross")
