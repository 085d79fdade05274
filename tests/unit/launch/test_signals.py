"""Wishes to stop: what the first signal does, what the second one does, and who has the signals afterwards."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from holdfast.launch.signals import StopSignals

_WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """Whatever a test does, pytest gets its handlers back; a signal that nobody takes fails the test, not the run."""

    def nobody(number: int, _: object) -> None:
        raise AssertionError(f"nobody has taken {signal.Signals(number).name}")

    before = {number: signal.signal(number, nobody) for number in _WISHES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _handlers() -> list[object]:
    return [signal.getsignal(number) for number in _WISHES]


@pytest.mark.parametrize("number", _WISHES)
def test_the_first_signal_asks_for_a_stop(number: signal.Signals) -> None:
    asked: list[str] = []
    with StopSignals() as signals:
        signals.then(asked.append)
        assert asked == []
        signal.raise_signal(number)
    assert asked == [f"{number.name} received"]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("second", "kind", "code"), [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, SystemExit, 143)]
)
def test_the_second_signal_leaves_now(
    first: signal.Signals, second: signal.Signals, kind: type[BaseException], code: int
) -> None:
    asked: list[str] = []
    with StopSignals() as signals:
        signals.then(asked.append)
        signal.raise_signal(first)
        with pytest.raises(kind) as left:
            signal.raise_signal(second)
        assert signals.exit_code == code
    assert kind is KeyboardInterrupt or left.value.args == (code,)
    assert asked == [f"{first.name} received"]


def test_a_third_signal_leaves_too() -> None:
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def test_a_warning_that_time_runs_out_never_insists_and_what_follows_it_is_the_first() -> None:
    asked: list[str] = []
    with StopSignals() as signals:
        signals.then(asked.append)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert asked == ["SIGUSR1 received", "SIGUSR1 received", "SIGTERM received", "SIGUSR1 received"]


@pytest.mark.parametrize(
    ("number", "code"), [(None, 143), (signal.SIGUSR1, 143), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_process_that_could_not_save_ends_with_the_number_of_its_signal(
    number: signal.Signals | None, code: int
) -> None:
    with StopSignals() as signals:
        if number is not None:
            signal.raise_signal(number)
    assert signals.exit_code == code


def test_a_wish_that_comes_before_anybody_can_act_on_it_is_kept() -> None:
    asked: list[str] = []
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signals.then(asked.append)
    assert asked == ["SIGTERM received"]


def test_a_wish_that_is_no_signal_may_come_from_any_thread_and_the_first_signal_is_still_the_first() -> None:
    asked: list[str] = []
    with StopSignals() as signals:
        thread = threading.Thread(target=signals.ask, args=("stopped in the browser",))
        thread.start()
        thread.join(_DEADLINE_S)
        signals.then(asked.append)
        signals.ask("stopped in the browser, again")
        signal.raise_signal(signal.SIGINT)
    assert asked == ["stopped in the browser", "stopped in the browser, again", "SIGINT received"]


def test_the_handlers_of_before_have_the_signals_back_whatever_happens_inside() -> None:
    before = _handlers()
    with pytest.raises(KeyboardInterrupt), StopSignals():  # noqa: PT012
        assert not set(before) & set(_handlers())
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert _handlers() == before


def test_signals_that_are_ignored_are_ignored_again_afterwards() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR1)
        assert signals.exit_code == 143
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_signals_that_somebody_else_has_taken_meanwhile_are_taken_back() -> None:
    asked: list[str] = []
    with StopSignals() as signals:
        signals.then(asked.append)
        ours = _handlers()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.install()
        assert _handlers() == ours
        signal.raise_signal(signal.SIGTERM)
    assert asked == ["SIGTERM received"]


def test_outside_the_main_thread_it_waits_for_wishes_and_leaves_the_signals_alone() -> None:
    before, asked, during = _handlers(), list[str](), list[list[object]]()

    def work() -> None:
        with StopSignals() as signals:
            signals.install()
            during.append(_handlers())
            signals.ask("stopped in the browser")
            signals.then(asked.append)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(_DEADLINE_S)
    assert (asked, during) == (["stopped in the browser"], [before])
    assert _handlers() == before


@pytest.mark.parametrize(
    ("number", "kind", "code"), [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGUSR1, SystemExit, 143)]
)
def test_when_the_grace_is_over_the_main_thread_is_woken_as_by_a_second_signal(
    number: signal.Signals, kind: type[BaseException], code: int
) -> None:
    with StopSignals(0.2) as signals:
        signal.raise_signal(number)
        assert not signals.is_overdue
        began_s = time.monotonic()
        with pytest.raises(kind):
            time.sleep(_DEADLINE_S)
        assert 0.1 < time.monotonic() - began_s < _DEADLINE_S / 2
        assert (signals.is_overdue, signals.exit_code) == (True, code)


def test_whoever_is_done_in_time_is_not_woken() -> None:
    with StopSignals(0.2) as signals:
        signal.raise_signal(signal.SIGTERM)
    time.sleep(0.4)
    assert not signals.is_overdue
