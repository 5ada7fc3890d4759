"""Programs that run without the library predict as models do, whatever the number and the size of images."""

import json

import pytest
import torch

from detrlib.checkpoints import program
from detrlib.checkpoints.export import export
from detrlib.checkpoints.source import build_source
from detrlib.errors import ConfigError, WeightsError

TINY = {"model.backbone.name": "tiny", "data.image_size": 96}
PYRAMID = {"levels": 2, "stages": [3, 4], "refine": True, "two_stage": True, "query_init": "memory"}
CHOICES = {
    "softmax": TINY,
    "sparse transforms": TINY | {"model.attention": {"encoder_self": "entmax15", "decoder_cross": "alpha_entmax"}},
    "polled": TINY | {"model.polling": {"ratio": 0.4, "pooled": 5}},
    "gates, differences, registers": TINY
    | {"model.attention": {"gate": "head", "differential": True}, "model.registers": 3},
    "sparse encoder": TINY
    | {"model.architecture": "deformable", "model.deformable": PYRAMID | {"rho": 0.3, "encoder_auxiliary": True}}
    | {"model.deformable.class_specific_proposals": True},
}


@pytest.mark.parametrize("chosen", CHOICES)
def test_a_program_predicts_as_the_model_at_any_size(chosen, source_of, tmp_path, padded_batch):
    source = source_of(CHOICES[chosen])
    names = {program.NAMES: ""}
    path = export(source, tmp_path / "model.pt2")
    run = torch.export.load(path, extra_files=names).module()
    model = build_source(source)
    assert json.loads(names[program.NAMES]) == {str(label): name for label, name in source.names.items()}
    for sizes, canvas in ((((70, 101), (128, 64), (97, 160)), (128, 160)), (((90, 64),), (96, 64))):
        images, padding_mask = padded_batch(*sizes, canvas=canvas)
        with torch.no_grad():
            found, expected = run(images, padding_mask), model(images, padding_mask)
        for name in ("logits", "boxes"):
            torch.testing.assert_close(found[name], getattr(expected, name), rtol=0, atol=1e-5)


def test_what_is_missing_for_onnx_is_named_before_any_work(source_of, tmp_path, monkeypatch):
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model\.onnx.*onnxscript.*detrlib\[onnx\]"):
        export(source_of(TINY), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_asks_for_numbers_is_named(source_of, tmp_path, monkeypatch):
    class Asking(torch.nn.Module):
        def forward(self, images, padding_mask):
            return images[: int(padding_mask.sum())]

    monkeypatch.setattr(program, "build_source", lambda source: Asking())
    with pytest.raises(WeightsError, match=r"model\.pt2.*detr.*safetensors"):
        export(source_of(TINY), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_onnx_runtime_predicts_as_the_model(source_of, tmp_path, padded_batch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    source = source_of(CHOICES["softmax"])
    session = runtime.InferenceSession(export(source, tmp_path / "model.onnx"))
    images, padding_mask = padded_batch((70, 101), (128, 64), (97, 160), canvas=(128, 160))
    found = session.run(["logits", "boxes"], {"images": images.numpy(), "padding_mask": padding_mask.numpy()})
    with torch.no_grad():
        expected = build_source(source)(images, padding_mask)
    for ours, theirs in zip((expected.logits, expected.boxes), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-5)
