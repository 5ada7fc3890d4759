"""The attention store: maps come back as they went in, whole parts or none, and nothing else is read."""

import errno
import json
import math
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator

from detrlib.data import build_dataset, collate
from detrlib.data.batch import Shared
from detrlib.engine.evaluate import evaluate
from detrlib.errors import ConfigError, RunError
from detrlib.losses import Criterion, match
from detrlib.models import build_model
from detrlib.runs import maps as store
from detrlib.runs.examples import Recorder, load_examples, recorder
from detrlib.runs.maps import SMALLEST, AttentionStore, MapWriter, as_half, clear_maps, pack

FULL = OSError(errno.ENOSPC, "No space left on device")


def sparse_maps(*shape, support=0.05, seed=0):
    """Maps [...,K] that sum to one over about `support` of the keys, float32."""
    random = np.random.default_rng(seed)
    weights = random.random(shape, dtype=np.float32) * (random.random(shape) < support)
    weights[..., 0, 0] += 1e-3  # no row without weight
    return weights / weights.sum((-2, -1), keepdims=True)


def write(run_dir, images, **part):
    """A store of {image id: {site: maps}}; the last cells of every grid reach half beyond the image."""
    with MapWriter(run_dir, **part) as writer:
        for image_id, sites in images.items():
            extent = np.array(next(iter(sites.values())).shape[-2:]) - 0.5
            writer.add(image_id, extent, {site: [pack(layer) for layer in layers] for site, layers in sites.items()})
    return run_dir


