"""Every picture looked into once: all faults together, what is odd in rows, and nothing decoded twice."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from detrlib.data import CocoDataset, check
from detrlib.data.check import check_pictures
from detrlib.errors import DataError, RunError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETRLIB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photographs(tmp_path):
    """`photographs(**options)` opens a data set of four different JPEG files in a folder, `photographs.folder`."""
    folder = tmp_path / "train"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(random.integers(0, 255, (30, 40, 3), np.uint8)).save(folder / f"{number}.jpg")
    images = [{"id": n + 1, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in range(4)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))

    def open_set(**options):
        return CocoDataset(folder, tmp_path / "a.json", **options)

    open_set.folder = folder
    return open_set


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were looked into since."""
    names, examine = [], check._examine

    def noted(path, decode):
        names.append(path.name)
        return examine(path, decode)

    monkeypatch.setattr(check, "_examine", noted)
    return names


def cut_short(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_pictures_are_decoded_once_and_again_when_they_change(photographs, decoded):
    first = check_pictures({"train": photographs()})["train"]
    assert sorted(decoded) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert first["file"].tolist() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"] and first["digest"].nunique() == 4
    decoded.clear()
    again = check_pictures({"train": photographs(), "val": photographs(limit=2)})
    assert decoded == [] and again["train"].equals(first) and len(again["val"]) == 2
    os.utime(photographs.folder / "2.jpg", ns=(1, 1))
    check_pictures({"train": photographs()})
    assert decoded == ["2.jpg"]


def test_headers_are_enough_for_some_faults_and_are_no_decoding(photographs, decoded):
    cut_short(photographs.folder / "1.jpg")
    assert not check_pictures({"train": photographs()}, "headers")["train"]["decoded"].any()
    decoded.clear()
    with pytest.raises(DataError, match=r"1\.jpg: cut short"):
        check_pictures({"train": photographs()})
    assert len(decoded) == 4
    with pytest.raises(DataError, match=r"1\.jpg"):
        check_pictures({"train": photographs()}, "all")
    assert len(decoded) == 4, "a fault is remembered too, until the file changes"


def test_every_fault_of_every_split_is_named(photographs, monkeypatch):
    cut_short(photographs.folder / "0.jpg")
    (photographs.folder / "1.jpg").write_text("no picture")
    Image.new("RGB", (20, 15)).save(photographs.folder / "3.jpg")
    with pytest.raises(DataError) as error:
        check_pictures({"train": photographs(), "val": photographs(limit=1)})
    said = str(error.value)
    assert "train and val" in said and "\n" not in said and "data.truncated" in said and "2.jpg" not in said
    assert all(words in said for words in ("0.jpg: cut short", "1.jpg: not a picture", "3.jpg: the file is 20 x 15"))
    monkeypatch.setattr(check, "SHOWN", 2)
    with pytest.raises(DataError, match="all of them in") as error:
        check_pictures({"train": photographs()})
    (path,) = (check.cache_folder() / "pictures").glob("faults-*.txt")
    assert str(path) in str(error.value) and len(path.read_text().splitlines()) == 3


def test_jpeg_files_cut_short_are_accepted_on_request_and_counted(photographs):
    cut_short(photographs.folder / "1.jpg")
    with pytest.raises(DataError, match=r"1\.jpg: not readable"):
        photographs()[1]
    dataset = photographs(truncated=True)
    assert check_pictures({"train": dataset})["train"]["truncated"].tolist() == [False, True, False, False]
    pixels = np.asarray(dataset.image(1))
    assert pixels.shape == (30, 40, 3) and pixels[:4].std() > 20 and pixels[-4:].std() < 1


def test_what_stands_in_the_files(photographs):
    tag = Image.Exif()
    tag[0x0112] = 3
    Image.open(photographs.folder / "0.jpg").save(photographs.folder / "1.jpg", "PNG")
    Image.new("RGB", (40, 30), (9, 14, 11)).save(photographs.folder / "2.jpg", exif=tag)
    Image.fromarray(np.full((30, 40), 4000, np.uint16)).save(photographs.folder / "3.jpg", "PNG")
    table = check_pictures({"train": photographs()})["train"]
    assert table["digest"][0] == table["digest"][1] and table["orientation"].tolist() == [1, 1, 3, 1]
    assert table["depth"].tolist() == [8, 8, 8, 12] and table["brightest"][2] < 20 and table["brightest"][3] == 250


def test_what_was_done_before_an_interruption_is_remembered(photographs, decoded, monkeypatch):
    noted = check._examine

    def stopped(path, decode):
        if path.name == "3.jpg":
            raise KeyboardInterrupt
        return noted(path, decode)

    monkeypatch.setattr(check, "_examine", stopped)
    monkeypatch.setattr(check, "cores", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        check_pictures({"train": photographs()})
    monkeypatch.setattr(check, "_examine", noted)
    done = len(decoded)
    check_pictures({"train": photographs()})
    assert len(decoded) <= 4 + (3 - done) and decoded[-1] == "3.jpg"


@pytest.mark.parametrize("spoilt", [lambda whole: b"no table", lambda whole: whole[:60] + b"?" + whole[61:]])
def test_a_memory_that_is_damaged_or_cannot_be_written_is_no_fault(photographs, decoded, caplog, monkeypatch, spoilt):
    check_pictures({"train": photographs()})
    (path,) = (check.cache_folder() / "pictures").glob("*.parquet")
    path.write_bytes(spoilt(path.read_bytes()))

    def full(path, write):
        raise RunError("could not write")

    monkeypatch.setattr(check, "write_atomic", full)
    assert len(check_pictures({"train": photographs()})["train"]) == 4 and len(decoded) == 8
    assert str(path) in caplog.text and "decoded again" in caplog.text


def test_a_log_without_a_bar_has_a_line_now_and_then(photographs, caplog, monkeypatch):
    monkeypatch.setattr(check, "SECONDS", -1)
    with caplog.at_level("INFO"):
        check_pictures({"train": photographs()})
    assert "decoding 4 pictures of" in caplog.text and "2 of 4 pictures decoded" in caplog.text


def test_many_faults_are_named_also_where_no_list_of_them_can_be_written(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SHOWN", 2)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETRLIB_CACHE", str(tmp_path / "file"))
    for number in range(3):
        (photographs.folder / f"{number}.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"0\.jpg: not a picture"):
        check_pictures({"train": photographs()})


def test_pictures_may_be_named_by_paths_elsewhere(photographs, tmp_path):
    content = json.loads((tmp_path / "a.json").read_text())
    for image in content["images"]:
        image["file_name"] = str(photographs.folder / image["file_name"])
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "empty").mkdir()
    dataset = CocoDataset(tmp_path / "empty", tmp_path / "a.json")
    assert check_pictures({"train": dataset})["train"]["file"].tolist() == dataset.file_names
