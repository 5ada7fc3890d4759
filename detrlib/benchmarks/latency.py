"""How long the components of a model take in a forward pass.

measure_latency(model, (800, 1066))["decoder"]          milliseconds
"""

import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from detrlib.benchmarks.measure import now, seconds
from detrlib.experiments.costs import ORDER, PUBLISHED_SIZE, REST, component_of


@torch.no_grad()
def measure_latency(
    model: nn.Module, size: tuple[int, int] = PUBLISHED_SIZE, batch: int = 1, repeats: int = 10, warm_up: int = 3
) -> dict[str, float]:
    """Median milliseconds of every component and of the whole ("total") for a batch of random images of `size`.

    On the model's device, in evaluation mode, without gradients; the first `warm_up` passes are not counted. Times of
    components are taken in passes of their own, which wait for the device at every border; the total is not slowed so.
    """
    device = str(next(model.parameters()).device)
    images = torch.rand(batch, 3, *size, device=device)
    training = model.training
    model.eval()
    try:
        totals = [seconds(lambda: model(images), device) for _ in range(warm_up + repeats)][warm_up:]
        parts = []
        for _ in range(repeats):
            with _stopwatch(model, device) as spent:
                whole = seconds(lambda: model(images), device)
            parts.append({**spent, REST: whole - spent.total()})
    finally:
        model.train(training)
    medians = {name: 1000 * statistics.median(part.get(name, 0.0) for part in parts) for name in ORDER}
    return medians | {"total": 1000 * statistics.median(totals)}


@contextmanager
def _stopwatch(model: nn.Module, device: str) -> Iterator[Counter[str]]:
    """Seconds by component, of every forward pass within; a component within another is not counted twice."""
    spent: Counter[str] = Counter()
    running, last = [], 0.0  # components at work, outermost first

    def switch() -> None:
        nonlocal last
        time = now(device)
        if running:
            spent[running[-1]] += time - last
        last = time

    def enter(name: str) -> None:
        switch()
        running.append(name)

    def leave(*_) -> None:
        switch()
        running.pop()

    hooks = []
    for path, module in model.named_modules():
        if (name := component_of(path)) != REST:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(module.register_forward_hook(leave))
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
