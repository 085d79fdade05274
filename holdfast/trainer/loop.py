"""The loop: from a restored or fresh state to the goal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from holdfast import failpoints
from holdfast.errors import NonFiniteStep
from holdfast.parallel.microbatches import Microbatch
from holdfast.trainer.state import StateView
from holdfast.trainer.step import (
    Pending,
    StepParts,
    await_room,
    fence,
    offer,
    pass_over,
    take,
    train_step,
    vote,
)
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
    evaluate: Callable[[int], object]
    """Collective. Evaluate at this step."""
    max_left_out: int = 0
    """Steps of the whole run that may be left out because they are not finite."""


class Trainer:
    """Runs steps until the goal, a stop that all ranks agreed on, or a fault (raised)."""

    def __init__(
        self, view: StateView, parts: StepParts, batches: Callable[[int], Sequence[Microbatch]], goal: Goal
    ) -> None:
        self._view, self._parts, self._batches, self._goal = view, parts, batches, goal
        self._pending = Pending()

    def restore(
        self, source: Restorer, version: int, *, take_over: bool = False, mend: Callable[[], None] = lambda: None
    ) -> None:
        """Collective. Put the state of ``version`` in place, or keep the fresh one (-1) as version 0. With
        ``take_over`` it becomes a version of this rank's own, because those that it was read from will not stay;
        ``mend``, collective, may change it before."""
        self._parts.watcher.enter(Phase.RESTORE, max(version, 0))
        failpoints.hit("recovery.before_restore", version)
        if version >= 0:
            self._view.adopt(source.restore_into(self._view.capture(), version))
            self._pending.restored = version
            if source is self._parts.snapshots and not take_over:
                self._pending.held_by_all = version
        self._pending.reach(self._view)
        if take_over:
            # Others may still read what this rank lets go of now.
            vote([0.0, 0.0, 0.0], self._parts, self._pending, self._view.train.step)
            mend()
            take(self._view, self._parts, self._pending)
        elif version < 0:
            # So that a fault in the very first step costs nothing. Every memory is empty.
            offer(self._view, self._parts, self._pending, has_room=True)
        failpoints.hit("recovery.after_restore", version)

    def fit(self) -> Ending:
        """Collective. Train to the goal or to an agreed stop.

        The last state is then a version that every rank holds, unless one had no room for it: that is logged, and
        the version committed before stays.
        """
        while self._view.train.step < self._goal.max_steps and not self._view.is_over:
            self._parts.watcher.check()
            try:
                stop = self._step()
            except NonFiniteStep as error:
                self._leave_out(error)
                continue
            if stop:
                return self._settle(Ending.STOPPED)
            self._evaluate_if_due()
        return self._settle(Ending.FINISHED)

    def give_up_live(self) -> None:
        """The live state is about to become another one than that of its step: nobody may go on with it."""
        self._pending.live = -1

    def keep_live(self) -> int:
        """Not collective. The epoch broke: begin to capture the state of the last boundary, if it is still whole here
        and was not captured before, so that all ranks that survive can redo the step from where they are.

        Returns the version; -1 if an update had begun, or no buffer could be spared.
        """
        pending, live = self._pending, self._pending.live
        if live < 0 or live in (pending.version, pending.held_by_all):
            return live
        return live if self._parts.snapshots.offer(self._view.marked(), live) else -1

    def _step(self) -> bool:
        """Collective. Whether the ranks agreed to stop."""
        step = self._view.train.step
        if step in self._view.train.left_out:
            return pass_over(self._view, self._parts, self._pending)
        report, stop = train_step(self._view, self._batches(step), self._parts, self._pending)
        self._parts.watcher.finished(report)
        return stop

    def _leave_out(self, error: NonFiniteStep) -> None:
        """Collective: every rank has the same error. Go back to the newest state that all hold; the steps since then
        are made again, but not this one. Raises: the error, if it may not be left out or nothing is there to go to.
        """
        train, version = self._view.train, self._pending.held_by_all
        if len(train.left_out) >= self._goal.max_left_out or version < 0:
            raise error
        if error.quantity == "loss":
            self._parts.engine.update(0.0)  # takes the gradients; what it spoils is restored below
        train.left_out.add(error.step)
        self._parts.watcher.enter(Phase.RESTORE, version)
        self._pending.live = -1
        self._view.adopt(self._parts.snapshots.restore_into(self._view.capture(), version))
        self._pending.version, self._pending.is_held = version, False
        self._pending.reach(self._view)
        if self._parts.rank == 0:
            self._parts.note({"event": "step_left_out", "step": error.step, "reason": str(error), "version": version})

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
            if not await_room(self._parts, pending, step, step):
                logger.warning("the last version, %d, was not taken: a rank had no room for it", step)
                return ending
            take(self._view, self._parts, pending)
        fence(self._parts, pending, step)
        if not vote([0.0, 0.0, 0.0], self._parts, pending, step).is_held_by_all:
            logger.warning("the last version, %d, is not complete on every rank", step)
        return ending
