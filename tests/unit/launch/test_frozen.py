"""What the driver asks keepers to hold, and when it says that they do."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.events import BricksHeld, MemoryEvents, Protection
from holdfast.fault_tolerance.bricks import Brick, BrickFile
from holdfast.launch.calls import Calls
from holdfast.launch.frozen import FrozenFiles
from holdfast.launch.pulse import Pulse
from tests.support.keepers import LocalFleet, make_keeper

_BRICK = Brick(BrickFile("adapter.base", "/base", "1e9c", 100), (0, 1), 1)


class _Driver:
    def __init__(self, *bricks: Brick) -> None:
        self.fleet, self.events = LocalFleet.of_keepers(*(make_keeper(node) for node in range(3))), MemoryEvents()
        calls = Calls(self.fleet)
        self.pulse = Pulse(calls, interval_s=1.0, silence_s=1.0, on_step=lambda report: None)
        self.frozen = FrozenFiles(bricks, calls, self.events, self.pulse)

    def hear(self, node: int, *, is_whole: bool = True, read: int = 0, coded: int = 0, failed: str = "") -> None:
        status: dict[str, Any] = {"is_whole": is_whole, "held": 100, "read": read, "received": read, "coded": coded}
        self.pulse.bricks[node] = {**status, "failed": [failed] if failed else []}

    def snapshots(self, *sizes: int) -> None:
        for rank, size in enumerate(sizes):
            older = {"version": 3, "epoch": 1, "bytes": 1}
            self.pulse.versions[rank] = [older, {"version": 4, "epoch": 1, "bytes": size}]


@pytest.fixture
def driver() -> _Driver:
    found = _Driver(_BRICK)
    found.frozen.hold({0: "a:1", 1: "b:1", 2: "c:1"})
    found.snapshots(40, 41, 42)
    return found


def test_keepers_are_asked_with_the_addresses_of_all_and_the_first_time_is_told_from_later_ones(
    driver: _Driver,
) -> None:
    driver.frozen.hold({0: "a:1", 2: "c:2"})
    asked = [(sent.target.number, sent.args[1], sent.args[2]) for sent in driver.fleet.sent]
    first, then = {"0": "a:1", "1": "b:1", "2": "c:1"}, {"0": "a:1", "2": "c:2"}
    assert asked == [(0, first, True), (1, first, True), (2, first, True), (0, then, False), (2, then, False)]
    assert all(
        sent.method == "hold_bricks" and Brick.from_json(sent.args[0][0]) == _BRICK for sent in driver.fleet.sent
    )  # type: ignore[index]


def test_a_run_without_frozen_files_asks_nobody() -> None:
    driver = _Driver()
    driver.frozen.hold({0: "a:1"})
    driver.frozen.tell_news(1)
    assert (driver.fleet.sent, driver.events.events, driver.frozen.exist) == ([], [], False)


def test_it_is_told_once_when_every_piece_is_there_and_every_rank_has_a_snapshot(driver: _Driver) -> None:
    driver.hear(0, read=100)
    driver.frozen.tell_news(3)
    driver.hear(1, is_whole=False)
    driver.frozen.tell_news(3)
    driver.hear(1, coded=100)
    driver.frozen.tell_news(4)
    assert driver.events.events == []
    for _ in range(2):
        driver.frozen.tell_news(3)
    expected = BricksHeld(1, 100, {"0": 100, "1": 100}, 100, 100, 100, {"0": 40, "1": 41, "2": 42})
    assert driver.events.events == [expected]


def test_an_epoch_in_which_nothing_was_taken_in_is_no_news_and_a_rebuilt_piece_is(driver: _Driver) -> None:
    for epoch, coded in enumerate((0, 0, 100)):
        driver.frozen.hold({0: "a:1", 1: "b:1", 2: "c:1"})
        driver.snapshots(50 + epoch, 51, 52)
        driver.hear(0, read=100 + coded)
        driver.frozen.tell_news(3)  # what the other one said before is history
        driver.hear(1, coded=coded)
        driver.frozen.tell_news(3)
    assert [event.coded for event in driver.events.of(BricksHeld)] == [0, 100]  # type: ignore[attr-defined]


def test_what_keeps_a_piece_away_is_told_once(driver: _Driver) -> None:
    driver.hear(0)
    driver.hear(1, is_whole=False, failed="/base: no room")
    for _ in range(2):
        driver.frozen.tell_news(3)
    (event,) = driver.events.of(Protection)
    assert event == Protection("reduced", "node 1 does not hold its piece of a frozen file: /base: no room")
