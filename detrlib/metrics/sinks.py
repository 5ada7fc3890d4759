"""Attention sinks: the one key on which a head rests whatever it is asked, and what comes of it.

For a layer and a head, p_qk are the weights of an image, v_k the values, o_q = sum_k p_qk v_k what the head puts out.

    received  r_k = mean over queries of p_qk; the sink is the key of the largest (Gu et al. 2024, arXiv 2410.10781,
              Sec. 3: a sink where r_k > 0.3). Rows that sum to one or less count as they are; those that sum to more,
              as sigmoid's and ReLU's may, are divided by their sum; of signed weights magnitudes count
    value     |v_s| over the mean of the other keys' |v_k| (Fesser et al. 2026, arXiv 2606.08105): up to 0.2 the head
              rests on it to do nothing, from 0.5 on it gives all queries the same, which they call broadcast
    output    sum_q <p_qs v_s, o_q> / sum_q <o_q, o_q>: the projection on the output, one for all keys together
              (Cunningham & Cirone 2026, arXiv 2606.07604), queries counted by the size of their output: in a head
              that does nothing for most, shares of next to nothing would drown the others

What keys are depends on the site. encoder_self and decoder_cross: cells of the image, or kept cells and pooled tokens,
whose place is that of the cell with most of their weight. decoder_self: queries, which have numbers, and neither border
nor corner. Where points are sampled: cells of the finest level, of no value: values are interpolated from all levels.

Legend: B images, L layers, H heads, Q queries, K keys, h x w cells, D channels of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from detrlib.metrics.moments import Moments, described, plain
from detrlib.models import AttentionMaps
from detrlib.models.outputs import Site

MEASURES = (
    *("weight", "second", "sink", "sink_even", "sink_lead", "border", "corner"),
    *("value_norm", "output_share", "matched", "null_mass"),
)
POINTS = 64  # along either side of an image: where it is asked which of its cells are sinks
NOTHING, BROADCAST = 0.2, 0.5  # of `value_norm`, by Fesser et al.
RESTS = 0.5  # share of images in which a head has a sink: from here on it is called a head that rests
AGREED = 0.5  # share of images with the same best cell: from here on that is one place
PLACE = ("row", "column", "rows", "columns")
EVEN = ("weight", "border", "corner")


class Limits(NamedTuple):
    """From where on the best key is called a sink: `evaluate.sink_threshold`, `sink_even`, `sink_lead`."""

    threshold: float = 0.3
    even: float = 10.0
    lead: float = 2.0


LIMITS = Limits()


class Sinks(NamedTuple):
    """What `sinks` measures of the heads of one layer."""

    values: Tensor  # [B,M,H] of the MEASURES
    key: Tensor  # [B,H] the best key
    place: Tensor  # [B,4,H] PLACE: row and column of the best cell, rows and columns of cells of the image

    def left(self, looks: Tensor, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps [n,H,K] over the cells of a grid, of images [n], without the sinks of those heads that have one."""
        row, column = self.place[image, 0], self.place[image, 1]  # [n,H]
        cell = (row * grid[1] + column)[..., None]
        resting = self.values[image, MEASURES.index("sink")] > 0
        return looks.scatter(-1, cell, looks.gather(-1, cell) * ~resting[..., None])


