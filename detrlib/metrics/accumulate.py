"""What attention maps are like over a data set: how sparse, whether they look at the object, and where they rest.

Batches stream through in the pass that finds detections; sums are kept, not maps, and a row per image or object goes
to a table on disk if asked for, so that memory does not grow with the data.

Legend: B images, L layers, H heads, Q queries, K keys, n matched pairs of a batch, S selections of queries, M measures.
A head axis of H + 1 holds the mean over heads before the heads.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from detrlib.config import Config, Model
from detrlib.data import Batch
from detrlib.losses.matcher import Match
from detrlib.metrics import localisation, sparsity
from detrlib.metrics.moments import Moments, described
from detrlib.metrics.sinks import MEASURES, PLACE, Limits, Places, Sinks, SinksOfSite, sinks
from detrlib.metrics.tables import Table
from detrlib.models import AttentionMaps, Predictions
from detrlib.models.outputs import Site, cell_side

SITES = get_args(Site)
SELECTIONS = ("all", "matched", "confident")  # of queries; where queries are cells of the image, "all" alone
MEAN_HEAD = -1  # in tables, the mean over heads
LOCATED = (*localisation.MEASURES, "paibb_without_sink")


class AttentionMeasures:
    """Sparsity and sinks of every site, layer, head and image, localisation of every matched query, batch by batch.

    paibb_without_sink is PAIBB of what is left of a row without its head's sink in the image, where it has one (its
    mean weight is above `evaluate.sink_threshold`); heads count in the mean over heads by what is left of them.

    Args:
        cfg: settings of the model, and of `evaluate`.
        folder: where the tables of single images (`sparsity`, `sinks`) and objects (`located`) go; None: nowhere.
        process, processes: which of the processes that share the data this one is.
        sites: those measured beside decoder_cross; None: as `evaluate.sites` says. A model must be asked for the maps
            of `self.sites`.
    """

    def __init__(
        self,
        cfg: Config,
        folder: Path | None = None,
        process: int = 0,
        processes: int = 1,
        sites: Collection[str] | None = None,
    ):
        self.cfg, self.settings = cfg, cfg.evaluate
        self.sites = _sites(cfg, sites)
        model, measures, layers = cfg.model, len(sparsity.MEASURES), {site: _layers(cfg.model, site) for site in SITES}
        heads = model.num_heads
        self.sparse = {site: Moments(len(_selections(site)), measures, layers[site], heads + 1) for site in self.sites}
        self.sinks = {
            site: SinksOfSite(layers[site], heads, model.num_queries if site == "decoder_self" else None)
            for site in self.sites
        }
        self.limits = Limits(*(getattr(cfg.evaluate, f"sink_{name}") for name in Limits._fields))
        shape = len(LOCATED), model.decoder_layers, heads + 1
        self.located = {size: Moments(*shape) for size in ("all", *localisation.SIZES)}
        self.tables = _open_tables(folder, self.sites, process, processes) if folder else ()

    def add(self, predictions: Predictions, batch: Batch, indices: list[Match]) -> None:
        """Measure one batch whose predictions hold maps; indices as `match` returns them."""
        maps, scores = predictions.attention, predictions.class_scores().amax(-1)  # [B,Q]
        images = np.array([target["image_id"] for target in batch.targets])
        queries = _flat(indices, 0)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[queries] = True
        chosen = torch.stack([torch.ones_like(chosen), chosen, scores > self.settings.confident_score], 1)  # [B,S,Q]
        looks, without = [], []
        for site in self.sites:
            if (padding := maps.padding_at(site)) is None:
                padding = scores.new_zeros(len(scores), math.prod(maps.grid_at(site)), dtype=torch.bool)
            key_valid = ~padding
            rows = key_valid[:, None] if site == "encoder_self" else chosen  # rows of padding do not count
            valid = None if site == "decoder_self" or self.settings.count_padding else key_valid[:, None, None]
            measured, resting = [], []
            for layer, weights in enumerate(getattr(maps, site)):  # [B,H,Q,K]
                measured.append(self._measure(weights, valid, rows))
                counted = rows[:, 0], None if site == "encoder_self" else rows[:, 1]
                resting.append(sinks(maps, site, layer, weights, *counted, self.limits))
                if site == "decoder_cross":
                    cells = weights if maps.polled is None else maps.polled.on_cells(weights)
                    looks.append(cells[queries[0], :, queries[1]].abs())  # [n,H,K], of weights with signs too
                    without.append(resting[-1].left(looks[-1], queries[0], maps.grid))
            self._add_sparsity(site, torch.stack(measured, 3).cpu(), images)
            self._add_sinks(site, resting, images)
        if len(queries[0]):
            looks = torch.stack([torch.stack(layers, 1) for layers in (looks, without)])
            self._add_located(looks, scores[queries], maps, batch, indices, images)

    def _measure(self, weights: Tensor, valid: Tensor | None, chosen: Tensor) -> Tensor:
        """Means [B,S,M,H] over chosen rows [B,S,Q] of one layer's weights [B,H,Q,K]; NaN where none is chosen.

        Those of shape are over rows that have weight.
        """
        measures = sparsity.sparsity(weights, valid, self.settings.zero_threshold, self.settings.zero_share)
        values = torch.stack([measures[name] for name in sparsity.MEASURES], 1)  # [B,M,H,Q]
        chosen = chosen.to(values)
        sums = torch.einsum("bmhq,bsq->bsmh", values, chosen)
        counts = chosen.sum(-1)[..., None, None].expand_as(sums).clone()
        empty = sums[:, :, sparsity.MEASURES.index("empty")]
        for name in sparsity.OF_SHAPE:  # zero in empty rows, so that sums are those of the others
            counts[:, :, sparsity.MEASURES.index(name)] -= empty
        return sums / counts

    def _add_sparsity(self, site: str, values: Tensor, images: np.ndarray) -> None:
        """values [B,S,M,L,H]."""
        self.sparse[site].add(torch.cat([values.nanmean(-1, keepdim=True), values], -1))
        if not self.tables:
            return
        values = values.movedim(2, -1).numpy()  # [B,S,L,H,M]
        rows = values.reshape(-1, values.shape[-1])
        known = ~np.isnan(rows[:, -1])  # images may have no matched or confident query
        image, selection, layer, head = np.indices(values.shape[:-1]).reshape(4, -1)[:, known]
        columns = {"image_id": images[image], "site": np.full(len(image), self.sites.index(site)), "layer": layer}
        columns |= {"head": head, "queries": selection}
        self.tables[0].add(columns | dict(zip(sparsity.MEASURES, rows[known].T, strict=True)))

    def _add_sinks(self, site: str, found: list[Sinks], images: np.ndarray) -> None:
        """Sinks of all layers."""
        values, places = self.sinks[site].add(found)  # [B,M,L,H], [B,4,L,H]
        if not self.tables:
            return
        image, layer, head = np.indices((len(values), *values.shape[2:])).reshape(3, -1)
        columns = {"image_id": images[image], "site": np.full(len(image), self.sites.index(site)), "layer": layer}
        numbers = torch.cat([values, places], 1).movedim(1, -1).flatten(0, -2).T.numpy()
        self.tables[2].add(columns | {"head": head} | dict(zip((*MEASURES, *PLACE), numbers, strict=True)))

    def _add_located(
        self, looks: Tensor, scores: Tensor, maps: AttentionMaps, batch: Batch, indices: list[Match], images: np.ndarray
    ) -> None:
        """looks [2,n,L,H,K], maps of matched queries as they are and without sinks, and their scores [n]."""
        image, index = _flat(indices, 1)
        boxes, labels = (
            torch.cat([target[name][i] for target, (_, i) in zip(batch.targets, indices, strict=True)])
            for name in ("boxes", "labels")
        )
        sizes, originals = (
            torch.stack([target[name] for target in batch.targets])[image] for name in ("size", "original_size")
        )
        extents = sizes.double() / cell_side(batch.pixels.shape[-2:], maps.grid)
        looks = torch.cat([looks.mean(3, keepdim=True), looks], 3).unflatten(-1, maps.grid)  # [2,n,L,H+1,h,w]
        where = boxes, extents, self.settings.paibb, originals
        measures = localisation.locate(looks[0], *where)
        left = measures["paibb"] if torch.equal(*looks) else localisation.paibb(looks[1], *where)
        measures["paibb_without_sink"] = left
        values = torch.stack([measures[name] for name in LOCATED], 1).cpu()  # [n,M,L,H+1]
        areas = (boxes[:, 2:].double() * originals.flip(1)).prod(-1).cpu()  # pixels of the file
        size = (areas >= localisation.SMALL).int() + (areas > localisation.LARGE)
        self.located["all"].add(values)
        for number, name in enumerate(localisation.SIZES):
            self.located[name].add(values[size == number])
        if self.tables:
            of_pair = {"object": index, "label": labels, "area": areas, "size": size, "score": scores.float()}
            of_pair = {"image_id": images[image.cpu().numpy()]} | {k: v.cpu().numpy() for k, v in of_pair.items()}
            pair, layer, head = np.indices((len(values), *values.shape[2:])).reshape(3, -1)
            columns = {name: column[pair] for name, column in of_pair.items()}
            columns |= {"layer": layer, "head": head + MEAN_HEAD}
            rows = values.movedim(1, -1).flatten(0, -2).T.numpy()
            self.tables[1].add(columns | dict(zip(LOCATED, rows, strict=True)))

    def close(self) -> list[Tensor]:
        """Let the tables of this process appear under their names; its `sums`."""
        for table in self.tables:
            table.close()
        return self.sums()

    def merge(self, sums: list[list[Tensor]], tables: bool = True) -> None:
        """Take over the `sums` of all processes, this one included; tables: of one that removes earlier tables."""
        for moments, parts in zip(self._moments(), zip(*sums, strict=True), strict=True):
            moments.sums = torch.stack(parts).sum(0)
        for table in self.tables if tables else ():
            table.remove_earlier()

    def sums(self) -> list[Tensor]:
        """All that this process has gathered."""
        return [moments.sums for moments in self._moments()]

    def _moments(self) -> list[Moments | Places]:
        return [*self.sparse.values(), *self.located.values(), *(m for site in self.sinks.values() for m in site.all)]

    def summary(self, learned: dict[str, list[float]]) -> dict:
        """What results.json holds of attention; learned: alphas [H] by module, such as "decoder_cross.0".

        attention     site -> measure -> [L]: means over images of means over heads and all queries
        sparsity      site -> "alpha" in effect [L][H], and selection -> "images" and measure -> mean, std, heads
        paibb         size -> mean over pairs in the last layer, of the mean over heads; "without_sink": of all sizes,
                      without sinks; "pairs": their number
        localisation  size -> "pairs" and measure -> mean, std, heads
        sinks         site -> as of `SinksOfSite.summary`
        with mean and std [L] over images or pairs of the mean over heads, and heads [L][H] the mean of each.
        """
        attention, sparse, located = {}, {}, {}
        for site, moments in self.sparse.items():
            count, mean, std = moments.results()  # [S,M,L,H+1]
            sparse[site] = {"alpha": alphas_in_effect(self.cfg.model, site, learned)}
            for number, selection in enumerate(_selections(site)):
                measures = described(sparsity.MEASURES, mean[number], std[number])
                sparse[site][selection] = {"images": int(count[number].max())} | measures
            attention[site] = {name: sparse[site]["all"][name]["mean"] for name in sparsity.MEASURES}
        for size, moments in self.located.items():
            count, mean, std = moments.results()  # [M,L,H+1]
            located[size] = {"pairs": int(count.max())} | described(LOCATED, mean, std)
        last = {size: values["paibb"]["mean"][-1] for size, values in located.items()}
        paibb = last | {
            "without_sink": located["all"]["paibb_without_sink"]["mean"][-1],
            "pairs": located["all"]["pairs"],
        }
        resting = {site: of_site.summary() for site, of_site in self.sinks.items()}
        return {"attention": attention, "sparsity": sparse, "paibb": paibb, "localisation": located, "sinks": resting}


def alphas_in_effect(settings: Model, site: str, learned: dict[str, list[float]]) -> list[list[float]] | None:
    """The alpha of entmax that every layer and head of a site works with, [L][H].

    None for other transforms, such as tvmax, and for learned ones that an intervention has replaced. learned: values
    [H] by module, such as "decoder_cross.0", of the transforms that learn theirs.
    """
    name = settings.transform_at(site)
    layers = range(_layers(settings, site))
    if name == "alpha_entmax":
        modules = [f"{site}.{layer}" for layer in layers]
        return [learned[module] for module in modules] if set(modules) <= set(learned) else None
    # Deformable attention is a softmax over its samples.
    alpha = 1.0 if name == "deformable" else settings.alpha_at(site)
    return None if alpha is None else [[alpha] * settings.num_heads for _ in layers]


def _sites(cfg: Config, sites: Collection[str] | None) -> list[str]:
    """The sites that are measured: those named, or what the settings say, and decoder_cross."""
    model = cfg.model
    if sites is None and cfg.evaluate.sites != "auto":
        sites = [site for site in cfg.evaluate.sites if model.scores_keys(site)]
    elif sites is None:  # where sparsity is a question; maps of the encoder are large
        sites = [site for site in SITES if model.scores_keys(site) and model.transform_at(site) != "softmax"]
    return [site for site in SITES if (site in sites and _layers(model, site)) or site == "decoder_cross"]


def _open_tables(folder: Path, sites: list[str], process: int, processes: int) -> tuple[Table, ...]:
    """sparsity: a row for each image, site, layer, head and selection; located: for each object, layer and head;
    sinks: for each image, site, layer and head.
    """
    position = {"layer": "int16", "head": "int16"}
    sparse = {"image_id": "int64", "site": "", **position, "queries": "", **dict.fromkeys(sparsity.MEASURES, "float32")}
    words = {"site": sites, "queries": list(SELECTIONS)}
    of_object = {"image_id": "int64", "object": "int32", "label": "int32", "area": "float32", "size": ""}
    located = {**of_object, "score": "float32", **position, **dict.fromkeys(LOCATED, "float32")}
    resting = {"image_id": "int64", "site": "", **position, **dict.fromkeys(MEASURES, "float32")}
    resting |= dict.fromkeys(PLACE, "int32")
    return (
        Table(folder / "sparsity", sparse, words, process, processes),
        Table(folder / "located", located, {"size": list(localisation.SIZES)}, process, processes),
        Table(folder / "sinks", resting, {"site": sites}, process, processes),
    )


def _selections(site: str) -> tuple[str, ...]:
    return SELECTIONS[:1] if site == "encoder_self" else SELECTIONS


def _layers(settings: Model, site: str) -> int:
    return settings.encoder_layers if site == "encoder_self" else settings.decoder_layers


def _flat(indices: list[Match], side: int) -> tuple[Tensor, Tensor]:
    """Image numbers and one side of the indices (0 queries, 1 targets) of all images in a row, [n] and [n]."""
    index = torch.cat([both[side] for both in indices])
    counts = torch.tensor([len(both[side]) for both in indices], device=index.device)
    return torch.arange(len(indices), device=index.device).repeat_interleave(counts, output_size=len(index)), index
