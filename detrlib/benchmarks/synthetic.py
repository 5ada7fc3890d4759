"""Random scores, images and boxes, and steps of training on them, where speed and memory alone are of interest."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from detrlib.config import Config
from detrlib.data import Batch
from detrlib.engine.optimizer import build_optimizer
from detrlib.engine.step import Pending, train_step
from detrlib.losses.criterion import Criterion
from detrlib.models import build_model


def random(shape: tuple[int, ...], scale: float, device: str, seed: int = 0) -> Tensor:
    """From N(0, scale^2), the same on every device."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def random_batch(size: tuple[int, int], batch: int, device: str, padded: bool = False) -> Batch:
    """`batch` random images of `size` (height, width) with eight boxes each, on the device.

    padded: all images but the first are an eighth narrower.
    """
    boxes = 0.5 + 0.05 * random((batch, 8, 4), 1.0, device).clamp(-4, 4)
    targets = [{"labels": torch.arange(8, device=device), "boxes": per_image} for per_image in boxes]
    mask = torch.zeros(batch, *size, dtype=torch.bool, device=device)
    mask[1:, :, size[1] - size[1] // 8 :] = padded
    return Batch(random((batch, 3, *size), 1.0, device), mask if padded else None, targets)


def training_step(
    cfg: Config,
    size: tuple[int, int],
    batch: int = 1,
    device: str = "cpu",
    padded: bool = False,
    compiler: str | None = None,
) -> Callable[[], object]:
    """A step of training `cfg.model` with weights drawn at random, by `train_step` as training itself takes it; call it
    to take the step. Of the batch see `random_batch`; `compiler` is a backend of torch.compile, None: none.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(cfg.model).to(device).train()
    images, mask, targets = random_batch(size, batch, device, padded)
    with torch.no_grad():  # the features of a network without pretraining are huge: attention would see one key only
        images /= model.backbone(images, None)[-1].features.std()
    if compiler:
        model.compile(backend=compiler)
    optimizer = build_optimizer(model, cfg.train)
    given = [Batch(images, mask, targets)], Criterion(**dict(cfg.loss)), optimizer, Accelerator(cpu=device == "cpu")
    how = {"precision": cfg.train.precision, "clip_norm": cfg.train.clip_norm, "pending": Pending()}
    return lambda: train_step(model, *given, **how)
