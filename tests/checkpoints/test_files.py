"""Official files in and out, number for number; what stands in them beside weights; damaged and malicious ones."""

import os
import pickle

import pytest
import torch
from torch import nn

from detrlib.checkpoints.files import export_official, load_official, official_config, read_official
from detrlib.data import collate
from detrlib.errors import ConfigError, WeightsError
from detrlib.models.backbone import build_body

R18 = {"name": "resnet18", "weights": "none", "freeze_stem": True}
TOLD = {
    "model.num_heads": 4,
    "model.dropout": 0.1,
}


# Round trips


def test_a_model_comes_back_from_an_official_file(every_small, tmp_path, padded_batch):
    model, told = every_small
    state = export_official(model)
    torch.save({"model": state, "epoch": 49}, tmp_path / "official.pth")
    again = load_official(tmp_path / "official.pth", told)
    assert not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    back = export_official(again)
    assert list(back) == list(state) and all(torch.equal(back[key], state[key]) for key in state)
    images, padding = padded_batch((96, 128), (128, 64), canvas=(128, 160))
    with torch.no_grad():
        torch.testing.assert_close(again(images, padding).logits, model(images, padding).logits)


def test_an_import_predicts_images_as_the_official_code_does_alone(every_small, tmp_path):
    """In batches of odd sizes too; with one setting, batches are predicted as that code predicts them."""
    model, told = every_small
    torch.save({"model": export_official(model)}, tmp_path / "official.pth")
    exact = load_official(tmp_path / "official.pth", told).double()
    official = load_official(tmp_path / "official.pth", told | {"model.compatibility.padding": "official"}).double()
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in [(123, 189), (193, 67)]]
    batch = collate([(image, {}) for image in images])
    with torch.no_grad():
        together, in_official_batch = (one(batch.images, batch.padding_mask) for one in (exact, official))
        for number, image in enumerate(images):
            alone = official(image[None])
            torch.testing.assert_close(together.logits[number], alone.logits[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(together.boxes[number], alone.boxes[0], rtol=0, atol=1e-6)
            assert (in_official_batch.logits[number] - alone.logits[0]).abs().max() > 1e-4


def test_official_file_of_a_detector_with_swin_t(
    tmp_path, official_file, official_swin_names, padded_batch, small, trainable
):
    chosen = {
        "architecture": "deformable",
        "classification": "sigmoid",
        "deformable": {"levels": 4, "refine": True, "two_stage": True},
    }
    model = small(backbone=R18 | {"name": "swin_t"}, **chosen)
    for name, value in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(value)
    state = export_official(model)
    prefix = "backbone.0.body."
    names = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    assert names == official_swin_names("norm1", "norm2", "norm3")
    assert state[f"{prefix}layers.2.blocks.4.attn.relative_position_index"].shape == (49, 49)
    assert state[f"{prefix}layers.1.downsample.reduction.weight"].shape == (384, 768)
    path = official_file(tmp_path / "swin.pth", state, num_queries=7)
    again = load_official(path, TOLD)
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert trainable(again) == trainable(model)
    images, padding = padded_batch((64, 60), (40, 64), canvas=(64, 64))
    with torch.no_grad():
        torch.testing.assert_close(again(images, padding).logits, model(images, padding).logits)
    del state[f"{prefix}layers.2.blocks.5.norm1.weight"]
    other = {f"{prefix}layers.2.blocks.17.norm1.weight": torch.zeros(384)}  # Swin-S
    with pytest.raises(WeightsError, match=r"not Swin-T \(blocks \(2, 2, 18, 2\), 96 channels\)"):
        load_official(official_file(tmp_path / "swin_s.pth", state | other), TOLD)


def test_alphas_that_are_not_clamped_are_expressed_as_clamped_ones(small):
    model = small(backbone=R18, attention={"decoder_cross": "alpha_entmax", "alpha_init": "normal"})
    expected = [layer.multihead_attn.transform.alpha for layer in model.transformer.decoder.layers]
    state = export_official(model)
    assert state["transformer.decoder.layers.1.multihead_attn.pre_alpha"].shape == (4,)
    for i, alpha in enumerate(expected):
        clamped = (1 + state[f"transformer.decoder.layers.{i}.multihead_attn.pre_alpha"].sigmoid()).clamp(1.01, 2)
        torch.testing.assert_close(clamped, alpha, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"queries": "anchor", "backbone": R18}, "expected_size"),
        ({"attention": {"encoder_self": "alpha_entmax"}, "backbone": R18}, "encoder.*pre_alpha"),
        ({}, "backbone"),
    ],
)
def test_models_without_official_form_are_not_exported(settings, reason, small):
    with pytest.raises(WeightsError, match=reason):
        export_official(small(**settings))


