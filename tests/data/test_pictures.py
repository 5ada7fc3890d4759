"""Pictures as people have them: which are meant, how they are read, and one line for those that cannot be."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from detrlib.data import decoding
from detrlib.data.decoding import read_picture
from detrlib.data.pictures import are_pictures, find_pictures, pictures_folder, readable
from detrlib.errors import DataError


@pytest.fixture
def colours():
    """A picture of 40 x 20 pixels whose left half is red and whose right half is blue."""
    array = np.zeros((20, 40, 3), dtype=np.uint8)
    array[:, :20, 0], array[:, 20:, 2] = 255, 255
    return Image.fromarray(array)


def read(path):
    (picture,) = find_pictures(path)
    return picture.read()


# --- how they are read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_and_data_sets_keep_stored_pixels(tmp_path, colours, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    colours.save(tmp_path / f"turned.{suffix}", exif=exif)
    image, size = read(tmp_path / f"turned.{suffix}")
    assert size == image.size[::-1] == ((40, 20) if orientation >= 5 else (20, 40))
    # Where EXIF's eight orientations say that the left side of the stored picture is seen.
    side = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}[orientation]
    x, y = {"left": (5, 10), "right": (35, 10), "top": (10, 5), "bottom": (10, 35)}[side]
    red, _, blue = image.getpixel((x, y))
    assert red > 200 and blue < 60
    if suffix == "tiff":  # which Pillow turns itself
        return
    stored, size = read_picture(tmp_path / f"turned.{suffix}")
    assert size == (20, 40) and stored.getpixel((5, 10))[0] > 200


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path, colours, mode):
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(colours.convert("L")).astype(np.uint16) * 257)
    else:
        picture = colours.convert(mode)
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    picture.save(path)
    image, size = read(path)
    assert image.mode == "RGB" and size == (20, 40)
    wanted = np.asarray(picture.convert("L") if mode != "I;16" else colours.convert("L")).astype(int)
    assert np.abs(np.asarray(image.convert("L")).astype(int) - wanted)[:, 5].max() < 12


def test_huge_pictures_are_reduced_and_keep_their_size(tmp_path, colours, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    big = colours.resize((800, 400), Image.Resampling.NEAREST)
    big.save(tmp_path / "huge.jpg", exif=exif)
    big.save(tmp_path / "huge.png")
    monkeypatch.setattr(decoding, "MOST_PIXELS", 100_000)
    monkeypatch.setattr(decoding, "REDUCED", 20_000)
    image, size = read(tmp_path / "huge.jpg")
    assert size == (800, 400) and image.width < 150 and image.getpixel((10, 10))[0] > 200
    image, size = read(tmp_path / "huge.png")
    assert size == (400, 800) and image.width < 250
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # Pillow's own limit, which no JPEG needs
    assert read(tmp_path / "huge.jpg")[1] == (800, 400)
    with pytest.raises(DataError, match=r"huge\.png: too many pixels"):
        read(tmp_path / "huge.png")


def test_a_picture_is_reduced_for_drawing(colours):
    (picture,) = find_pictures(colours)
    assert picture.pixels(10).shape == (5, 10, 3) and picture.pixels(1000).shape == (20, 40, 3)


# --- which are meant -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, colours):
    """Pictures, and what is none."""
    (tmp_path / "within").mkdir()
    for name in ("b.jpg", "a.PNG", ".hidden.jpg", "within/c.jpg"):
        colours.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("none")
    return tmp_path


def names(pictures):
    return [picture.title for picture in pictures]


def test_files_folders_and_patterns(folder):
    assert names(find_pictures(folder)) == ["a.PNG", "b.jpg"]
    assert names(find_pictures([folder / "b.jpg", str(folder)])) == ["b.jpg", "a.PNG"], "each file once"
    assert names(find_pictures(f"{folder}/**/*.jpg")) == ["b.jpg", "c.jpg"]
    assert names(find_pictures(folder, limit=1)) == ["a.PNG"]
    assert [picture.image_id for picture in find_pictures(folder)] == [1, 2]


def test_a_name_with_signs_of_a_pattern_is_a_file_where_there_is_one(folder, colours):
    colours.save(folder / "what[1].png")
    assert names(find_pictures(folder / "what[1].png")) == ["what[1].png"]


def test_files_that_are_named_by_numbers_have_them_for_ids(tmp_path, colours):
    for name in ("000000000139.png", "7.png"):
        colours.save(tmp_path / name)
    assert [picture.image_id for picture in find_pictures(tmp_path)] == [139, 7]
    colours.save(tmp_path / "007.png")
    assert [picture.image_id for picture in find_pictures(tmp_path)] == [1, 2, 3], "two would be the same"


def test_what_is_not_there_is_named(folder):
    with pytest.raises(DataError, match=r"c\.jpg: there is no such file"):
        find_pictures(folder / "c.jpg")
    with pytest.raises(DataError, match=r"\*\.gif: no picture matches"):
        find_pictures(f"{folder}/*.gif")
    os.mkfifo(folder / "pipe.jpg")  # to read it would be to wait for a writer
    with pytest.raises(DataError, match=r"pipe\.jpg: neither"):
        find_pictures(folder / "pipe.jpg")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no pictures"):
        find_pictures(folder / "empty")
    (folder / "outer").mkdir()
    (folder / "within").rename(folder / "outer" / "within")
    with pytest.raises(DataError, match="some in within"):
        find_pictures(folder / "outer")
    with pytest.raises(DataError, match="no pictures are given"):
        find_pictures([])


def test_lists_of_images_without_annotations(tmp_path, colours):
    """As COCO publishes them for its test images: sizes refer to stored pixels, as annotations would."""
    (tmp_path / "test2017").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.save(tmp_path / "test2017" / "one.jpg", exif=exif)
    colours.save(tmp_path / "test2017" / "two.jpg")
    path = tmp_path / "annotations" / "image_info_test2017.json"
    path.parent.mkdir()
    images = [{"id": 9, "file_name": "two.jpg"}, {"id": 3, "file_name": "one.jpg", "width": 40, "height": 20}]
    path.write_text(json.dumps({"images": images, "categories": []}))
    listed = find_pictures(path)
    assert [(p.image_id, p.title, p.read()[1]) for p in listed] == [(3, "one.jpg", (20, 40)), (9, "two.jpg", (20, 40))]
    images[1] |= {"width": 20, "height": 40}  # as annotated where programs show it
    path.write_text(json.dumps({"images": images}))
    image, size = find_pictures(path)[0].read()
    assert size == image.size[::-1] == (40, 20)
    (tmp_path / "images").mkdir()
    (tmp_path / "test2017").rename(tmp_path / "images" / "test2017")
    assert find_pictures(path)[0].source == tmp_path / "images" / "test2017" / "one.jpg"
    images[1] |= {"width": 41, "height": 20}
    path.write_text(json.dumps({"images": images}))
    with pytest.raises(DataError, match=r"one\.jpg: 40 x 20 pixels, its list says 41 x 20"):
        find_pictures(path)[0].read()
    path.write_text(json.dumps({"images": [{"id": 3}]}))
    with pytest.raises(DataError, match=r"image_info_test2017\.json.*file_name"):
        find_pictures(path)
    with pytest.raises(DataError, match=r"elsewhere"):
        pictures_folder(path, "one.jpg", tmp_path / "elsewhere")


def test_pictures_in_memory(colours):
    array = np.asarray(colours)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for given in (colours, array, tensor, tensor / 255, np.dstack([array, array[..., 0]])):
        (picture,) = find_pictures(given)
        image, size = picture.read()
        assert size == (20, 40) and np.array_equal(np.asarray(image), array), type(given)
        assert (picture.name, picture.image_id) == ("picture 1", 1)
    assert len(find_pictures([array, tensor])) == 2
    assert len(find_pictures(np.stack([array, array]))) == 2, "a batch is several"
    grey = find_pictures([array[..., 0], tensor[:1]])
    assert all(np.array_equal(np.asarray(one.read()[0])[..., 1], array[..., 0]) for one in grey)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([np.zeros((4, 4, 3))], "float64"),
        ([np.zeros((4, 4, 5), dtype=np.uint8)], r"\[4, 4, 5\]"),
        ([np.zeros((0, 4, 3), dtype=np.uint8)], r"\[0, 4, 3\]"),
        ([torch.full((3, 4, 4), -1.0)], "normalised"),
        ([np.zeros((4, 4, 3), dtype=np.uint8), None], "picture 2: a NoneType"),
    ],
)
def test_what_is_no_picture_in_memory_is_named(given, words):
    with pytest.raises(DataError, match=words):
        find_pictures(given)


# --- which can be read -----------------------------------------------------------------------------------------


def test_unreadable_files_are_named_together_before_any_is_decoded(folder, colours):
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    good, faults = readable(find_pictures(folder))
    assert names(good) == ["a.PNG", "b.jpg"] and set(faults) == {str(folder / n) for n in ("empty.png", "text.jpg")}
    with pytest.raises(DataError, match=r"text\.jpg: not a picture"):
        readable(find_pictures(folder / "text.jpg"))
    content = (folder / "b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut\.jpg: not readable"):
        read(folder / "cut.jpg")


def test_words_that_name_pictures(folder, colours):
    colours.save(folder / "no-suffix", "PNG")
    for word in (folder, folder / "b.jpg", folder / "no-suffix", f"{folder}/*.jpg", folder / "within"):
        assert are_pictures(str(word)), word
    for word in (folder / "notes.txt", folder / "absent.jpg", f"{folder}/*.gif", "detr-r50"):
        assert not are_pictures(str(word)), word


@pytest.mark.parametrize("given", [None, 3])
def test_what_is_neither_a_picture_nor_several_is_refused(given):
    with pytest.raises(DataError, match=f"picture 1: a {type(given).__name__}"):
        find_pictures(given)
