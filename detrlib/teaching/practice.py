"""A small training for a notebook: images learned by heart, in seconds."""

import torch
from torch import nn

from detrlib.data import Batch


def learn_by_heart(model: nn.Module, criterion: nn.Module, batch: Batch, steps: int, rate: float = 1e-3) -> list[float]:
    """Train a model on one batch, the same in every step, and leave it in evaluation mode.

    What it then detects in these images says that it can learn, and nothing about any other image.

    Args:
        model: as of `build_model`, on the CPU; it is changed.
        criterion: as of `losses.Criterion`.
        batch: of `data.collate`.
        steps: updates of the weights, by AdamW with gradients clipped to a norm of 0.1.
        rate: learning rate of all parameters.

    Returns:
        The total loss before every update.
    """
    model.train()
    images, totals = batch.images, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        loss, _ = criterion(model(images, batch.padding_mask), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        totals.append(loss.item())
    model.eval()
    return totals
