"""How files are read: deep pixels, files cut short, and sizes by the header; orientations stand in test_pictures."""

import numpy as np
import pytest
from PIL import Image

from detrlib.data.decoding import UNREADABLE, picture_size, read_picture


@pytest.mark.parametrize(
    ("kind", "brightest", "seen"),
    [
        *((np.uint16, 255, 255), (np.uint16, 4095, 255), (np.uint16, 4096, 16), (np.uint16, 65535, 255)),
        *((np.int32, 4000, 250), (np.float32, 1, 255), (np.float32, 0.5, 128), (np.float32, 200, 200)),
    ],
)
def test_deep_pixels_are_scaled_by_the_range_that_holds_the_brightest(tmp_path, kind, brightest, seen):
    pixels = np.zeros((4, 6), kind)
    pixels[0] = brightest
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    image, _ = read_picture(tmp_path / "deep.tif")
    assert image.mode == "RGB" and set(np.asarray(image)[0].ravel()) == {seen} and not np.asarray(image)[1:].any()


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e6, np.int32(-3), np.int32(70000)])
def test_numbers_that_are_no_pixels_are_refused(tmp_path, value):
    pixels = np.full((4, 4), value, np.int32 if isinstance(value, np.int32) else np.float32)
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"pixels go from.*8 or 16 bits"):
        read_picture(tmp_path / "deep.tif")


def test_a_jpeg_cut_short_is_read_on_request_and_nothing_else_is(tmp_path):
    for suffix in ("jpg", "png"):
        path = tmp_path / f"cut.{suffix}"
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError):
        read_picture(tmp_path / "cut.jpg")
    image, size = read_picture(tmp_path / "cut.jpg", truncated=True)
    assert size == (64, 64) and np.asarray(image)[:8].std() > 20 and np.asarray(image)[-8:].std() < 1
    with pytest.raises(UNREADABLE):
        read_picture(tmp_path / "cut.png", truncated=True)
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "absent.jpg", truncated=True)


def test_a_size_is_read_from_the_header_as_stored_or_upright(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 8
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=tag)
    assert picture_size(tmp_path / "turned.jpg") == (40, 20)
    assert picture_size(tmp_path / "turned.jpg", upright=True) == (20, 40)
