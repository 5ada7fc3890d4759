"""How long a training still takes, evaluations included, from what its steps and evaluations have taken so far."""

from datetime import datetime, timedelta
from statistics import mean

from detrlib.config import Train
from detrlib.engine.tracking import duration

FIRST = 3  # steps, after one that prepares things, from which the time that is left is told
MINUTE = 60  # seconds of steps between two lines
FORWARD = 1 / 3  # of a step's time for each image, which evaluating one is taken for until it has been seen


class Pace:
    """Of one training, which may be one that goes on.

    steps: of an epoch. evaluated: images of an evaluation in parts of those of a step.
    """

    def __init__(self, settings: Train, steps: int, evaluated: float):
        self.settings, self.steps, self.evaluated = settings, steps, evaluated
        self.evaluations: list[float] = []  # seconds of each so far
        self.first: float | None = None  # seconds of the first step, which prepares things
        self.taken, self.timed = 0.0, 0  # seconds of the others, and how many these are
        self.said: float | None = None  # after so many seconds of steps

    def step(self, seconds: float, number: int, epoch: int) -> str | None:
        """Note what a step has taken with its batch, `number` of `epoch`, both from 0; a line if one is due."""
        if self.first is None:
            self.first = seconds
            return None
        self.taken, self.timed = self.taken + seconds, self.timed + 1
        if self.timed < FIRST or (self.said is not None and self.taken - self.said < MINUTE):
            return None
        self.said = self.taken
        left = self.left(epoch, number + 1)
        until = datetime.now() + timedelta(seconds=left)
        whole = f"an epoch takes about {duration(self.steps * self.taken / self.timed)} without evaluation"
        where = f"epoch {epoch + 1}/{self.settings.epochs}, {number + 1} of {self.steps} updates"
        return f"time: about {duration(left)} left, until {until:%Y-%m-%d %H:%M} ({where}; {whole})"

    def left(self, epoch: int, number: int = 0) -> float | None:
        """Seconds until the end, with `epoch` epochs and `number` steps of another complete.

        None where it went on after the steps of an epoch, so that it has seen none.
        """
        if self.first is None:
            return None
        step = self.taken / self.timed if self.timed else self.first
        evaluation = mean(self.evaluations) if self.evaluations else FORWARD * self.evaluated * step
        epochs, every = self.settings.epochs, self.settings.eval_every
        judged = sum(each % every == 0 or each == epochs for each in range(epoch + 1, epochs + 1))
        return ((epochs - epoch) * self.steps - number) * step + judged * evaluation
