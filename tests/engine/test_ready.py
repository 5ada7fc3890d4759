"""What is known to be wrong before a training starts, and before its processes do."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from detrlib.data.shapes import shapes_folder
from detrlib.engine import launch as door
from detrlib.engine import memory
from detrlib.engine.ready import ready
from detrlib.errors import ConfigError, DataError, DetrlibError, WeightsError

CPU = torch.device("cpu")


def test_settings_are_completed_by_the_data(tiny_config):
    cfg, splits, described = ready(tiny_config(), 2, CPU)
    assert cfg.model.num_classes == 7 and cfg.data.classes[1] == "circle"
    assert list(splits) == list(described) == ["train", "val"] and described["train"]["images"] == 32


@pytest.mark.parametrize(
    ("settings", "kind", "named"),
    [
        ({"train.batch_size": 9}, ConfigError, r"train\.batch_size 9 .* 2 processes"),
        ({"data.train_limit": 1, "train.batch_size": 2}, ConfigError, "1 training images"),
        ({"data.root": "/nowhere"}, DataError, "/nowhere"),
        ({"model.num_classes": 2}, ConfigError, r"model\.num_classes 2"),
        ({"data.workers": 1024, "data.image_size": 4000}, ConfigError, r"data\.workers"),
        ({"train.start": "/nowhere.pt"}, WeightsError, "/nowhere.pt"),
        ({"model.backbone": {"name": "resnet18", "weights": "/nowhere.pt"}}, WeightsError, "/nowhere.pt"),
        ({"model.feedforward_dim": 2**20, "model.hidden_dim": 2**16}, ConfigError, "linear1"),
    ],
)
def test_what_processes_would_meet_is_found_before_they_start(
    tiny_config, tmp_path, monkeypatch, settings, kind, named
):
    monkeypatch.setattr(door, "_torchrun", lambda *given: pytest.fail("processes were started"))
    with pytest.raises(kind, match=named):
        door.launch(tiny_config(settings), tmp_path / "run", gpus=0, processes=2)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_pictures_are_decoded_before_processes_start(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(door, "_torchrun", lambda *given: pytest.fail("processes were started"))
    data = shutil.copytree(shapes_folder(tiny_config().data.shapes), tmp_path / "data")
    picture = min((data / "train2017").iterdir())
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(DataError, match=picture.name):
        door.launch(tiny_config({"data.root": str(data)}), tmp_path / "run", gpus=0, processes=2)


def test_memory_that_a_machine_has_not_is_not_asked_for(tiny_config, monkeypatch):
    """The number is said, and what it may mean where ids of categories are taken for classes."""
    cfg = tiny_config({"model.num_classes": 100_000})
    ready(cfg, 1, CPU)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=2**20, available=2**20))
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    with pytest.raises(DetrlibError, match=r"num_classes 100000.*data\.contiguous"):
        ready(cfg, 1, CPU)