IMAGES = {
    9: {"decoder_cross": sparse_maps(3, 2, 5, 6, 7), "decoder_self": sparse_maps(3, 2, 5, 5, seed=1)},
    4: {"decoder_cross": sparse_maps(3, 2, 5, 4, 9, support=0.6, seed=2)},  # sparse rows and dense ones
    70000000000: {"decoder_cross": sparse_maps(3, 2, 5, 1, 1, support=1.0, seed=3)},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write(tmp_path_factory.mktemp("store"), IMAGES)


# --- packing ---------------------------------------------------------------------------------------------------


def test_half_precision_rounds_to_nearest_and_keeps_the_support():
    tiny = np.float32([0, 1e-45, 2**-26, 2**-25, 2**-24, 1.4 * 2**-24, 2**-14, 0.1, 1, -1e-12])
    half = as_half(tiny)
    assert half.dtype == np.float16 and ((half != 0) == (tiny != 0)).all()
    assert half[1] == half[2] == half[3] == half[4] == half[5] == SMALLEST == -half[-1]
    assert np.nextafter(np.float16(0), np.float16(1)) == SMALLEST  # nothing lies between it and zero
    weights = 10.0 ** np.random.default_rng(0).uniform(-12, 0, 20000)
    error = np.abs(as_half(weights).astype(np.float64) - weights)
    normal, lost = weights >= 2**-14, weights < 2**-25
    assert (error[normal] <= weights[normal] * 2**-11).all()
    assert (error[~normal & ~lost] <= 2**-25).all() and (error[lost] < 2**-24).all()


def test_signs_of_weights_are_kept(tmp_path):
    maps = sparse_maps(2, 3, 4, 5, 6) * np.sign(np.random.default_rng(1).standard_normal((2, 3, 4, 5, 6)))
    found = AttentionStore(write(tmp_path, {1: {"decoder_cross": maps}})).maps(1)
    assert (np.sign(found) == np.sign(maps)).all() and (found < 0).any()
    np.testing.assert_allclose(found, maps, rtol=2**-11, atol=2**-24)


def test_rows_that_do_not_sum_to_one_come_back_as_they_are(tmp_path):
    """Beside a null key, which may take all of a row, and of sigmoid, whatever their size."""
    maps = sparse_maps(1, 2, 3, 5, 6)
    maps[0, 0] *= 0.3
    maps[0, 0, 1] = 0.0
    maps[0, 1] *= 30.0
    found = AttentionStore(write(tmp_path, {1: {"decoder_cross": maps}})).maps(1)
    np.testing.assert_allclose(found.sum((-2, -1)), maps.sum((-2, -1)), rtol=2**-10)
    assert not found[0, 0, 1].any() and found[0, 1].sum((-2, -1)).min() > 1
    assert as_half(np.array([1e9, -1e9])).tolist() == [65504.0, -65504.0]


def test_rows_are_dense_where_that_is_smaller():
    maps = np.zeros((2, 2, 2, 4), dtype=np.float32)
    maps[0, 0] = 0.125  # all eight cells
    maps[0, 1, 0, :] = 0.25  # four
    maps[1, 0, :, 0] = 0.2, 0.3
    packed = pack(maps)
    assert packed.shape == (2, 2, 2, 4)
    assert packed.indices.to_pylist() == [None, [0, 1, 2, 3], [0, 4], []]
    assert [len(row) for row in packed.weights.to_pylist()] == [8, 4, 2, 0]


@pytest.mark.parametrize("support", [0.0, 0.02, 0.3, 0.7, 1.0])
def test_maps_of_any_support_survive(tmp_path, support):
    random = np.random.default_rng(1)
    maps = 10.0 ** random.uniform(-12, 0, (2, 3, 7, 5, 11)) * (random.random((2, 3, 7, 5, 11)) < support)
    write(tmp_path, {1: {"decoder_cross": maps}})
    back = AttentionStore(tmp_path).maps(1)
    assert ((back != 0) == (maps != 0)).all()
    assert np.array_equal(back, as_half(maps).astype(np.float32))


# --- reading ---------------------------------------------------------------------------------------------------


def test_what_is_stored_comes_back(run_dir):
    opened = AttentionStore(run_dir)
    assert opened.images == [4, 9, 70000000000]
    for image_id, sites in IMAGES.items():
        h, w = sites["decoder_cross"].shape[-2:]
        assert opened.shape(image_id)[3:] == (h, w)
        assert opened.sites(image_id) == list(sites)
        for site, maps in sites.items():
            back = opened.maps(image_id, site)
            assert opened.shape(image_id, site) == maps.shape == back.shape and back.dtype == np.float32
            assert np.array_equal(back, as_half(maps).astype(np.float32))


@pytest.mark.parametrize("cells", [2**21, 0], ids=["row group per image", "row group per layer"])
@pytest.mark.parametrize(
    "choice, wanted",
    [
        ((None, None, None), ([0, 1, 2], [0, 1], [0, 1, 2, 3, 4])),
        ((1, 0, 3), ([1], [0], [3])),
        ((-1, [-1], [4, 0, 0]), ([2], [1], [4, 0, 0])),
        (([2, 0, 2], slice(None), slice(None, None, 2)), ([2, 0, 2], [0, 1], [0, 2, 4])),
        ((range(1, 3), np.array([1, 0]), np.arange(5) % 2 == 1), ([1, 2], [1, 0], [1, 3])),
        ((slice(0, 0), None, 1), ([], [0, 1], [1])),
        ((1, None, []), ([1], [0, 1], [])),
    ],
)
def test_layers_heads_and_queries_are_chosen_as_in_numpy(tmp_path, monkeypatch, cells, choice, wanted):
    monkeypatch.setattr(store, "ROW_GROUP_CELLS", cells)
    write(tmp_path, {9: IMAGES[9]})
    (path,) = tmp_path.glob("maps/*")
    assert pq.ParquetFile(path).num_row_groups == (2 if cells else 6)
    for site, maps in IMAGES[9].items():
        axes = np.ix_(*(np.array(numbers, dtype=int) for numbers in wanted))
        assert np.array_equal(AttentionStore(tmp_path).maps(9, site, *choice), as_half(maps)[axes])


def test_one_image_is_read_without_the_others(tmp_path):
    """Every byte of the other images is overwritten after the store is written."""
    write(tmp_path, IMAGES)
    (path,) = tmp_path.glob("maps/*")
    file = pq.ParquetFile(path).metadata
    content = bytearray(path.read_bytes())
    for number in range(file.num_row_groups):
        for column in range(file.num_columns):
            chunk = file.row_group(number).column(column)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            if file.row_group(number).column(0).statistics.min != 4:
                content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    opened = AttentionStore(tmp_path)
    assert np.array_equal(opened.maps(4), as_half(IMAGES[4]["decoder_cross"]))
    with pytest.raises(RunError, match="maps of image 9 are damaged"):
        opened.maps(9)


def test_any_reader_of_parquet_finds_the_maps(run_dir):
    """The layout as the module describes it, with pandas and one row at a time."""
    (path,) = run_dir.glob("maps/*")
    described = json.loads(pq.read_metadata(path).metadata[b"detrlib"])
    shapes = {image["image_id"]: {s: v["shape"] for s, v in image["sites"].items()} for image in described["images"]}
    back = {image: {site: np.zeros(shape) for site, shape in sites.items()} for image, sites in shapes.items()}
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["image_id", "site", "layer", "head", "query", "indices", "weights"]
    assert not frame.duplicated(["image_id", "site", "layer", "head", "query"]).any()
    assert set(frame.indices.isna()) == {True, False}  # dense rows and sparse ones
    for row in frame.itertuples():
        row_of = back[row.image_id][row.site][row.layer, row.head, row.query].reshape(-1)
        row_of[slice(None) if row.indices is None else row.indices] = row.weights
    for image_id, sites in IMAGES.items():
        for site, maps in sites.items():
            assert np.array_equal(back[image_id][site], as_half(maps))


def test_sparse_maps_take_a_tenth_of_dense_ones(tmp_path):
    maps = {number: {"decoder_cross": sparse_maps(3, 8, 20, 16, 16, support=0.04, seed=number)} for number in range(8)}
    write(tmp_path, maps)
    (path,) = tmp_path.glob("maps/*")
    assert path.stat().st_size < 8 * 3 * 8 * 20 * 256 * 2 / 10


# --- what is not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, message",
    [
        ((5,), "maps of image 5 are not stored in .*, but of 3 others .4, 9, 70000000000.; set evaluate.store_maps"),
        ((4, "decoder_self"), "maps of decoder_self are not stored of image 4 in .*, only of decoder_cross; add it"),
        ((9, "decoder_cross", 3), "no layer 3 at decoder_cross of image 9 in .*: there are 3, 0 to 2"),
        ((9, "decoder_cross", None, [0, -3]), r"no head \[0, -3\] at decoder_cross .*: there are 2, 0 to 1"),
        ((9, "decoder_self", None, None, 5), "no query 5 at decoder_self .*: there are 5, 0 to 4"),
    ],
)
def test_what_is_not_stored_is_named_with_what_is(run_dir, asked, message):
    with pytest.raises(RunError, match=message):
        AttentionStore(run_dir).maps(*asked)


