"""Files are written whole or not at all, and read without running code in them."""

import errno
import json
import os
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from detrlib.errors import DamagedFile, RunError
from detrlib.files import (
    damage,
    load_checkpoint,
    load_json,
    load_weights,
    one_at_a_time,
    remove_unfinished,
    write_atomic,
    write_checkpoint,
    write_json,
)

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
    write_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(*place, fail(error))
    with pytest.raises(RunError, match=f"could not write {path}: .*{str(error)[-20:]}.* before is intact"):
        write_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path) == {"epoch": 1}
    assert files(tmp_path) == ["last.pt"]


def test_a_folder_at_the_place_of_a_file_is_said_to_be_one(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(RunError, match=r"results\.json: a folder is in its place"):
        write_json(tmp_path / "results.json", {})
    assert files(tmp_path) == ["results.json"]
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=r"results\.json: a file is in the place of its folder"):
        write_json(tmp_path / "run" / "results.json", {})


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
    with pytest.raises(RunError, match=r"no checkpoint .*last\.pt; there are none"):
        load_checkpoint(tmp_path / "last.pt")
    for content in (b"", b"PK\x03\x04 cut short", b"text"):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(DamagedFile, match=r"last\.pt is damaged, or no checkpoint"):
            load_checkpoint(tmp_path / "last.pt")
    torch.save({"model": print}, tmp_path / "code.pt")
    with pytest.raises(RunError, match=r"code\.pt is not a checkpoint") as caught:
        load_checkpoint(tmp_path / "code.pt")
    assert "weights_only" not in str(caught.value) and caught.value.__suppress_context__


def test_memory_that_is_short_is_no_fault_of_the_file(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    monkeypatch.setattr(torch, "load", fail(RuntimeError("can't allocate memory: you tried to allocate 64 bytes")))
    with pytest.raises(RuntimeError, match="64 bytes"):
        load_checkpoint(tmp_path / "last.pt")


def test_what_may_not_be_read_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", fail(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(RunError, match=r"results\.json is not yours to read") as caught:
        load_json(tmp_path / "results.json", "delete it")
    assert not isinstance(caught.value, DamagedFile)


@pytest.mark.parametrize("number, known", [(errno.ENOSYS, True), (errno.ENOLCK, True), (errno.EIO, False)])
def test_where_there_are_no_locks_nobody_waits(tmp_path, monkeypatch, number, known):
    monkeypatch.setattr("fcntl.flock", fail(OSError(number, "no locks")))
    with nullcontext() if known else pytest.raises(OSError, match="no locks"), one_at_a_time(tmp_path / "shapes"):
        pass


STATE = {"epoch": 3, "model": {"weight": torch.arange(200.0), "bias": torch.ones(3)}}


def test_a_checkpoint_is_a_file_of_torch_and_one_without_a_checksum_is_read_too(tmp_path):
    write_checkpoint(tmp_path / "new.pt", STATE)
    torch.save(STATE, tmp_path / "old.pt")
    for name in ("new.pt", "old.pt"):
        for state in (load_checkpoint(tmp_path / name), torch.load(tmp_path / name, weights_only=True, mmap=True)):
            assert state["epoch"] == 3 and torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert zipfile.ZipFile(tmp_path / "new.pt").testzip() is None


def test_any_changed_bit_and_any_missing_byte_is_found(tmp_path):
    path = tmp_path / "a.pt"
    write_checkpoint(path, STATE)
    whole = path.read_bytes()
    assert damage(path) == ""
    with path.open("r+b", buffering=0) as file:
        for bit in range(0, 8 * len(whole), 17):  # of headers, padding, data, directory, checksum
            os.pwrite(file.fileno(), bytes([whole[bit // 8] ^ 1 << bit % 8]), bit // 8)
            assert damage(path), f"bit {bit} of {8 * len(whole)}"
            os.pwrite(file.fileno(), whole[bit // 8 :][:1], bit // 8)
        file.truncate(len(whole) + 1)
        assert damage(path)
        for size in (*range(len(whole) - 1, len(whole) - 80, -1), *range(len(whole) - 80, -1, -61)):
            file.truncate(size)
            assert damage(path), f"cut to {size} of {len(whole)}"


def test_a_changed_number_in_a_file_without_our_checksum_is_found(tmp_path):
    path = tmp_path / "old.pt"
    torch.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["model"]["weight"].numpy().tobytes()) + 41] ^= 4
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # says nothing
    with pytest.raises(DamagedFile, match=r"old\.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize("links", [True, False])
def test_what_was_there_is_kept_under_another_name(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", fail(OSError(errno.EPERM, "no links here")))
    path, before = tmp_path / "last.pt", tmp_path / "previous.pt"
    for epoch in range(3):
        write_checkpoint(path, {"epoch": epoch}, before)
        assert load_checkpoint(path) == {"epoch": epoch}
        assert before.exists() == (epoch > 0)
    assert load_checkpoint(before) == {"epoch": 1} and files(tmp_path) == ["last.pt", "previous.pt"]


def test_what_killed_writers_have_left_is_swept_and_nothing_else(tmp_path):
    def killed(temporary):
        (tmp_path / "kept").mkdir(exist_ok=True)
        os.link(temporary, tmp_path / "kept" / temporary.name)

    write_atomic(tmp_path / "last.pt", killed)
    (left,) = (tmp_path / "kept").iterdir()
    left.replace(tmp_path / left.name)
    others = [".owner", ".last.pt.lock", "last.pt", ".gitignore", ".env.template", ".notes.markdown"]
    for name in others:
        (tmp_path / name).touch()
    assert remove_unfinished(tmp_path) == [tmp_path / left.name]
    assert files(tmp_path) == sorted([*others, "kept"])


def test_any_change_of_content_in_checked_json_is_found(tmp_path):
    path, values = tmp_path / "results.json", {"AP": 0.125, "names": {"1": "Käfer"}, "none": None, "list": [1, -1.5]}
    write_json(path, values, checksum=True)
    assert load_json(path, "") == values and json.loads(path.read_text()).items() >= values.items()
    path.write_text(path.read_text().replace("0.125", "0.725"))
    with pytest.raises(DamagedFile, match=r"results\.json is damaged .*; evaluate again"):
        load_json(path, "evaluate again")
    write_json(path, values)  # as earlier versions did
    assert load_json(path, "") == values
    for content in (b"", b"[1]", b"{\x8f", b'{"a": 1'):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"results\.json is damaged \(.*\); evaluate again"):
            load_json(path, "evaluate again")


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
