"""The page: everything in one file, nothing from outside, no markup from names, and maps and numbers as they are."""

import re
from pathlib import Path

import numpy as np
import pytest

from detrlib.errors import RunError
from detrlib.figures.page import STEPS, code_weights, page_example, page_picture, write_page
from detrlib.figures.predictions import MapChoice, views_of

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">@NOTE@.png'


@pytest.fixture
def page(tmp_path, make_detected):
    """The page of two runs and one picture, whose file and class have names that are markup."""
    picture = {"first": make_detected(), HOSTILE: make_detected(count=0)}
    picture["first"].source.source = Path("/nowhere") / HOSTILE.replace("/", "\u2215")
    picture["first"].names[0] = HOSTILE
    pictures = [page_picture(picture, np.zeros((64, 96, 3), dtype=np.uint8))]
    names = [{1: "circle", 2: HOSTILE}, {1: "circle"}]
    write_page(
        tmp_path / "index.html", pictures, list(picture), names, title=HOSTILE, note=HOSTILE, view=MapChoice(layer=0)
    )
    return (tmp_path / "index.html").read_text(encoding="utf-8")


def test_names_are_text_and_never_markup(page, scripts):
    assert "alert(1)</script>" not in page and "<img src=x" not in page
    (picture,), (settings,) = scripts(page, 'class="picture"'), scripts(page, 'id="settings"')
    assert picture["detected"][0]["names"] == [HOSTILE, "circle", "square"] and "alert(1)" in picture["title"]
    assert picture["name"] == picture["title"]  # no folder of the machine it was made on
    assert settings["runs"] == ["first", HOSTILE] and set(settings["classes"]) == {"circle", HOSTILE}
    assert page.count("&#64;NOTE&#64;.png") == 4, "as the title, a heading twice, and the note: no place to be filled"


def test_nothing_is_loaded_from_elsewhere(page):
    assert "default-src 'none'" in page
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page) + re.findall(r"https?://[^\s\"']+", page)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"@[A-Z]+@", page.replace("@NOTE@", "")), "a place that was not filled"


def test_pictures_boxes_and_maps_are_embedded(page, make_detected, scripts, unpacked):
    (picture,), (settings,) = scripts(page, 'class="picture"'), scripts(page, 'id="settings"')
    assert picture["source"].startswith("data:image/png;base64,") and picture["size"] == [64, 96]
    first, second = picture["detected"]
    assert np.allclose(first["boxes"][2], [60 / 96, 5 / 64, 20 / 96, 25 / 64], atol=1e-5)
    assert second == {"boxes": [], "scores": [], "names": [], "matched": []}
    (maps,), views = first["maps"], views_of(make_detected())
    assert [maps[name] for name in ("site", "layers", "heads", "keys")] == ["decoder_cross", 2, 3, [4, 6]]
    weights, _ = unpacked(maps)
    assert np.allclose(weights[1, 1, 2].reshape(4, 6), views["layer 2"][1, 2], rtol=0.04)
    assert np.array_equal(weights[1, 1, 2].reshape(4, 6) > 0, views["layer 2"][1, 2] > 0)
    assert settings["layer"] == 0 and settings["head"] == 0 and len(settings["colours"]) == 256


def test_photographs_are_embedded_small(make_detected):
    text = page_picture({"run": make_detected()}, np.zeros((600, 800, 3), dtype=np.uint8))
    assert "data:image/jpeg;base64," in text


def test_codes_of_weights_are_exact_about_zero_and_close_elsewhere():
    for top in (1.0, 0.003, 40.0):  # sigmoid's rows and those of ReLU may have weights above one
        weights = top * np.array([0.0, 1e-30, 2.0**-24, 1e-4, 0.03, 0.5, 1.0])
        codes = code_weights(weights, np.array(top))
        assert codes[0] == 0 and (codes[1:] > 0).all() and codes[-1] == 255
        told, least = top * 2.0 ** ((codes.astype(float) - 255) / STEPS), codes == 1
        assert np.allclose(told[2:], weights[2:], rtol=0.04)
        assert least[1] and (told[least] >= 0.96 * weights[least]).all(), "of the lowest code a bound is told"
    assert not code_weights(np.zeros(3), np.array(0.0)).any()


@pytest.mark.parametrize("what", ["scores", "boxes", "maps"])
def test_a_run_whose_numbers_are_not_finite_is_named_with_the_image(make_example, make_detected, what):
    example, detected = make_example(), make_detected()
    for faulty in (example, detected, detected.example):
        if what != "maps":
            getattr(faulty, what).flat[1] = np.nan
        elif faulty is not detected:
            faulty.stored["decoder_cross"][0, 0, 0, 0] = np.nan
    with pytest.raises(RunError, match=r"^other: .*image 7"):
        page_example({"run": make_example(), "other": example}, {"run": {}, "other": {}})
    with pytest.raises(RunError, match=r"^other: .*picture 1"):
        page_picture({"run": make_detected(), "other": detected}, np.zeros((64, 96, 3), dtype=np.uint8))
