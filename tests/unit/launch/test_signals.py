"""Wishes to stop: the first one asks, the second one leaves, and the handlers of others come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from holdfast.launch.signals import StopSignals


def _send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)], ids=lambda v: str(v)
)
def test_the_first_signal_asks_and_knows_its_exit_code(number: signal.Signals, code: int) -> None:
    asked = list[str]()
    with StopSignals() as signals:
        signals.then(asked.append)
        _send(number)
    assert asked == [f"{number.name} received"]
    assert signals.exit_code == code


def test_a_wish_that_comes_before_anybody_listens_is_not_lost() -> None:
    asked = list[str]()
    with StopSignals() as signals:
        _send(signal.SIGTERM)
        signals.then(asked.append)
    assert asked == ["SIGTERM received"]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_with_its_own_exit_code(first: signal.Signals) -> None:
    with StopSignals() as signals:
        _send(first)
        with pytest.raises(KeyboardInterrupt):
            _send(signal.SIGINT)
        assert signals.exit_code == 130
        with pytest.raises(SystemExit) as left:
            _send(signal.SIGTERM)
        assert left.value.code == signals.exit_code == 143


def test_a_warning_does_not_insist_and_what_follows_it_is_the_first_order() -> None:
    asked = list[str]()
    with StopSignals() as signals:
        signals.then(asked.append)
        _send(signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1)
        assert asked == ["SIGUSR1 received", "SIGUSR1 received", "SIGTERM received", "SIGUSR1 received"]
        with pytest.raises(SystemExit):
            _send(signal.SIGTERM)


def test_a_wish_that_came_another_way_leaves_the_first_signal_its_meaning() -> None:
    asked = list[str]()
    with StopSignals() as signals:
        signals.then(asked.append)
        signals.ask("stopped in the user interface")
        _send(signal.SIGTERM)
    assert asked == ["stopped in the user interface", "SIGTERM received"]


def test_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_outside_the_main_thread_no_handler_is_touched() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), list[object]()

    def elsewhere() -> None:
        with StopSignals() as signals:
            signals.then(seen.append)
            seen.append(signal.getsignal(signal.SIGTERM))
            signals.ask("asked")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before, "asked"]
