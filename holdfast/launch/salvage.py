"""What the keepers of a dead driver still hold becomes a checkpoint, from which the next attempt goes on.

Keepers on Ray outlive their driver by ``recovery.lease_s``. Their arenas belong to one attempt, so they are not taken
over: the newest version that every rank holds is written to storage, every digest verified, and they are let go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from holdfast.clock import Clock
from holdfast.launch.calls import Calls, Gathered
from holdfast.launch.durable import DurableTier
from holdfast.launch.fleet import Address, Completion, Fleet, Lost

__all__ = ["find_world", "salvage"]

logger = logging.getLogger(__name__)

_ANSWER_S = 15.0
_NO_MORE_WRITERS = 1 << 30
"""An epoch that no attempt reaches: a worker that has not noticed the end of its driver may publish nothing more."""
_POLL_S = 0.1


def find_world(inventories: Sequence[Mapping[str, Any]]) -> int:
    """Ranks of the newest version that anybody holds; 0 if nobody holds any."""
    held = [version for inventory in inventories for versions in inventory["held"].values() for version in versions]
    newest = max(held, key=lambda version: (version["epoch"], version["version"]), default=None)
    return 0 if newest is None else int(newest["world"])


def salvage(
    fleet: Fleet, keepers: Sequence[Address], durable: DurableTier, *, clock: Clock, deadline_s: float
) -> int | None:
    """Write what ``keepers`` hold to ``durable``, unless it has as much already, and let them go.

    Returns the step that was written, None if none was: a keeper does not answer in ``deadline_s``, a rank's memory is
    gone, or storage has it. Nothing is lost by that: what storage had before it still has.
    """
    calls, end = Calls(fleet), clock.now() + deadline_s
    before = max(durable.survey()[0], default=-1)
    try:
        told = _inventories(calls, keepers, fleet, clock, end)
        world = find_world([cast(Mapping[str, Any], found) for found in told.values()])
        keeper_of = {
            int(rank): keeper for keeper, found in told.items() for rank in cast(Mapping[str, Any], found)["held"]
        }
        if world and set(range(world)) <= set(keeper_of):
            durable.move_to(world, "")  # whoever reads it finds its slices in any layout
            nodes = {keeper.number for keeper in keepers}
            durable.persist_newest(calls, nodes, keeper_of.__getitem__, deadline_s=end)
            _until(lambda: durable.is_idle, calls, fleet, clock, end)
    finally:
        for keeper in keepers:
            fleet.release(keeper)
    return durable.newest_step if durable.newest_step > before else None


def _inventories(calls: Calls, keepers: Sequence[Address], fleet: Fleet, clock: Clock, end: float) -> Gathered:
    """Of all that answer; one that has just left its lease makes the others no less worth asking."""
    told: dict[Address, object] = {}
    silent: list[Address] = []

    def then(answer: Completion) -> None:
        if answer.error is None:
            told[answer.target] = answer.result
        else:
            silent.append(answer.target)
            logger.info("%s of the attempt before does not tell what it holds: %s", answer.target, answer.error)

    for keeper in keepers:
        due = min(end, clock.now() + _ANSWER_S)
        calls.ask(keeper, "inventory", _NO_MORE_WRITERS, then=then, deadline_s=due)
    _until(lambda: len(told) + len(silent) == len(keepers), calls, fleet, clock, end)
    return told


def _until(is_done: Callable[[], bool], calls: Calls, fleet: Fleet, clock: Clock, end: float) -> None:
    while not is_done() and clock.now() < end:
        for report in fleet.poll(_POLL_S):
            if isinstance(report, Lost):
                calls.forget(report.target, report.cause)
            else:
                calls.complete(report)
        calls.expire(clock.now())
