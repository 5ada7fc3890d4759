"""When a sweep will be over, from what its runs have taken so far.

A run starts, trains and is then measured; figures over all runs are drawn at the end. What has been seen of one run is
expected of the others; what no run has reached yet is taken to last as long as a start, which loads the same libraries.
"""

from collections.abc import Collection
from dataclasses import dataclass
from heapq import heappop, heappush
from statistics import mean

FIGURES = 4  # starts that drawing all figures takes, and one more for each run that is drawn
TELLING = 0.1  # of a training: what it takes in all is told by so much of it, and before by its last logged step


@dataclass
class Course:
    """What is known of one run: times in seconds of one clock, None where something has not happened yet."""

    share: float = 0.0  # of the training steps, done
    whole: float | None = None  # seconds that all of them take, by the last one that was logged
    started: float | None = None  # its process
    first: tuple[float, float] | None = None  # when it was seen to train, and the share then
    latest: tuple[float, float] | None = None
    start: float | None = None  # seconds from the start of its process to its first step
    ended: float | None = None  # its process
    over: bool = False  # nothing is left to do

    def see(self, now: float, share: float, whole: float | None) -> None:
        """Note how much of its training is done, and what all of it would take at the pace of its last step."""
        if self.started is not None and share > self.share:
            self.latest, self.whole = (now, share), whole
            if self.first is None:
                trained = (share - self.share) * (whole or 0.0)  # before it was seen
                self.first, self.start = self.latest, max(0.0, now - self.started - trained)
        self.share = share  # less than before where a run goes on after its last complete epoch

    @property
    def training(self) -> float | None:
        """Seconds that all of its training takes."""
        if self.first and self.latest[1] - self.first[1] > TELLING:
            return (self.latest[0] - self.first[0]) / (self.latest[1] - self.first[1])
        return self.whole

    @property
    def end(self) -> float | None:
        """Seconds after its training."""
        return self.ended - self.latest[0] if self.ended is not None and self.latest else None

    def left(self, now: float, start: float, training: float, end: float) -> float:
        """Seconds until it is over, where runs take so long for each part."""
        if self.started is None:
            return start + (1 - self.share) * training + end
        if self.latest is None:
            return max(0.0, start - (now - self.started)) + (1 - self.share) * training + end
        after = (1 - self.share) * (self.training or training) + end
        return max(0.0, after - (now - self.latest[0]))


def seconds_left(courses: Collection[Course], slots: int, now: float) -> float | None:
    """Seconds until runs, `slots` side by side, and the figures over them are done; None before a first step."""

    def expected(name: str) -> float | None:
        seen = [value for course in courses if (value := getattr(course, name)) is not None]
        return mean(seen) if seen else None

    start, training, end = expected("start"), expected("training"), expected("end")
    if training is None:
        return None
    times = [start, training, start if end is None else end]
    going = [course for course in courses if not course.over]
    slot_free = []
    for course in sorted(going, key=lambda course: course.started is None):  # those that wait come last
        begins = heappop(slot_free) if course.started is None and len(slot_free) >= slots else 0.0
        heappush(slot_free, begins + course.left(now, *times))
    return max(slot_free, default=0.0) + (FIGURES + len(courses)) * start
