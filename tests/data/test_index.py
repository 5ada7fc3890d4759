"""The index of a large file: made once, shared, made anew where the file or the index has changed, and not needed."""

import json
import multiprocessing
from pathlib import Path

import pytest
from PIL import Image

from detrlib.data import CocoDataset, index
from detrlib.data.annotations import read_annotations
from detrlib.data.index import read_columns
from detrlib.errors import DataError

IMAGES = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(1, 5)]
BOXES = [
    {"id": n, "image_id": 1 + n % 4, "category_id": 7, "bbox": [n, 5, 10, 8], "area": 61.5, "iscrowd": 0}
    for n in range(20)
]
FILE = {"images": IMAGES, "annotations": BOXES, "categories": [{"id": 7, "name": "dog"}], "info": {"year": 2017}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, in which every file counts as large; returns where indices lie in it."""
    monkeypatch.setenv("DETRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "LEAST", 1)
    return tmp_path / "cache" / "annotations"


@pytest.fixture
def reads(monkeypatch):
    """The files that were read, and not found in an index."""
    read, plain = [], index._read
    monkeypatch.setattr(index, "_read", lambda path: read.append(path) or plain(path))
    return read


@pytest.fixture
def write(tmp_path):
    """`write(content)` makes an annotation file; returns its path."""

    def make(content=FILE, name="a.json"):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return make


def test_what_is_read_again_is_what_was_read(cache, reads, write):
    path = write()
    first, again = read_columns(path), read_columns(path)
    assert first.content() == again.content() == read_annotations(path) == FILE
    assert reads == [path] and len(list(cache.glob("*.pt"))) == 1


def test_a_list_that_is_there_twice_is_refused_rather_than_lost(write):
    path = write()
    path.write_text(path.read_text()[:-1] + ', "images": []}')
    with pytest.raises(DataError, match=r"a\.json: 'images' is there twice"):
        read_columns(path)


def test_a_copy_elsewhere_has_the_same_index_and_a_file_that_changes_has_another(cache, reads, write):
    read_columns(write())
    read_columns(write(name="b.json"))
    assert len(reads) == 1
    changed = FILE | {"annotations": [one | {"bbox": [1, 5, 10, 8]} for one in BOXES]}
    assert read_columns(write(changed)).content() == changed and len(reads) == 2


def test_what_had_to_be_mended_is_kept_too(cache, reads, write):
    path = write(FILE | {"annotations": [*BOXES[1:], BOXES[0] | {"bbox": [], "area": "4", "id": None}]})
    first, again = read_columns(path), read_columns(path)
    assert len(reads) == 1 and first.content() == again.content()
    assert again.boxes.annotations()[-1] == BOXES[0] | {"bbox": [], "area": 4, "id": 20}


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b.replace(b"2017", b"2018")])
def test_a_damaged_index_is_made_anew(cache, reads, write, caplog, damage):
    path = write()
    read_columns(path)
    (kept,) = cache.glob("*.pt")
    kept.write_bytes(damage(kept.read_bytes()))
    assert read_columns(path).content() == FILE
    assert str(kept) in caplog.text and len(reads) == 2
    caplog.clear()
    assert read_columns(path).content() == FILE
    assert len(reads) == 2 and not caplog.text


def test_without_a_cache_it_works_and_says_so_once(cache, reads, write, caplog):
    cache.parent.write_text("no folder")
    path = write()
    assert read_columns(path).content() == FILE
    assert len(caplog.records) == 1 and str(path) in caplog.text


def test_files_that_are_not_ones_own_are_a_line(cache, write, caplog, monkeypatch):
    """The cache of another user, and then annotations of his."""
    path, opened = write(), Path.open

    def refuse(part):
        def not_yours(self, *options, **named):
            if part in self.parts:
                raise PermissionError(13, "Permission denied")
            return opened(self, *options, **named)

        return not_yours

    monkeypatch.setattr(Path, "open", refuse(cache.name))
    assert read_columns(path).content() == FILE and str(path) in caplog.text
    monkeypatch.setattr(Path, "open", refuse(path.name))
    with pytest.raises(DataError, match=r"a\.json: .*Permission denied"):
        read_columns(path)


def test_a_list_of_pictures_says_nothing_of_their_annotations(cache, tmp_path, write_layout):
    root = write_layout(tmp_path / "voc", "voc")
    path, one = root / "ImageSets" / "Main" / "train.txt", root / "Annotations" / "train0.xml"
    before = len(read_columns(path).boxes.ids)
    one.write_text("<annotation></annotation>")
    assert len(read_columns(path).boxes.ids) < before


def test_a_faulty_file_is_named_each_time_and_leaves_nothing(cache, write):
    path = write(FILE | {"annotations": [BOXES[0] | {"image_id": 99}]})
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.json: annotations\[0\]\.image_id: 99"):
            read_columns(path)
    assert not list(cache.glob("*.pt"))


def test_small_files_have_no_index(cache, monkeypatch, write):
    monkeypatch.setattr(index, "LEAST", 10**6)
    assert read_columns(write()).content() == FILE and not cache.exists()


def _open(path, results):
    index.LEAST = 1
    plain = index._read
    index._read = lambda path: results.put("read") or plain(path)
    results.put(len(read_columns(path).boxes.ids))


def test_of_processes_that_start_together_one_reads(cache, write):
    path, context = write(), multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in range(5)]
    for process in processes:
        process.join()
    assert sorted(map(str, found)) == ["20", "20", "20", "20", "read"] and results.empty()


def test_the_index_is_mapped_and_not_changed_by_a_data_set(cache, write, tmp_path):
    path = write(FILE | {"images": [{name: one[name] for name in ("id", "file_name")} for one in IMAGES]})
    for image in IMAGES:
        Image.new("RGB", (20, 10)).save(tmp_path / image["file_name"])
    read_columns(path)
    (kept,) = cache.glob("*.pt")
    before = kept.read_bytes()
    dataset = CocoDataset(tmp_path, path)
    assert dataset.sizes[1] == (20, 10) and dataset.dropped == sum(one["bbox"][0] >= 20 for one in BOXES)
    assert kept.read_bytes() == before and read_columns(path).images.sizes.max() == 0
