"""One update of the weights: the batch part by part, one gradient."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detrlib.data import Batch
from detrlib.engine.evaluate import autocast
from detrlib.errors import NonFiniteLoss
from detrlib.losses.criterion import Criterion


def train_step(
    model: nn.Module,
    parts: list[Batch],
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    precision: str = "float32",
    clip_norm: float = 0.0,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """One update of the weights.

    The parts of the batch are on the device one after the other, and their gradients add up to that of the whole batch:
    losses are divided by what they are divided by in the batch, see `Criterion`. Only what is random depends on the
    parts, as dropout does.

    Args:
        model: as `accelerator.prepare` returns it, in training mode.
        parts: of the batch of this process, as many as every other process has, see `Batch.split`; on any device.
        criterion: gives the loss and its unweighted terms.
        optimizer: as `accelerator.prepare` returns it.
        accelerator: averages gradients over the processes.
        precision: float32, or bfloat16 for the forward pass.
        clip_norm: largest norm of all gradients together; 0 leaves them as they are.
        watch: called between the backward pass and clipping, when gradients are what the loss made them.

    Returns:
        "loss", which was minimised, its unweighted terms, and with clipping "grad_norm", that before it; detached, and
        of the whole batch.

    Raises:
        NonFiniteLoss: the loss or the norm of its gradients is no number; weights are as they were.
    """
    targets = [target for part in parts for target in part.targets]
    sums: dict[str, Tensor] = {}
    optimizer.zero_grad()
    for number, part in enumerate(parts, start=1):
        part = part.to(accelerator.device)
        # Processes exchange gradients once, when they are complete.
        with accelerator.no_sync(model) if number < len(parts) else nullcontext():
            with autocast(precision, accelerator.device):
                predictions = model(part.images, part.padding_mask)
            loss, terms = criterion(predictions, part.targets, targets)
            if not torch.isfinite(loss):
                raise NonFiniteLoss(f"loss is {loss.item()}")
            accelerator.backward(loss)
        for name, value in ({"loss": loss} | terms).items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        del predictions, loss, terms  # before the next part takes their place

    watch()
    if clip_norm:
        sums["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), clip_norm)
        if not torch.isfinite(sums["grad_norm"]):
            raise NonFiniteLoss(f"gradient norm is {sums['grad_norm'].item()}")
    optimizer.step()
    return sums
