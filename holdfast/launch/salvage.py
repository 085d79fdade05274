"""What the keepers of a dead driver still hold becomes a checkpoint, from which the next attempt goes on.

Keepers on Ray outlive their driver by ``recovery.lease_s``. Their arenas belong to one attempt, so they are not taken
over: the newest version that every rank holds is written to storage, every digest verified, and they are let go.
Workers have gone on for a moment without a driver; what their boards report of these steps is told, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from holdfast.clock import Clock
from holdfast.launch.calls import Calls
from holdfast.launch.durable import DurableTier
from holdfast.launch.fleet import Address, Completion, Fleet, Lost
from holdfast.types import StepReport

__all__ = ["Salvaged", "find_world", "salvage", "steps_between"]

logger = logging.getLogger(__name__)

_ANSWER_S = 15.0
_NO_MORE_WRITERS = 1 << 30
"""An epoch that no attempt reaches: a worker that has not noticed the end of its driver may publish nothing more."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What was left."""

    is_written: bool
    """To storage, because that had nothing as new."""
    step: int
    """Of the newest checkpoint in storage now; -1 without any."""
    reports: Sequence[StepReport]
    """Of finished steps, each once, in order, as far back as the boards reach."""


def steps_between(reports: Sequence[StepReport], recorded: int, step: int) -> list[StepReport]:
    """Of the steps that the dead driver has not recorded and that no rank will make again."""
    return [report for report in reports if recorded < report.step <= step]


def find_world(inventories: Sequence[Mapping[str, Any]]) -> int:
    """Ranks of the newest version that anybody holds; 0 if nobody holds any."""
    held = [version for inventory in inventories for versions in inventory["held"].values() for version in versions]
    newest = max(held, key=lambda version: (version["epoch"], version["version"]), default=None)
    return 0 if newest is None else int(newest["world"])


def salvage(
    fleet: Fleet, keepers: Sequence[Address], durable: DurableTier, *, clock: Clock, deadline_s: float
) -> Salvaged:
    """Write what ``keepers`` hold to ``durable``, unless it has as much already, and let them go.

    Nothing is written when a keeper does not answer in ``deadline_s`` or a rank's memory is gone. Nothing is lost by
    that: what storage had before it still has.
    """
    calls, end = Calls(fleet), clock.now() + deadline_s
    before = max(durable.survey()[0], default=-1)
    try:
        told = _answers("inventory", _NO_MORE_WRITERS, calls, keepers, fleet, clock, end)
        pulses = _answers("pulse", {}, calls, keepers, fleet, clock, end)
        world = find_world(list(told.values()))
        keeper_of = {int(rank): keeper for keeper, found in told.items() for rank in found["held"]}
        if world and set(range(world)) <= set(keeper_of):
            durable.move_to(world, "")  # whoever reads it finds its slices in any layout
            nodes = {keeper.number for keeper in keepers}
            durable.persist_newest(calls, nodes, keeper_of.__getitem__, deadline_s=end)
            _until(lambda: durable.is_idle, calls, fleet, clock, end)
    finally:
        for keeper in keepers:
            fleet.release(keeper)
    return Salvaged(durable.newest_step > before, durable.newest_step, _reports(pulses.values()))


def _reports(pulses: Iterable[Mapping[str, Any]]) -> list[StepReport]:
    """Every rank tells the same story; of a step that was replayed the newest epoch's counts."""
    found: dict[int, StepReport] = {}
    for pulse in pulses:
        for seen in pulse["ranks"].values():
            for report in (StepReport(**fields) for fields in seen["reports"]):
                if report.step not in found or found[report.step].epoch < report.epoch:
                    found[report.step] = report
    return [found[step] for step in sorted(found)]


def _answers(
    method: str, argument: object, calls: Calls, keepers: Sequence[Address], fleet: Fleet, clock: Clock, end: float
) -> dict[Address, Mapping[str, Any]]:
    """Of all that answer; one that has just left its lease makes the others no less worth asking."""
    told: dict[Address, Mapping[str, Any]] = {}
    silent: list[Address] = []

    def then(answer: Completion) -> None:
        if answer.error is None:
            told[answer.target] = cast(Mapping[str, Any], answer.result)
        else:
            silent.append(answer.target)
            logger.info("%s of the attempt before does not tell its %s: %s", answer.target, method, answer.error)

    for keeper in keepers:
        calls.ask(keeper, method, argument, then=then, deadline_s=min(end, clock.now() + _ANSWER_S))
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