def sinks(
    maps: AttentionMaps,
    site: Site,
    layer: int,
    weights: Tensor,
    rows: Tensor | None = None,
    matched: Tensor | None = None,
    limits: Limits = LIMITS,
) -> Sinks:
    """Measure the sinks of one layer.

    Args:
        maps: of the model, for values, grids and padding.
        site, layer: of the weights.
        weights: [B,H,Q,K], `getattr(maps, site)[layer]`, which deformable attention computes each time it is asked.
        rows: [B,Q], True for queries that count; None: all.
        matched: [B,Q], True for queries that are matched to objects.
        limits: from where on the best key is a sink.

    Returns:
        For every image and head these MEASURES, NaN for what is not known or does not exist:

        weight        of the best key, mean over queries
        second        that of the second best, over it: 0 to 1
        sink          1 where weight > limits.threshold, else 0: in the mean, the share of images with a sink
        sink_even     1 where weight > limits.even / K of K valid keys, else 0. Attention spread evenly gives 1 / K; if
                      each query looks at one key by chance, 10 / K is met in 4 of 100 images with 25 queries and 64
                      keys, in none with as many queries as keys, but in nearly all with 100 queries and 850 keys:
                      where queries are few, `agreement` over images must say whether it is a sink
        sink_lead     1 where weight > limits.lead times the second best, else 0
        border, corner    share of all weight on cells of the border of the image and, of these, in its corners
        value_norm, output_share    see above
        matched       weight of the same key, mean over matched queries: less than `weight` where queries without
                      an object rest on it
        null_mass     mean of what rows lack to one: weight of the null key, of registers, beyond the image; where
                      weights are signed, what two maps of a head cancel; of budget, sigmoid and ReLU, whose rows need
                      not sum to one, no weight of a null key
    """
    images, _, queries, keys = weights.shape
    rows = weights.new_ones(images, queries) if rows is None else rows.to(weights)
    valid = _valid_keys(maps, site, weights)  # [B,K]
    size = weights.abs()  # [B,H,Q,K]
    by_key, total, counted = received(size, rows, valid)
    best, index = by_key.topk(min(2, keys), -1)
    weight, key = best[..., 0], index[..., 0]
    second = best[..., 1] if keys > 1 else torch.zeros_like(weight)
    column = size.gather(-1, key[..., None, None].expand(-1, -1, queries, 1))[..., 0]  # [B,H,Q]
    border, corner, place = _on_grid(maps, site, by_key)
    value_norm, output_share = _of_values(maps, site, layer, weights, valid, key, rows)
    measured = {
        "weight": weight,
        "second": second / weight,
        "sink": weight > limits.threshold,
        "sink_even": weight * valid.sum(-1, keepdim=True) > limits.even,
        "sink_lead": weight > limits.lead * second,
        "border": border,
        "corner": corner,
        "value_norm": value_norm,
        "output_share": output_share,
        "matched": _mean(column / total.clamp(min=1), matched),
        "null_mass": (counted * (1 - total).clamp(min=0)).sum(-1),
    }
    values = torch.stack([measured[name].to(weights.dtype) for name in MEASURES], 1)
    return Sinks(values.float(), key, place)


