"""Tables that grow row by row in constant memory: one part per process while rows come in, one file in the end."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from detrlib.errors import RunError
from detrlib.files import write_atomic

log = logging.getLogger(__name__)

ROWS = 2**16  # that are kept in memory before they are written


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """While `path` is written bit by bit, raise RunError naming it where that fails."""
    try:
        yield
    except OSError as error:
        remedy = "free some space, or mend the folder, and evaluate again"
        raise RunError(f"could not write {path}: {error}; {remedy}") from error


def hidden_part(path: Path, part: int = 0) -> Path:
    """Where a part of `path` lies while it is written."""
    return path.with_name(f".{path.name}.{part}")


class Table:
    """One part of a parquet file at `path`, that of process number `part`; nothing is at `path` until `merge`.

    schema: the type of each column, as pyarrow calls it. names: of columns that hold words, all words there are; such
    a column is given as positions in that list.
    Raises RunError naming the file where it cannot be written.
    """

    def __init__(self, path: Path, schema: dict[str, str], names: dict[str, list[str]], part: int = 0):
        self.path, self.names = path, names
        words = pa.dictionary(pa.int32(), pa.string())
        numbers = {name: pa.type_for_alias(kind) for name, kind in schema.items() if name not in names}
        self._schema = pa.schema([(name, numbers.get(name, words)) for name in schema])
        self._columns, self._rows = [], 0
        with full_disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = parquet.ParquetWriter(hidden_part(path, part), self._schema)

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows: columns of one length, by name."""
        self._columns.append(columns)
        self._rows += len(next(iter(columns.values())))
        if self._rows >= ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        with full_disk_named(self.path):
            self._writer.close()

    def merge(self, parts: int) -> None:
        """Put the closed parts of all processes in place as one file. One process does so for all.

        Where parts lie on the disks of other machines there is no table; a warning says so.
        """
        paths = [hidden_part(self.path, part) for part in range(parts)]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            log.warning(
                "%s is not written: %s are not in this folder; keep the runs of several machines on a disk they share",
                *(self.path, ", ".join(missing)),
            )
            self.path.unlink(missing_ok=True)  # of an evaluation before this one
        elif parts == 1:
            os.replace(paths[0], self.path)
        else:
            write_atomic(self.path, lambda temporary: _concatenate(paths, temporary, self._schema))
        for path in paths:
            path.unlink(missing_ok=True)

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
        with full_disk_named(self.path):
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._columns, self._rows = [], 0


def _concatenate(paths: list[Path], target: Path, schema: pa.Schema) -> None:
    with parquet.ParquetWriter(target, schema) as writer:
        for path in paths:
            with parquet.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))
