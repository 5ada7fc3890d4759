"""Tables in parts: rows come back as they went in, and some of the parts are never taken for all."""

import errno

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from detrlib.errors import RunError
from detrlib.metrics import tables
from detrlib.metrics.tables import PartWriter, Table, part_files

SCHEMA = {"image_id": "int64", "site": "", "gini": "float32"}
SITES = ["encoder_self", "decoder_cross"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rows(*image_ids):
    ids = np.array(image_ids)
    return {"image_id": ids, "site": ids % 2, "gini": ids / 10}


def write(folder, parts, image_ids=()):
    """A table in parts of which only those with `image_ids` (a list for each) are written."""
    opened = [Table(folder, SCHEMA, {"site": SITES}, part, parts) for part in range(len(image_ids))]
    for table, ids in zip(opened, image_ids, strict=True):
        if ids:
            table.add(rows(*ids))
        table.close()
    return opened


@pytest.mark.parametrize("at_once", [1, 2**16])
def test_rows_come_back_in_the_order_of_the_parts(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(tables, "ROWS", at_once)
    folder = tmp_path / "sparsity"
    write(folder, 3, [[4, 1], [], [3]])
    assert names(folder) == [path.name for path in part_files(folder)]
    frame = pd.read_parquet(folder)
    assert frame["image_id"].tolist() == [4, 1, 3]
    assert frame["site"].astype(str).tolist() == [SITES[0], SITES[1], SITES[1]]
    assert frame["gini"].dtype == np.float32 and frame["gini"].tolist() == pytest.approx([0.4, 0.1, 0.3])


def test_nothing_is_there_before_a_part_is_closed(tmp_path):
    table = Table(tmp_path / "sparsity", SCHEMA, {"site": SITES})
    table.add(rows(1))
    assert part_files(tmp_path / "sparsity") == [] == part_files(tmp_path / "elsewhere")
    table.close()
    assert len(part_files(tmp_path / "sparsity")) == 1


def test_parts_that_are_missing_or_of_two_evaluations_are_no_table(tmp_path):
    write(tmp_path / "missing", 3, [[1], [2]])
    write(tmp_path / "mixed", 1, [[1]])
    write(tmp_path / "mixed", 2, [[1]])
    for name in ("missing", "mixed"):
        with pytest.raises(RunError, match=name):
            part_files(tmp_path / name)


def test_an_evaluation_replaces_the_tables_of_earlier_ones(tmp_path, caplog):
    folder = tmp_path / "sparsity"
    folder.with_suffix(".parquet").write_text("as of earlier versions")
    (tmp_path / "matches.parquet").write_text("another table")
    write(folder, 3, [[7], [8], [9]])
    (folder / ".part-00003-of-00004.parquet").write_text("of an evaluation that was killed")
    write(folder, 1, [[1]])[0].remove_earlier()
    assert pd.read_parquet(folder)["image_id"].tolist() == [1] and len(part_files(folder)) == 1
    assert names(tmp_path) == ["matches.parquet", "sparsity"] and len(names(folder)) == 1
    assert not caplog.text


def test_disks_that_are_not_shared_are_named_in_a_warning(tmp_path, caplog):
    write(tmp_path / "sparsity", 2, [[1]])[0].remove_earlier()
    assert "sparsity is no table" in caplog.text and "part-00001-of-00002.parquet" in caplog.text
    with pytest.raises(RunError, match="sparsity holds 1 of 2 parts"):
        part_files(tmp_path / "sparsity")
    (tmp_path / "sparsity" / "part-00000-of-00002 (copy).parquet").touch()
    with pytest.raises(RunError, match=r"\(copy\)\.parquet is no part of a table"):
        part_files(tmp_path / "sparsity")


def test_a_part_is_not_kept_where_nobody_wants_it(tmp_path):
    PartWriter(tmp_path, pa.schema([("a", "int64")])).close(keep=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["write_table", "close"])
def test_a_full_disk_is_named(tmp_path, monkeypatch, name):
    real = getattr(parquet.ParquetWriter, name)

    def failing(*arguments, **named):
        monkeypatch.setattr(parquet.ParquetWriter, name, real)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet.ParquetWriter, name, failing)
    with pytest.raises(RunError, match=r"part-00000-of-00001\.parquet"):
        write(tmp_path / "sparsity", 1, [[1]])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"part-00000-of-00001\.parquet"):
        write(tmp_path / "file" / "sparsity", 1, [[1]])
