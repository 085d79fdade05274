"""Calls to processes with an answer and a deadline: what the conductor's steps are made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from holdfast.launch.fleet import Address, Completion, Fleet

__all__ = ["LOST", "NO_ANSWER", "Calls", "Gathered"]

NO_ANSWER = "no answer before the deadline"
"""Why a call has failed that nobody has answered."""

logger = logging.getLogger(__name__)

Gathered = Mapping[Address, object]
"""Results by process."""

LOST = "process lost"
"""How the error of a call begins that ended with its process: no answer, and nothing about what was asked."""


@dataclass(slots=True)
class _Open:
    target: Address
    then: Callable[[Completion], None]
    deadline_s: float


class Calls:
    """Open calls by number. Used from the conductor's thread only."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._open: dict[int, _Open] = {}

    def ask(
        self,
        target: Address,
        method: str,
        *args: object,
        then: Callable[[Completion], None],
        deadline_s: float = float("inf"),
    ) -> None:
        """Call ``method``; ``then`` gets the answer, or an error if none came before ``deadline_s`` (monotonic)."""
        self._open[self._fleet.call(target, method, *args)] = _Open(target, then, deadline_s)

    def track(self, call: int, target: Address, then: Callable[[Completion], None]) -> None:
        """Wait for a call that somebody else has made."""
        self._open[call] = _Open(target, then, float("inf"))

    def tell(self, target: Address, method: str, *args: object) -> None:
        """Call ``method`` and forget the answer."""
        self._fleet.call(target, method, *args)

    def gather(
        self,
        asks: Mapping[Address, tuple[str, Sequence[object]]],
        *,
        then: Callable[[Gathered], None],
        failed: Callable[[Completion], None],
        deadline_s: float = float("inf"),
    ) -> None:
        """Ask several processes; ``then`` runs when all have answered, ``failed`` at the first error."""
        results: dict[Address, object] = {}
        state = {"failed": False}

        def collect(answer: Completion) -> None:
            if state["failed"]:
                return
            if answer.error is not None:
                state["failed"] = True
                failed(answer)
                return
            results[answer.target] = answer.result
            if len(results) == len(asks):
                then(results)

        for target, (method, args) in asks.items():
            self.ask(target, method, *args, then=collect, deadline_s=deadline_s)
        if not asks:
            then({})

    def complete(self, answer: Completion) -> None:
        """Hand an answer to whoever asked; of answers nobody waits for only errors leave a trace, in the log."""
        waiting = self._open.pop(answer.call, None)
        if waiting is not None:
            waiting.then(answer)
        elif answer.error is not None:
            logger.warning("%s: %s", answer.target, answer.error.splitlines()[0])

    def forget(self, target: Address, cause: str) -> None:
        """The process has gone: fail its open calls."""
        self._fail([n for n, c in self._open.items() if c.target == target], f"{LOST}: {cause}")

    def forgive(self, seconds: float) -> None:
        """The driver did not listen for so long: nobody could answer in time."""
        for call in self._open.values():
            call.deadline_s += seconds

    def expire(self, now: float) -> None:
        """Fail every call whose deadline has passed."""
        self._fail([n for n, c in self._open.items() if c.deadline_s < now], NO_ANSWER)

    def _fail(self, numbers: Sequence[int], why: str) -> None:
        for number in numbers:
            waiting = self._open.pop(number, None)
            if waiting is not None:
                waiting.then(Completion(number, waiting.target, None, why))
