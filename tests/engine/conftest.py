"""What tests of training share: a training that is interrupted, and whether two states are the same."""

import signal

import pytest
import torch

from detrlib.engine import loop


@pytest.fixture(scope="session")
def same():
    def same(a, b):
        """Whether two nested structures of tensors are equal, bit for bit."""
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        return a == b

    return same


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the next training end at once before its update number `step` (from 0), as a second Ctrl-C does.

    Or it gets a signal in this update, after which it saves and stops; `what`: or in such a call of another function.
    """

    def arm(step, by=None, what="train_step"):
        real, steps = getattr(loop, what), iter(range(step + 1))

        def stopping(*given, **settings):
            if next(steps) == step:
                monkeypatch.setattr(loop, what, real)
                if by is None:
                    raise KeyboardInterrupt
                signal.raise_signal(by)
            return real(*given, **settings)

        monkeypatch.setattr(loop, what, stopping)

    return arm
