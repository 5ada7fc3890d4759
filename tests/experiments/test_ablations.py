"""Parts taken out of models of every family: what is left is the model without them, and afterwards it is whole."""

import contextlib
import copy
import re

import pytest
import torch
from torch import nn

from detrlib.errors import ModelError
from detrlib.experiments.ablations import (
    queries_of,
    without_attention,
    without_feedforward,
    without_layers,
    without_queries,
    without_samples,
    zeroed_queries,
)
from detrlib.experiments.interventions import pruned, swapped
from detrlib.experiments.parts import attention_at, stack_of
from detrlib.models import build_model

SITES = ("encoder_self", "decoder_self", "decoder_cross")
SIGMOID = {"architecture": "deformable", "classification": "sigmoid"}
PROPOSING = {"levels": 2, "refine": True, "two_stage": True}
OWN = {
    "learned": {"queries": "learned"},
    "pre-norm": {"norm": "pre", "attention": {"decoder_cross": "sparsemax"}},
    "conditional": {"queries": "conditional"},
    "anchor": {"queries": "anchor", "attention": {"decoder_self": "alpha_entmax"}},
    "polling": {"polling": {"ratio": 0.4, "pooled": 3}},
    "deformable": {"architecture": "deformable", "deformable": {"levels": 2}},
    "refining": {"architecture": "deformable", "deformable": {"levels": 2, "refine": True}},
    "proposing": {"architecture": "deformable", "deformable": PROPOSING},
    "sparse": {"architecture": "deformable", "deformable": PROPOSING | {"rho": 0.5, "encoder_auxiliary": True}},
}
HUGGINGFACE = ("detr", "conditional_detr", "dab_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine")
CHOOSING = ("rt_detr", "rt_detr_v2", "d_fine")  # their queries, by scores


@pytest.fixture(scope="session")
def family(small, huggingface_settings, model_settings, randomise):
    def family(name, **settings):
        """A small model of a family; of transformers with options."""
        if name in OWN:
            return small(**OWN[name] | settings)
        told = huggingface_settings(name)["model"]
        told["options"] |= settings
        torch.manual_seed(0)
        model = build_model(model_settings(**told)).eval()
        randomise(model)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.2)  # attention that looks somewhere
        return model

    return family


@pytest.fixture(scope="session")
def predict(padded_batch):
    batch = padded_batch((64, 96), (51, 70), canvas=(64, 96))

    @torch.no_grad()
    def predict(model, attention=True):
        return model(*batch, need_attention=attention)

    return predict


def assert_same(one, other, rtol=1e-4, atol=1e-5):
    for name in ("logits", "boxes"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=rtol, atol=atol)


def each(*families):
    return pytest.mark.parametrize("name", families)


# --- queries -------------------------------------------------------------------------------------------------------


@each(*OWN, *(name for name in HUGGINGFACE if name not in CHOOSING))
def test_queries_that_are_gone_leave_the_others_alone(name, family, predict, untouched):
    """Where queries do not ask each other, the others detect as before; where they do, they miss them."""
    model = family(name)
    with untouched(model):
        whole, count = predict(model), len(queries_of(model).numbers)
        kept = [number for number in range(count) if number not in (1, 4)]
        with without_queries(model, [4, 1]):
            assert len(queries_of(model).numbers) == count - 2
            fewer = predict(model)
            assert fewer.attention.decoder_self[0].shape[-2:] == (count - 2, count - 2)
        with without_attention(model, "decoder_self"), without_queries(model, [1]), without_queries(model, [4]):
            apart = predict(model)
        with without_attention(model, "decoder_self"):
            together = predict(model)
        torch.testing.assert_close(apart.logits, together.logits[:, kept], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(apart.boxes, together.boxes[:, kept], rtol=1e-4, atol=1e-5)
        assert name == "dab_detr" or not torch.allclose(fewer.logits, whole.logits[:, kept], rtol=0, atol=1e-5)


@each("learned", "anchor", "deformable", "detr", "dab_detr")
def test_zeroed_queries_have_no_embedding(name, family, predict, untouched):
    model = family(name)
    with untouched(model):
        with zeroed_queries(model, range(len(queries_of(model).numbers))):
            logits = predict(model).logits
        torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), rtol=1e-4, atol=1e-5)
        with without_queries(model, [0]), zeroed_queries(model, [0, 2]):
            one = predict(model)
        with zeroed_queries(model, [2]), without_queries(model, [0]):
            assert_same(predict(model), one)


@each("proposing", "sparse")
def test_queries_that_are_proposed_go_by_rank(name, family, predict):
    model = family(name)
    with without_queries(model, [5, 6]):
        ranked = predict(model)
    model.num_queries = 5
    assert_same(predict(model), ranked, rtol=0, atol=0)


# --- layers --------------------------------------------------------------------------------------------------------


