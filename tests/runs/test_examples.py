"""Examples come back as they were stored, with maps of their queries."""

import dataclasses

import numpy as np
import pytest

from detrlib import runs
from detrlib.errors import RunError
from detrlib.runs.examples import Example, save_example
from detrlib.runs.maps import MapWriter, as_half, clear_maps, pack


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def stored(tmp_path):
    """A run folder with two examples, one of them without queries, and the maps of every query of both."""
    random = np.random.default_rng(0)
    examples, maps = [], {}
    with MapWriter(tmp_path) as writer:
        for image_id, queries in ((581929, [4, 0, 2]), (7, [])):
            examples.append(
                Example(
                    image_id=image_id,
                    image=random.integers(0, 255, (6, 8, 3)).astype(np.uint8),
                    true_boxes=random.random((2, 4), dtype=np.float32),
                    true_labels=np.array([1, 5]),
                    boxes=random.random((len(queries), 4), dtype=np.float32),
                    labels=np.arange(len(queries)),
                    scores=random.random(len(queries), dtype=np.float32),
                    matched=np.full(len(queries), -1),
                    queries=np.array(queries, dtype=np.int64),
                    extent=np.array([2.5, 4.0], dtype=np.float32),
                )
            )
            shapes = {"decoder_cross": (2, 4, 5, 3, 4), "encoder_self": (1, 4, 12, 3, 4), "decoder_self": (2, 4, 5, 5)}
            maps[image_id] = {site: as_half(random.random(shape)) for site, shape in shapes.items()}
            sites = {site: [pack(layer) for layer in layers] for site, layers in maps[image_id].items()}
            writer.add(image_id, examples[-1].extent, sites)
            save_example(tmp_path, examples[-1])
    return tmp_path, examples, maps


def test_examples_come_back_as_they_were_stored_with_the_maps_of_their_queries(stored):
    run_dir, examples, maps = stored
    assert files(run_dir / "examples") == ["000000000007.npz", "000000581929.npz"]
    loaded = runs.load_examples(run_dir)
    assert [example.image_id for example in loaded] == [7, 581929]
    for back, example in zip(loaded, reversed(examples), strict=True):
        assert isinstance(back.image_id, int)
        for field in dataclasses.fields(Example)[1:-2]:
            before, after = getattr(example, field.name), getattr(back, field.name)
            assert before.dtype == after.dtype and np.array_equal(before, after), field.name
        of_image = maps[back.image_id]
        assert np.array_equal(back.maps(), of_image["decoder_cross"][:, :, example.queries])
        assert np.array_equal(back.maps("decoder_self"), of_image["decoder_self"][:, :, example.queries])
        assert np.array_equal(back.maps("encoder_self"), of_image["encoder_self"])
        for site, layers in of_image.items():  # of all queries, also where no detection is kept
            rows = layers[0].reshape(*layers.shape[1:3], -1).astype(np.float64)
            shares = rows / np.maximum(rows.sum(-1, keepdims=True), 1)
            np.testing.assert_allclose(back.received(site, 0).reshape(4, -1), shares.mean(1), rtol=1e-5)
        for site in back.sites:
            assert back.shape(site) == back.maps(site).shape
            assert np.array_equal(back.maps(site, -1), back.maps(site)[-1])


def test_maps_are_magnitudes_and_the_store_keeps_signs(stored):
    run_dir, (example, _), maps = stored
    clear_maps(run_dir)
    signed = maps[example.image_id]["decoder_cross"] - np.float16(0.5)
    with MapWriter(run_dir) as writer:
        writer.add(example.image_id, example.extent, {"decoder_cross": [pack(layer) for layer in signed]})
    (run_dir / "examples" / "000000000007.npz").unlink()
    (back,) = runs.load_examples(run_dir)
    assert np.array_equal(back.stored.maps(back.image_id), signed) and (signed < 0).any()
    assert np.array_equal(back.maps(), np.abs(signed[:, :, example.queries]))
    assert np.array_equal(back.maps(layer=1), back.maps()[1])
    in_memory = dataclasses.replace(back, stored={"decoder_cross": signed})
    assert np.array_equal(in_memory.maps(), np.abs(signed))


def test_examples_are_not_loaded_without_their_maps(stored, tmp_path):
    run_dir, *_ = stored
    with pytest.raises(RunError, match="holds no examples; evaluate it first"):
        runs.load_examples(tmp_path / "other")
    with MapWriter(run_dir) as writer:
        writer.add(581929, (3, 4), {"decoder_cross": [pack(np.ones((4, 5, 3, 4)))]})
    with pytest.raises(RunError, match="maps of image 7 are not stored"):
        runs.load_examples(run_dir)
    (run_dir / "examples" / "000000000007.npz").unlink()
    (example,) = runs.load_examples(run_dir)
    with pytest.raises(
        RunError, match="maps of encoder_self are not stored of image 581929, only of decoder_cross; add"
    ):
        example.maps("encoder_self")
    clear_maps(run_dir)
    with pytest.raises(RunError, match="holds no attention maps; evaluate it again"):
        runs.load_examples(run_dir)


def test_a_damaged_example_is_named(stored):
    run_dir, *_ = stored
    path = run_dir / "examples" / "000000000007.npz"
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    for content in (b"PK cut short", b"", changed):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"000000000007\.npz"):
            runs.load_examples(run_dir)


def test_examples_of_earlier_versions_ask_for_another_evaluation(stored):
    run_dir, *_ = stored
    path = run_dir / "examples" / "000000000007.npz"
    with np.load(path) as file:
        values = {name: file[name] for name in file.files if name != "queries"}
    np.savez_compressed(path, **values, maps=np.zeros((2, 4, 0, 3, 4), dtype=np.float16))
    with pytest.raises(RunError, match=r"000000000007\.npz was written before .* evaluate the run again"):
        runs.load_examples(run_dir)
