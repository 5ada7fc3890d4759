"""Weights of backbones: downloaded, read from files, refused."""

import urllib.error

import pytest
import torch
import torchvision

from detrlib.errors import WeightsError
from detrlib.models.backbone import build_backbone


def test_imagenet_weights_offline(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(WeightsError, match=r"resnet18.*no route to host.*model\.backbone\.weights"):
        build_backbone("resnet18", "imagenet")


def test_imagenet_weights_are_loaded(monkeypatch):
    torch.manual_seed(0)
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: state)
    body = build_backbone("resnet18", "imagenet").body
    assert torch.equal(body.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert not body.conv1.weight.requires_grad


def test_there_are_no_imagenet_weights_of_the_tiny_backbone():
    with pytest.raises(WeightsError, match=r"tiny.*none or crops"):
        build_backbone("tiny", "imagenet")


def test_weights_of_another_architecture_are_named(tmp_path):
    path = tmp_path / "resnet34.pt"
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    with pytest.raises(WeightsError, match=r"resnet34\.pt: weights of another backbone: unexpected layer1\.2"):
        build_backbone("resnet18", path)


def test_a_file_that_is_no_state_dict_is_named(tmp_path):
    torch.save({"model": {"conv1.weight": torch.zeros(1), "epoch": 3}}, tmp_path / "run.pt")
    with pytest.raises(WeightsError, match=r"run\.pt: expected a state dict"):
        build_backbone("resnet18", tmp_path / "run.pt")
    with pytest.raises(WeightsError, match=r"model\.backbone\.weights: no file .*absent\.pt"):
        build_backbone("resnet18", tmp_path / "absent.pt")