def test_stores_that_are_none(tmp_path):
    with pytest.raises(RunError, match=r"holds no attention maps; evaluate it again .* evaluate.store_maps above 0"):
        AttentionStore(tmp_path)
    write(tmp_path, {1: IMAGES[4]}, part=1, parts=3)
    with pytest.raises(RunError, match="maps holds 1 of 3 parts"):
        AttentionStore(tmp_path)
    clear_maps(tmp_path)
    path = tmp_path / "maps" / "part-00000-of-00001.parquet"
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(
        RunError, match=r"part-00000-of-00001.parquet is no whole part of an attention store .*evaluate the run"
    ):
        AttentionStore(tmp_path)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(RunError, match="is no whole part of an attention store"):
        AttentionStore(tmp_path)


def test_parts_of_several_processes_are_one_store(tmp_path):
    write(tmp_path, {9: IMAGES[9]}, part=0, parts=3)
    write(tmp_path, {4: IMAGES[4]}, part=1, parts=3)
    write(tmp_path, {}, part=2, parts=3)  # fewer images than processes
    opened = AttentionStore(tmp_path)
    assert opened.images == [4, 9]
    for image_id in opened.images:
        assert np.array_equal(opened.maps(image_id), as_half(IMAGES[image_id]["decoder_cross"]))


# --- writing ---------------------------------------------------------------------------------------------------


def test_an_error_leaves_no_part_and_nothing_temporary(tmp_path):
    with pytest.raises(KeyboardInterrupt), MapWriter(tmp_path) as writer:
        writer.add(1, (4, 9), {"decoder_cross": [pack(IMAGES[4]["decoder_cross"][0])]})
        assert len(list((tmp_path / "maps").iterdir())) == 1
        raise KeyboardInterrupt
    assert list((tmp_path / "maps").iterdir()) == []


def test_a_store_of_no_images_is_none_and_files_are_readable_by_others(tmp_path):
    write(tmp_path, {})
    assert list((tmp_path / "maps").iterdir()) == []
    write(tmp_path, IMAGES)
    (path,) = (tmp_path / "maps").iterdir()
    assert path.name == "part-00000-of-00001.parquet" and path.stat().st_mode & 0o777 == 0o644


def test_no_image_is_stored_twice_and_layers_are_alike(tmp_path):
    with MapWriter(tmp_path) as writer:
        writer.add(1, (2, 2), {"decoder_cross": [pack(np.ones((1, 2, 2, 2)))]})
        with pytest.raises(ValueError, match="image 1 is stored already"):
            writer.add(1, (2, 2), {"decoder_cross": [pack(np.ones((1, 2, 2, 2)))]})
        with pytest.raises(ValueError, match="the layers of decoder_cross have the shapes"):
            writer.add(2, (2, 2), {"decoder_cross": [pack(np.ones((1, n, 2, 2))) for n in (2, 3)]})
    assert AttentionStore(tmp_path).images == [1]


