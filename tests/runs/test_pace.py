"""The time a run has left."""

from __future__ import annotations

import pytest

from coconut_ds.runs.terminal import Pace


def test_before_the_first_step_nothing_is_promised():
    assert Pace(steps=10, evaluations=2).seconds_left() == 0


def test_steps_and_evaluations_that_are_left_take_as_long_as_the_latest():
    pace = Pace(steps=10, evaluations=2)
    pace.stepped(64, 2.0)
    assert pace.examples_per_s == 32
    assert pace.seconds_for(4) == 8
    assert pace.seconds_left() == 9 * 2
    pace.evaluated(5.0)
    assert pace.seconds_left() == 9 * 2 + 1 * 5


def test_a_slow_step_moves_the_average_by_a_tenth():
    pace = Pace(steps=10, evaluations=0)
    pace.stepped(64, 1.0)
    pace.stepped(64, 2.0)
    assert pace.seconds_for(1) == pytest.approx(1.1)
    assert pace.examples_per_s == pytest.approx(64 - 3.2)