def received(size: Tensor, rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What every key receives, [B,H,K]: the mean over queries of magnitudes of weights [B,H,Q,K]; the sink is the best.

    rows [B,Q] and valid [B,K] are 1 for queries and keys that count, else 0. With it come the sum of every row,
    [B,H,Q], and how much each row counts, [B,1,Q].
    """
    total = (size @ valid[:, None, :, None])[..., 0]  # [B,H,Q]
    counted = rows[:, None] / rows.sum(-1)[:, None, None]  # [B,1,Q], sums to one
    return ((counted / total.clamp(min=1))[:, :, None] @ size)[:, :, 0] * valid[:, None], total, counted


def _valid_keys(maps: AttentionMaps, site: Site, weights: Tensor) -> Tensor:
    """[B,K], 1 for keys that are no padding, 0 for those that are."""
    padding = None if site == "decoder_self" else maps.padding_at(site)
    return weights.new_ones(len(weights), weights.shape[-1]) if padding is None else (~padding).to(weights.dtype)


def _of_values(
    maps: AttentionMaps, site: Site, layer: int, weights: Tensor, valid: Tensor, key: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """[B,H] norm of the value of a key over the mean of the others', and its share of the output."""
    mixed = maps.mixed(site, layer)  # [B,H,Q,D]
    if mixed is None:
        return (torch.full(key.shape, torch.nan, device=key.device),) * 2
    values, mixed = maps.values[site][layer].float(), mixed.float()
    norms = values.norm(dim=-1) * valid[:, None]  # [B,H,K]
    own = norms.gather(-1, key[..., None])[..., 0]
    others = (norms.sum(-1) - own) / (valid.sum(-1, keepdim=True) - 1)
    value = values.gather(2, key[..., None, None].expand(-1, -1, 1, values.shape[-1]))  # [B,H,1,D]
    column = weights.gather(-1, key[..., None, None].expand(-1, -1, weights.shape[2], 1))  # [B,H,Q,1], signed
    part = (column * value * mixed).sum(-1)  # [B,H,Q]
    rows = rows[:, None]
    return own / others, (rows * part).sum(-1) / (rows * mixed.square().sum(-1)).sum(-1)


def _on_grid(maps: AttentionMaps, site: Site, received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B,H] shares on the border and in the corners, [B,4,H] the place of the best cell; received [B,H,K]."""
    if site == "decoder_self":
        number, unknown = received.argmax(-1), torch.full(received.shape[:2], torch.nan, device=received.device)
        place = [torch.zeros_like(number), number, torch.ones_like(number), torch.full_like(number, received.shape[-1])]
        return unknown, unknown, torch.stack(place, 1)
    if maps.polled is not None:
        received = maps.polled.on_cells(received[:, :, None])[:, :, 0]
    grid, extents = maps.grid_at(site), valid_extents(maps, site, len(received)).to(received.device)
    ends = [torch.arange(n, device=received.device) for n in grid]
    rows, columns = (((at == 0) | (at == extents[:, axis, None] - 1)) for axis, at in enumerate(ends))  # [B,h], [B,w]
    border, corner = (rows[:, :, None] | columns[:, None]), (rows[:, :, None] & columns[:, None])
    on = (torch.einsum("bhk,bk->bh", received, mask.flatten(1).to(received)) for mask in (border, corner))
    best, total = received.argmax(-1), received.sum(-1)
    place = [best // grid[1], best % grid[1], *extents.T[..., None].expand(2, *best.shape)]
    return *(part / total for part in on), torch.stack(place, 1)


def valid_extents(maps: AttentionMaps, site: Site, images: int) -> Tensor:
    """[B,2], rows and columns of the grid of a site that belong to each image."""
    grid = maps.grid_at(site)
    padding = maps.padding_at(site) if maps.polled is None else maps.polled.cell_padding
    if padding is None:
        return torch.tensor(grid).expand(images, 2)
    valid = ~padding.unflatten(-1, grid)
    return torch.stack([valid[:, :, 0].sum(1), valid[:, 0].sum(1)], 1)


def _mean(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Means [B,H] of values [B,H,Q] over chosen queries [B,Q]; NaN where none is."""
    if chosen is None:
        return torch.full(values.shape[:2], torch.nan, device=values.device)
    chosen = chosen[:, None].to(values)
    return (values * chosen).sum(-1) / chosen.sum(-1)


class SinksOfSite:
    """Sinks of all layers and heads of a site, batch by batch.

    Args:
        layers, heads: how many there are.
        queries: of decoder_self, whose keys they are; None: keys are cells.
    """

    def __init__(self, layers: int, heads: int, queries: int | None = None):
        self.moments = Moments(len(MEASURES), layers, heads + 1)
        self.even = Moments(len(EVEN))  # what attention spread evenly would have
        self.places = Places(layers, heads, queries)

    def add(self, found: list[Sinks]) -> tuple[Tensor, Tensor]:
        """Take the sinks of all layers in a batch; returns them on the CPU: [B,M,L,H] measures, [B,4,L,H] PLACE."""
        values = torch.stack([layer.values for layer in found], 2).cpu()
        places = torch.stack([layer.place for layer in found], 2).cpu()
        self.moments.add(torch.cat([values.nanmean(-1, keepdim=True), values], -1))
        self.places.add(places, values[:, MEASURES.index("weight")])
        rows, columns = places[:, 2:, 0, 0].double().unbind(1)
        inner, ends = (rows - 2).clamp(min=0) * (columns - 2).clamp(min=0), rows.clamp(max=2) * columns.clamp(max=2)
        even = torch.stack([torch.ones_like(rows), rows * columns - inner, ends], 1) / (rows * columns)[:, None]
        self.even.add(even if self.places.of_cells else even.where(torch.tensor([True, False, False]), torch.nan))
        return values, places

    @property
    def all(self) -> list["Moments | Places"]:
        """What is gathered, each with its `sums`, which add up over processes."""
        return [self.moments, self.even, self.places]

    def summary(self) -> dict:
        """What results.json holds of the site.

        even: what attention spread evenly would have of weight, border and corner. Each of the MEASURES: mean and std
        over images [L] of the mean over heads, and the mean of each head, heads [L][H]. agreement: heads [L][H], the
        largest share of images whose best cells cover one point, and mean [L] over heads; place [L][H]: that point,
        (y, x) in 0..1 of the image. does [L][H]: what a head does that has a sink in at least half of the images, by
        the norm of its value: "nothing", "broadcast", or "unclear" between the two; None without a sink, or values.
        """
        _, mean, std = self.moments.results()
        agreement, place = self.places.results()
        sink, norm = (mean[MEASURES.index(name), :, 1:] for name in ("sink", "value_norm"))
        names = [[_does(*head) for head in zip(*layer, strict=True)] for layer in zip(sink, norm, strict=True)]
        return {
            "even": dict(zip(EVEN, plain(self.even.results()[1]), strict=True)),
            **described(MEASURES, mean, std),
            "agreement": {"mean": plain(agreement.nanmean(1)), "heads": plain(agreement)},
            "place": [[point if None not in point else None for point in layer] for layer in plain(place)],
            "does": names,
        }


def _does(sink: Tensor, norm: Tensor) -> str | None:
    """What a head does, given its share of images with a sink and the relative norm of the sink's value."""
    if sink < RESTS or norm.isnan():
        return None
    return "nothing" if norm <= NOTHING else "broadcast" if norm >= BROADCAST else "unclear"


class Places:
    """Where the best keys of images are, in sum: so much memory for any number of images.

    Places are compared relative to the image: at each of POINTS x POINTS points of it stands the number of images whose
    best cell covers the point. Images of one size agree where the cell is the same; of several, where cells overlap.
    Where keys are queries, `queries` of them, points are their numbers.
    """

    def __init__(self, layers: int, heads: int, queries: int | None = None):
        self.of_cells = queries is None
        self.shape = (layers, heads, *((POINTS, POINTS) if self.of_cells else (1, queries)))
        self.sums = torch.zeros(layers, heads, self.shape[2] * self.shape[3] + 1, dtype=torch.float64)  # and of images

    def add(self, places: Tensor, weights: Tensor) -> None:
        """places [B,4,L,H] as PLACE, of best keys whose `weights` [B,L,H] are above zero."""
        there = (weights > 0).double()
        rows = _covered(places[:, 0], places[:, 2], self.shape[2]).double() * there[..., None]
        columns = _covered(places[:, 1], places[:, 3], self.shape[3]).double()
        self.sums[..., :-1] += torch.einsum("blhr,blhc->lhrc", rows, columns).flatten(2)
        self.sums[..., -1] += there.sum(0)

    def shares(self) -> Tensor:
        """[L,H,n,n] shares of images whose best cell covers each point; NaN without images."""
        return self.sums[..., :-1].unflatten(-1, self.shape[2:]) / self.sums[..., -1, None, None]

    def results(self) -> tuple[Tensor, Tensor]:
        """agreement [L,H], the largest share of images whose best cells cover one point, and this point [L,H,2].

        A point is (y, x) in 0..1 of the image; the middle of those that as many cells cover, from the first on. NaN
        without images.
        """
        counts = self.sums[..., :-1].unflatten(-1, self.shape[2:])
        most, images = counts.amax((-2, -1)), self.sums[..., -1]
        points = torch.full((*most.shape, 2), torch.nan, dtype=torch.float64)
        for layer, head in images.nonzero().tolist():
            best = counts[layer, head] == most[layer, head]
            row, column = best.nonzero()[0].tolist()
            lengths = [int(line.cumprod(0).sum()) for line in (best[row:, column].int(), best[row, column:].int())]
            middle = torch.tensor([row, column]) + torch.tensor(lengths) / 2
            points[layer, head] = middle / torch.tensor(self.shape[2:])
        return most / images, points


def _covered(index: Tensor, count: Tensor, points: int) -> Tensor:
    """[..., points], True at points on the line 0..1 that belong to the part number `index` of `count` equal ones.

    A part that is too short for any point has the one nearest to its middle.
    """
    index, count = index[..., None].double(), count[..., None].double()
    at = torch.arange(points, device=index.device, dtype=torch.float64)
    line = (at + 0.5) * count / points
    nearest = ((index + 0.5) / count * points).floor() == at
    return ((line >= index) & (line < index + 1)) | nearest
