"""How long a training still takes: said after the first steps and each minute, evaluations counted."""

import pytest

from detrlib.engine.pace import FIRST, MINUTE, Pace


@pytest.fixture
def pace(tiny_config):
    """Of 3 epochs of 100 steps, judged after the second and the third, on 30 steps' worth of images."""
    return Pace(tiny_config({"train.epochs": 3, "train.eval_every": 2}).train, 100, 30)


def test_all_steps_and_evaluations_that_are_left_count(pace):
    for number, seconds in enumerate([50.0, 2.0, 2.0]):  # the first prepares things, and tells nothing of the others
        pace.step(seconds, number, 0)
    assert pace.left(0, 3) == pytest.approx(297 * 2 + 2 * 30 * 2 / 3)  # a third of a step, until one has been seen
    pace.evaluations += [10.0, 20.0]
    assert pace.left(1) == pytest.approx(200 * 2 + 2 * 15)
    assert pace.left(2) == pytest.approx(100 * 2 + 15)
    assert pace.left(3) == 0


def test_an_epoch_of_one_step_tells_something(pace):
    pace.steps = 1
    pace.step(5.0, 0, 0)
    assert pace.left(1) == pytest.approx(2 * 5 + 2 * 50)


def test_a_line_comes_after_the_first_steps_and_then_each_minute(pace):
    lines = [pace.step(10.0, number, 0) for number in range(20)]
    said = [number for number, line in enumerate(lines) if line]
    assert said == [FIRST, FIRST + MINUTE // 10, FIRST + 2 * MINUTE // 10]
    left = (300 - 4) * 10 + 2 * 100
    assert f"about {round(left / 60)} min left" in lines[FIRST] and "epoch 1/3, 4 of 100 updates" in lines[FIRST]
