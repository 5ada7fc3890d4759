"""Backbone weights from crops of the training data: what is cropped, and that they are made once."""

import threading

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


def test_background_has_the_scale_of_an_object_and_no_crop_is_smaller_than_training_shows(dataset, monkeypatch):
    sides = {}
    crop, whole = pretrain._square_crop, dataset.image(0)

    def watched(image, box, side, generator):
        sides.setdefault(image.data_ptr(), []).append(side)
        return crop(image, box, side, generator)

    monkeypatch.setattr(pretrain, "_square_crop", watched)
    crops, labels = collect_crops(dataset, image_size=256)  # objects are up to 2.6 times as long as a crop
    window = pretrain.SIDE * min(whole.size) / 256
    drawn = [side for of_image in sides.values() for side in of_image]
    assert len(drawn) == len(crops)
    assert min(drawn) >= window and max(drawn) <= window * 800 / 480 + 1e-6
    assert len(set(drawn)) > 3 and (labels == dataset.num_classes).any()


def test_the_middle_of_a_crop_lies_in_the_object_however_large_that_is():
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    image[:, 20:180, 40:190] = 255
    generator = torch.Generator().manual_seed(0)
    quarter = pretrain.SIDE // 4
    for _ in range(20):
        crop = pretrain._square_crop(image, torch.tensor([40.0, 20, 190, 180]), 60, generator)
        assert crop[:, quarter + 2 : -quarter - 2, quarter + 2 : -quarter - 2].float().mean() > 254


def test_recognition_is_judged_class_by_class():
    class Brightness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.ones(()))

        def forward(self, images):
            return self.slope * images.mean((1, 2, 3))[:, None] * torch.tensor([-1.0, 1.0])

    crops = torch.full((10, 3, 8, 8), 255, dtype=torch.uint8)
    labels = torch.tensor([1] * 9 + [0])  # one dark class that looks bright: nine of ten are right
    assert pretrain._recalls(Brightness(), crops, labels) == [0.0, 1.0]


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
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        backbone_weights(settings, dataset, image_size=64)


def test_processes_that_start_at_once_train_once(dataset, quick, monkeypatch, tmp_path, tiny_config):
    """A second one waits for the first, here a thread that has another's lock, and takes what that has made."""
    monkeypatch.setenv("DETRLIB_CACHE", str(tmp_path))
    settings, real, made = tiny_config().model.backbone, pretrain.train_classifier, []

    def slowly(*given):
        made.append(second.start())
        second.join(0.5)
        assert second.is_alive()  # it waits
        return real(*given)

    second = threading.Thread(target=lambda: made.append(backbone_weights(settings, dataset, image_size=64)))
    monkeypatch.setattr(pretrain, "train_classifier", slowly)
    path = backbone_weights(settings, dataset, image_size=64)
    second.join()
    assert made == [None, path]