@pytest.mark.parametrize("place", [(pq.ParquetWriter, "write_table"), (pq.ParquetWriter, "close"), (os, "replace")])
def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path, monkeypatch, place):
    real = getattr(*place)

    def failing(*arguments, **named):
        monkeypatch.setattr(*place, real)
        raise FULL

    monkeypatch.setattr(*place, failing)
    with pytest.raises(RunError, match=r"could not write .*part-00000-of-00001\.parquet: .*No space left.*free some"):
        write(tmp_path, IMAGES)
    assert list((tmp_path / "maps").iterdir()) == []


# --- what an evaluation stores ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def evaluated(tiny_config):
    def evaluated(run_dir, overrides=None, **model):
        """A model that is not trained, its results, and the data set that it was evaluated on."""
        model = {"model.attention.decoder_cross": "entmax15"} | {f"model.{k}": v for k, v in model.items()}
        cfg = tiny_config({"model.num_classes": 7, **model, **(overrides or {})})
        torch.manual_seed(0)
        model, dataset = build_model(cfg.model).eval(), build_dataset(cfg.data, "val")
        return model, evaluate(model, dataset, cfg, Accelerator(), run_dir=run_dir)[0], dataset

    return evaluated


SITES = ["decoder_cross", "decoder_self", "encoder_self"]


def test_maps_of_a_whole_data_set_are_those_of_the_model(tmp_path, evaluated):
    overrides = {"evaluate.store_maps": "all", "evaluate.store_sites": SITES, "evaluate.batch_size": 5}
    model, results, dataset = evaluated(tmp_path, overrides)
    opened = AttentionStore(tmp_path)
    ids = [dataset[number][1]["image_id"] for number in range(len(dataset))]
    assert opened.images == sorted(ids) and len(ids) == 13
    batch = collate([dataset[number] for number in range(13)])
    with torch.no_grad():
        maps = model(batch.images, batch.padding_mask, need_attention=True).attention
    for site in SITES:
        wanted = torch.stack(list(getattr(maps, site)), 1).numpy()  # [B,L,H,n,K]
        for index, image_id in enumerate(ids):
            back = opened.maps(image_id, site)
            assert opened.sites(image_id) == SITES
            np.testing.assert_allclose(back.reshape(wanted[index].shape), wanted[index], rtol=2**-10, atol=2e-6)
    whole = torch.tensor(np.stack([opened.maps(image_id) for image_id in ids]))  # [B,L,H,Q,h,w]
    support = (whole > 0).sum((-2, -1)).float().mean((0, 2, 3))
    assert support.tolist() == pytest.approx(results["attention"]["decoder_cross"]["support"], rel=1e-5)


def test_examples_alone_are_stored_by_default_and_an_earlier_evaluation_is_forgotten(tmp_path, evaluated):
    *_, dataset = evaluated(tmp_path, {"evaluate.store_maps": 3})
    first = [dataset[number][1]["image_id"] for number in range(3)]
    assert AttentionStore(tmp_path).images == sorted(first) and len(load_examples(tmp_path)) == 2
    evaluated(tmp_path)
    opened, examples = AttentionStore(tmp_path), load_examples(tmp_path)
    assert opened.images == sorted(first[:2]) == [example.image_id for example in examples]
    for example in examples:
        assert example.shape()[:3] == (2, 4, len(example.scores))
        assert np.array_equal(example.maps(), opened.maps(example.image_id, queries=example.queries))
        assert example.extent.tolist() == list(example.shape()[3:])
    evaluated(tmp_path, {"evaluate.examples": 0})
    assert list((tmp_path / "maps").iterdir()) == list((tmp_path / "examples").iterdir()) == []


class Process:
    """What a recorder asks of one of several processes."""

    def __init__(self, number, count):
        self.process_index, self.num_processes, self.is_main_process = number, count, number == 0

    def wait_for_everyone(self):
        """Processes of these tests follow each other."""


def record(cfg, run_dir, model, samples, process=None, size=8):
    """Maps and examples of samples, in batches of a size, as one process would store them."""
    process = process or Process(0, 1)
    share = Shared(len(samples), size, process.process_index, process.num_processes)
    with recorder(cfg, len(samples), process, run_dir) as to, torch.no_grad():
        for first, numbers in zip(share.firsts, share, strict=True):
            batch = collate([samples[number] for number in numbers])
            found = model(batch.images, batch.padding_mask, need_attention={"decoder_cross", *to.sites(first)})
            to.add(first, batch, found, match(found, batch.targets, Criterion(**dict(cfg.loss)).costs))


def sample(image_id, height, width):
    """A random image with one object, as a data set gives it."""
    size = torch.tensor([height, width])
    target = {"image_id": image_id, "size": size, "original_size": size}
    target |= {"boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]]), "labels": torch.tensor([1])}
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(image_id)), target


