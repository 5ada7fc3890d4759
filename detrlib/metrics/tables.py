"""Parquet tables that grow in constant memory: a folder of parts, one written by each process.

Any reader of parquet takes the folder for one table: `pandas.read_parquet("measures/sparsity")`. A part is written
under a hidden name and appears whole; its name says how many there are, so that some of them are not taken for all.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from detrlib.errors import RunError
from detrlib.files import reach_disk, write_atomic

log = logging.getLogger(__name__)

ROWS = 2**16  # that are kept in memory before they are written


def part_files(folder: Path) -> list[Path]:
    """The parts of the table in `folder`, all of them; none where there is no table.

    Raises RunError naming the folder when some are missing, or a file that is none, such as a copy.
    """
    paths = sorted(folder.glob("part-*.parquet"))
    if odd := next((path for path in paths if not re.fullmatch(r"part-\d+-of-\d+", path.stem)), None):
        raise RunError(f"{odd} is no part of a table; move it out of that folder")
    parts = int(paths[-1].stem.rpartition("-")[2]) if paths else 0
    if [path.name for path in paths] != [_part_name(part, parts) for part in range(parts)]:
        raise RunError(
            f"{folder} holds {len(paths)} of {parts} parts: the evaluation was interrupted, or ran on "
            "machines that share no disk; evaluate again"
        )
    return paths


def _part_name(part: int, parts: int) -> str:
    return f"part-{part:05d}-of-{parts:05d}.parquet"


def write_table(path: Path, table: pd.DataFrame, index: bool = False) -> None:
    """A whole table as a parquet file with checksums, written atomically."""
    write_atomic(path, partial(table.to_parquet, index=index, write_page_checksum=True))


def read_table(path: Path) -> pd.DataFrame:
    """A parquet file, or a folder of parts, whose checksums are right; errors are pyarrow's."""
    return pd.read_parquet(path, page_checksum_verification=True)


class PartWriter:
    """Writes part number `part` of the `parts` of the table in `folder`; it is there once it is closed.

    options: of pyarrow's ParquetWriter. Raises RunError naming the file where it cannot be written.
    """

    def __init__(self, folder: Path, schema: pa.Schema, part: int = 0, parts: int = 1, **options):
        self.path = folder / _part_name(part, parts)
        self._temporary = folder / f".{self.path.name}"
        with self._faults_named():
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = parquet.ParquetWriter(self._temporary, schema, write_page_checksum=True, **options)

    def write(self, rows: pa.Table) -> None:
        """Write rows as one row group."""
        with self._faults_named():
            self._writer.write_table(rows, row_group_size=max(len(rows), 1))

    def close(self, keep: bool = True, metadata: dict[str, str] | None = None) -> None:
        """Let the part appear under its name, with metadata of the file; or, not to be kept, remove it."""
        try:
            with self._faults_named():
                self._writer.add_key_value_metadata(metadata or {})
                self._writer.close()
                if keep:
                    reach_disk(self._temporary)
                    os.replace(self._temporary, self.path)
                    reach_disk(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            fault = f"could not write {self.path}: {error}"
            raise RunError(f"{fault}; free some space, or mend the folder, and evaluate again") from error


class Table:
    """One process's part of the table in `folder`, to which rows are added.

    schema: the type of each column, as pyarrow calls it. names: of columns that hold words, all words there are; such
    a column is given as positions in that list. Raises RunError naming the file where it cannot be written.
    """

    def __init__(
        self, folder: Path, schema: dict[str, str], names: dict[str, list[str]], part: int = 0, parts: int = 1
    ):
        self.folder, self.names, self.parts = folder, names, parts
        words = pa.dictionary(pa.int32(), pa.string())
        numbers = {name: pa.type_for_alias(kind) for name, kind in schema.items() if name not in names}
        self._schema = pa.schema([(name, numbers.get(name, words)) for name in schema])
        self._columns, self._rows = [], 0
        self._writer = PartWriter(folder, self._schema, part, parts)

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows: columns of one length, by name."""
        self._columns.append(columns)
        self._rows += len(next(iter(columns.values())))
        if self._rows >= ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and let the part appear."""
        self._flush()
        self._writer.close()

    def remove_earlier(self) -> None:
        """Remove what earlier evaluations have left of the table: one process does so, once all parts are closed.

        Where parts lie on the disks of other machines there is no table; a warning says so.
        """
        own = [_part_name(part, self.parts) for part in range(self.parts)]
        for path in [self.folder.with_suffix(".parquet"), *self.folder.iterdir()]:
            if path.name not in own:
                path.unlink(missing_ok=True)
        missing = [name for name in own if not (self.folder / name).exists()]
        if missing:
            log.warning(
                "%s is no table: %s are not in this folder; keep the runs of several machines on a disk they share",
                *(self.folder, ", ".join(missing)),
            )

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = {name: np.concatenate([rows[name] for rows in self._columns]) for name in self._schema.names}
        arrays = [
            pa.DictionaryArray.from_arrays(pa.array(values, pa.int32()), self.names[name])
            if name in self.names
            else pa.array(values, self._schema.field(name).type)
            for name, values in columns.items()
        ]
        self._writer.write(pa.Table.from_arrays(arrays, schema=self._schema))
        self._columns, self._rows = [], 0
