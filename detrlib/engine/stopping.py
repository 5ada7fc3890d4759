"""How training ends early and loses nothing: a signal ends it after the step in which it comes.

SIGTERM and SIGUSR1 come from Slurm and from launchers, SIGINT from Ctrl-C and from the interrupt of a notebook, SIGHUP
from a terminal that is closed. The first saves and stops: after the step, or, during an evaluation, after its batch.
The next does at once what it does to any program. Before there is anything to save, so does the first.

Of several processes it is enough that one gets the signal. What each wishes travels with the numbers of boxes that
they exchange in every step anyway, so that all of them stop, or save, after the same one.
"""

import math
import os
import signal
import time
from contextlib import suppress
from enum import IntEnum

import torch
from accelerate import Accelerator
from torch import Tensor

from detrlib.engine.children import taking
from detrlib.engine.step import Sent
from detrlib.errors import Stopped

SAME = 5.0  # seconds in which signals count as one: Slurm sends to all processes, and what got it hands it on
TWICE = 1.0  # likewise for those of a person, who may mean it


class Wish(IntEnum):
    """What is to be done after a step."""

    NOTHING, SAVE, STOP = range(3)


class Stopping:
    """Whether training is to stop, or to save, after a step; while it is entered it takes signals, see `taking`."""

    def __init__(self, accelerator: Accelerator, save_minutes: float):
        self.accelerator, self.seconds = accelerator, save_minutes * 60 or math.inf
        self.signal: signal.Signals | None = None  # the first that has come
        self.training = False  # there is something to save
        self._came = self._saved = time.monotonic()
        self._taking, self._wishes = taking(self._take), None

    def __enter__(self) -> "Stopping":
        self._taking.__enter__()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._taking.__exit__(None, None, None)
        if kind is KeyboardInterrupt and self.signal and not self.training:
            raise Stopped(f"stopped by {self.name} before the first step; the same run name starts again") from None

    def _take(self, number: signal.Signals) -> bool:
        if self.signal is not None:
            return time.monotonic() - self._came <= (TWICE if number == signal.SIGINT else SAME)
        self.signal, self._came = number, time.monotonic()
        if not self.training:
            raise KeyboardInterrupt  # which nobody takes for a fault
        if self.accelerator.is_main_process:
            with suppress(OSError):  # nobody reads it any more
                # Not by print, in whose midst this may be.
                os.write(2, f"\n{self.name}: saving after this step; another one ends at once\n".encode())
        return True

    @property
    def name(self) -> str:
        """Of the signal that has come, to this process or another."""
        return "a signal" if self.signal is None else self.signal.name

    def asked(self) -> bool:
        """Whether this process was told to stop; the others may not know of it."""
        return self.signal is not None

    def saved(self) -> None:
        """Note that everything is saved, for `train.save_minutes`."""
        self._saved = time.monotonic()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values [N] over the processes, which learn from each other in it what they wish."""
        if self.accelerator.num_processes == 1:
            return values
        both = torch.cat([values, values.new_full((1,), self._wish())])
        means = self.accelerator.reduce(both, "mean")
        self._wishes = Sent(means[-1:])
        return means[:-1]

    def agreed(self) -> Wish:
        """What all processes do after this step; a step is one that has asked for a `mean`."""
        if self._wishes is None:
            return self._wish()
        total = round(self._wishes.read()[0] * self.accelerator.num_processes)
        return Wish(min(total, Wish.STOP))

    def _wish(self) -> Wish:
        """What this process wishes. The clock is that of the main one, so that all wishes to save add up to one."""
        if self.asked():
            return Wish.STOP
        due = self.accelerator.is_main_process and time.monotonic() - self._saved >= self.seconds
        return Wish.SAVE if due else Wish.NOTHING
