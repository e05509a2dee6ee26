"""How long a queue takes to empty, by a clock that stands still unless it is told to go."""

from __future__ import annotations

import math

import pytest

from realtime_serve.engine.drain_rate import DrainRate


class Line:
    """Requests that come, wait and end, as a client sees them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.open = 0
        self.rate = DrainRate(lambda: self.now)

    def come(self, count: int = 1) -> None:
        for _ in range(count):
            self.rate.observe(self.open)
            self.rate.took_one()
            self.open += 1

    def refused(self) -> None:
        self.rate.observe(self.open)

    def steady(self, seconds: float, *, ends_every: float) -> None:
        """One ends and another comes, again and again."""
        for _ in range(round(seconds / ends_every)):
            self.now += ends_every
            self.open -= 1
            self.come()

    def drained_in(self, waiting: int) -> float:
        self.refused()
        return self.rate.seconds_to_drain(waiting)


@pytest.mark.parametrize("ends_every", [0.001, 0.1, 2.0, 10.0])
def test_it_is_the_waiting_over_the_rate(ends_every: float) -> None:
    line = Line()
    line.come(50)
    line.steady(200, ends_every=ends_every)
    assert line.drained_in(40) == pytest.approx(40 * ends_every, rel=0.01)


def test_refusals_between_change_nothing() -> None:
    line = Line()
    line.come(50)
    for _ in range(500):
        line.now += 0.05
        line.refused()
        line.now += 0.05
        line.refused()
        line.refused()
        line.open -= 1
        line.come()
    assert line.drained_in(10) == pytest.approx(1.0, rel=0.01)


def test_it_follows_a_change_of_load() -> None:
    line = Line()
    line.come(50)
    line.steady(100, ends_every=0.1)
    line.steady(90, ends_every=2.0)
    assert line.drained_in(10) == pytest.approx(20.0, rel=0.5)
    line.steady(150, ends_every=0.1)
    assert line.drained_in(10) == pytest.approx(1.0, rel=0.1)


def test_until_one_has_ended_each_takes_as_long_as_has_passed() -> None:
    line = Line()
    assert line.drained_in(10) == 0.0
    line.come(11)
    line.now += 2.0
    assert line.drained_in(10) == pytest.approx(20.0, rel=0.05)


def test_many_that_end_together_count_over_the_time_they_took() -> None:
    line = Line()
    line.come(60)
    line.now += 5.0
    line.open -= 50
    assert line.drained_in(10) == pytest.approx(1.0)


def test_idle_time_is_not_slowness() -> None:
    line = Line()
    line.come(50)
    line.steady(100, ends_every=0.1)
    before = line.drained_in(10)
    line.open = 0
    line.now += 3600.0
    line.come(50)
    assert line.drained_in(10) == pytest.approx(before)


def test_a_clock_that_stands_still_or_a_long_pause_is_no_error() -> None:
    line = Line()
    line.come(5)
    line.open -= 3
    assert line.drained_in(2) == pytest.approx(0.0, abs=1e-5)
    line.now += 1e9
    assert math.isfinite(line.drained_in(2))