# What files say beside their entries


def test_arguments_in_the_file_are_used(tmp_path, official_file, without_memory):
    state = export_official(without_memory("sparse"))
    state = {key: torch.zeros(value.shape) for key, value in state.items()}
    path = official_file(tmp_path / "s.pth", state, rho=0.2, num_queries=100, nheads=8, eff_specific_head=False)
    checkpoint = read_official(path)
    assert (checkpoint.family, checkpoint.epoch) == ("sparse", 3)
    cfg = official_config(checkpoint)
    assert cfg.model.deformable.rho == 0.2
    assert not cfg.model.deformable.class_specific_proposals
    assert cfg.model.num_queries == 100
    assert official_config(checkpoint, {"model.deformable.rho": "0.4"}).model.deformable.rho == 0.4


def test_dilation_of_dc5_is_told_by_arguments_or_by_the_caller(tmp_path, official_file, small):
    model = small(backbone=R18 | {"name": "resnet50"})
    path = official_file(tmp_path / "dc5.pth", export_official(model), dilation=True, nheads=4)
    assert load_official(path).backbone.body.layer4[1].conv2.dilation == (2, 2)
    plain = load_official(path, {"model.backbone.dilation": False})
    assert plain.backbone.body.layer4[1].conv2.dilation == (1, 1)


def test_thesis_files_name_their_transform(tmp_path, small):
    model = small(backbone=R18, norm="pre", attention={"decoder_cross": "sparsemax"})
    content = {"model": export_official(model), "hyperparams": {"decoder_act": "sparsemax", "nheads": 4}}
    torch.save(content, tmp_path / "thesis.pth")
    again = load_official(tmp_path / "thesis.pth")
    transform = again.transformer.decoder.layers[0].multihead_attn.transform
    assert type(transform).__name__ == "Sparsemax" and not transform.padding_adds_one
    as_trained = load_official(tmp_path / "thesis.pth", {"model.compatibility.padding": "thesis"})
    assert as_trained.transformer.decoder.layers[0].multihead_attn.transform.padding_adds_one
    assert again.transformer.encoder.norm is not None


def test_counters_of_tools_are_ignored(tmp_path, of_small):
    model, told = of_small("detr")
    counters = {"total_params": torch.zeros(1), "transformer.total_ops": torch.zeros(1)}
    counters |= {"backbone.0.body.bn1.num_batches_tracked": torch.zeros(1)}
    torch.save({"model": export_official(model) | counters}, tmp_path / "counted.pth")
    assert load_official(tmp_path / "counted.pth", told).state_dict().keys() == model.state_dict().keys()


def test_runs_of_the_deformable_family_have_its_losses(tmp_path, of_small, official_file):
    state = export_official(of_small("two-stage")[0])
    path = official_file(tmp_path / "official.pth", state, nheads=4, num_queries=7, lr=2e-4)
    cfg = official_config(read_official(path))
    assert (cfg.loss.cost_class, cfg.loss.weight_class) == (2, 2)
    assert (cfg.model.num_heads, cfg.model.num_queries) == (4, 7)


# Files as people have them


def test_files_of_backbones_are_named(tmp_path):
    torch.save(build_body("resnet18", False).state_dict(), tmp_path / "resnet.pth")
    torch.save({"online_network_state_dict": {}}, tmp_path / "scrl.pth")
    for name, kind in [("resnet", "backbone alone"), ("scrl", "SCRL")]:
        with pytest.raises(WeightsError, match=rf"{kind}.*model\.backbone\.weights"):
            read_official(tmp_path / f"{name}.pth")


def test_an_incomplete_file_says_what_is_missing(tmp_path, of_small):
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


def test_a_wrong_number_of_heads_is_refused(tmp_path, of_small, official_file):
    path = official_file(tmp_path / "heads.pth", export_official(of_small("plain")[0]))
    with pytest.raises(ConfigError, match="num_heads"):
        load_official(path, {"model.num_heads": 5})


def test_damaged_files(tmp_path, of_small, official_file):
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
