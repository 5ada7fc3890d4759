"""Attention maps on disk, sparse and image by image: <run>/maps/part-*.parquet, one part per process.

One row per map, that is per (image_id, site, layer, head, query), with its cells that are not zero:

    indices   where, ascending: row * w + column of the image's key grid (h, w); null: all cells in order, stored
              densely because that is smaller
    weights   float16, one for each index; signed where attention is differential

Shapes, extents and row groups of the images stand under `detrlib` in the metadata of the file. Only the valid part of a
grid is stored, no padding. Rows of one image and site lie together, in order, in a row group of their own (of large
maps: one for each layer), which is all that is read for them. (A parquet filter reads no more either, but looks at the
statistics of all row groups each time: 0.8 s for the 30,000 of COCO's validation images, against 1 ms.) Any reader of
parquet can use the files:

    SELECT layer, avg(len(weights)) FROM 'maps/*.parquet' GROUP BY layer        -- mean support, of sparse maps

Rounding to float16 moves a weight by 2^-11 of itself, or by 2^-25 when it is below 2^-14, so that sums of rows move as
much: rows that sum to one do so no longer exactly. Others, beside a null key or of sigmoid, are kept as they are, empty
ones as lists of no cell. A weight that would become zero is stored as 2^-24, the smallest number above it, so that the
support is exact, and one beyond float16 as its largest number.

Legend: L layers, H heads, n queries, K keys; keys are the h x w cells of a grid, or the Q queries (decoder_self).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from detrlib.errors import RunError, in_one_line
from detrlib.metrics.tables import PartWriter, part_files

SMALLEST, LARGEST = np.float16(2.0**-24), float(np.finfo(np.float16).max)
ROW_GROUP_CELLS = 2**21  # an image with more gets a row group for each layer: 4 MiB of dense float16
FOLDER, METADATA = "maps", "detrlib"
Choice = int | slice | Sequence[int] | np.ndarray | None


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("site", pa.string(), nullable=False),
        pa.field("layer", pa.uint16(), nullable=False),
        pa.field("head", pa.uint16(), nullable=False),
        pa.field("query", pa.uint32(), nullable=False),
        pa.field("indices", _list_of(pa.uint32())),  # parquet packs integers by value: 16 bits would save nothing
        pa.field("weights", _list_of(pa.float16()), nullable=False),
    ]
)
POSITION = ["image_id", "site", "layer", "head", "query"]
ENCODING = {"indices.list.element": "DELTA_BINARY_PACKED", "weights.list.element": "BYTE_STREAM_SPLIT"}


# --- writing ---------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """The maps of one layer as rows of the store, heads by heads."""

    indices: pa.ListArray
    weights: pa.ListArray
    shape: tuple[int, ...]  # (H, n, h, w), or (H, n, Q)


def pack(maps: np.ndarray) -> Packed:
    """Maps of one layer [H,n,h,w] or [H,n,Q], in any precision, as rows of the store."""
    half = as_half(maps).reshape(math.prod(maps.shape[:2]), -1)  # [R,K]
    nonzero = half != 0
    dense = 2 * nonzero.sum(1) > half.shape[1]  # an index costs about as much as a weight
    sparse = nonzero & ~dense[:, None]
    columns = np.nonzero(sparse)[1].astype(np.uint32)
    indices = pa.ListArray.from_arrays(
        _offsets(sparse), pa.array(columns), type=SCHEMA.field("indices").type, mask=pa.array(dense)
    )
    kept = sparse | dense[:, None]
    weights = pa.ListArray.from_arrays(_offsets(kept), pa.array(half[kept]), type=SCHEMA.field("weights").type)
    return Packed(indices, weights, maps.shape)


def as_half(weights: np.ndarray) -> np.ndarray:
    """Weights in float16, with the same zeros: what is too small for it becomes its smallest number, not zero."""
    half = weights.clip(-LARGEST, LARGEST).astype(np.float16)
    lost = (half == 0) & (weights != 0)
    half[lost] = np.copysign(SMALLEST, weights[lost])
    return half


def _offsets(kept: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32))


class MapWriter:
    """Writes one part of a store, image by image, in constant memory; to be used in a `with` statement.

    The part appears under its name when the block ends without an error, whole; a store of no images is none.
    """

    def __init__(self, run_dir: Path, part: int = 0, parts: int = 1):
        options = {"compression": "zstd", "use_dictionary": POSITION, "column_encoding": ENCODING}
        statistics = ["image_id", "site", "layer"]
        self._writer = PartWriter(run_dir / FOLDER, SCHEMA, part, parts, write_statistics=statistics, **options)
        self._images: dict[int, dict] = {}
        self._parts, self._row_groups = parts, 0

    def __enter__(self) -> "MapWriter":
        return self

    def add(self, image_id: int, extent: Iterable[float], sites: Mapping[str, Sequence[Packed]]) -> None:
        """The maps of one image: for each site its layers, first to last.

        extent: height and width of the image in cells of the grid, at most (h, w).
        Raises ValueError for an image that is stored already, or layers of different shapes, RunError on a full disk.
        """
        if image_id in self._images:
            raise ValueError(f"image {image_id} is stored already")
        entry = {"image_id": image_id, "extent": [float(cells) for cells in extent], "sites": {}}
        for site, layers in sites.items():
            shapes = {layer.shape for layer in layers}
            if len(shapes) != 1:
                raise ValueError(f"the layers of {site} have the shapes {sorted(shapes)}, not one")
            shape = (len(layers), *shapes.pop())
            together = len(layers) if math.prod(shape) <= ROW_GROUP_CELLS else 1
            where = {"first_row_group": self._row_groups, "layers_per_row_group": together}
            entry["sites"][site] = {"shape": shape} | where
            for first in range(0, len(layers), together):
                self._writer.write(_rows(image_id, site, first, layers[first : first + together]))
                self._row_groups += 1
        self._images[image_id] = entry

    def __exit__(self, kind, error, traceback) -> None:
        keep = kind is None and (self._images or self._parts > 1)
        self._writer.close(bool(keep), {METADATA: json.dumps({"images": list(self._images.values())})})


def _rows(image_id: int, site: str, first: int, layers: Sequence[Packed]) -> pa.Table:
    """Rows of layers `first`, first + 1, ... of one site of an image."""
    layer, head, query = np.indices((len(layers), *layers[0].shape[:2])).reshape(3, -1)
    columns = {
        "image_id": np.full(len(layer), image_id),
        "site": pa.repeat(site, len(layer)),
        "layer": layer + first,
        "head": head,
        "query": query,
        "indices": pa.concat_arrays([packed.indices for packed in layers]),
        "weights": pa.concat_arrays([packed.weights for packed in layers]),
    }
    return pa.table(columns).cast(SCHEMA)


def clear_maps(run_dir: Path) -> None:
    """Remove stored maps, and what an evaluation that was killed has left of its own."""
    for pattern in ("part-*.parquet", ".part-*.parquet*"):
        for path in (run_dir / FOLDER).glob(pattern):
            path.unlink()


# --- reading ---------------------------------------------------------------------------------------------------


class _Site(NamedTuple):
    shape: list[int]
    first_row_group: int
    layers_per_row_group: int


class _Image(NamedTuple):
    path: Path
    file: pq.ParquetFile
    sites: dict[str, _Site]


class AttentionStore:
    """The stored attention maps of an evaluated run, read image by image.

    Opening it reads what is stored of which image, no map. Raises RunError where there is none, or a part is missing.
    """

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)
        self._images: dict[int, _Image] = {}
        paths = part_files(self.run_dir / FOLDER)
        if not paths:
            raise RunError(
                f"{run_dir} holds no attention maps; evaluate it again (notebook 07_evaluate) with "
                "evaluate.examples or evaluate.store_maps above 0"
            )
        for path in paths:
            try:
                file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
                images = json.loads(file.metadata.metadata[METADATA.encode()])["images"]
                for image in images:
                    sites = {site: _Site(**stored) for site, stored in image["sites"].items()}
                    self._images[image["image_id"]] = _Image(path, file, sites)
            except Exception as error:  # pyarrow has many
                raise RunError(
                    f"{path} is no whole part of an attention store ({in_one_line(error)}); evaluate the run again"
                ) from error

    @property
    def images(self) -> list[int]:
        """Ids of the stored images, ascending."""
        return sorted(self._images)

    def sites(self, image_id: int) -> list[str]:
        """The sites whose maps are stored of an image. Raises RunError for an image that is not stored."""
        return list(self._of(image_id).sites)

    def shape(self, image_id: int, site: str = "decoder_cross") -> tuple[int, ...]:
        """(L, H, n, h, w), or (L, H, Q, Q) of decoder_self. Raises RunError for what is not stored."""
        sites = self._of(image_id).sites
        if site not in sites:
            raise RunError(
                f"maps of {site} are not stored of image {image_id} in {self.run_dir}, only of {', '.join(sites)}; "
                "add it to evaluate.store_sites and evaluate again"
            )
        return tuple(sites[site].shape)

    def maps(
        self,
        image_id: int,
        site: str = "decoder_cross",
        layers: Choice = None,
        heads: Choice = None,
        queries: Choice = None,
    ) -> np.ndarray:
        """Read maps of one image.

        Args:
            image_id: one of `images`.
            site: one of `sites(image_id)`.
            layers, heads, queries: a number, several, or a slice, negative ones from the end; None: all. With a single
                number the result still has that axis, of length one.

        Returns:
            float32 [L,H,n,h,w], of decoder_self [L,H,n,Q].

        Raises:
            RunError: an image or a site is not stored, or numbers do not exist.
        """
        shape, image = self.shape(image_id, site), self._of(image_id)
        layers, heads, queries = (
            _chosen(choice, size, f"no {name} {choice} at {site} of image {image_id} in {self.run_dir}")
            for name, choice, size in zip(("layer", "head", "query"), (layers, heads, queries), shape, strict=False)
        )
        together = image.sites[site].layers_per_row_group
        groups, position = np.unique(layers // together, return_inverse=True)
        rows = ((position * together + layers % together)[:, None, None] * shape[1] + heads[:, None]) * shape[
            2
        ] + queries
        groups += image.sites[site].first_row_group
        try:
            table = image.file.read_row_groups(groups.tolist(), ["indices", "weights"]).take(rows.ravel())
            return _unpacked(table, math.prod(shape[3:])).reshape(*rows.shape, *shape[3:])
        except Exception as error:  # pyarrow has many
            fault = f"{image.path}: maps of image {image_id} are damaged ({in_one_line(error)})"
            raise RunError(f"{fault}; evaluate the run again") from error

    def _of(self, image_id: int) -> _Image:
        if image_id not in self._images:
            some = ", ".join(map(str, self.images[:5])) + (", ..." if len(self._images) > 5 else "")
            raise RunError(
                f"maps of image {image_id} are not stored in {self.run_dir}, but of {len(self._images)} others "
                f"({some}); set evaluate.store_maps to more images, or all, and evaluate again"
            )
        return self._images[image_id]


def _chosen(choice: Choice, size: int, fault: str) -> np.ndarray:
    """The numbers out of 0..size-1 that a choice means. Raises RunError that opens with `fault`."""
    numbers = np.arange(size)
    if choice is None or isinstance(choice, slice):
        return numbers[choice or slice(None)]
    wanted = np.atleast_1d(np.asarray(choice))
    try:
        return numbers[wanted if wanted.size else wanted.astype(int)]
    except IndexError:
        raise RunError(f"{fault}: there are {size}, 0 to {size - 1}") from None


def _unpacked(table: pa.Table, cells: int) -> np.ndarray:
    """Rows of the store as maps [R,K], float32."""
    indices, weights = (table.column(name).combine_chunks() for name in ("indices", "weights"))
    count = np.diff(weights.offsets.to_numpy())
    dense = np.repeat(indices.is_null().to_numpy(zero_copy_only=False), count)  # of each weight
    column = np.empty(len(dense), dtype=np.int64)
    column[~dense] = indices.flatten().to_numpy()
    column[dense] = np.tile(np.arange(cells), dense.sum() // cells)
    maps = np.zeros((len(table), cells), dtype=np.float32)
    maps[np.repeat(np.arange(len(table)), count), column] = weights.flatten().to_numpy()
    return maps
