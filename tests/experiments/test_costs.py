"""Costs: counts by hand, and the table of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrlib.attention import MultiheadAttention, build_transform
from detrlib.experiments.costs import ATEN, ORDER, component_of, cost_table, count_flops, count_parameters


class ByHand(nn.Module):
    """A convolution, a linear layer and an attention under the names of a detector's components."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.input_proj = nn.Conv2d(8, 12, 1)
        self.transformer = nn.Module()
        self.transformer.encoder = MultiheadAttention(12, 3, build_transform("sparsemax", 3))
        self.class_embed = nn.ModuleList([nn.Linear(12, 5)])

    def forward(self, images, padding=None):
        tokens = self.input_proj(F.relu(self.backbone(images))).flatten(2).transpose(1, 2)
        assert padding is None
        encoded, _ = self.transformer.encoder(tokens, tokens, tokens)
        return self.class_embed[0](encoded)


def test_counts_by_hand():
    height, width = 9, 12
    cells = 5 * 6
    found = count_flops(ByHand(), (height, width))
    assert found == dict.fromkeys(ORDER, 0) | {
        "backbone": cells * 8 * 3 * 9,
        "input projection": cells * 8 * 12,
        "encoder": 4 * cells * 12 * 12 + 2 * cells * cells * 12,
        "heads": cells * 12 * 5,
    }
    with_scores = count_flops(ByHand(), (height, width), {ATEN._softmax: 6, ATEN._safe_softmax: 6})
    assert with_scores["encoder"] - found["encoder"] == 6 * 3 * cells * cells


def test_options_by_hand(small):
    """A gate is a projection; the second map of a difference mixes values once more; a register is a token."""
    plain, size = {"encoder_layers": 1, "decoder_layers": 1}, (64, 96)
    cells, queries = 8 * 12, 7

    def counts(**settings):
        model = small(**plain | settings)
        return count_flops(model, size), count_parameters(model)

    flops, parameters = counts()
    found, more = counts(attention={"gate": "channel", "differential": True})
    assert found["encoder"] - flops["encoder"] == cells * 32 * 32 + cells * cells * 32
    more_by_hand = 32 * 32 + 4 * 4 + 8  # the gate, four vectors of half a head, the norm of a head
    assert more["encoder"][0] - parameters["encoder"][0] == more_by_hand
    assert more["decoder"][0] - parameters["decoder"][0] == 2 * more_by_hand
    found, _ = counts(attention={"gate": "head", "gate_sites": "decoder_cross"})
    assert found["decoder"] - flops["decoder"] == queries * 32 * 4
    registers, more = counts(registers=3)
    assert more["encoder"][0] - parameters["encoder"][0] == 3 * 32
    per_token = 4 * 32 * 32 + 2 * 32 * 48
    pairs = (cells + 3) ** 2 - cells**2
    assert registers["encoder"] - flops["encoder"] == 3 * per_token + 2 * pairs * 32
    assert registers["decoder"] == flops["decoder"]


def test_parameters_by_hand():
    model = ByHand()
    model.backbone.requires_grad_(False)
    found = count_parameters(model)
    assert {name: count for name, count in found.items() if any(count)} == {
        "backbone": (0, 216),
        "input projection": (8 * 12 + 12, 0),
        "encoder": (4 * (12 * 12 + 12), 0),
        "heads": (12 * 5 + 5, 0),
    }


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("transformer.decoder.layers.0.linear1", "decoder"),
        ("transformer.enc_output_norm", "proposals"),
        ("transformer.encoder", "encoder"),
        ("class_embed.3", "heads"),
        ("backbone.body.conv1", "backbone"),
        ("query_embed", "rest"),
        ("", "rest"),
    ],
)
def test_components(path, component):
    assert component_of(path) == component


@pytest.mark.parametrize("transform", ["sparsemax", "entmax15", "entmax", "alpha_entmax", "tvmax"])
def test_transforms_change_nothing_that_is_counted(transform, small):
    attention = {"encoder_self": transform, "decoder_cross": transform}
    assert count_flops(small(attention=attention), (64, 96)) == count_flops(small(), (64, 96))


def test_counting_leaves_the_model_alone(small):
    model = small(attention={"decoder_cross": "alpha_entmax"}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model, (64, 96))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_cost_table(small):
    models = {"one": small(), "two": small(queries="anchor")}
    table = cost_table(models, (64, 96))
    assert list(table.columns) == ["model", "component", "parameters", "frozen", "gflops"]
    for label, model in models.items():
        rows = table[table.model == label].set_index("component")
        parts = rows.drop("total")
        assert rows.loc["total", "parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert parts.parameters.sum() == rows.loc["total", "parameters"]
        assert parts.gflops.sum() == pytest.approx(rows.loc["total", "gflops"])
        assert (rows.loc[["backbone", "encoder", "decoder", "heads"], "gflops"] > 0).all()
        assert "scoring" not in rows.index
