"""One base for every foreseeable fault, and the built-in kinds that some of them are as well."""

import errno
import inspect
from pathlib import Path

import pytest

from detrlib import errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", KINDS)
def test_one_base_catches_every_kind_with_its_message(kind):
    with pytest.raises(errors.DetrlibError, match=r"^data\.root: no such folder$"):
        raise kind("data.root: no such folder")


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.DataError, errors.ModelError])
def test_wrong_values_are_value_errors_as_callers_of_other_libraries_expect(kind):
    assert issubclass(kind, ValueError)


def test_kinds_are_told_apart():
    others = [kind for kind in KINDS if kind not in (errors.DetrlibError, errors.DamagedFile)]
    assert issubclass(errors.DamagedFile, errors.RunError)  # for whoever has no other file to turn to
    assert not any(issubclass(one, other) for one in others for other in others if one is not other)


def test_faults_of_a_disk_or_of_rights_are_foreseen_wherever_they_come_from():
    foreseen = (errors.DataError("x"), PermissionError(errno.EACCES, "denied", "x"), OSError(errno.ENOSPC, "no space"))
    assert all(errors.fault_of(error) for error in foreseen)
    assert errors.fault_of(FileNotFoundError(errno.ENOENT, "x")) is errors.fault_of(ValueError("x")) is None


def test_a_folder_at_the_place_of_a_file_is_foreseen_with_a_remedy(tmp_path):
    (tmp_path / "viewer.html").mkdir()
    with pytest.raises(OSError) as caught:
        (tmp_path / "viewer.html").write_text("a page")
    assert "viewer.html" in errors.fault_of(caught.value) and "another place" in errors.fault_of(caught.value)


def test_a_message_is_one_line():
    assert errors.in_one_line(ValueError("one\n  two\n")) == "one two"
    assert errors.in_one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize(
    "said",
    ["can't allocate memory: you tried to allocate 256 bytes.", "CUDA out of memory. Tried", "Cannot allocate memory"],
)
def test_short_memory_is_one_line_whoever_has_none(said):
    fault = errors.fault_of(RuntimeError(f"[enforce fail]\n{said}\nGPU 0"))
    assert "memory" in fault and "\n" not in fault
    assert errors.fault_of(MemoryError()) and errors.fault_of(RuntimeError("shapes differ")) is None


def test_what_was_given_is_cut_short():
    assert errors.shown("run") == errors.shown(Path("run")) == "'run'"
    assert len(errors.shown("x" * 999)) == 60 and len(errors.shown([0] * 999, 120)) == 120


def test_long_lists_say_how_many_more_there_are():
    assert errors.listed(iter("abc")) == "a, b, c" and errors.listed([]) == ""
    assert errors.listed([1, 2, 3], 1, "; ") == "1; and 2 more"
