"""The viewer of a run: what stands in it is the library's, and it is as new as its results."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from detrlib.boxes import xyxy_to_cxcywh
from detrlib.figures.choices import cell_at
from detrlib.figures.viewer import refresh_viewers, shown, write_viewer
from detrlib.metrics.localisation import paibb
from detrlib.metrics.sparsity import sparsity
from detrlib.runs.examples import load_examples
from detrlib.runs.folder import load_results


def test_the_viewer_of_a_run_tells_what_the_library_measures(evaluated_run, scripts, unpacked):
    (path,) = refresh_viewers(evaluated_run)
    assert path == evaluated_run / "viewer.html" and refresh_viewers(evaluated_run) == []
    pictures = scripts(path.read_text(encoding="utf-8"), 'class="picture"')
    examples = load_examples(evaluated_run)
    evaluated = load_results(evaluated_run)["images"]
    assert f"These are {len(examples)} of {evaluated} evaluated images." in path.read_text(encoding="utf-8")
    assert len(examples) < evaluated
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
    assert "Trust Notebook, or open viewer.html</iframe>" in frame
    for example in (evaluated_run / "examples").glob("*.npz"):
        example.unlink()
    os.utime(evaluated_run / "results.json", (path.stat().st_mtime + 9,) * 2)
    assert refresh_viewers(evaluated_run) == [] and not path.exists()
    assert "no run stores examples" in shown(None).data


def test_images_of_other_data_are_no_images_of_these_though_their_numbers_are(evaluated_run, tmp_path, scripts):
    other, same, more = (Path(shutil.copytree(evaluated_run, tmp_path / name)) for name in ("other", "same", "more"))
    for path in (other / "examples").glob("*.npz"):
        stored = dict(np.load(path))
        np.savez(path, **stored | {"image": np.rot90(255 - stored["image"])})
    for path in (more / "examples").glob("*.npz"):  # the same pictures, in which other things are annotated
        stored = dict(np.load(path))
        np.savez(path, **stored | {"true_boxes": stored["true_boxes"] / 2})
    text = write_viewer([evaluated_run, same, other, more], tmp_path / "viewer.html").read_text(encoding="utf-8")
    pictures = scripts(text, 'class="picture"')
    shows = sorted(tuple(detected is not None for detected in picture["detected"]) for picture in pictures)
    number = len(load_examples(evaluated_run))
    each = [(False, False, False, True), (False, False, True, False), (True, True, False, False)]
    assert shows == [one for one in each for _ in range(number)]
