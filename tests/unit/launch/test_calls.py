"""Calls with an answer and a deadline: every one that is asked ends exactly once."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest

from holdfast.launch.calls import Calls, Gathered
from holdfast.launch.fleet import Address, Completion, Role
from tests.support.keepers import LocalFleet

_A, _B, _C = (Address(Role.WORKER, number) for number in range(3))


class _Body:
    """A process that answers with its name, or not at all as one wishes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def hello(self, *args: object) -> list[object]:
        return [self.name, *args]

    def fail(self) -> None:
        raise ValueError(f"{self.name} cannot")


class _Desk:
    """Calls over a fleet of three, and everything that was answered."""

    def __init__(self) -> None:
        self.fleet = LocalFleet({_A: _Body("a"), _B: _Body("b"), _C: _Body("c")})
        self.calls = Calls(self.fleet)
        self.answers: list[Completion] = []
        self.gathered: list[Gathered] = []

    def turn(self) -> None:
        for report in self.fleet.poll(0.0):
            assert isinstance(report, Completion)
            self.calls.complete(report)

    def ask(self, target: Address, method: str, *args: object, deadline_s: float = float("inf")) -> None:
        self.calls.ask(target, method, *args, then=self.answers.append, deadline_s=deadline_s)

    def gather(self, asks: Mapping[Address, str], deadline_s: float = float("inf")) -> None:
        self.calls.gather(
            {target: (method, ()) for target, method in asks.items()},
            then=self.gathered.append,
            failed=self.answers.append,
            deadline_s=deadline_s,
        )


@pytest.fixture
def desk() -> _Desk:
    return _Desk()


# -- one call ---------------------------------------------------------------------------------------------------------


def test_every_answer_reaches_the_one_who_asked(desk: _Desk) -> None:
    heard: dict[str, object] = {}
    for name, target in (("first", _A), ("second", _B), ("third", _A)):
        desk.calls.ask(target, "hello", name, then=lambda answer, name=name: heard.update({name: answer.result}))
    desk.turn()
    assert heard == {"first": ["a", "first"], "second": ["b", "second"], "third": ["a", "third"]}


def test_an_error_is_an_answer(desk: _Desk) -> None:
    desk.ask(_A, "fail")
    desk.turn()
    assert [(a.target, a.result) for a in desk.answers] == [(_A, None)]
    assert (desk.answers[0].error or "").startswith("ValueError: a cannot\nTraceback")


def test_a_deadline_that_has_passed_is_an_error_and_the_late_answer_is_dropped(desk: _Desk) -> None:
    desk.fleet.held_back.add("hello")
    desk.ask(_A, "hello", deadline_s=10.0)
    desk.ask(_B, "hello", deadline_s=20.0)
    desk.ask(_C, "hello")
    desk.calls.expire(10.0)
    assert desk.answers == []
    desk.calls.expire(10.1)
    assert [(a.target, a.error) for a in desk.answers] == [(_A, "no answer before the deadline")]
    desk.fleet.held_back.clear()
    desk.turn()
    desk.calls.expire(1e12)
    assert [(a.target, a.error) for a in desk.answers[1:]] == [(_B, None), (_C, None)]


def test_a_lost_process_answers_all_its_open_calls_with_an_error_and_nobody_elses(desk: _Desk) -> None:
    desk.fleet.held_back.add("hello")
    for target in (_A, _B, _A):
        desk.ask(target, "hello")
    desk.calls.forget(_A, "killed")
    desk.calls.forget(_A, "killed")
    assert [(a.target, a.error) for a in desk.answers] == [(_A, "process lost: killed")] * 2
    desk.fleet.held_back.clear()
    desk.turn()
    assert [(a.target, a.error) for a in desk.answers[2:]] == [(_B, None)]


def test_a_call_that_another_one_has_made_is_waited_for(desk: _Desk) -> None:
    desk.calls.track(desk.fleet.call(_A, "hello", 7), _A, desk.answers.append)
    desk.calls.expire(1e12)
    desk.turn()
    assert [a.result for a in desk.answers] == [["a", 7]]
    desk.calls.track(desk.fleet.call(_B, "hello"), _B, desk.answers.append)
    desk.calls.forget(_B, "killed")
    assert desk.answers[-1].error == "process lost: killed"


