"""Nodes that will be taken away: what the run does between the notice and the end. Pure.

The newest version goes to disk at once. If there is another host for the node, workers are started there while the
ranks still train; then the ranks leave together at a step boundary, and as soon as the version they left behind can be
had without the node, its processes are ended and the run recovers as from any loss, without one step to repeat.
If there is none, the node's end is a loss like any other. Either way it is a preemption and no failure. When no node
is left that stays, the run stops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from holdfast.events import PreemptionNoticed
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance import stopping
from holdfast.fault_tolerance.incidents import Loss
from holdfast.fault_tolerance.lanes import Recorded, lost_beyond_repair
from holdfast.fault_tolerance.situation import Move, Notice, Situation, Stage

__all__ = ["begin_to_move", "conclude", "foresee", "forget", "is_settled", "look", "moved", "noticed"]

_LEAST_S = 10.0
"""Before the end of a node its ranks leave it, warm workers elsewhere or not."""
_PARITY_S = 5.0
"""For the parity of the last version, which is not worth much more time than the step that would be repeated."""


def noticed(run: Situation, message: m.NodeDraining, now: float) -> None:
    """A notice that is repeated changes nothing."""
    known = run.notices.get(message.node)
    if message.node not in run.roster.nodes or (known is not None and known.host == message.host):
        return
    run.notices[message.node] = Notice(message.host, now + message.within_s, message.reason)
    within_s = message.within_s if message.within_s < math.inf else None
    run.announce(PreemptionNoticed(message.node, message.host, within_s, message.reason))
    if run.stage is Stage.RUN:
        run.act(m.Persist())


def moved(run: Situation, node: int, host: str) -> None:
    """What is started for the node from now on is on ``host``."""
    notice = run.notices.get(node)
    if notice is not None:
        notice.has_home = host != notice.host


def look(run: Situation, now: float) -> None:
    """Time has passed: if every node is to go and none has anywhere to go, the run stops while it can."""
    notices = [run.notices.get(node) for node in run.roster.nodes]
    doomed = [notice for notice in notices if notice is not None and not notice.has_home and not notice.is_over]
    if len(doomed) == len(notices):
        first = min(doomed, key=lambda notice: notice.deadline_s)
        reason = f"every node will be taken away ({first.reason}), and there is no other host"
        stopping.ask(run, reason, now, within_s=first.deadline_s - now)


def begin_to_move(run: Situation, now: float) -> None:
    """While the ranks train: once workers are warm where nodes are to move, ask the ranks to leave together."""
    moving = {node: run.notices[node] for node in run.roster.nodes if node in run.notices and _moves(run, node)}
    if not moving:
        return
    for node, notice in moving.items():
        if notice.ready_by_s == math.inf:
            notice.ready_by_s = min(notice.deadline_s - _LEAST_S, now + run.recovery.start_timeout_s)
            run.act(*run.crew.prepare(node, incident=run.ledger.incidents, now=now))
    if run.crew.has_relief(moving) or now >= min(notice.ready_by_s for notice in moving.values()):
        run.stage, run.move = Stage.MOVE, Move(tuple(moving))
        run.deadline_s = min(now + run.recovery.step_timeout_s, *(notice.deadline_s for notice in moving.values()))
        run.act(m.StopEpoch(run.epoch))


def _moves(run: Situation, node: int) -> bool:
    return run.notices[node].has_home and not run.notices[node].is_over


def is_settled(run: Situation, move: Move, now: float) -> bool:
    """All ranks have left: whether what they have left behind can be had without the nodes that move."""
    needs_disk = bool(_against_parity(run, move))
    if not move.is_settled:
        move.is_settled = True
        if needs_disk:
            run.act(m.Persist())
        else:
            run.deadline_s = min(run.deadline_s, now + _PARITY_S)
    return run.persisted >= move.boundary if needs_disk else run.encoded >= (run.epoch, move.boundary)


def _against_parity(run: Situation, move: Move) -> str:
    ranks = tuple(rank for node in move.nodes for rank in run.roster.ranks_of(node))
    return lost_beyond_repair(Recorded(move.boundary, run.epoch, absent=ranks), run.roster.lanes)


def foresee(run: Situation, losses: Sequence[Loss]) -> list[Loss]:
    """Tell the losses that were announced from those that were not."""
    return [replace(loss, is_preemption=loss.is_preemption or run.is_expected(loss)) for loss in losses]


def conclude(run: Situation, losses: Sequence[Loss]) -> None:
    """A node whose keeper has gone, as announced, is one that replacements have been started for."""
    for loss in losses:
        if loss.node in run.notices and loss.is_preemption and not loss.is_victim and not loss.ranks:
            run.notices[loss.node].is_over = True


def forget(run: Situation) -> None:
    """An epoch starts: what was lost to a notice has been replaced, elsewhere or at the same place."""
    run.move = None
    run.notices = {node: notice for node, notice in run.notices.items() if not notice.is_over}
