"""How long a sweep still takes: every part of it counts, as soon as it has been seen once."""

import pytest

from detrlib.experiments.time_left import FIGURES, Course, seconds_left


@pytest.fixture
def course():
    def course(started=None, shares=(), ended=None, whole=100.0):
        """A run whose training began at `started` and was at `shares` of it, {time: share}."""
        made = Course(started=started)
        for time, share in dict(shares).items():
            made.see(time, share, whole)
        made.ended, made.over = ended, ended is not None
        return made

    return course


def test_nothing_is_known_before_a_first_step(course):
    assert seconds_left([course(), course(started=0.0)], 1, 5.0) is None


def test_a_first_logged_step_tells_of_all(course):
    """18 s to its first step, 98 of 100 s to train, as long to measure as to start, figures over one run."""
    left = seconds_left([course(0.0, {20.0: 0.02})], 1, 20.0)
    assert left == pytest.approx(98 + 18 + (FIGURES + 1) * 18)
    later = seconds_left([course(0.0, {20.0: 0.02})], 1, 25.0)
    assert later == pytest.approx(left - 5)


def test_a_tenth_of_a_training_tells_more_than_its_last_step(course):
    """Evaluations lie between steps: 0.2 of it took 60 s, so all of it takes 300."""
    left = seconds_left([course(0.0, {20.0: 0.1, 80.0: 0.3})], 1, 80.0)
    assert left == pytest.approx(0.7 * 300 + 10 + (FIGURES + 1) * 10)


def test_runs_that_wait_begin_where_others_end(course):
    """Two slots: one is free in 10 + 40 s, when the last run begins, which takes 10 s, a mean training, and 40 s."""
    done = course(0.0, {20.0: 0.1, 65.0: 1.0}, ended=105.0)
    busy = [course(0.0, {20.0: 0.1, 100.0: 0.9}), course(0.0, {20.0: 0.1, 100.0: 0.4})]
    left = seconds_left([done, *busy, course()], 2, 100.0)
    trainings = 50, 100, 80 / 0.3
    last = 10 + 40 + 10 + sum(trainings) / 3 + 40
    assert left == pytest.approx(max(last, 0.6 * trainings[2] + 40) + (FIGURES + 4) * 10)


def test_a_run_that_goes_on_is_not_taken_for_a_fast_one(course):
    """What another sweep has done tells nothing, and steps since the last complete epoch are done again."""
    resumed = Course()
    resumed.see(0.0, 0.6, 100.0)
    resumed.started = 1.0
    resumed.see(10.0, 0.5, 100.0)
    assert resumed.first is None and resumed.training is None
    resumed.see(21.0, 0.51, 100.0)
    assert resumed.start == pytest.approx(19) and resumed.training == 100
    assert seconds_left([resumed], 1, 21.0) == pytest.approx(49 + 19 + (FIGURES + 1) * 19)
