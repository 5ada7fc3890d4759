"""What can be planned: names and numbers of rows, which parts a model has, and what it cannot do without."""

import logging

import pytest
import torch

from detrlib.errors import ModelError
from detrlib.experiments import planned
from detrlib.experiments.ablations import queries_of
from detrlib.experiments.planned import ABLATIONS, possible, query_shares, sinks_away

DEFORMABLE = {"architecture": "deformable", "deformable": {"levels": 2, "decoder_points": 3}}


def names(interventions):
    return [(one.kind, one.value, one.layer) for one in interventions]


def test_queries_go_in_order_from_either_end_and_at_random():
    order = [3, 1, 0, 2, 4, 5, 7, 6]
    shares = query_shares(order, "decoder_cross", shares=(0.05, 0.5, 0.99))
    by_value = {one.value: one.enter.keywords["queries"] for one in shares}
    assert by_value["0.50 least confident"] == [3, 1, 0, 2] and by_value["0.50 most confident"] == [6, 7, 5, 4]
    assert by_value["0.12 least confident"] == [3]  # one at least, and one is left
    assert sorted([*by_value["0.88 most confident"], 3]) == list(range(8))
    draws = [by_value[f"0.50 draw {n}"] for n in range(1, planned.DRAWS + 1)]
    assert all(len(set(draw)) == 4 for draw in draws) and len(set(map(tuple, draws))) > 1
    assert names(shares) == names(query_shares(order, "decoder_cross", shares=(0.05, 0.5, 0.99)))
    zeroed = query_shares(order, "decoder_self", zeroed=True)
    assert {(one.kind, one.site) for one in zeroed} == {("embeddings", "decoder_self")}


def test_every_part_of_a_model_is_planned_once(small):
    model = small(decoder_layers=2)
    each = [(part, layer) for part in ("encoder", "decoder") for layer in (0, 1)]
    assert names(ABLATIONS["feedforward"](model, "decoder_cross")) == [("feedforward", *one) for one in each]
    layers = ABLATIONS["layers"](model, "decoder_cross")
    assert names(layers) == [("layer", *one) for one in each]
    sites = names(ABLATIONS["sites"](model, "decoder_cross"))
    assert sites == [
        ("attention", site, layer)
        for site in ("encoder_self", "decoder_self", "decoder_cross")
        for layer in (None, 0, 1)
    ]
    queries = ABLATIONS["single_queries"](model, "decoder_cross")
    assert names(queries) == [("query", str(query), None) for query in range(len(queries_of(model).numbers))]
    assert possible(model, layers + queries) == layers + queries
    sinks = sinks_away(model, "encoder_self", ["zeroed", "masked"])
    assert names(sinks) == [("sink", way, layer) for way in ("zeroed", "masked") for layer in (None, 0, 1)]
    assert names(sinks_away(small(encoder_layers=1), "encoder_self", ["masked"])) == [("sink", "masked", None)]
    assert {one.site for one in layers} == {"decoder_cross"} and {one.site for one in sinks} == {"encoder_self"}


def test_levels_and_points_are_those_of_sampled_sites(small):
    model = small(**DEFORMABLE)
    levels = names(ABLATIONS["levels"](model, "decoder_cross"))
    assert levels == [("level", f"{site} {n}", None) for site in ("encoder_self", "decoder_cross") for n in (0, 1)]
    points = names(ABLATIONS["points"](model, "decoder_cross"))
    counts = {"encoder_self": 4, "decoder_cross": 3}
    assert points == [("point", f"{site} {n}", None) for site, count in counts.items() for n in range(count)]
    with pytest.raises(ModelError, match="there are no levels to ablate"):
        ABLATIONS["levels"](small(), "decoder_cross")


def test_what_a_model_cannot_do_without_is_left_out_and_said(small, caplog):
    model = small(encoder_layers=0, decoder_layers=1)
    layers = ABLATIONS["layers"](model, "decoder_cross")
    assert names(layers) == [("layer", "decoder", 0)]
    with pytest.raises(ModelError, match="a decoder without layers detects nothing"):
        possible(model, layers)
    blocks = ABLATIONS["feedforward"](model, "decoder_cross")
    with caplog.at_level(logging.INFO):
        assert possible(model, layers + blocks) == blocks
    assert ["detects nothing" in message for message in caplog.messages] == [True]
    assert possible(model, []) == []
    with torch.no_grad(), blocks[0].enter(model):
        model(torch.zeros(1, 3, 64, 64))
