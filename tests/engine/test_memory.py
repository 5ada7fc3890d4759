"""What is said of memory against what is really held, and the search for what fits."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from detrlib.data import build_dataset
from detrlib.engine import memory
from detrlib.engine.memory import LiveBytes, Memory, Passes, Plan, estimate, free_memory, most_that_fit, training_memory
from detrlib.errors import ConfigError
from detrlib.models import build_model, checkpoint_activations
from detrlib.models.checkpointing import call

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def detector(tiny_config):
    def detector(overrides=None):
        """Settings and model of a tiny run."""
        cfg = tiny_config({"model.num_classes": 7} | (overrides or {}))
        torch.manual_seed(0)
        return cfg, build_model(cfg.model)

    return detector


@pytest.fixture
def plan(detector):
    def plan(overrides=None, fits=None, whole=8):
        """The plan of a tiny run; `fits` stands for a GPU."""
        (cfg, model), accelerator = detector(overrides), Accelerator()
        return Plan(cfg, model.to(accelerator.device), build_dataset(cfg.data, "train"), whole, accelerator, fits)

    return plan


# --- counting --------------------------------------------------------------------------------------------------


def test_live_bytes_are_those_of_tensors_that_are_there():
    there = torch.zeros(1000)
    with LiveBytes([there]) as live:
        there.view(10, 100).t()  # a view is nothing new
        assert live.now == live.peak == 0
        kept = there + 1
        assert live.now == 4000
        more = torch.cat([kept, kept])
        kept[:10].add_(1)
        del more
    assert (live.now, live.peak) == (4000, 12000)
    assert len(kept) == 1000


def test_live_bytes_of_a_pass_are_fewer_where_they_are_computed_again():
    """Of sixteen squares, or of eight pairs of them: the input of each, and what the backward pass adds."""

    def peak(again):
        x = torch.ones(MIB // 4, requires_grad=True)
        with LiveBytes([x]) as live:
            y = x
            for _ in range(8):
                y = call(lambda z: z.square().square(), y, again=again)
            y.sum().backward()
        return live.peak / MIB

    assert 15 <= peak(False) <= 20
    assert 8 <= peak(True) <= 13


def test_watching_a_model_leaves_it_and_the_random_numbers_as_they_were(detector):
    cfg, model = detector({"model.dropout": 0.5})
    model.input_proj = torch.nn.Sequential(model.input_proj, torch.nn.BatchNorm2d(32))  # which moves as images pass
    before, drawn = copy.deepcopy(model.eval().state_dict()), torch.get_rng_state()
    kept, peak = Passes(model, cfg, 3, CPU).bytes(2, (64, 64))
    assert 0 < kept <= peak
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


# --- estimates -------------------------------------------------------------------------------------------------


def test_weights_gradients_and_what_adam_keeps_are_counted(detector, trainable):
    cfg, model = detector({"train.freeze": ["backbone"], "train.ema": 0.9})
    model.backbone.requires_grad_(False)
    every = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    found = estimate(model, cfg, (64, 64), 3, CPU)
    assert found.gradients == 4 * trainable(model)
    assert found.weights == 2 * every + 2 * found.gradients
    assert estimate(model, cfg, (64, 64), 3, CPU, processes=2).weights == found.weights + found.gradients
    assert found.needed(3, parts=2) - found.needed(2, parts=1) == found.per_image + found.gradients


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    "overrides, most",
    [
        ({}, 1.1),
        ({"model.attention.encoder_self": "entmax15"}, 1.1),
        ({"model.backbone.name": "resnet18", "train.checkpoint_activations": True}, 1.1),
    ],
    ids=["tiny", "entmax", "checkpointed"],
)
def test_small_images_tell_what_large_ones_take(images, overrides, most, monkeypatch, detector):
    """Scores of the encoder grow with the square of the area, features with the area, queries not at all."""
    cfg, model = detector(overrides)
    checkpoint_activations(model, cfg.train.checkpoint_activations)
    monkeypatch.setattr(memory, "SIDE", 64)
    found = estimate(model, cfg, (256, 192), 3, CPU)
    _, really = Passes(model, cfg, 3, CPU).bytes(images, (256, 192))
    assert 0.8 * really <= found.once + images * found.per_image <= most * really


def test_images_with_too_few_tokens_for_the_queries_are_not_watched(monkeypatch, detector):
    deformable = {"levels": 2, "two_stage": True, "refine": True}
    cfg, model = detector(
        {"model.architecture": "deformable", "model.num_queries": 100, "model.deformable": deformable}
    )
    monkeypatch.setattr(memory, "SIDE", 32)
    assert estimate(model, cfg, (256, 256), 3, CPU).per_image > 0


def test_more_images_fit_where_the_stem_is_frozen_and_activations_are_computed_again(tiny_config):
    """Whether weights are there to keep decides what is trained, also where none are loaded."""

    def fitting(**more):
        cfg = tiny_config({"model.num_classes": 7, "model.backbone.name": "resnet18"} | more)
        return int(training_memory(cfg, (64, 96), 1.0).split(" at a time")[0].split()[-1])

    plain, frozen = fitting(), fitting(**{"model.backbone.weights": "imagenet"})
    assert 0 < plain < frozen < fitting(**{"model.backbone.weights": "imagenet", "train.checkpoint_activations": True})


# --- what fits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest, found", [(32, 32), (31, 16), (5, 4), (1, 1)])
def test_the_first_of_the_halves_that_fits_is_taken(largest, found):
    tried = []
    assert most_that_fit(32, lambda images: tried.append(images) or images <= largest) == found
    assert tried == [32, 16, 8, 4, 2, 1][: tried.index(found) + 1]
    assert most_that_fit(5, lambda images: images <= 3) == 3


def test_not_even_one_image_that_fits_is_named():
    with pytest.raises(ConfigError, match=r"train.micro_batch auto: not even one image fits.*checkpoint_activations"):
        most_that_fit(3, lambda images: False)


def test_what_was_found_is_remembered_for_the_same_device_and_batch(tmp_path, plan):
    tried = []

    def fits(images):
        tried.append(images)
        return images <= 2

    auto = {"train.micro_batch": "auto"}
    assert plan(auto, fits).images(tmp_path) == 2 and tried == [8, 4, 2]
    assert json.loads((tmp_path / "micro_batch.json").read_text())["images"] == 2
    assert plan(auto, fits).images(tmp_path) == 2 and tried == [8, 4, 2]
    assert plan(auto, fits, whole=6).images(tmp_path) == 2 and tried == [8, 4, 2, 6, 3, 2]
    assert plan(auto | {"train.checkpoint_activations": True}, fits).images(tmp_path) == 2 and len(tried) == 9


@pytest.mark.gpu
def test_a_gpu_is_tried_and_its_memory_told(tmp_path, gpu, plan):
    asked = plan({"train.micro_batch": "auto"})
    assert asked.images(tmp_path) == 8
    assert json.loads((tmp_path / "micro_batch.json").read_text())["device"] == torch.cuda.get_device_name(gpu)
    assert "are free" in asked.line(8)
    torch.cuda.empty_cache()  # of which eight small images would take what they need
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        with pytest.raises(ConfigError, match="micro_batch"):
            asked.images(tmp_path / "full")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_share_of_a_gpu_is_asked_for_by_its_number(monkeypatch):
    """Accelerate calls the only one cuda, without a number, of which torch would tell nothing."""

    def share(number):
        assert number is None or isinstance(number, int)
        return 0.25

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", share)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    assert memory._limit(torch.device("cuda")) == memory._limit(torch.device("cuda:1")) == 250


def test_the_whole_batch_without_a_gpu_and_no_more_than_there_is(tmp_path, plan):
    assert plan({"train.micro_batch": "auto"}).images(tmp_path) == plan().images(tmp_path) == 8
    assert "auto is the whole batch on a CPU" in plan({"train.micro_batch": "auto"}).line(8)
    assert "auto" not in plan().line(8)
    assert plan({"train.micro_batch": 3}).images(tmp_path) == 3
    assert plan({"train.micro_batch": 30}).images(tmp_path) == 8
    assert list(tmp_path.iterdir()) == []


def test_the_line_names_the_remedy_only_where_memory_is_short(plan, monkeypatch):
    def line(free, images=8, there=2**40):
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        monkeypatch.setattr(memory, "all_memory", lambda device: there)
        return plan().line(images)

    assert "are free" in line(2**40) and "set train" not in line(2**40)
    monkeypatch.setattr(memory, "estimate", lambda *given: Memory(2**30, 2**29, 2**28, 2**30))
    assert "about 12.0 GiB for 8 images of 64 x 64" in line(20 * 2**30)
    short = line(5 * 2**30)
    assert "more than the 5.0 GiB" in short and "train.micro_batch: 2, or train.micro_batch" in short
    assert "micro_batch: " not in line(2**29)
    with pytest.raises(ConfigError, match=r"8\.0 GiB that the machine has; set train\.micro_batch"):
        line(5 * 2**30, there=2**33)  # no other program can make room for it
    monkeypatch.setattr(memory, "estimate", lambda *given: raise_out_of_memory())
    assert "do not fit into 5.0 GiB" in line(5 * 2**30) and "train.checkpoint_activations" in line(5 * 2**30)


def raise_out_of_memory():
    raise torch.OutOfMemoryError("no")


def test_processes_share_the_memory_of_a_machine(monkeypatch):
    alone = free_memory(CPU)
    assert alone > 2**27
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == pytest.approx(alone / 4, rel=0.5)
