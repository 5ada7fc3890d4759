"""One update of the weights: the batch part by part, one gradient.

On a GPU the CPU only queues what is to be done, and runs ahead of it. It waits once in a step, for the costs that it
matches by (see losses/matcher.py), and where losses are logged. So whether a loss is a number is known to it one step
late: the GPU itself leaves the weights alone where it is none, and `Pending` tells of it as soon as the CPU has waited.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from detrlib.data import Batch
from detrlib.engine.evaluate import autocast
from detrlib.errors import NonFiniteLoss
from detrlib.losses.criterion import Criterion


class Sent:
    """Numbers on their way to the CPU, which goes on meanwhile."""

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._arrival = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def read(self) -> list[float]:
        """Them, once they are there. Nobody waits who has waited for a later result."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values.tolist()


class Pending:
    """Loss and gradient norm of the last update, of which the CPU does not know yet whether they are numbers."""

    def __init__(self):
        self._noted = None

    def note(self, numbers: dict[str, Tensor], explain: Callable[[str], str] = str) -> Tensor:
        """Send `numbers`, by what they are, to the CPU. explain: from what is none to the message of the error.

        Returns whether all of them are numbers, on their device.
        """
        values = torch.stack(list(numbers.values()))
        self._noted = list(numbers), Sent(values), explain
        return values.isfinite().all()

    def read(self) -> None:
        """Raise NonFiniteLoss where one of them is no number; `Sent.read` says when this waits."""
        if self._noted is None:
            return
        (names, sent, explain), self._noted = self._noted, None
        for name, value in zip(names, sent.read(), strict=True):
            if not math.isfinite(value):
                raise NonFiniteLoss(explain(f"{name} is {value}"))


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
    pending: Pending | None = None,
    explain: Callable[[str], str] = str,
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
        pending: of the update before, read here, and then of this one; None: this one is read at once.
        explain: from what is no number to the message of the error.

    Returns:
        "loss", which was minimised, its unweighted terms, and "grad_norm", that before clipping; detached, and of the
        whole batch.

    Raises:
        NonFiniteLoss: the loss or the norm of its gradients is no number; weights are as they were. On a GPU, with a
            fused optimiser, this is told of the update before.
    """
    pending, may_wait = (Pending(), False) if pending is None else (pending, _skips(optimizer))
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
            pending.read()  # the matcher has just waited for what came later
            accelerator.backward(loss)
        for name, value in ({"loss": loss} | terms).items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        del predictions, loss, terms  # before the next part takes their place

    watch()
    if clip_norm:
        sums["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), clip_norm)
    else:
        sums["grad_norm"] = get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    finite = pending.note({"loss": sums["loss"], "gradient norm": sums["grad_norm"]}, explain)
    if not may_wait:
        pending.read()
    with _unless(~finite, optimizer) if may_wait else nullcontext():
        optimizer.step()
    return sums


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser can be told on a GPU to leave the weights alone."""
    group = optimizer.param_groups[0]
    return bool(group.get("fused")) and group["params"][0].is_cuda


@contextmanager
def _unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A fused optimiser does nothing where `skip` is true, which is not asked for: as for gradients scaled too far."""
    inner = getattr(optimizer, "optimizer", optimizer)  # within that of Accelerate
    inner.found_inf = skip.float()
    try:
        yield
    finally:
        del inner.found_inf
