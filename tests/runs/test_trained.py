"""Which checkpoint a training goes on from, when one is damaged or gone."""

import pytest

from detrlib import runs
from detrlib.errors import DamagedFile, RunError
from detrlib.files import write_checkpoint, write_json
from detrlib.runs.trained import can_resume, read_trained, write_trained


@pytest.fixture
def folder(tmp_path):
    """The checkpoints of a run after three epochs."""
    for epoch in (1, 2, 3):
        write_trained(tmp_path / "checkpoints", {"epoch": epoch})
    return tmp_path / "checkpoints"


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_last_is_taken_without_a_word(folder):
    assert read_trained(folder) == ({"epoch": 3}, folder / "last.pt", "")


@pytest.mark.parametrize("spoil, word", [(damage, "damaged"), (lambda path: path.unlink(), "gone")])
def test_the_one_before_is_taken_with_a_line(folder, spoil, word):
    spoil(folder / "last.pt")
    content, path, why = read_trained(folder, ["epoch"])
    assert (content, path) == ({"epoch": 2}, folder / "previous.pt")
    assert "last.pt" in why and word in why and "\n" not in why and can_resume(folder.parent)


def test_two_damaged_ones_are_both_named_and_weights_are_a_way_on(folder):
    write_checkpoint(folder / "best.pt", {"epoch": 1})
    for name in ("last.pt", "previous.pt"):
        damage(folder / name)
    with pytest.raises(DamagedFile, match=r"last\.pt.*previous\.pt.*train\.start=.*best\.pt"):
        read_trained(folder)
    (folder / "previous.pt").unlink()
    with pytest.raises(DamagedFile, match=r"last\.pt.*train\.start=.*best\.pt"):
        read_trained(folder)


def test_another_programs_file_is_no_reason_to_go_back(folder):
    write_checkpoint(folder / "last.pt", {"weights": 1})
    with pytest.raises(RunError, match=r"last\.pt .*lacks epoch"):
        read_trained(folder, ["epoch"])


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tmp_path):
    assert not can_resume(tmp_path) and runs.begins_again(tmp_path) == []
    runs.append_metrics(tmp_path, {"global_step": 4, "epoch": 0})
    runs.append_metrics(tmp_path, {"global_step": 8, "epoch": 1})
    assert not can_resume(tmp_path)  # killed before or in its first save
    assert "8 steps" in runs.begins_again(tmp_path)[0]
    runs.append_metrics(tmp_path, {"global_step": 9, "epoch": 1})
    with pytest.raises(RunError, match=r"checkpoints .*step 9.*delete the run's folder"):
        can_resume(tmp_path)


@pytest.mark.parametrize("start", [{"global_step": 0, "stopped": 4}, {"global_step": 4}])
def test_a_run_that_was_stopped_or_went_on_had_a_checkpoint(tmp_path, start):
    write_json(tmp_path / "environment.json", {"starts": [{"global_step": 0}]}, checksum=True)
    assert not can_resume(tmp_path)
    write_json(tmp_path / "environment.json", {"starts": [start]}, checksum=True)
    with pytest.raises(RunError, match="checkpoints"):
        can_resume(tmp_path)


def test_a_run_that_was_evaluated_unfinished_had_a_checkpoint(tmp_path):
    write_json(tmp_path / "results.json", {"detection": {}, "unfinished": "epoch 1 of 2"})
    with pytest.raises(RunError, match="checkpoints"):
        can_resume(tmp_path)
