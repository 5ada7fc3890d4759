"""The folder of detections: what is in it, and what is not touched."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from detrlib.errors import RunError
from detrlib.figures.album import Album, check_folder
from detrlib.figures.page import write_page
from detrlib.figures.predictions import MapChoice


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_with_everything(tmp_path, make_detected):
    explained = make_detected()
    explained.explanations = {"raw": np.ones((3, 4, 6), dtype=np.float32)}
    with Album(tmp_path / "out", ["sweep/one", "pictures"], view=MapChoice(layer=0), attention=True) as album:
        album.add((explained, make_detected(count=1)))
        album.add((make_detected(attention=False), make_detected(count=0)))
    assert album.counts() == {"sweep/one": 6, "pictures": 1} and album.page == tmp_path / "out" / "index.html"
    assert files(tmp_path / "out") == [
        "attention/picture-1.png",
        "explanations/picture-1--sweep-one.png",
        "index.html",
        *(f"pictures-2/{name}" for name in ("contact_sheet.png", "images.json", "predictions.json")),
        *(f"pictures/picture-1{end}.png" for end in ("-2", "")),
        *(f"sweep-one/{name}" for name in ("contact_sheet.png", "images.json", "predictions.json")),
    ]
    assert len(json.loads((tmp_path / "out" / "sweep-one" / "predictions.json").read_text())) == 6
    text = album.page.read_text()
    assert text.count('class="picture">') == 2 and "sweep/one and pictures" in text


def test_only_pictures_of_our_own_are_replaced(tmp_path, make_detected):
    for count in (2, 1):
        with Album(tmp_path, ["run"]) as album:
            for _ in range(count):
                album.add((make_detected(attention=False),))
        if count == 2:
            Image.new("RGB", (3, 3)).save(tmp_path / "pictures" / "holiday.png")
            (tmp_path / "pictures" / "broken.png").write_text("none")
    assert [name for name in files(tmp_path) if name.startswith("pictures/")] == [
        "pictures/broken.png",
        "pictures/holiday.png",
        "pictures/picture-1.png",
    ]


def test_what_was_done_is_written_whatever_stops_it(tmp_path, make_detected):
    with pytest.raises(KeyboardInterrupt), Album(tmp_path, ["run"]) as album:
        album.add((make_detected(attention=False),))
        raise KeyboardInterrupt
    assert (tmp_path / "index.html").stat().st_size and (tmp_path / "run" / "predictions.json").exists()


def test_file_names_of_any_title(tmp_path, make_detected):
    with Album(tmp_path, ["run"]) as album:
        for title in ("a" * 240 + ".jpg", "../../<b>&\n$(rm).png", "A.png", "a.png", "....png", "日本.jpg"):
            detected = make_detected(attention=False, count=0)
            detected.source.name = title
            album.add((detected,))
    names = [name.removeprefix("pictures/") for name in files(tmp_path) if name.startswith("pictures/")]
    assert len(names) == 6 and all(len(name) < 100 and "/" not in name and "\n" not in name for name in names)
    assert {"A.png", "a-2.png", "b-rm.png", "日本.png"} <= set(names)


def test_a_page_of_many_pictures_says_what_it_leaves_out(tmp_path, make_detected, monkeypatch):
    monkeypatch.setattr("detrlib.figures.page.MOST_BYTES", 1)
    with Album(tmp_path, ["run"]) as album:
        for _ in range(2):
            album.add((make_detected(attention=False, count=0),))
    assert "The first 1 of 2 pictures" in album.page.read_text()


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match=r"file is a file"):
        check_folder(tmp_path / "file" / "out")
    for folder in ("/proc/none", tmp_path / "file"):
        with pytest.raises(RunError, match=str(folder)):
            Album(type(tmp_path)(folder), ["run"])


def test_an_album_without_pictures_leaves_an_earlier_one_as_it_was(tmp_path, make_detected):
    with Album(tmp_path / "out", ["run"]) as album:
        album.add((make_detected(attention=False),))
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    with Album(tmp_path / "out", ["run"]):
        pass
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    with Album(tmp_path / "new", ["run"]):
        pass
    assert files(tmp_path / "new") == []


def test_a_full_disk_tears_no_file_that_was_there(tmp_path, make_detected, monkeypatch):
    """What was written stays readable, and half of what could not be written is nowhere."""
    with Album(tmp_path, ["run"]) as album:
        album.add((make_detected(attention=False),))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def full(self, *args, **kwargs):
        with self.open("wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"index\.html"):
        write_page(tmp_path / "index.html", [], ["run"], [{}])
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: full(path))
    with pytest.raises(RunError, match=r"picture-1\.png"), Album(tmp_path, ["run"]) as album:
        album.add((make_detected(attention=False),))
    for name in ("run/contact_sheet.png", "index.html"):
        assert (tmp_path / name).read_bytes() == before[name]
    assert set(files(tmp_path)) <= set(before)


def test_a_folder_that_a_file_stands_in_the_way_of_is_named(tmp_path, make_detected):
    (tmp_path / "pictures").write_text("no folder")
    with pytest.raises(RunError, match="pictures"), Album(tmp_path, ["run"]) as album:
        album.add((make_detected(attention=False),))
