"""One contract for every clock, then what the fake one adds."""

from __future__ import annotations

import time

import pytest

from holdfast.clock import Clock, FakeClock, SystemClock


@pytest.fixture(params=[SystemClock, FakeClock])
def clock(request: pytest.FixtureRequest) -> Clock:
    made: Clock = request.param()
    return made


def test_time_passes_while_one_sleeps_and_never_goes_back(clock: Clock) -> None:
    before = clock.now()
    clock.sleep(0.002)
    after = clock.now()
    assert after - before >= 0.002
    clock.sleep(0.0)
    assert clock.now() >= after


def test_nobody_sleeps_into_the_past(clock: Clock) -> None:
    before = clock.now()
    with pytest.raises(ValueError, match="non-negative"):
        clock.sleep(-1.0)
    assert clock.now() >= before


def test_the_system_clock_is_the_one_that_processes_of_a_host_share() -> None:
    low = time.clock_gettime(time.CLOCK_MONOTONIC)
    assert low <= SystemClock().now() <= time.clock_gettime(time.CLOCK_MONOTONIC)


def test_a_fake_clock_stands_still_until_it_is_moved() -> None:
    clock = FakeClock(100.0)
    assert clock.now() == clock.now() == 100.0
    clock.advance(2.5)
    clock.sleep(0.5)
    assert clock.now() == 103.0
