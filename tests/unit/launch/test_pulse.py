"""A finger on every node: whose turn it is, what is learned, what a step is told once, and who is silent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from holdfast.clock import FakeClock
from holdfast.fault_tolerance.board import REPORT_SLOTS
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.protector import Protector, Status
from holdfast.launch.calls import Calls
from holdfast.launch.fleet import Address, Completion, Role
from holdfast.launch.pulse import Pulse
from holdfast.types import Phase, StepReport
from tests.support.keepers import LocalFleet, attach, make_keeper, offer, writer

_INTERVAL_S, _SILENCE_S = 0.125, 10.0


def _report(step: int, epoch: int = 1, loss: float = 1.5) -> StepReport:
    return StepReport(step, epoch, loss, 2.5, 1e-3, 0.7, 64 * step, 0.25, 0.0, 9000, step - 1)


class _Driver:
    """What a conductor does with a pulse, against keepers whose hosts have clocks of their own."""

    def __init__(self, *keepers: Keeper) -> None:
        self.fleet = LocalFleet.of_keepers(*keepers)
        self.calls, self.clock, self.steps = Calls(self.fleet), FakeClock(50.0), list[StepReport]()
        self.pulse = Pulse(self.calls, interval_s=_INTERVAL_S, silence_s=_SILENCE_S, on_step=self.steps.append)
        self.nodes = range(len(keepers))

    def ask(self) -> None:
        self.pulse.ask(self.nodes, self.clock.now())

    def hear(self) -> None:
        for report in self.fleet.poll(0.0):
            assert isinstance(report, Completion)
            self.calls.complete(report)
        self.calls.expire(self.clock.now())

    def turn(self, seconds: float = _INTERVAL_S) -> None:
        self.ask()
        self.hear()
        self.clock.advance(seconds)

    def asked(self) -> list[int]:
        return [sent.target.number for sent in self.fleet.sent]


# -- whose turn it is -------------------------------------------------------------------------------------------------


def test_every_keeper_is_asked_once_per_interval() -> None:
    driver = _Driver(make_keeper(0), make_keeper(1))
    for _ in range(10):
        driver.turn(_INTERVAL_S / 4)
    assert driver.asked() == [0, 1] * 3  # at 0, 1 and 2 intervals


def test_a_keeper_that_has_not_answered_is_not_asked_again_and_the_others_are() -> None:
    driver = _Driver(make_keeper(0), make_keeper(1))
    driver.turn()
    driver.fleet.held_back.add("pulse")
    driver.ask()
    del driver.fleet.bodies[Address(Role.KEEPER, 0)]
    driver.fleet.held_back.clear()
    for _ in range(3):
        driver.hear()
        driver.clock.advance(_INTERVAL_S)
        driver.ask()
    assert driver.asked() == [0, 1, 0, 1, 1, 1, 1]


# -- what is learned --------------------------------------------------------------------------------------------------


def test_ages_are_carried_over_between_hosts_whose_clocks_differ() -> None:
    host = FakeClock(900_000.0)
    keeper = make_keeper(clock=host)
    board = attach(keeper, 3).board
    board.take_over(pid=77, epoch=2)
    board.enter(Phase.VOTE, 5, host.now() - 7.0)
    board.beat(host.now() - 2.0)
    driver = _Driver(keeper)
    driver.ask()
    asked_s = driver.clock.now()
    driver.clock.advance(0.3)  # the answer takes its time
    driver.hear()
    beat = driver.pulse.beats[3]
    assert (beat.rank, beat.epoch, beat.phase, beat.step) == (3, 2, Phase.VOTE, 5)
    assert (beat.beat_s, beat.progress_s) == pytest.approx((asked_s - 2.0, asked_s - 7.0))


def test_a_rank_is_not_held_responsible_for_the_silence_of_its_keeper() -> None:
    driver = _Driver(make_keeper(0), make_keeper(1))
    for rank, node in ((0, 0), (1, 1)):
        attach(driver.fleet.bodies[Address(Role.KEEPER, node)], rank).board.beat(1000.0)  # type: ignore[arg-type]  # a keeper
    driver.turn()
    known = driver.pulse.beats_at(driver.clock.now())
    del driver.fleet.bodies[Address(Role.KEEPER, 1)]
    for _ in range(8):
        driver.turn()
    now = driver.clock.now()
    ages = {rank: now - beat.beat_s for rank, beat in driver.pulse.beats_at(now).items()}
    assert ages[1] == pytest.approx(driver.clock.now() - 8 * _INTERVAL_S - known[1].beat_s)
    assert ages[0] == pytest.approx(ages[1])  # as of the keeper's clock, which the test does not move
    assert (driver.pulse.heard_s[0], driver.pulse.heard_s[1]) == (now - _INTERVAL_S, now - 9 * _INTERVAL_S)


def test_versions_are_those_of_the_last_pulse() -> None:
    keeper = make_keeper()
    snapshots = writer(keeper, epoch=2, persist_every=4)
    driver = _Driver(keeper)
    offer(snapshots, 4)
    driver.turn()
    assert [(v["version"], v["epoch"], v["kept"]) for v in driver.pulse.versions[0]] == [(4, 2, True)]
    keeper.quarantine(0, 4)
    driver.turn()
    assert driver.pulse.versions[0] == []


def test_a_rank_is_forgotten_with_its_keeper_and_read_from_the_start_at_its_successor() -> None:
    driver = _Driver(make_keeper())
    board = attach(driver.fleet.bodies[Address(Role.KEEPER, 0)]).board  # type: ignore[arg-type]  # a keeper
    for step in (1, 2, 3):
        board.append(_report(step))
    driver.turn()
    successor = make_keeper()
    board = attach(successor).board
    for step in range(4, 10):
        board.append(_report(step))
    driver.fleet.bodies[Address(Role.KEEPER, 0)] = successor
    driver.pulse.forget_rank(0)
    driver.pulse.forget_rank(0)
    assert (driver.pulse.beats, driver.pulse.versions) == ({}, {})
    driver.turn()
    assert [report.step for report in driver.steps] == list(range(1, 10))


# -- a step is told once ----------------------------------------------------------------------------------------------


def test_a_step_that_every_rank_tells_of_is_told_once_and_in_order() -> None:
    keepers = [make_keeper(0), make_keeper(1)]
    boards = [attach(keeper, rank).board for rank, keeper in enumerate(keepers)]
    driver = _Driver(*keepers)
    for step in range(1, 10):
        boards[step % 2].append(_report(step))
        driver.turn()
        boards[(step + 1) % 2].append(replace(_report(step), stall_s=0.5))
    driver.turn()
    assert driver.steps == [_report(step) for step in range(1, 10)]


def test_only_reports_that_are_new_are_asked_for() -> None:
    keeper = make_keeper()
    board = attach(keeper, 3).board
    driver = _Driver(keeper)
    for step in (1, 2):
        board.append(_report(step))
        driver.turn()
    driver.ask()
    assert [sent.args for sent in driver.fleet.sent] == [({},), ({"3": 1},), ({"3": 2},)]


def test_a_step_of_which_only_one_rank_lived_to_tell_is_told() -> None:
    keepers = [make_keeper(0), make_keeper(1)]
    boards = [attach(keeper, rank).board for rank, keeper in enumerate(keepers)]
    driver = _Driver(*keepers)
    for step in (1, 2):
        boards[0].append(_report(step))
    for step in (1, 2, 3):
        boards[1].append(_report(step))
    driver.turn()
    assert [report.step for report in driver.steps] == [1, 2, 3]


def test_steps_that_a_newer_epoch_repeats_are_told_again_and_old_news_of_the_older_one_is_not() -> None:
    keepers = [make_keeper(0), make_keeper(1)]
    boards = [attach(keeper, rank).board for rank, keeper in enumerate(keepers)]
    driver = _Driver(*keepers)
    for step in (1, 2, 3):
        boards[0].append(_report(step, epoch=1))
    driver.turn()
    for step in (2, 3, 4):
        boards[0].append(_report(step, epoch=2))
    for step, epoch in ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2)):
        boards[1].append(_report(step, epoch))
    driver.turn()
    told = [(report.epoch, report.step) for report in driver.steps]
    assert told == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4)]


def test_reports_that_were_carried_into_a_new_keepers_memory_are_not_told_again() -> None:
    keeper, successor = make_keeper(), make_keeper()
    old = attach(keeper)
    for step in range(1, 6):
        old.board.append(_report(step))
    driver = _Driver(keeper)
    driver.turn()
    new = attach(successor)
    driver.fleet.bodies[Address(Role.KEEPER, 0)] = successor
    driver.pulse.forget_rank(0)
    driver.turn()
    new.board.carry_over(old.board)
    new.board.append(_report(6))
    driver.turn()
    driver.turn()
    assert [report.step for report in driver.steps] == [1, 2, 3, 4, 5, 6]


def test_a_driver_that_was_busy_for_longer_than_the_ring_lasts_hears_of_the_newest_steps() -> None:
    keeper = make_keeper()
    board = attach(keeper).board
    driver = _Driver(keeper)
    for step in range(1, REPORT_SLOTS + 11):
        board.append(_report(step))
    driver.turn()
    assert [report.step for report in driver.steps] == list(range(11, REPORT_SLOTS + 11))


# -- silence ----------------------------------------------------------------------------------------------------------


def test_a_keeper_that_does_not_answer_in_time_is_reported_once_and_asked_again() -> None:
    driver = _Driver(make_keeper(0), make_keeper(1))
    driver.fleet.held_back.add("pulse")
    driver.ask()
    driver.clock.advance(_SILENCE_S)
    driver.hear()
    assert driver.pulse.silent == []
    driver.clock.advance(0.1)
    driver.fleet.held_back.clear()
    del driver.fleet.bodies[Address(Role.KEEPER, 0)]
    driver.hear()
    assert driver.pulse.silent == [(0, "no answer before the deadline")]
    driver.ask()
    assert driver.asked() == [0, 1, 0, 1]


def test_an_answer_that_came_while_the_driver_slept_counts() -> None:
    driver = _Driver(make_keeper())
    driver.ask()
    driver.clock.advance(100 * _SILENCE_S)
    driver.hear()
    assert driver.pulse.silent == []


def test_a_keeper_that_fails_is_reported_with_its_error_and_others_are_not_disturbed() -> None:
    bad, good = make_keeper(0), make_keeper(1)
    board = attach(bad, 0).board
    board._view[4096:8192] = bytes(4096)  # its signs of life are destroyed
    attach(good, 1)
    driver = _Driver(bad, good)
    driver.turn()
    assert [(node, error.splitlines()[0]) for node, error in driver.pulse.silent] == [
        (0, "SnapshotError: the board of rank 0 cannot be read; its memory was overwritten")
    ]
    assert list(driver.pulse.beats) == [1]


def test_a_lost_keeper_is_reported_and_its_successor_is_asked_in_its_turn() -> None:
    driver = _Driver(make_keeper(0), make_keeper(1))
    driver.fleet.held_back.add("pulse")
    driver.ask()
    driver.calls.forget(Address(Role.KEEPER, 0), "killed")
    assert driver.pulse.silent == [(0, "process lost: killed")]
    driver.clock.advance(_INTERVAL_S)
    driver.ask()
    assert driver.asked() == [0, 1, 0]


def test_pulses_keep_the_lease() -> None:
    host = FakeClock(0.0)
    keeper = make_keeper(clock=host)
    driver = _Driver(keeper)
    for _ in range(5):
        host.advance(50.0)
        driver.turn()
        assert not keeper.expired(host.now())
    host.advance(61.0)
    assert keeper.expired(host.now())


# -- what keepers agree on --------------------------------------------------------------------------------------------


def test_each_committed_version_is_news_once_whichever_keepers_tell_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _Driver(make_keeper(0), make_keeper(1))
    driver.turn()
    assert driver.pulse.committed() == []
    monkeypatch.setattr(Protector, "status", Status(committed=7, epoch=2))
    for _ in range(3):
        driver.turn()
    monkeypatch.setattr(Protector, "status", Status(committed=8, epoch=2))
    driver.turn()
    assert driver.pulse.committed() == [(2, 7), (2, 8)]
    assert driver.pulse.committed() == []


def test_attempts_that_fail_are_told_of_only_when_no_version_is_committed_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = _Driver(make_keeper(0))
    for aborted in range(1, 30, 2):
        monkeypatch.setattr(Protector, "status", Status(committed=aborted, epoch=1, aborted=aborted, reason="skipped"))
        driver.turn()
    assert driver.pulse.unprotected == []
    for aborted in range(30, 41):
        monkeypatch.setattr(Protector, "status", Status(committed=29, epoch=1, aborted=aborted, reason="no memory"))
        driver.turn()
    assert driver.pulse.unprotected == [(0, "no memory"), (0, "no memory")]