def shorter(model, part, gone, small):
    """A model built with fewer layers, with the weights of those that are left."""
    names = {}
    layers = len(stack_of(model, part).layers())
    kept = [layer for layer in range(layers) if layer != gone]
    for name in model.state_dict():
        new = re.sub(rf"({part}\.(?:aifi\.0\.)?layers)\.(\d+)\.", lambda m: renumbered(m, kept), name)
        if part == "decoder":
            new = re.sub(r"((?:class|bbox)_embed)\.(\d+)\.", lambda m: renumbered(m, kept, layers), new)
        names[name] = new
    state = {new: model.state_dict()[old] for old, new in names.items() if "gone" not in new}
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    return small


def renumbered(match, kept, layers=0):
    number = int(match[2])
    if layers and number >= layers:
        return f"{match[1]}.{number - 1}."  # of proposals
    return f"{match[1]}.{kept.index(number)}." if number in kept else "gone"


@each(*OWN, "detr", "conditional_detr", "dab_detr", "deformable_detr", "rt_detr", "rt_detr_v2")
def test_without_a_layer_a_model_is_one_built_without_it(name, family, predict, untouched):
    """Of encoders the first, but where transformers builds no model without; of decoders the second."""
    model = family(name, **({} if name in OWN else {"decoder_layers": 3}))
    with untouched(model):
        for part, gone in (("encoder", 0), ("decoder", 1)):
            layers = len(stack_of(model, part).layers())
            if part == "encoder" and (layers == 1 or name == "sparse"):  # heads of a sparse encoder: below
                continue
            sizes = {f"{other}_layers": len(stack_of(model, other).layers()) for other in ("encoder", "decoder")}
            other = shorter(model, part, gone, family(name, **sizes | {f"{part}_layers": layers - 1}))
            with without_layers(model, part, [gone]):
                fewer = predict(model)
                assert len(stack_of(model, part).layers()) == layers - 1 and stack_of(model, part).total() == layers
            expected = predict(other)
            assert_same(fewer, expected)
            assert len(fewer.auxiliary) == len(expected.auxiliary)
            for site in (site for site in SITES if site.startswith(part)):
                ours, theirs = getattr(fewer.attention, site), getattr(expected.attention, site)
                assert len(ours) == len(theirs) == layers - 1
                torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)


def test_without_layers_a_pre_norm_encoder_passes_on_what_it_gets(family, padded_batch):
    model = family("pre-norm")
    encoder, heard = model.transformer.encoder, {}
    encoder.norm.register_forward_pre_hook(lambda _, x: heard.update(into=x[0]))
    model.input_proj.register_forward_hook(lambda *x: heard.update(tokens=x[-1].flatten(2).transpose(1, 2)))
    with without_layers(model, "encoder", [0, 1]), torch.no_grad():
        model(*padded_batch((64, 96), canvas=(64, 96)))
    assert torch.equal(heard["into"], heard["tokens"])


def test_heads_of_encoder_layers_go_with_them(family, predict):
    model = family("sparse", encoder_layers=3)
    heads, first = list(model.class_embed), 4  # three decoder layers and the proposals stand before
    for gone, kept in ((0, [1]), (1, [0]), (2, [0])):
        with without_layers(model, "encoder", [gone]):
            assert list(model.class_embed) == heads[:first] + [heads[first + layer] for layer in kept]
            assert len(predict(model).encoder_auxiliary) == 1
    with without_layers(model, "encoder", [0, 1, 2]):
        assert predict(model, False).encoder_auxiliary == []


# --- blocks --------------------------------------------------------------------------------------------------------


def outputs(module):
    return [part for name, part in module.named_children() if name in ("out_proj", "output_proj", "o_proj")]


@each(*OWN, *HUGGINGFACE)
def test_attention_that_is_gone_has_an_output_of_zeros(name, family, predict, untouched):
    model = family(name)
    with untouched(model):
        for site in SITES:
            zeroed = copy.deepcopy(model)
            last = max(modules := attention_at(zeroed, site))
            if not outputs(modules[0]):
                assert (name, site) == ("d_fine", "decoder_cross")
                with pytest.raises(ModelError, match="ends in no projection"), without_attention(model, site):
                    raise AssertionError("entered")
                continue
            for output in (outputs(module)[0] for module in modules.values()):
                (output.weight.data.zero_(), output.bias.data.zero_())
            with without_attention(model, site):
                found = predict(model)
            assert_same(found, predict(zeroed))
            with without_attention(model, site, [last]):
                weights = getattr(predict(model).attention, site)
            sampled = any(hasattr(module, "sampling_offsets") for module in modules.values())
            assert bool(weights[last].any()) == sampled and (not last or weights[0].any())


