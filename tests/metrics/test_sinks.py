"""Sinks: planted ones are found with all that was planted; rows that sum to less or more; places over a data set."""

import json

import numpy as np
import pytest
import torch

from detrlib.metrics.sinks import MEASURES, PLACE, Limits, Places, SinksOfSite, sinks
from detrlib.models import AttentionMaps
from detrlib.models.outputs import Polled
from detrlib.models.sparse import Kept

GRID, EXTENTS = (4, 5), [(4, 5), (3, 4)]  # the second image has padding
HEADS, QUERIES, CHANNELS = 3, 6, 8
WEIGHT = 0.7  # of the planted sink
CELL = [(0, 4), (2, 3)]  # (row, column) by image: a corner, and the corner of the smaller image


def random(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def planted():
    """Maps with a sink of WEIGHT at CELL in every row, and values whose norms are all one, but that of the sink: 0 in
    head 0, 1 in head 1, 3 in head 2.
    """
    padding = torch.ones(2, *GRID, dtype=torch.bool)
    for image, (rows, columns) in enumerate(EXTENTS):
        padding[image, :rows, :columns] = False
    padding = padding.flatten(1)
    others = random(2, HEADS, QUERIES, 20).masked_fill(padding[:, None, None], 0.0)
    values = random(2, HEADS, 20, CHANNELS, seed=1) - 0.5
    values /= values.norm(dim=-1, keepdim=True)
    for image, (row, column) in enumerate(CELL):
        key = row * GRID[1] + column
        others[image, ..., key] = 0.0
        values[image, :, key] *= torch.tensor([0.0, 1.0, 3.0])[:, None]
    weights = (1 - WEIGHT) * others / others.sum(-1, keepdim=True)
    for image, (row, column) in enumerate(CELL):
        weights[image, ..., row * GRID[1] + column] = WEIGHT
    return AttentionMaps([], [], [weights], GRID, padding, values={"decoder_cross": [values]})


def measured(maps, **given):
    """{measure: [B,H]}, {part of the place: [B,H]} of the only layer of decoder_cross."""
    found = sinks(maps, "decoder_cross", 0, maps.decoder_cross[0], **given)
    values = dict(zip(MEASURES, found.values.unbind(1), strict=True))
    return values, dict(zip(PLACE, found.place.unbind(1), strict=True))


def test_a_planted_sink_is_found_with_all_that_was_planted(planted):
    matched = torch.zeros(2, QUERIES, dtype=torch.bool)
    matched[0, 2:4] = True
    weights = planted.decoder_cross[0]
    weights[0, :, 2:4] *= 0.5  # matched queries of the first image rest on it half as much, and on a null key instead
    found, place = measured(planted, matched=matched)
    for image, (row, column) in enumerate(CELL):
        assert {name: set(place[name][image].tolist()) for name in PLACE} == {
            "row": {row},
            "column": {column},
            "rows": {EXTENTS[image][0]},
            "columns": {EXTENTS[image][1]},
        }
    expected = torch.tensor([WEIGHT * (4 + 2 * 0.5) / 6, WEIGHT])[:, None].expand(2, HEADS)
    torch.testing.assert_close(found["weight"], expected, check_dtype=False)
    torch.testing.assert_close(found["null_mass"][0], torch.full((HEADS,), 0.5 / 3))
    torch.testing.assert_close(found["null_mass"][1], torch.zeros(HEADS), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["matched"][0], torch.full((HEADS,), WEIGHT / 2))
    assert found["matched"][1].isnan().all()
    assert torch.equal(found["sink"], torch.ones(2, HEADS)) and torch.equal(found["sink_lead"], torch.ones(2, HEADS))
    torch.testing.assert_close(found["value_norm"], torch.tensor([0.0, 1.0, 3.0]).expand(2, HEADS))


def test_numbers_are_those_of_loops(planted):
    """All measures of single images, heads and queries by their definitions."""
    found, _ = measured(planted)
    for image, (rows, columns) in enumerate(EXTENTS):
        valid = ~planted.key_padding[image]
        for head in range(HEADS):
            weights = planted.decoder_cross[0][image, head][:, valid].numpy()  # [Q,k]
            values = planted.values["decoder_cross"][0][image, head][valid].numpy()
            received = weights.mean(0)
            order = received.argsort()[::-1]
            cells = received.reshape(rows, columns)
            inner, corners = cells[1:-1, 1:-1].sum(), cells[[0, 0, -1, -1], [0, -1, 0, -1]].sum()
            output = weights @ values
            part = sum(weights[query, order[0]] * values[order[0]] @ output[query] for query in range(QUERIES))
            expected = {
                "weight": received[order[0]],
                "second": received[order[1]] / received[order[0]],
                "border": 1 - inner / cells.sum(),
                "corner": corners / cells.sum(),
                "output_share": part / (output * output).sum(),
            }
            for name, value in expected.items():
                assert found[name][image, head].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_a_head_that_broadcasts_is_told_from_one_that_does_nothing(planted):
    found = sinks(planted, "decoder_cross", 0, planted.decoder_cross[0])
    share = dict(zip(MEASURES, found.values.unbind(1), strict=True))["output_share"]
    assert torch.equal(share[:, 0], torch.zeros(2))
    assert ((share[:, 1:] > 0.9) & (share[:, 1:] < 1.1)).all()  # other values may point against the output
    of_site = SinksOfSite(1, HEADS)
    of_site.add([found])
    assert of_site.summary()["does"] == [["nothing", "broadcast", "broadcast"]]
    planted.values["decoder_cross"][0][:] *= 0  # a head that puts out nothing at all: shares of nothing are not known
    found, _ = measured(planted)
    assert found["output_share"].isnan().all() and found["value_norm"].isnan().all()


def test_a_head_without_a_sink_does_neither(planted):
    planted.decoder_cross[0] = (~planted.key_padding)[:, None, None].double().expand(2, HEADS, QUERIES, 20) / 20
    of_site = SinksOfSite(1, HEADS)
    of_site.add([sinks(planted, "decoder_cross", 0, planted.decoder_cross[0])])
    summary = of_site.summary()
    assert summary["does"] == [[None] * HEADS] and summary["sink"]["heads"] == [[0.0] * HEADS]
    assert summary["weight"]["heads"] == [[pytest.approx(1 / 20)] * HEADS]
    # Attention spread evenly has of the border what the border has of the cells.
    assert summary["border"]["mean"] == [pytest.approx(summary["even"]["border"])]
    assert summary["corner"]["mean"] == [pytest.approx(summary["even"]["corner"])]
    assert summary["even"]["weight"] == pytest.approx((1 / 20 + 1 / 12) / 2)


def test_limits_are_those_given(planted):
    """0.7 of 20 and of 12 cells are 14 and 8.4 times the even share."""
    found, _ = measured(planted, limits=Limits(0.71, 10.0, 1.5))
    assert found["sink"].sum() == 0
    assert found["sink_even"].tolist() == [[1.0] * HEADS, [0.0] * HEADS]
    assert found["sink_lead"].sum() == 2 * HEADS
    assert measured(planted, limits=Limits(0.3, 8.0, 1e4))[0]["sink_lead"].sum() == 0


def test_rows_that_sum_to_more_than_one_count_as_shares(planted):
    """As of sigmoid and ReLU: five times the weights change nothing, and there is no mass on a null key."""
    before, _ = measured(planted)
    planted.decoder_cross[0] = 5 * planted.decoder_cross[0]
    after, _ = measured(planted)
    for name in MEASURES:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_empty_rows_weigh_nothing_and_are_no_fault(planted):
    weights = planted.decoder_cross[0]
    weights[0] = 0.0  # all of them of the first image
    weights[1, :, :3] = 0.0
    found, place = measured(planted)
    assert found["weight"][0].tolist() == [0.0] * HEADS and found["null_mass"][0].tolist() == [1.0] * HEADS
    torch.testing.assert_close(found["weight"][1], torch.full((HEADS,), WEIGHT / 2))
    of_site = SinksOfSite(1, HEADS)
    of_site.add([sinks(planted, "decoder_cross", 0, weights)])
    summary = of_site.summary()
    assert summary["weight"]["heads"] == [[pytest.approx(WEIGHT / 4)] * HEADS]
    assert summary["agreement"]["heads"] == [[1.0] * HEADS]  # of the one image that has a best cell
    assert json.loads(json.dumps(summary)) == summary and place["rows"][0].tolist() == [4] * HEADS


def test_magnitudes_count_where_weights_have_signs(planted):
    signs = (random(2, HEADS, QUERIES, 20, seed=5) - 0.5).sign()
    before, _ = measured(planted)
    planted.decoder_cross[0] = planted.decoder_cross[0] * signs
    after, _ = measured(planted)
    for name in set(MEASURES) - {"output_share"}:  # which takes them as they are: values are taken away
        torch.testing.assert_close(after[name], before[name], equal_nan=True)


def test_keys_that_are_queries_have_no_border(planted):
    weights = torch.full((2, HEADS, QUERIES, QUERIES), 0.1)
    weights[..., 4] = 0.5
    maps = AttentionMaps([], [weights], [], GRID, planted.key_padding)
    found = sinks(maps, "decoder_self", 0, weights)
    values = dict(zip(MEASURES, found.values.unbind(1), strict=True))
    assert values["border"].isnan().all() and values["corner"].isnan().all() and values["value_norm"].isnan().all()
    assert values["weight"].tolist() == [[0.5] * HEADS] * 2
    of_site = SinksOfSite(1, HEADS, QUERIES)
    of_site.add([found])
    summary = of_site.summary()
    assert summary["place"][0][0] == [0.5, pytest.approx(4.5 / QUERIES)]
    assert summary["even"] == {"weight": pytest.approx(1 / QUERIES), "border": None, "corner": None}


def test_pooled_tokens_are_keys_and_their_place_is_the_cell_they_hold_most_of():
    kept = Kept(torch.tensor([[1, 6]]), torch.zeros(1, 2, dtype=torch.bool), None)
    share = torch.zeros(1, 1, 8)
    share[0, 0, [0, 3, 7]] = torch.tensor([0.2, 0.5, 0.3])
    polled = Polled(kept, share, torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.bool))
    weights = torch.tensor([0.1, 0.1, 0.8]).expand(1, 1, 4, 3)
    maps = AttentionMaps([], [], [weights], (2, 4), torch.zeros(1, 3, dtype=torch.bool), polled)
    found, place = measured(maps)
    assert found["weight"].item() == pytest.approx(0.8)  # of the token
    assert (place["row"].item(), place["column"].item()) == (0, 3)
    assert found["border"].item() == pytest.approx(1) and found["corner"].item() == pytest.approx(0.8)


