"""Poll and pool: which cells are kept, what the others are pooled into, and what attention to them means on the grid.

Legend: B images, K cells, n kept cells, M pooled tokens.
"""

import itertools
import json

import pytest
import torch
from torch import nn

from detrlib.config import Config, load_config, replace
from detrlib.engine.loop import train
from detrlib.errors import ConfigError
from detrlib.experiments.costs import count_flops
from detrlib.losses.criterion import Criterion
from detrlib.metrics.sparsity import zeros_ratio
from detrlib.models import build_model
from detrlib.models.pnp import PollAndPool
from detrlib.models.transformer import Memory

SIZES, CANVAS = [(70, 101), (128, 64)], (128, 160)
SOME = {"ratio": 0.4, "pooled": 3}


@pytest.fixture(scope="session")
def polling(small):
    def polling(queries="learned", transform="softmax", **settings):
        attention = dict.fromkeys(("encoder_self", "decoder_self", "decoder_cross"), transform)
        return small(**{"queries": queries, "attention": attention, "polling": SOME} | settings)

    return polling


@pytest.fixture(scope="session")
def looked(padded_batch):
    def looked(model):
        """Predictions of a padded batch with their maps."""
        with torch.no_grad():
            return model(*padded_batch(*SIZES, canvas=CANVAS), need_attention=True)

    return looked


def sampler(ratio=0.4, pooled=3, dim=8, dtype=torch.float64, **settings):
    """A sampler, and the memory of 3 images with 20, 7 and 1 valid cells of 4 x 5."""
    torch.manual_seed(0)
    padding = torch.arange(20) >= torch.tensor([[20], [7], [1]])
    memory = Memory(torch.randn(3, 20, dim, dtype=dtype), torch.randn(3, 20, dim, dtype=dtype), padding, (4, 5))
    return PollAndPool(dim, ratio, pooled, **settings).to(dtype), memory


@pytest.mark.parametrize("queries", ["learned", "anchor"])
@pytest.mark.parametrize("settings", [SOME, {"ratio": 0.4, "pooled": 0}, {"ratio": 1.0, "pooled": 3}])
def test_an_image_alone_is_predicted_as_in_a_padded_batch(queries, settings, assert_alone_as_in_batch, polling):
    assert_alone_as_in_batch(polling(queries, polling=settings))


@pytest.mark.parametrize("transform", ["sparsemax", "entmax15", "alpha_entmax"])
def test_padding_changes_nothing_for_any_transform(transform, assert_alone_as_in_batch, polling):
    assert_alone_as_in_batch(polling("anchor", transform, norm="pre", position="learned"))
    assert_alone_as_in_batch(polling(encoder_layers=0, attention={"decoder_cross": transform}))


