"""What attention maps are like over a data set: how sparse, whether they look at the object, and where they rest.

Batches stream through in the pass that finds detections; sums are kept, not maps, and a row per image or object goes
to a table on disk if asked for, so that memory does not grow with the data.

Legend: B images, L layers, H heads, Q queries, K keys, n matched pairs of a batch, S selections of queries, M measures.
A head axis of H + 1 holds the mean over heads before the heads.
"""

import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detrlib.config import Config, Model
from detrlib.data import Batch
from detrlib.losses.matcher import Match
from detrlib.metrics import localisation, sparsity
from detrlib.metrics.moments import Moments, described
from detrlib.metrics.tables import Table
from detrlib.models import AttentionMaps, Predictions
from detrlib.models.outputs import cell_side

SELECTIONS = ("all", "matched", "confident")  # of queries; where queries are cells of the image, "all" alone
MEAN_HEAD = -1  # in tables, the mean over heads


class AttentionMeasures:
    """Sparsity of every site, layer, head and image, and localisation of every matched query, batch by batch.

    Args:
        cfg: settings of the model, and of `evaluate`.
        folder: where the tables of single images (`sparsity`) and objects (`located`) go; None: nowhere.
        process, processes: which of the processes that share the data this one is.
        sites: those measured beside decoder_cross; None: those where sparsity is a question, because the transform is
            not softmax. A model must be asked for the maps of `self.sites`.
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
        selfs = ("encoder_self", "decoder_self")
        if sites is None:  # maps of the encoder are large
            model = cfg.model
            sites = [site for site in selfs if model.scores_keys(site) and model.transform_at(site) != "softmax"]
        self.sites = [*(site for site in selfs if site in sites), "decoder_cross"]
        model, measures = cfg.model, len(sparsity.MEASURES)
        heads = model.num_heads + 1
        self.sparse = {
            site: Moments(len(_selections(site)), measures, _layers(model, site), heads) for site in self.sites
        }
        shape = len(localisation.MEASURES), model.decoder_layers, heads
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
        looks = []
        for site in self.sites:
            if (padding := maps.padding_at(site)) is None:
                padding = scores.new_zeros(len(scores), math.prod(maps.grid_at(site)), dtype=torch.bool)
            key_valid = ~padding
            rows = key_valid[:, None] if site == "encoder_self" else chosen  # rows of padding do not count
            valid = None if site == "decoder_self" or self.settings.count_padding else key_valid[:, None, None]
            measured = []
            for weights in getattr(maps, site):  # [B,H,Q,K]
                measured.append(self._measure(weights, valid, rows))
                if site == "decoder_cross":
                    cells = weights if maps.polled is None else maps.polled.on_cells(weights)
                    looks.append(cells[queries[0], :, queries[1]].abs())  # [n,H,K], of weights with signs too
            self._add_sparsity(site, torch.stack(measured, 3).cpu(), images)
        if len(queries[0]):
            self._add_located(torch.stack(looks, 1), scores[queries], maps, batch, indices, images)

    def _measure(self, weights: Tensor, valid: Tensor | None, chosen: Tensor) -> Tensor:
        """Means [B,S,M,H] over chosen rows [B,S,Q] of one layer's weights [B,H,Q,K]; NaN where none is chosen."""
        measures = sparsity.sparsity(weights, valid, self.settings.zero_threshold, self.settings.zero_share)
        values = torch.stack([measures[name] for name in sparsity.MEASURES], 1)  # [B,M,H,Q]
        chosen = chosen.to(values)
        means = torch.einsum("bmhq,bsq->bsmh", values, chosen)
        return means / chosen.sum(-1)[..., None, None]

    def _add_sparsity(self, site: str, values: Tensor, images: np.ndarray) -> None:
        """values [B,S,M,L,H]."""
        self.sparse[site].add(torch.cat([values.mean(-1, keepdim=True), values], -1))
        if not self.tables:
            return
        values = values.movedim(2, -1).numpy()  # [B,S,L,H,M]
        rows = values.reshape(-1, values.shape[-1])
        known = ~np.isnan(rows[:, 0])  # images may have no matched or confident query
        image, selection, layer, head = np.indices(values.shape[:-1]).reshape(4, -1)[:, known]
        columns = {"image_id": images[image], "site": np.full(len(image), self.sites.index(site)), "layer": layer}
        columns |= {"head": head, "queries": selection}
        self.tables[0].add(columns | dict(zip(sparsity.MEASURES, rows[known].T, strict=True)))

    def _add_located(
        self, looks: Tensor, scores: Tensor, maps: AttentionMaps, batch: Batch, indices: list[Match], images: np.ndarray
    ) -> None:
        """looks [n,L,H,K], the maps, and scores [n] of the matched queries."""
        image, index = _flat(indices, 1)
        boxes, labels = (
            torch.cat([target[name][i] for target, (_, i) in zip(batch.targets, indices, strict=True)])
            for name in ("boxes", "labels")
        )
        sizes, originals = (
            torch.stack([target[name] for target in batch.targets])[image] for name in ("size", "original_size")
        )
        extents = sizes.double() / cell_side(batch.pixels.shape[-2:], maps.grid)
        looks = torch.cat([looks.mean(2, keepdim=True), looks], 2).unflatten(-1, maps.grid)  # [n,L,H+1,h,w]
        measures = localisation.locate(looks, boxes, extents, self.settings.paibb, originals)
        values = torch.stack([measures[name] for name in localisation.MEASURES], 1).cpu()  # [n,M,L,H+1]
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
            self.tables[1].add(columns | dict(zip(localisation.MEASURES, rows, strict=True)))

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

    def _moments(self) -> list[Moments]:
        return [*self.sparse.values(), *self.located.values()]

    def summary(self, learned: dict[str, list[float]]) -> dict:
        """What results.json holds of attention; learned: alphas [H] by module, such as "decoder_cross.0".

        attention     site -> measure -> [L]: means over images of means over heads and all queries
        sparsity      site -> "alpha" in effect [L][H], and selection -> "images" and measure -> mean, std, heads
        paibb         size -> mean over pairs in the last layer, of the mean over heads; "pairs": their number
        localisation  size -> "pairs" and measure -> mean, std, heads
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
            located[size] = {"pairs": int(count.max())} | described(localisation.MEASURES, mean, std)
        last = {size: values["paibb"]["mean"][-1] for size, values in located.items()}
        paibb = last | {"pairs": located["all"]["pairs"]}
        return {"attention": attention, "sparsity": sparse, "paibb": paibb, "localisation": located}


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
    known = {"softmax": 1.0, "deformable": 1.0, "entmax15": 1.5, "sparsemax": 2.0, "entmax": settings.attention.alpha}
    return [[known[name]] * settings.num_heads for _ in layers] if name in known else None


def _open_tables(folder: Path, sites: list[str], process: int, processes: int) -> tuple[Table, Table]:
    """sparsity: a row for each image, site, layer, head and selection; located: for each object, layer and head."""
    position = {"layer": "int16", "head": "int16"}
    sparse = {"image_id": "int64", "site": "", **position, "queries": "", **dict.fromkeys(sparsity.MEASURES, "float32")}
    words = {"site": sites, "queries": list(SELECTIONS)}
    of_object = {"image_id": "int64", "object": "int32", "label": "int32", "area": "float32", "size": ""}
    located = {**of_object, "score": "float32", **position, **dict.fromkeys(localisation.MEASURES, "float32")}
    return (
        Table(folder / "sparsity", sparse, words, process, processes),
        Table(folder / "located", located, {"size": list(localisation.SIZES)}, process, processes),
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