@pytest.mark.parametrize("count", [1, 2, 5])
def test_processes_share_the_first_images_and_their_examples(tmp_path, count, small, tiny_config):
    cfg, model = tiny_config({"evaluate.store_maps": 4}), small()
    samples = [sample(image_id, 64, 64) for image_id in range(10, 17)]
    for number in range(count):
        record(cfg, tmp_path, model, samples, Process(number, count), size=2)
    opened = AttentionStore(tmp_path)
    assert opened.images == [10, 11, 12, 13] and len(list((tmp_path / "maps").iterdir())) == count
    assert [example.image_id for example in load_examples(tmp_path)] == [10, 11]


def test_padding_is_not_stored_neither_as_keys_nor_as_cells_that_ask(tmp_path, small, tiny_config):
    cfg = tiny_config({"evaluate.store_sites": SITES, "evaluate.examples": 3})
    samples = [sample(1, 96, 150), sample(2, 128, 64), sample(3, 70, 192)]
    model = small(attention={"encoder_self": "sparsemax", "decoder_cross": "sparsemax"})
    record(cfg, tmp_path / "batch", model, samples)
    together = AttentionStore(tmp_path / "batch")
    for image, target in samples:
        image_id = target["image_id"]
        record(cfg, tmp_path / str(image_id), model, [(image, target)])
        alone = AttentionStore(tmp_path / str(image_id))
        h, w = alone.shape(image_id)[3:]
        assert (
            (h, w) == together.shape(image_id)[3:] == tuple(math.ceil(s / model_stride(model)) for s in image.shape[1:])
        )
        assert together.shape(image_id, "encoder_self") == (2, 4, h * w, h, w)
        for site in SITES:
            np.testing.assert_allclose(together.maps(image_id, site), alone.maps(image_id, site), atol=5e-4)
        assert together.maps(image_id).sum((-2, -1)) == pytest.approx(1.0, abs=5e-3)


def model_stride(model):
    """Pixels of the image for each cell of the key grid."""
    with torch.no_grad():
        images, padding = torch.zeros(1, 3, 128, 128), torch.zeros(1, 128, 128, dtype=torch.bool)
        return 128 // model(images, padding, need_attention=True).attention.grid[0]


@pytest.mark.parametrize("deformable", [{}, {"refine": True, "two_stage": True, "rho": 0.4}], ids=["dense", "sparse"])
def test_deformable_attention_is_stored_as_maps_of_the_finest_level(tmp_path, deformable, small, tiny_config):
    cfg = tiny_config({"evaluate.store_sites": SITES})
    model = small(architecture="deformable", classification="sigmoid", deformable={"levels": 2, **deformable})
    samples = [sample(1, 64, 128), sample(2, 128, 100)]
    record(cfg, tmp_path, model, samples)
    batch, opened = collate(samples), AttentionStore(tmp_path)
    with torch.no_grad():
        maps = model(batch.images, batch.padding_mask, need_attention=True).attention
    for index, image_id in enumerate((1, 2)):
        h, w = maps.valid_grid(index)
        assert opened.shape(image_id)[3:] == (h, w) != maps.grid
        for site in ("decoder_cross", "encoder_self"):
            wanted = torch.stack([maps.as_images(site, layer)[index] for layer in range(len(getattr(maps, site)))])
            wanted = as_half(wanted[..., :h, :w].numpy())
            assert np.array_equal(opened.maps(image_id, site), wanted)
            assert 0 < (wanted > 0).mean() < 0.5


# --- settings --------------------------------------------------------------------------------------------------


def test_settings_say_what_is_stored(tiny_config):
    assert tiny_config().evaluate.store_maps == 0 and tiny_config().evaluate.store_sites == ("decoder_cross",)
    both = tiny_config({"evaluate.store_maps": "all", "evaluate.store_sites": "[decoder_cross, decoder_self]"})
    assert both.evaluate.store_maps == "all" and both.evaluate.store_sites == ("decoder_cross", "decoder_self")
    assert Recorder(both, 13, None, None).images == 13
    with pytest.raises(ConfigError, match=r"store_sites: model.encoder_layers is 0, there is no encoder_self to store"):
        tiny_config({"evaluate.store_sites": SITES, "model.encoder_layers": 0})
    with pytest.raises(ConfigError, match=r"store_maps.*'everything'"):
        tiny_config({"evaluate.store_maps": "everything"})
    with pytest.raises(ConfigError, match=r"store_maps.*-1"):
        tiny_config({"evaluate.store_maps": -1})