# Over a data set


def test_places_agree_where_cells_of_images_of_different_sizes_overlap():
    places = Places(1, 1)
    # The last of 3 x 3 cells, of 4 x 6, the last row's first but one of 40 x 60, and the middle of 3 x 3.
    for row, column, rows, columns in ((2, 2, 3, 3), (3, 5, 4, 6), (39, 58, 40, 60), (1, 1, 3, 3)):
        places.add(torch.tensor([row, column, rows, columns]).view(1, 4, 1, 1), torch.ones(1, 1, 1))
    agreement, place = places.results()
    assert agreement.tolist() == [[0.75]]
    np.testing.assert_allclose(place[0, 0], [1 - 0.5 / 40, 1 - 1.5 / 60], atol=0.5 / 64)


def test_places_of_one_size_are_counted_cell_by_cell():
    generator = torch.Generator().manual_seed(0)
    places, cells = Places(2, 3), torch.randint(0, 5, (40, 2, 2, 3), generator=generator)
    sizes = torch.full_like(cells, 5)
    for part in torch.cat([cells, sizes], 1).split(7):
        places.add(part, torch.ones(len(part), 2, 3))
    agreement, place = places.results()
    for layer, head in np.ndindex(2, 3):
        numbers = cells[:, 0, layer, head] * 5 + cells[:, 1, layer, head]
        counts = numbers.bincount()
        assert agreement[layer, head].item() == pytest.approx(counts.max().item() / 40)
        if (counts == counts.max()).sum() == 1:
            best = counts.argmax().item()
            np.testing.assert_allclose(place[layer, head], [(best // 5 + 0.5) / 5, (best % 5 + 0.5) / 5], atol=0.01)
    assert Places(1, 1).results()[0].isnan().all()


def test_batches_and_processes_add_up(planted):
    weights, values = planted.decoder_cross[0], planted.values["decoder_cross"][0]
    whole, parts = SinksOfSite(1, HEADS), [SinksOfSite(1, HEADS) for _ in range(3)]  # the last sees no image
    whole.add([sinks(planted, "decoder_cross", 0, weights)])
    for image, part in enumerate(parts[:2]):
        one = slice(image, image + 1)
        alone = AttentionMaps(
            [], [], [weights[one]], GRID, planted.key_padding[one], values={"decoder_cross": [values[one]]}
        )
        part.add([sinks(alone, "decoder_cross", 0, weights[one])])
    for gathered, *others in zip(*(part.all for part in parts), strict=True):
        gathered.sums = torch.stack([gathered.sums, *(other.sums for other in others)]).sum(0)
    for together, alone in zip(parts[0].all, whole.all, strict=True):
        torch.testing.assert_close(together.sums, alone.sums, rtol=1e-6, atol=1e-9)
    size = sum(each.sums.numel() for each in whole.all)
    whole.add([sinks(planted, "decoder_cross", 0, weights)])
    assert sum(each.sums.numel() for each in whole.all) == size  # whatever the number of images
