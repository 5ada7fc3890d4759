"""Backbone weights from crops of the training data: what is cropped, and that they are made once."""

import pytest
import torch

from detrlib.data import build_dataset
from detrlib.engine import pretrain
from detrlib.engine.pretrain import backbone_weights, collect_crops
from detrlib.files import load_checkpoint
from detrlib.models.backbone import build_body


@pytest.fixture(scope="module")
def dataset(tiny_config):
    return build_dataset(tiny_config().data, "train", augment=False)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "SAMPLES", 3 * pretrain.BATCH)
    monkeypatch.setenv("DETRLIB_CACHE", str(tmp_path))


def test_crops_are_of_every_object_and_of_background(dataset):
    crops, labels = collect_crops(dataset, image_size=64)
    assert crops.dtype == torch.uint8 and crops.shape[1:] == (3, pretrain.SIDE, pretrain.SIDE)
    objects = torch.cat([dataset.objects(index)[1] for index in range(len(dataset))])
    background = labels == dataset.num_classes
    assert torch.equal(labels[~background].sort().values, objects.sort().values)
    assert 0 < background.sum() <= len(dataset)
    assert all(torch.equal(*pair) for pair in zip((crops, labels), collect_crops(dataset, 64), strict=True))


def test_weights_are_made_once_and_fit_the_backbone(dataset, quick, monkeypatch, tiny_config):
    settings = tiny_config().model.backbone
    before = torch.get_rng_state()
    path = backbone_weights(settings, dataset, image_size=64)
    assert torch.equal(torch.get_rng_state(), before)  # runs with and without a cache draw the same
    state, own = load_checkpoint(path), build_body(settings.name, settings.dilation).state_dict()
    assert own.keys() <= state.keys() and all(own[name].shape == state[name].shape for name in own)
    monkeypatch.setattr(pretrain, "train_classifier", lambda *given: pytest.fail("trained again"))
    assert backbone_weights(settings, dataset, image_size=64) == path
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        backbone_weights(settings, dataset, image_size=32)
