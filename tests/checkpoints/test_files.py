"""Files as people have them: of other models, damaged, malicious, backbones alone; and runs made of official files."""

import os
import pickle

import pytest
import torch
from small import randomise
from test_names import TOLD, of_small, official_file

from detrlib.checkpoints import files as checkpoints
from detrlib.checkpoints.files import export_official, load_official, read_official
from detrlib.config import load_config
from detrlib.engine.evaluate import load_model
from detrlib.errors import ConfigError, RunError, WeightsError
from detrlib.files import load_checkpoint
from detrlib.models.backbone import build_backbone, build_body
from detrlib.models.pretrained import backbone_entries
from detrlib.runs.imported import save_run

# Other files


FOREIGN = {
    "panoptic": ({"detr.transformer.decoder.norm.weight": 1, "mask_head.lay1.weight": 1}, "panoptic.*box model"),
    "demo": ({"query_pos": 1, "row_embed": 1, "linear_class.weight": 1, "conv.weight": 1}, "demonstration.*detr-r50"),
    "own": ({"backbone.body.conv1.weight": 1, "transformer.decoder.norm.weight": 1}, "this library itself.*load_model"),
    "transformers": ({"model.decoder.layers.0.fc1.weight": 1}, "transformers package.*official file"),
    "resnet": ({"conv1.weight": 1, "layer1.0.conv1.weight": 1, "fc.weight": 1}, r"backbone alone.*backbone\.weights"),
    "conditional": ({"transformer.decoder.layers.0.ca_qcontent_proj.weight": 1}, "Conditional DETR"),
    "faster-rcnn": ({"backbone.body.conv1.weight": 1, "roi_heads.box_head.fc6.weight": 1}, "another detector"),
    "anything": ({"encoder.weight": 1}, r"no DETR.*encoder\.weight"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_named(name, tmp_path):
    names, message = FOREIGN[name]
    torch.save({"model": {key: torch.zeros(size) for key, size in names.items()}}, tmp_path / f"{name}.pth")
    with pytest.raises(WeightsError, match=rf"(?s){name}\.pth: .*{message}"):
        read_official(tmp_path / f"{name}.pth")


def test_files_of_backbones_are_named(tmp_path):
    torch.save(build_body("resnet18", False).state_dict(), tmp_path / "resnet.pth")
    torch.save({"online_network_state_dict": {}}, tmp_path / "scrl.pth")
    for name, kind in [("resnet", "backbone alone"), ("scrl", "SCRL")]:
        with pytest.raises(WeightsError, match=rf"{kind}.*model\.backbone\.weights"):
            read_official(tmp_path / f"{name}.pth")


def test_an_incomplete_file_says_what_is_missing(tmp_path):
    state = export_official(of_small("detr")[0])
    del state["query_embed.weight"]
    torch.save({"model": state}, tmp_path / "half.pth")
    with pytest.raises(WeightsError, match=r"half\.pth: an incomplete checkpoint: it has no query_embed\.weight"):
        load_official(tmp_path / "half.pth")
    state = export_official(of_small("detr")[0])
    del state["transformer.decoder.layers.1.norm2.bias"]
    torch.save({"model": state}, tmp_path / "hole.pth")
    with pytest.raises(WeightsError, match=r"hole\.pth: does not fit.*missing transformer\.decoder\.layers\.1\.norm2"):
        load_official(tmp_path / "hole.pth", TOLD)


def test_a_wrong_number_of_heads_is_refused(tmp_path):
    path = official_file(tmp_path / "heads.pth", export_official(of_small("plain")[0]))
    with pytest.raises(ConfigError, match="num_heads"):
        load_official(path, {"model.num_heads": 5})


def test_damaged_files(tmp_path):
    whole = official_file(tmp_path / "whole.pth", export_official(of_small("detr")[0]))
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:100_000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><title>Sign in</title>")
    (tmp_path / "list.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    for name, message in [
        ("cut", "damaged, or cut short.*download it again"),
        ("empty", "damaged, or cut short"),
        ("page", "text, perhaps a web page"),
        ("list", "holds a list"),
        ("numbers", "holds no state dict"),
        ("absent", "no file"),
    ]:
        with pytest.raises(WeightsError, match=message):
            read_official(tmp_path / f"{name}.pth")


class Malicious:
    """An object whose unpickling runs a command."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("new_format", [True, False])
def test_no_code_in_a_file_is_run(tmp_path, new_format):
    trace = tmp_path / "trace"
    content = {"model": {}, "args": Malicious(trace)}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsError, match=r"evil\.pth: refused.*mkdir"):
        read_official(tmp_path / "evil.pth")
    assert not trace.exists()
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError):
        read_official(tmp_path / "bare.pth")
    assert not trace.exists()


# Backbones


@pytest.mark.parametrize("prefix", ["", "module."])
def test_scrl_weights_start_a_backbone(prefix, tmp_path):
    torch.manual_seed(0)
    body = build_body("resnet18", False)
    randomise(body)
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    network = {"projector.0.weight": torch.zeros(1)}
    for name, value in body.state_dict().items():
        part, rest = name.split(".", 1)
        network[f"{prefix}encoder.{numbers[part]}.{rest}"] = value
    content = {"online_network_state_dict": network, "epoch": 200}
    assert backbone_entries(content).keys() == body.state_dict().keys()
    torch.save(content, tmp_path / "resnet18.pt")
    loaded = build_backbone("resnet18", tmp_path / "resnet18.pt").body.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in body.state_dict().items())


def test_backbone_files_of_other_forms():
    state = {"conv1.weight": torch.zeros(1)}
    assert (
        backbone_entries({"model": state})
        == backbone_entries({"state_dict": state})
        == backbone_entries(state)
        == state
    )


# Runs and the command line


def test_a_run_of_official_weights(tmp_path):
    model, told = of_small("detr")
    path = official_file(tmp_path / "official.pth", export_official(model))
    save_run(path, tmp_path / "run", told | {"data.root": "elsewhere"})
    cfg = load_config(tmp_path / "run" / "config.yaml")
    assert (cfg.data.root, cfg.model.num_heads, cfg.model.backbone.mask_padding) == ("elsewhere", 4, False)
    again = load_model(tmp_path / "run")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    known = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (known["epoch"], known["global_step"]) == (3, 0)
    with pytest.raises(RunError, match="there already"):
        save_run(path, tmp_path / "run", told)


def test_runs_of_the_deformable_family_have_its_losses(tmp_path):
    state = export_official(of_small("two-stage")[0])
    path = official_file(tmp_path / "official.pth", state, nheads=4, num_queries=7, lr=2e-4)
    cfg = checkpoints.official_config(read_official(path))
    assert (cfg.loss.cost_class, cfg.loss.weight_class) == (2, 2)
    assert (cfg.model.num_heads, cfg.model.num_queries) == (4, 7)
