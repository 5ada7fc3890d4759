"""Files are written whole or not at all, and read without running code in them."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from detrlib.errors import RunError
from detrlib.files import load_checkpoint, load_weights, save_checkpoint, write_atomic, write_json

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(error):
    def failing(*arguments, **named):
        raise error

    return failing


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_files_are_replaced_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, lambda temporary: temporary.write_text("old"))
    write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and files(path.parent) == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "place, error",
    [
        ((torch, "save"), FULL),
        ((torch, "save"), RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        ((os, "replace"), FULL),
    ],
    ids=["saving", "saving, as torch says it", "renaming"],
)
def test_a_full_disk_leaves_the_old_checkpoint_and_names_the_file(tmp_path, monkeypatch, place, error):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(*place, fail(error))
    with pytest.raises(RunError, match=f"could not write {path}: .*{str(error)[-20:]}.* before is intact"):
        save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path) == {"epoch": 1}
    assert files(tmp_path) == ["last.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    write_json(tmp_path / "results.json", {"AP": 0.5})
    with pytest.raises(RunError, match="No space left on device"):
        write_atomic(tmp_path / "results.json", lambda temporary: Path("/dev/full").write_text("x"))
    assert json.loads((tmp_path / "results.json").read_text()) == {"AP": 0.5}


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", fail(KeyboardInterrupt()))
    assert files(tmp_path) == []


def test_checkpoints_that_are_none(tmp_path):
    with pytest.raises(RunError, match=r"no checkpoint .*last\.pt; has the run finished its first epoch"):
        load_checkpoint(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(RunError, match=r"last\.pt is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "last.pt")
    torch.save({"model": print}, tmp_path / "code.pt")
    with pytest.raises(RunError, match=r"code\.pt is not a checkpoint"):
        load_checkpoint(tmp_path / "code.pt")


def test_weights_of_another_architecture_are_not_half_loaded(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = {"0.weight": torch.ones(4, 2), "0.bias": torch.ones(3), "extra": torch.ones(1), "1.bias": torch.ones(1)}
    with pytest.raises(RunError) as caught:
        load_weights(model, other, tmp_path / "a.pt")
    assert str(caught.value) == (
        f"{tmp_path / 'a.pt'} holds weights that do not fit this architecture: missing 1.weight; unexpected extra; "
        "0.weight is (4, 2), the model has (3, 2)"
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_that_are_no_numbers_are_named(tmp_path):
    model = torch.nn.Linear(1, 2)
    state = {"weight": torch.tensor([[1.0], [float("nan")]]), "bias": torch.ones(2)}
    with pytest.raises(RunError, match=r"a\.pt .*weight holds"):
        load_weights(model, state, tmp_path / "a.pt")
    assert model.weight.isfinite().all()
