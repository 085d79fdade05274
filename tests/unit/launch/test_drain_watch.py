"""Who will be taken away: what is told, what an answer that never comes does, and that nobody waits for it."""

from __future__ import annotations

import threading
import time

import pytest

from holdfast.launch.drain_watch import DrainWatch, seconds_left
from tests.support.drivers import until


def test_the_newest_answer_is_what_counts() -> None:
    answers = {"a": 0}
    watch = DrainWatch(lambda: answers, every_s=0.01)
    assert watch.deadlines() == {"a": 0}
    answers["b"] = 1_700_000_000_000
    until(lambda: watch.deadlines() == answers, "the second answer")
    watch.close()


def test_a_question_that_is_not_answered_keeps_nobody_waiting() -> None:
    hangs, asked = threading.Event(), list[int]()

    def ask() -> dict[str, int]:
        asked.append(1)
        if len(asked) > 1:
            hangs.wait(20.0)
        return {"a": 0}

    watch = DrainWatch(ask, every_s=0.01)
    until(lambda: len(asked) > 1, "the second question")
    assert watch.deadlines() == {"a": 0}
    watch.close()
    hangs.set()


def test_trouble_is_told_once_and_what_was_known_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    asked = list[int]()

    def ask() -> dict[str, int]:
        asked.append(1)
        if 1 < len(asked) < 5:
            raise ConnectionError("no answer from the head")
        return {"a": len(asked)}

    watch = DrainWatch(ask, every_s=0.01)
    until(lambda: watch.deadlines() != {"a": 1}, "an answer after the trouble")
    watch.close()
    assert [record.message for record in caplog.records] == [
        "nobody tells which nodes will be taken away: no answer from the head"
    ]


def test_a_deadline_is_a_time_from_now_and_never_negative() -> None:
    assert seconds_left(0) == float("inf")
    assert 29 < seconds_left(int(1000 * (time.time() + 30))) <= 30
    assert seconds_left(1) == 0.0