@each(*OWN, *HUGGINGFACE)
def test_feedforward_that_is_gone_adds_nothing(name, family, predict, untouched):
    model = family(name)
    with untouched(model):
        for part in ("encoder", "decoder"):
            zeroed, whole = copy.deepcopy(model), copy.deepcopy(model)
            for layer in stack_of(zeroed, part).layers():
                block = getattr(layer, "mlp", layer)
                last = block.layers[-1] if hasattr(block, "layers") else getattr(block, "linear2", None) or block.fc2
                assert last.in_features == (48 if name in OWN else 32)
                (last.weight.data.zero_(), last.bias.data.zero_())
            with without_feedforward(model, part):
                assert_same(predict(model, False), predict(zeroed, False))
            getattr(*stack_of(whole, part))[0] = stack_of(zeroed, part).layers()[0]
            with without_feedforward(model, part, [0]):
                assert_same(predict(model, False), predict(whole, False))


# --- samples -------------------------------------------------------------------------------------------------------


@each("deformable", "sparse", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine")
def test_hidden_samples_have_no_weight_and_the_others_all_of_it(name, family, predict, untouched):
    model = family(name)
    with untouched(model):
        own = predict(model).attention.decoder_cross.samples[0].weights
        with without_samples(model, "decoder_cross", levels=[1], points=[0]):
            fewer = predict(model)
        kept = torch.ones_like(own, dtype=torch.bool)
        kept[..., 1, :] = kept[..., :, 0] = False
        left = torch.where(kept, own, 0.0)
        weights = fewer.attention.decoder_cross.samples[0].weights
        torch.testing.assert_close(weights, left / left.sum((-2, -1), keepdim=True), rtol=1e-4, atol=1e-5)
        with without_samples(model, "decoder_cross", points=[0]), without_samples(model, "decoder_cross", [1]):
            assert_same(predict(model), fewer, rtol=0, atol=0)


# --- together ------------------------------------------------------------------------------------------------------


@each("anchor", "sparse", "deformable_detr", "detr")
def test_the_order_of_contexts_does_not_matter(name, family, predict, untouched):
    model = family(name)
    steps = [
        lambda: without_layers(model, "decoder", [0]),
        lambda: without_feedforward(model, "decoder", [1]),
        lambda: without_attention(model, "decoder_self", [1]),
        lambda: swapped(model, "decoder_self", "sparsemax"),
        lambda: without_queries(model, [3, 0]),
        lambda: without_queries(model, [5]),
    ]
    if name == "detr":
        steps.append(lambda: pruned(model, "decoder_cross", {0: [1], 1: [2]}))
    found = []
    with untouched(model):
        for order in (steps, steps[::-1]):
            with contextlib.ExitStack() as stack:
                for step in order:
                    stack.enter_context(step())
                found.append(predict(model))
    assert_same(*found)


def test_an_exception_leaves_nothing_behind(family, untouched):
    model = family("sparse")
    with untouched(model):
        with (
            pytest.raises(ZeroDivisionError),
            without_layers(model, "decoder", [2]),
            without_samples(model, "encoder_self", [0]),
            without_attention(model, "decoder_cross"),
            without_queries(model, [6]),
        ):
            raise ZeroDivisionError
        with pytest.raises(ModelError), without_feedforward(model, "decoder"), without_layers(model, "decoder", [7]):
            raise AssertionError("an impossible context was entered")


def test_a_model_that_moves_within_finds_its_parts_where_it_has_gone(family):
    model = family("anchor")
    with without_layers(model, "decoder", [1]), without_queries(model, [0]), without_attention(model, "decoder_self"):
        model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "context", "message"),
    [
        ("learned", lambda m: without_queries(m, [7]), r"queries \[7\]: the model has 7"),
        ("proposing", lambda m: without_queries(m, range(7)), "none of the 7 would be left"),
        ("proposing", lambda m: zeroed_queries(m, [1]), "proposes its queries"),
        ("rt_detr", lambda m: without_queries(m, [1]), "RTDetrForObjectDetection chooses its queries"),
        (
            "learned",
            lambda m: without_layers(m, "decoder", [0, 1, 2]),
            r"layers \[0, 1, 2\] at decoder: a ",
        ),
        ("learned", lambda m: without_layers(m, "neck", [0]), "unknown part 'neck'"),
        ("d_fine", lambda m: without_layers(m, "decoder", [0]), "DFineForObjectDetection corrects the boxes"),
        ("conditional_detr", lambda m: without_layers(m, "decoder", [0]), "cannot do without its first"),
        ("learned", lambda m: without_attention(m, "decoder_cross", [3]), r"layers \[3\] at decoder_cross: the model"),
        ("learned", lambda m: without_samples(m, "decoder_cross", [0]), "scores keys and samples no points"),
        (
            "sparse",
            lambda m: without_samples(m, "decoder_cross", [2]),
            r"levels \[2\] at decoder_cross: the",
        ),
        ("sparse", lambda m: without_samples(m, "decoder_cross", [0, 1]), "none is left to sample"),
    ],
)
def test_what_a_model_lacks_is_said(name, context, message, family):
    with pytest.raises(ModelError, match=message), context(family(name)):
        raise AssertionError("entered")