def test_an_answer_nobody_waits_for_is_dropped(desk: _Desk) -> None:
    desk.calls.tell(_A, "hello")
    desk.turn()
    desk.calls.complete(Completion(4711, _A, "?"))


def test_an_error_nobody_waits_for_is_in_the_log(desk: _Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.calls.tell(_A, "fail")
    with caplog.at_level(logging.WARNING):
        desk.turn()
    assert [record.getMessage() for record in caplog.records] == ["worker 0: ValueError: a cannot"]


def test_an_answer_may_lead_to_the_next_question(desk: _Desk) -> None:
    desk.calls.ask(_A, "hello", then=lambda answer: desk.ask(_B, "hello", answer.result))
    desk.turn()
    desk.turn()
    assert [a.result for a in desk.answers] == [["b", ["a"]]]


def test_a_question_that_a_lost_process_leads_to_is_not_failed_with_it(desk: _Desk) -> None:
    """A replacement has the number of the process it replaces."""
    desk.fleet.held_back.add("hello")
    desk.calls.ask(_A, "hello", then=lambda _: desk.ask(_A, "hello", "again"))
    desk.calls.forget(_A, "killed")
    assert desk.answers == []
    desk.fleet.held_back.clear()
    desk.turn()
    assert [a.result for a in desk.answers] == [["a", "again"]]


def test_a_call_that_was_answered_while_others_expire_is_answered_once(desk: _Desk) -> None:
    desk.fleet.held_back.add("hello")
    desk.ask(_B, "hello", deadline_s=1.0)

    def then(answer: Completion) -> None:
        desk.answers.append(answer)
        desk.calls.forget(_B, "killed")

    desk.calls.ask(_A, "hello", then=then, deadline_s=1.0)
    desk.ask(_B, "hello", deadline_s=1.0)
    desk.calls.expire(2.0)
    assert [(a.target, a.error) for a in desk.answers] == [
        (_B, "no answer before the deadline"),
        (_A, "no answer before the deadline"),
        (_B, "process lost: killed"),
    ]


# -- several calls ----------------------------------------------------------------------------------------------------


def test_all_answers_are_handed_over_together(desk: _Desk) -> None:
    desk.fleet.held_back.add("fail")
    desk.gather({_A: "hello", _B: "hello"})
    assert desk.gathered == []
    desk.turn()
    assert desk.gathered == [{_A: ["a"], _B: ["b"]}]
    assert desk.answers == []


def test_nothing_to_gather_is_gathered_at_once(desk: _Desk) -> None:
    desk.gather({})
    assert desk.gathered == [{}]


def test_the_first_error_is_told_and_later_ones_and_answers_are_not(desk: _Desk) -> None:
    desk.gather({_A: "hello", _B: "fail", _C: "fail"})
    desk.turn()
    assert desk.gathered == []
    assert [a.target for a in desk.answers] == [_B]


def test_a_process_that_is_lost_while_others_are_awaited_is_the_first_error(desk: _Desk) -> None:
    desk.fleet.held_back.add("hello")
    desk.gather({_A: "hello", _B: "hello"})
    desk.calls.forget(_B, "killed")
    desk.fleet.held_back.clear()
    desk.turn()
    assert desk.gathered == []
    assert [(a.target, a.error) for a in desk.answers] == [(_B, "process lost: killed")]


def test_a_deadline_holds_for_all_that_are_asked(desk: _Desk) -> None:
    desk.fleet.kill(_B)
    desk.gather({_A: "hello", _B: "hello"}, deadline_s=10.0)
    desk.turn()
    desk.calls.expire(10.1)
    desk.calls.expire(99.0)
    assert desk.gathered == []
    assert [(a.target, a.error) for a in desk.answers] == [(_B, "no answer before the deadline")]


def test_what_the_driver_has_overslept_is_no_lateness_of_others(desk: _Desk) -> None:
    desk.ask(_A, "hello", deadline_s=10.0)
    desk.calls.forgive(100.0)
    desk.calls.expire(109.0)
    assert desk.answers == []
    desk.calls.expire(111.0)
    assert [a.error for a in desk.answers] == ["no answer before the deadline"]
