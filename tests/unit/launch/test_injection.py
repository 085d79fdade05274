"""The driver's part of fault injection: what is due and when, what is told, how wishes are answered."""

from __future__ import annotations

from pathlib import Path

from holdfast.configs.schema import LaunchConfig, RunConfig
from holdfast.events import FaultInjected, MemoryEvents
from holdfast.fault_tolerance import chaos
from holdfast.fault_tolerance.config import ChaosConfig
from holdfast.fault_tolerance.ledger import Ledger
from holdfast.launch import inject_files
from holdfast.launch.inject_files import State, struck_folder
from holdfast.launch.injection import Injector
from holdfast.launch.records import JsonlEvents
from holdfast.trainer.config import TrainerConfig


class Driven:
    """A run directory and the injector of its driver, without processes."""

    def __init__(self, root: Path, *faults: str, allow_inject: bool = True) -> None:
        config = RunConfig(
            chaos=ChaosConfig(faults=list(faults), allow_inject=allow_inject),
            launch=LaunchConfig(nodes=3),
            trainer=TrainerConfig(max_steps=100),
        )
        self.root, self.events = root, MemoryEvents()
        self.injector = Injector(config, root, self.events)

    def due(self, step: int, *, has_checkpoint: bool = True) -> list[str]:
        return [str(fault) for fault in self.injector.due(step, has_checkpoint=has_checkpoint)]

    def told(self, now: float) -> list[tuple[str, int]]:
        self.injector.report(now, is_urgent=True)
        return [(e.action, e.step) for e in self.events.events if isinstance(e, FaultInjected)]

    def state(self, number: int) -> State | None:
        found = inject_files.answer_to(self.root, number)
        return None if found is None else found.state


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_what_has_no_failpoint_is_due_once_when_its_step_is_seen(tmp_path: Path) -> None:
    run = Driven(tmp_path, "node_sigkill node=1 step=4", "sigkill rank=0 step=4", "disk_full step=6 for=1")
    assert run.due(9) == [], "no epoch has begun"
    run.injector.begin(-1)
    assert run.due(3) == []
    assert run.due(7) == ["node_sigkill node=1 step=4", "disk_full step=6 for=1.0"]
    assert run.due(8) == []
    assert run.told(0.0) == [("node_sigkill", 7), ("disk_full", 7)]


def test_steps_before_the_first_epoch_are_history_and_those_before_a_recovery_are_not(tmp_path: Path) -> None:
    run = Driven(tmp_path, "keeper_sigkill node=1 step=4", "keeper_sigkill node=2 step=6")
    run.injector.begin(5)
    run.injector.begin(7)  # after a recovery; step 6 was passed before anybody looked
    assert run.due(8) == ["keeper_sigkill node=2 step=6"]


def test_damage_to_a_checkpoint_waits_for_one(tmp_path: Path) -> None:
    run = Driven(tmp_path, "truncate_file step=4")
    run.injector.begin(0)
    assert run.due(5, has_checkpoint=False) == []
    assert run.due(6) == ["truncate_file step=4"]


def test_a_rate_strikes_every_step_that_the_driver_has_slept_through_and_none_twice(tmp_path: Path) -> None:
    run = Driven(tmp_path, "node_sigstop rate=0.2 seed=4", "driver_sigterm rate=0.3 seed=5 from=10")
    run.injector.begin(0)
    found = [due for step in (7, 7, 3, 8, 30) for due in run.due(step)]
    nodes, driver = chaos.Rate(0.2, 4), chaos.Rate(0.3, 5, None, 10)
    planned = [f"node_sigstop node={n} step={s}" for s in range(31) for n in range(3) if nodes.strikes(n, s)]
    planned += [f"driver_sigterm step={s}" for s in range(31) if driver.strikes(0, s)]
    assert planned and sorted(found) == sorted(planned)