class Modulated(nn.Module):
    """Features [B,E,h,w], normalised, times their scores: what polling makes of cells that are all kept."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward(self, features):
        features = features.movedim(1, -1)
        spread = features.var(-1, correction=0, keepdim=True)
        normal = (features - features.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt()
        return (normal * self.score(features).sigmoid()).movedim(-1, 1)


@pytest.mark.parametrize("queries", ["learned", "anchor"])
@pytest.mark.parametrize("pooled", [0, 3])
def test_all_cells_kept_is_plain_detr_on_modulated_features(queries, pooled, looked, polling, small):
    model, plain = polling(queries, polling={"ratio": 1.0, "pooled": pooled}), small(queries=queries)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".poll." not in name})
    plain.input_proj = nn.Sequential(plain.input_proj, Modulated(model.transformer.encoder.poll.score))
    found, expected = looked(model), looked(plain)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-5)
    for layer in range(3):
        one, other = (x.attention.as_images("decoder_cross", layer) for x in (found, expected))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 1.0])
def test_tokens_cell_by_cell(ratio):
    poll, memory = sampler(ratio)
    found = poll(memory)
    index, polled = found.polled.kept.index, found.polled
    n = index.shape[1]
    assert found.tokens.shape == found.position.shape == (3, n + 3, 8)
    assert torch.equal(found.padding, polled.key_padding())
    for image, valid in enumerate((20, 7, 1)):
        cells, places = memory.tokens[image, :valid], memory.position[image, :valid]
        scores = poll.score(cells).sigmoid().flatten()
        number = min(int(valid * ratio) + 1, valid)
        best = scores.topk(number).indices.sort().values
        there = ~found.padding[image, :n]
        assert index[image, there].tolist() == best.tolist()
        normal = nn.LayerNorm(8, elementwise_affine=False)(cells)
        expected = torch.stack([normal[cell] * scores[cell] for cell in best])
        torch.testing.assert_close(found.tokens[image, :n][there], expected)
        assert torch.equal(found.position[image, :n][there], places[best])
        rest = [cell for cell in range(valid) if cell not in best]
        assert found.padding[image, n:].tolist() == [not rest] * 3
        if rest:
            shares = poll.share(normal[rest]).softmax(0)  # over the cells that are left
            torch.testing.assert_close(found.tokens[image, n:], shares.T @ poll.value(normal[rest]))
            torch.testing.assert_close(found.position[image, n:], shares.T @ places[rest])


def test_attention_to_tokens_is_spread_over_the_cells_they_stand_for(looked, polling):
    model = polling(transform="sparsemax")
    predictions = looked(model)
    maps, polled = predictions.attention, predictions.polled
    assert maps.grid == (16, 20)
    assert [maps.valid_grid(i) for i in range(2)] == [(9, 13), (16, 8)]
    for site, layer in [("decoder_cross", 0), ("decoder_cross", 2), ("encoder_self", 1)]:
        weights, images = getattr(maps, site)[layer], maps.as_images(site, layer)
        assert images.shape == (*weights.shape[:-1], 16, 20)
        expected = torch.zeros(*weights.shape[:-1], 320)
        n = polled.kept.index.shape[1]
        for image, token in itertools.product(range(2), range(n)):
            expected[image, ..., polled.kept.index[image, token]] += weights[image, ..., token]
        for image, token in itertools.product(range(2), range(3)):
            expected[image] += weights[image, ..., n + token, None] * polled.share[image, token]
        torch.testing.assert_close(images.flatten(-2), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(images.sum((-2, -1)), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)
        assert not images.flatten(-2).masked_select(polled.cell_padding[:, None, None]).any()
    # What is attended to is what stands there: mixing cells by the maps is mixing tokens by the weights.
    kept = polled.kept.mask(320)
    assert not (polled.share * kept[:, None]).any()
    torch.testing.assert_close(polled.share.sum(-1), torch.ones(2, 3))


def test_without_pooling_cells_that_are_not_kept_get_nothing(looked, polling):
    predictions = looked(polling(polling={"ratio": 0.25, "pooled": 0}))
    maps, kept = predictions.attention, predictions.polled.kept.mask(320)
    images = maps.as_images("decoder_cross", -1).flatten(-2)
    assert torch.equal((images > 0).all((1, 2)), kept)
    assert not images.masked_select(~kept[:, None, None]).any()


def test_sparsity_is_about_the_keys_there_were_to_choose_from(looked, padded_batch, polling):
    """Softmax leaves none of its keys out, though most cells are none; sparsemax leaves out the same on any canvas."""
    ratios = {}
    for transform in ("softmax", "sparsemax"):
        maps = looked(polling(transform=transform)).attention
        assert maps.key_padding.shape == (2, maps.decoder_cross[0].shape[-1])
        ratios[transform] = zeros_ratio(maps.decoder_cross[-1], ~maps.key_padding[:, None, None])
    assert not ratios["softmax"].any()
    model, (images, padding) = polling(transform="sparsemax"), padded_batch(*SIZES, canvas=CANVAS)
    with torch.no_grad():
        alone = model(images[1:, :, :, :64], padding[1:, :, :64], need_attention=True).attention
    expected = zeros_ratio(alone.decoder_cross[-1], ~alone.key_padding[:, None, None])
    torch.testing.assert_close(ratios["sparsemax"][1:], expected)
    assert expected.any()


def test_training_draws_a_ratio_and_inference_takes_the_one_it_is_given():
    poll, memory = sampler(0.1, 0, train_ratios=(0.4, 0.8))
    memory = memory._replace(padding=None)

    def keeps():
        return poll(memory).tokens.shape[1]

    assert {keeps() for _ in range(60)} == set(range(9, 17))  # int(20 r) + 1 for r in 0.4 .. 0.8
    torch.manual_seed(3)
    drawn = [keeps() for _ in range(5)]
    torch.manual_seed(3)
    assert [keeps() for _ in range(5)] == drawn
    poll.eval()
    assert keeps() == 3
    poll.ratio = 0.5
    assert keeps() == 11


@pytest.mark.parametrize("queries", ["learned", "anchor"])
def test_every_parameter_learns(queries, padded_batch, polling):
    model = polling(queries, "alpha_entmax", position="learned").train()
    predictions = model(*padded_batch((70, 101), (96, 128), canvas=(96, 128)))
    layers = (*predictions.auxiliary, predictions)
    sum(layer.logits.square().sum() + layer.boxes.square().sum() for layer in layers).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_gradients_are_those_of_finite_differences():
    poll, memory = sampler(dim=4)

    def valid_tokens(features):
        found = poll(memory._replace(tokens=features))
        return found.tokens[~found.padding], found.position[~found.padding]

    assert torch.autograd.gradcheck(valid_tokens, memory.tokens.requires_grad_())


def test_where_all_cells_are_kept_gradients_are_numbers():
    poll, memory = sampler(1.0)
    poll(memory).tokens.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in poll.parameters())


def test_the_score_loss_is_the_mean_score_of_the_kept_cells(looked, polling, small):
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.5, 0.2, 0.3]])}] * 2
    predictions = looked(polling())
    total, terms = Criterion(weight_poll=2.0)(predictions, targets)
    kept = [predictions.polled.scores[i][predictions.polled.kept.mask(320)[i]].mean() for i in range(2)]
    torch.testing.assert_close(terms["loss_poll"], torch.stack(kept).mean())
    torch.testing.assert_close(total, Criterion(weight_poll=0.0)(predictions, targets)[0] + 2 * terms["loss_poll"])
    assert "loss_poll" not in Criterion()(looked(small()), targets)[1]


def test_maps_can_be_spread_inside_and_after_autocast(padded_batch, polling):
    model = polling(transform="entmax15")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = model(*padded_batch(*SIZES, canvas=CANVAS), need_attention=True).attention
        inside = maps.as_images("decoder_cross", 0)
    for images in (inside, maps.as_images("decoder_cross", 0)):
        torch.testing.assert_close(images.float().sum((-2, -1)), torch.ones(2, 4, 7), rtol=0, atol=1e-2)


def test_the_encoder_costs_what_its_tokens_cost():
    """Counted by hand: K tokens cost a layer 4 K E^2 + 2 K^2 E + 2 K E F, and polling its three linear layers."""
    settings = {"model.num_classes": 4, "model.backbone": {"name": "tiny", "weights": "none"}}
    settings |= {"model.encoder_layers": 2, "model.decoder_layers": 1}
    cells, e, f, m = 16 * 20, 256, 2048, 30
    for ratio in (None, 1 / 3, 0.5):
        with torch.device("meta"):
            model = build_model(replace(Config(), settings | {"model.polling": {"ratio": ratio}}).model)
        tokens, poll = cells, 0
        if ratio:
            tokens = int(cells * ratio) + 1 + m
            poll = cells * e * (e + 1) + cells * e * m + m * e * e + 2 * m * cells * e
        expected = poll + 2 * (4 * tokens * e**2 + 2 * tokens**2 * e + 2 * tokens * e * f)
        assert count_flops(model, (128, 160))["encoder"] == expected


def test_a_run_is_trained_and_measured(tmp_path, tiny_config):
    cfg = tiny_config({"model.polling": {"ratio": 0.5, "pooled": 4, "train_ratios": [0.3, 0.8]}, "train.epochs": 1})
    results = train(cfg, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["train/loss_poll"] < 1 for record in records if "train/loss_poll" in record)
    assert 0 < records[-1]["val/loss_poll"] < 1
    assert results["paibb"]["pairs"] > 0
    assert 0 < results["attention"]["decoder_cross"]["support"][0] <= 8 * 8 * 0.5 + 1 + 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.polling.pooled": 10}, "model.polling.ratio; set it"),
        ({"model.polling.train_ratios": [0.3, 0.8]}, "model.polling.ratio; set it"),
        ({"model.polling.ratio": 0.0}, "model.polling.ratio"),
        ({"model.polling": {"ratio": 0.3, "train_ratios": [0.3, 1.2]}}, "model.polling.train_ratios"),
        ({"model.polling.ratio": 0.3, "model.attention.decoder_cross": "tvmax"}, "no grid, which tvmax needs"),
        ({"model.polling.ratio": 0.3, "model.attention.encoder_self": "tvmax"}, "no grid, which tvmax needs"),
        ({"model.polling.ratio": 0.3, "model.attention.padding": "add_one"}, "model.compatibility.padding"),
        (
            {"model.polling.ratio": 0.3, "model.architecture": "deformable"},
            "model.polling.ratio.*model.deformable.rho",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_reason_and_remedy(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=settings)
