"""Costs: counts by hand, the published tables, and times that add up."""

import pytest
import torch
from small import small
from torch import nn
from torch.nn import functional as F

from detrlib.attention import MultiheadAttention, build_transform
from detrlib.experiments.costs import ORDER, component_of, cost_table, count_flops, count_parameters, measure_latency
from detrlib.experiments.published import DETR_TOOL, FVCORE, PUBLISHED, published_costs, published_model


class ByHand(nn.Module):
    """A convolution, a linear layer and an attention under the names of a detector's components."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.input_proj = nn.Conv2d(8, 12, 1)
        self.transformer = nn.Module()
        self.transformer.encoder = MultiheadAttention(12, 3, build_transform("sparsemax", 3))
        self.class_embed = nn.ModuleList([nn.Linear(12, 5)])

    def forward(self, images, padding):
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
    with_scores = count_flops(ByHand(), (height, width), DETR_TOOL)
    assert with_scores["encoder"] - found["encoder"] == 6 * 3 * cells * cells


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
        ("backbone.fpn.inner_blocks.0", "input projection"),
        ("query_embed", "rest"),
        ("", "rest"),
    ],
)
def test_components(path, component):
    assert component_of(path) == component


@pytest.mark.parametrize("transform", ["sparsemax", "entmax15", "entmax", "alpha_entmax", "tvmax"])
def test_transforms_change_nothing_that_is_counted(transform):
    attention = {"encoder_self": transform, "decoder_cross": transform}
    assert count_flops(small(attention=attention), (64, 96)) == count_flops(small(), (64, 96))


def test_counting_leaves_the_model_alone():
    model = small(attention={"decoder_cross": "alpha_entmax"}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model, (64, 96))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Published tables


def gflops(name: str, **options) -> float:
    return sum(count_flops(published_model(name), **options).values()) / 1e9


@pytest.fixture(scope="module")
def table():
    return published_costs()


def test_published_gflops_of_fvcore_are_derived_exactly(table):
    """To the last published digit: what is left is the rounding to 0.1 G."""
    rows = table.loc[[name for name, row in PUBLISHED.items() if row.tool is FVCORE]]
    assert len(rows) == 15
    assert (rows.as_published - rows.published_gflops).abs().max() < 0.1


def test_published_gflops_of_detr(table):
    rows = table.loc[[name for name, row in PUBLISHED.items() if row.tool is DETR_TOOL]]
    assert rows.difference.abs().max() < 1.5
    assert table.drop(index=rows.index).difference.abs().max() < 0.1  # percent


def test_interpolation_and_norms_by_hand():
    """Four corners for each channel of each sample; five for each element of a norm."""
    name = "Deformable DETR R50"
    tokens, queries = 107 * 130 + 54 * 65 + 27 * 33 + 14 * 17, 300
    layers = {"encoder": 6 * (tokens * 4 * 4 * 256 * 4), "decoder": 6 * (queries * 4 * 4 * 256 * 4)}
    plain, with_norms = count_flops(published_model(name)), count_flops(published_model(name), elementwise=FVCORE)
    linear = 256 * (256 + 128 + 256 + 256 + 2 * 1024)
    assert plain["encoder"] == 6 * tokens * linear + layers["encoder"]
    assert with_norms["encoder"] - plain["encoder"] == 6 * 2 * 5 * tokens * 256
    assert with_norms["decoder"] - plain["decoder"] == 6 * 3 * 5 * queries * 256
    assert with_norms["input projection"] - plain["input projection"] == 5 * tokens * 256


def test_scores_of_dc5_by_hand():
    """Six encoder layers of 8 x 3510 x 3510 scores, six of 8 x 100 x 3510, six of 8 x 100 x 100."""
    keys = 54 * 65
    difference = gflops("DETR-DC5 R50", elementwise=DETR_TOOL) - gflops("DETR-DC5 R50")
    assert difference == pytest.approx(6 * 6 * 8 * (keys * keys + 100 * keys + 100 * 100) / 1e9, rel=1e-6)


def test_costs_of_sparse_detr_are_linear_in_kept_tokens():
    names = [f"Sparse DETR R50, rho 0.{tenth}" for tenth in (1, 3, 5)]
    counts = [count_flops(published_model(name)) for name in names]
    tokens = 107 * 130 + 54 * 65 + 27 * 33 + 14 * 17
    # Offsets, weights, output and the feed-forward network are of kept tokens, values of all.
    per_token, value = 256 * (256 + 128 + 256 + 2 * 1024) + 256 * 4 * 4 * 4, 256 * 256
    for count, rho in zip(counts, (0.1, 0.3, 0.5), strict=True):
        assert count["encoder"] == 6 * ((int(tokens * rho) + 1) * per_token + tokens * value)
        assert {k: v for k, v in count.items() if k != "encoder"} == {
            k: v for k, v in counts[0].items() if k != "encoder"
        }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name):
    trained = sum(count for count, _ in count_parameters(published_model(name)).values())
    assert trained / 1e6 == pytest.approx(PUBLISHED[name].parameters, rel=0.015)


# Tables and times


def test_cost_table():
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


def test_latency():
    model = small().train()
    found = measure_latency(model, (96, 128), batch=2, repeats=3, warm_up=1)
    assert model.training
    assert found.keys() == {*ORDER, "total"}
    assert all(found[name] > 0 for name in ("backbone", "input projection", "encoder", "decoder", "heads", "total"))
    assert found["scoring"] == found["proposals"] == 0
    assert not any("forward" in vars(module) for module in model.modules())
    table = cost_table({"one": model}, (96, 128), latency=True, repeats=2, warm_up=0)
    assert (table.milliseconds >= 0).all()


def test_time_within_a_component_counts_once(monkeypatch):
    """A clock that moves by one whenever it is read: heads inside the decoder are not the decoder's."""
    from detrlib.experiments import costs

    ticks = iter(range(100_000))
    monkeypatch.setattr(costs, "_now", lambda device: float(next(ticks)))
    model = small()
    found = measure_latency(model, (64, 64), repeats=1, warm_up=0)
    parts = sum(found[name] for name in ORDER)
    assert found["heads"] > 0 and found["decoder"] > 0
    whole = measure_latency(model, (64, 64), repeats=1, warm_up=0)
    assert parts == sum(whole[name] for name in ORDER)