def test_each_strike_is_told_once_also_by_the_driver_of_the_next_attempt(tmp_path: Path) -> None:
    first = Driven(tmp_path, "sigkill rank=0 step=4", "keeper_sigkill node=1 step=5")
    first.injector.begin(0)
    worker = Ledger(struck_folder(tmp_path))
    (fault,) = chaos.parse_all(["sigkill rank=0 step=4"])
    assert worker.claim(fault, 4)
    assert first.told(1.0) == [("sigkill", 4)]
    assert first.told(2.0) == [("sigkill", 4)]
    JsonlEvents(tmp_path / "events.jsonl").emit(first.events.events[0])
    assert first.due(5) == ["keeper_sigkill node=1 step=5"]  # and the driver dies before it can tell
    second = Driven(tmp_path, "sigkill rank=0 step=4", "keeper_sigkill node=1 step=5")
    second.injector.begin(3)
    assert second.due(6) == []
    assert second.told(3.0) == [("keeper_sigkill", 5)]


def test_keepers_are_told_what_waits_at_their_failpoints_and_workers_what_was_wished(tmp_path: Path) -> None:
    run = Driven(
        tmp_path, "keeper_segv node=1 step=4 at=keeper.before_vote", "keeper_segv node=1 step=4", "exit rank=0 step=9"
    )
    inject_files.ask(tmp_path, "exit rank=2", "me")
    assert run.injector.listen(1.0, 3)
    entry = "keeper_segv node=1 step=4 at=keeper.before_vote"
    assert run.injector.for_keepers() == [(entry, f"chaos.faults: {entry}")]
    assert run.injector.for_workers() == [("exit rank=2 at=step.begin", "holdfast inject 001: exit rank=2")]


# -- wishes -----------------------------------------------------------------------------------------------------------


def test_a_wish_is_accepted_then_struck(tmp_path: Path) -> None:
    run = Driven(tmp_path)
    run.injector.begin(0)
    number = inject_files.ask(tmp_path, "node_sigkill node=2", "me")
    assert not run.injector.listen(1.0, 7), "nobody but the driver has to know"
    assert run.state(number) is State.ACCEPTED
    assert run.due(7) == ["node_sigkill node=2"]
    assert run.told(1.0) == [("node_sigkill", 7)]
    assert run.state(number) is State.STRUCK
    assert run.due(8) == []


def test_what_cannot_strike_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = Driven(tmp_path)
    wishes = {"sigkil rank=1": "did you mean 'sigkill'", "exit rank=7": "rank=7 does not exist"}
    wishes |= {"exit rank=0 step=3": "step=3 has passed", "exit rank=0 step=200": "never reached"}
    for entry in wishes:
        inject_files.ask(tmp_path, entry, "me")
    assert not run.injector.listen(1.0, 5)
    for number, fragment in enumerate(wishes.values(), start=1):
        answer = inject_files.answer_to(tmp_path, number)
        assert answer is not None and answer.state is State.REFUSED and fragment in answer.detail


def test_a_run_may_refuse_every_wish(tmp_path: Path) -> None:
    run = Driven(tmp_path, allow_inject=False)
    inject_files.ask(tmp_path, "exit rank=0", "me")
    run.injector.listen(1.0, 5)
    answer = inject_files.answer_to(tmp_path, 1)
    assert answer is not None and answer.state is State.REFUSED and "chaos.allow_inject=false" in answer.detail


def test_wishes_are_not_looked_for_at_every_turn(tmp_path: Path) -> None:
    run = Driven(tmp_path)
    run.injector.listen(1.0, 5)
    inject_files.ask(tmp_path, "exit rank=0", "me")
    assert not run.injector.listen(1.2, 5)
    assert run.injector.listen(2.0, 5)


def test_a_wish_whose_step_nobody_reached_is_missed_after_some_patience(tmp_path: Path) -> None:
    run = Driven(tmp_path)
    inject_files.ask(tmp_path, "exit rank=0 step=6 at=export.begin", "me")
    assert run.injector.listen(1.0, 5)
    for now in (2.0, 4.0):
        run.injector.listen(now, 9)
        assert run.state(1) is State.ACCEPTED
    run.injector.listen(20.0, 9)
    assert run.state(1) is State.MISSED


def test_nobody_is_left_without_an_answer_when_a_run_or_its_driver_ends(tmp_path: Path) -> None:
    run = Driven(tmp_path)
    inject_files.ask(tmp_path, "exit rank=0 step=90", "me")
    run.injector.listen(1.0, 5)
    run.injector.close(2.0)
    assert run.state(1) is State.MISSED
    inject_files.ask(tmp_path, "exit rank=0 step=90", "me")
    later = Driven(tmp_path)
    assert later.state(2) is State.MISSED
    assert not later.injector.listen(1.0, 5)
