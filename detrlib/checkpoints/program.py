"""A model as a program that runs without this library.

    detrlib export my-run model.pt2      torch.export.load("model.pt2").module()(images, padding_mask)
    detrlib export my-run model.onnx     for ONNX Runtime and others; needs `pip install 'detrlib[onnx]'`

Both take `images` [B,3,H,W], normalised as for ImageNet, and `padding_mask` [B,H,W], True = padding, of any size, and
give `logits` and `boxes` of the last decoder layer, as in `Predictions`. Names of classes stand in the file, by label.
"""

import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from detrlib.checkpoints.source import Source, build_source
from detrlib.errors import ConfigError, WeightsError
from detrlib.files import write_atomic

NAMES = "names.json"  # of the entry in a file


class Detector(nn.Module):
    """A model that returns what a detector is asked for."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, padding_mask: Tensor) -> dict[str, Tensor]:
        predictions = self.model(images, padding_mask)
        return {"logits": predictions.logits, "boxes": predictions.boxes}


def program_of(source: Source, path: Path) -> ExportedProgram:
    """The model of a source for batches of any number and size. Raises WeightsError naming `path` where it is none."""
    side = source.cfg.data.image_size
    images, padding_mask = torch.zeros(2, 3, side, side + side // 3), torch.zeros(2, side, side + side // 3).bool()
    sizes = {"images": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "padding_mask": dict.fromkeys(range(3), Dim.AUTO)}
    try:
        with torch.no_grad():
            return torch.export.export(Detector(build_source(source)), (images, padding_mask), dynamic_shapes=sizes)
    except Exception as error:  # of any layer whose way depends on numbers
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"{path}: torch.export makes no program of model.architecture {source.cfg.model.architecture} with these "
            f"settings ({reason}); write a .safetensors file instead"
        ) from error


def write_program(source: Source, path: Path) -> None:
    """A program for PyTorch, from torch.export."""
    program, names = program_of(source, path), json.dumps(source.names or {})

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.export.save(program, file, extra_files={NAMES: names})

    write_atomic(path, write)


def write_onnx(source: Source, path: Path) -> None:
    """An ONNX file. Raises ConfigError without the packages that write them, WeightsError for what ONNX has not."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{path}: needs {' and '.join(missing)}; pip install 'detrlib[onnx]', or write model.pt2")
    program = program_of(source, path)
    try:
        names = {"input_names": ["images", "padding_mask"], "output_names": ["logits", "boxes"]}
        written = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(f"{path}: ONNX has no such model ({reason}); write model.pt2 instead") from error
    written.model.metadata_props[NAMES] = json.dumps(source.names or {})
    write_atomic(path, lambda temporary: written.save(temporary, external_data=False))
