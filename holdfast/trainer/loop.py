"""The loop: from a restored or fresh state to the goal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from holdfast import failpoints
from holdfast.trainer.state import StateView
from holdfast.trainer.step import Microbatch, Pending, StepParts, fence, offer, take, train_step, vote
from holdfast.types import Phase, RankState

__all__ = ["Ending", "Goal", "Restorer", "Trainer"]

logger = logging.getLogger(__name__)


class Ending(str, Enum):
    """Why the loop ended. The values are words of the recovery machine's ``Outcome``."""

    FINISHED = "finished"
    STOPPED = "stopped"


class Restorer(Protocol):
    """Writes a stored version back into the live slices after checking every digest; returns its scalars."""

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]: ...


@dataclass(frozen=True, slots=True)
class Goal:
    """How far to go and what to do on the way."""

    max_steps: int
    evaluate_every: int
    """0 evaluates at the end only."""
    evaluate: Callable[[int], None]
    """Collective. Evaluate at this step."""


class Trainer:
    """Runs steps until the goal, a stop that all ranks agreed on, or a fault (raised)."""

    def __init__(
        self, view: StateView, parts: StepParts, batches: Callable[[int], Sequence[Microbatch]], goal: Goal
    ) -> None:
        self._view, self._parts, self._batches, self._goal = view, parts, batches, goal
        self._pending = Pending()

    def restore(self, source: Restorer, version: int) -> None:
        """Collective. Put the state of ``version`` in place, or keep the fresh one (-1) as version 0."""
        self._parts.watcher.enter(Phase.RESTORE, max(version, 0))
        failpoints.hit("recovery.before_restore", version)
        if version >= 0:
            self._view.adopt(source.restore_into(self._view.capture(), version))
            self._pending.restored = version
        else:
            offer(self._view, self._parts, self._pending)  # so that a fault in the very first step costs nothing
        failpoints.hit("recovery.after_restore", version)

    def fit(self) -> Ending:
        """Collective. Train to the goal or to an agreed stop.

        The last state is then a version that every rank holds, unless one had no room for it: that is logged, and
        the version committed before stays.
        """
        while self._view.train.step < self._goal.max_steps:
            self._parts.watcher.check()
            report, stop = train_step(self._view, self._batches(self._view.train.step), self._parts, self._pending)
            self._parts.watcher.finished(report)
            if stop:
                return self._settle(Ending.STOPPED)
            self._evaluate_if_due()
        return self._settle(Ending.FINISHED)

    def _evaluate_if_due(self) -> None:
        step, every = self._view.train.step, self._goal.evaluate_every
        if every and step % every == 0 and step < self._goal.max_steps:
            self._parts.watcher.enter(Phase.EVALUATE, step)
            self._goal.evaluate(step)

    def _settle(self, ending: Ending) -> Ending:
        """Collective. Bring the last state into a version that all ranks hold; who has skipped it tries once more."""
        step, pending = self._view.train.step, self._pending
        if pending.restored == step:
            return ending  # a finished run that was resumed
        if pending.version != step:
            take(self._view, self._parts, pending)
        fence(self._parts, pending, step)
        if not vote([0.0, 0.0, 0.0], self._parts, pending, step).is_held_by_all:
            logger.warning("the last version, %d, is not complete on every rank", step)
        return ending
