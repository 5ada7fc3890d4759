"""The page: everything in one file, nothing from outside, no markup from names, and maps and numbers as they are."""

import base64
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from detrlib.boxes import xyxy_to_cxcywh
from detrlib.figures.choices import cell_at
from detrlib.figures.page import (
    NUMBERS,
    STEPS,
    code_weights,
    page_picture,
    refresh_viewers,
    shown,
    write_page,
    write_viewer,
)
from detrlib.figures.predictions import MapChoice, views_of
from detrlib.metrics.localisation import paibb
from detrlib.metrics.sparsity import sparsity
from detrlib.runs.examples import load_examples

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">@NOTE@.png'


def scripts(text, kind):
    return [json.loads(found) for found in re.findall(rf'<script type="application/json" {kind}>(.*?)</script>', text)]


def unpacked(maps):
    """Weights [n,L,1+H,K] and numbers by name [n,L,1+H] of a site, as the page reads them."""
    codes, numbers = (gzip.decompress(base64.b64decode(maps[name])) for name in ("codes", "numbers"))
    shape = (-1, maps["layers"], 1 + maps["heads"])
    measured = np.frombuffer(numbers, "<f4").reshape(*shape, len(NUMBERS))
    codes = np.frombuffer(codes, np.uint8).reshape(*shape, int(np.prod(maps["keys"])))
    weights = np.where(codes > 0, measured[..., :1] * 2.0 ** ((codes.astype(float) - 255) / STEPS), 0)
    return weights, dict(zip(NUMBERS, np.moveaxis(measured, -1, 0), strict=True))


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


def test_names_are_text_and_never_markup(page):
    assert "alert(1)</script>" not in page and "<img src=x" not in page
    (picture,), (settings,) = scripts(page, 'class="picture"'), scripts(page, 'id="settings"')
    assert picture["detected"][0]["names"] == [HOSTILE, "circle", "square"] and "alert(1)" in picture["title"]
    assert picture["name"] == picture["title"]  # no folder of the machine it was made on
    assert settings["runs"] == ["first", HOSTILE] and set(settings["classes"]) == {"circle", HOSTILE}
    assert page.count("innerHTML") == 0 and "node.append(...content)" in page


def test_nothing_is_loaded_from_elsewhere(page):
    assert "default-src 'none'" in page
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page) + re.findall(r"https?://[^\s\"']+", page)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"@[A-Z]+@", page.replace("@NOTE@", "")), "a place that was not filled"


def test_pictures_boxes_and_maps_are_embedded(page, make_detected):
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
        assert np.allclose(top * 2.0 ** ((codes[2:].astype(float) - 255) / STEPS), weights[2:], rtol=0.04)
    assert not code_weights(np.zeros(3), np.array(0.0)).any()


# --- of runs ---------------------------------------------------------------------------------------------------


def test_the_viewer_of_a_run_tells_what_the_library_measures(evaluated_run):
    (path,) = refresh_viewers(evaluated_run)
    assert path == evaluated_run / "viewer.html" and refresh_viewers(evaluated_run) == []
    pictures = scripts(path.read_text(encoding="utf-8"), 'class="picture"')
    examples = load_examples(evaluated_run)
    assert [picture["name"] for picture in pictures] == [str(example.image_id) for example in examples]
    for picture, example in zip(pictures, examples, strict=True):
        assert len(picture["objects"]["boxes"]) == len(example.true_boxes)
        (detected,) = picture["detected"]
        for maps in detected["maps"]:
            weights, numbers = unpacked(maps)
            asking = detected["kept"]
            if maps["site"] == "encoder_self":
                asking = [cell_at(example, *example.boxes[row].reshape(2, 2).mean(0)) for row in asking]
            own = example.maps(maps["site"])[:, :, asking].transpose(2, 0, 1, *range(3, 3 + len(maps["keys"])))
            own = torch.from_numpy(np.concatenate([own.mean(2, keepdims=True), own], 2))
            told = sparsity(own.flatten(3))
            assert np.array_equal(weights > 0, own.flatten(3) > 0)
            assert np.allclose(weights, own.flatten(3), rtol=0.04)
            assert np.allclose(numbers["gini"], told["gini"], atol=1e-6)
            assert np.array_equal(1 - numbers["support"] / weights.shape[-1], told["zeros"])
            assert np.allclose(numbers["mass"], told["mass"], atol=1e-6)
            received = example.received(maps["site"], -1)
            assert np.allclose(maps["sinks"]["weights"][-1][1:], received.reshape(len(received), -1).max(-1), atol=1e-4)
            at_sink = own[:, -1, 2].flatten(1)[:, maps["sinks"]["keys"][-1][2]]
            assert np.array_equal(numbers["at_sink"][:, -1, 2], at_sink)
            if maps["site"] == "decoder_cross":
                height, width = example.image.shape[:2]
                rows = [row for row in detected["kept"] if example.matched[row] >= 0]
                boxes = example.true_boxes[example.matched[rows]] / np.array([width, height, width, height])
                boxes = xyxy_to_cxcywh(torch.from_numpy(boxes))
                at = [detected["kept"].index(row) for row in rows]
                shares = paibb(own[at], boxes, tuple(example.extent.tolist()))
                assert rows and np.allclose(numbers["paibb"][at], shares, atol=1e-5)


def test_a_viewer_is_written_again_after_an_evaluation_and_goes_with_its_examples(evaluated_run):
    (path,) = refresh_viewers(evaluated_run)
    os.utime(evaluated_run / "results.json", (path.stat().st_mtime + 5,) * 2)
    assert refresh_viewers(evaluated_run) == [path]
    frame = shown(path).data
    assert 'srcdoc="' in frame and frame.count('"') == 6, "a quotation mark of the page would end it"
    for example in (evaluated_run / "examples").glob("*.npz"):
        example.unlink()
    os.utime(evaluated_run / "results.json", (path.stat().st_mtime + 9,) * 2)
    assert refresh_viewers(evaluated_run) == [] and not path.exists()
    assert "no run stores examples" in shown(None).data


def test_images_of_other_data_are_no_images_of_these_though_their_numbers_are(evaluated_run, tmp_path):
    other, same = (Path(shutil.copytree(evaluated_run, tmp_path / name)) for name in ("other", "same"))
    for path in (other / "examples").glob("*.npz"):
        stored = dict(np.load(path))
        np.savez(path, **stored | {"image": np.rot90(255 - stored["image"])})
    text = write_viewer([evaluated_run, same, other], tmp_path / "viewer.html").read_text(encoding="utf-8")
    pictures = scripts(text, 'class="picture"')
    shows = sorted(tuple(detected is not None for detected in picture["detected"]) for picture in pictures)
    number = len(load_examples(evaluated_run))
    assert shows == [(False, False, True)] * number + [(True, True, False)] * number
