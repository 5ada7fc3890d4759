"""Small models in which every depth, width and parameter is different, and padded batches for them."""

import torch
from torch import nn

from detrlib.config import Model, load_config
from detrlib.models import build_model


def model_settings(**settings) -> Model:
    """The settings of a model, checked like those of a file; sections may be given as dictionaries."""
    return load_config(overrides={"model": settings}).model


def small(seed: int = 0, **settings) -> nn.Module:
    """A small model whose depths, heads and widths are all different, with no parameter or statistic left at zero."""
    defaults = {
        "backbone": {"name": "tiny", "weights": "none"},
        "hidden_dim": 32,
        "num_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "feedforward_dim": 48,
        "num_queries": 7,
        "num_classes": 5,
    }
    torch.manual_seed(seed)
    model = build_model(model_settings(**defaults | settings)).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move biases and norms away from 0 and 1, so that forgetting or swapping one shows."""
    for name, value in model.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            value.add_(0.2 * torch.randn_like(value))
        elif value.dim() == 1 and name.endswith(("weight", "running_var")):
            value.mul_(0.5 + 0.7 * torch.rand_like(value))
        elif "in_proj_weight" in name:
            value.mul_(4.0)  # attention that looks somewhere, so that queries and images differ
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.1)  # corrections of boxes and offsets of samples start at zero


def padded_batch(*sizes: tuple[int, int], canvas: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images of `sizes` in the corners of a canvas, and their padding."""
    generator = torch.Generator().manual_seed(1)
    images, padding = torch.zeros(len(sizes), 3, *canvas), torch.ones(len(sizes), *canvas, dtype=torch.bool)
    for i, (height, width) in enumerate(sizes):
        images[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        padding[i, :height, :width] = False
    return images, padding


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def frozen(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not p.requires_grad)


def assert_alone_as_in_batch(model: nn.Module) -> None:
    """Every layer's predictions of an image alone are those of the same image in a padded batch."""
    sizes, canvas = [(70, 101), (128, 64), (97, 160)], (128, 160)
    images, padding = padded_batch(*sizes, canvas=canvas)
    with torch.no_grad():
        together = model(images, padding)
        for i, (height, width) in enumerate(sizes):
            alone = model(images[i : i + 1, :, :height, :width], padding[i : i + 1, :height, :width])
            for one, all_of_them in zip((*alone.auxiliary, alone), (*together.auxiliary, together), strict=True):
                torch.testing.assert_close(one.logits[0], all_of_them.logits[i], rtol=0, atol=1e-4)
                torch.testing.assert_close(one.boxes[0], all_of_them.boxes[i], rtol=0, atol=1e-4)
    assert (together.logits[0] - together.logits[1]).abs().max() > 1e-2  # images matter
