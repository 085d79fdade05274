"""Fewer nodes, and more again: when the run stops waiting for a node, and when it takes one back. Pure.

A node that is not ready ``recovery.shrink_after_s`` after its loss is done without, if the others can share the global
batch. Its processes are tried again every ``recovery.retry_node_s``; once they are all ready and the versions of the
epoch are protected, the ranks leave together at a step boundary and go on in the larger world. Either way the ranks are
counted anew, and each reads its part of the same version from what the ranks before have left in the keepers' memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.events import Waiting, WorldChanged
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.incidents import Loss
from holdfast.fault_tolerance.situation import Situation, Stage

__all__ = ["begin_to_grow", "grow", "is_excused", "look", "start_missing"]

_PAUSE_S = 1.0
"""Before a process that did not start is started again; later as long as its node has been missing by then."""


def look(run: Situation, now: float) -> None:
    """Time has passed. Nothing happens, and nodes are waited for, without ``recovery.shrink_after_s``."""
    if not run.recovery.shrink_after_s:
        return
    if run.stage is Stage.GATHER:
        _note_who_is_missing(run, now)
        _shrink_if_due(run, now)
        start_missing(run, now)
    if run.stage is not Stage.STOP:
        _try_absent_nodes(run, now)


def is_excused(run: Situation, loss: Loss, now: float) -> bool:
    """A process of a node that is waited for did not start: it is tried again after a pause. That belongs to the
    incident that began the wait, unless the run cannot go on without the node: then each try uses up the budget."""
    node = loss.node
    if not run.recovery.shrink_after_s or node is None:
        return False
    missing_s = now - run.absences.since_s.setdefault(node, now)
    run.absences.retry_s[node] = now + min(max(missing_s, _PAUSE_S), run.recovery.retry_node_s)
    return not run.absences.refused


def start_missing(run: Situation, now: float) -> None:
    """Start what the nodes of the roster lack."""
    _start(run, [node for node in run.roster.nodes if run.absences.retry_s.get(node, now) <= now], now)


def begin_to_grow(run: Situation, now: float) -> None:
    """While the ranks train: if more nodes could take part, ask the ranks to leave together. Not before a version of
    the epoch has its parity: a change of membership is a risk that can wait."""
    if run.ledger.outage is None and run.encoded[0] == run.epoch and _larger(run):
        run.stage, run.deadline_s = Stage.GROW, now + run.recovery.stop_grace_s
        run.act(m.StopEpoch(run.epoch))


def grow(run: Situation) -> None:
    """The ranks have left their epoch: whoever is ready takes part in the next one."""
    nodes = _larger(run)
    if nodes:
        names = ", ".join(str(node) for node in nodes if node not in run.roster.nodes)
        _change(run, nodes, f"node(s) {names} are back")


def _absent(run: Situation) -> list[int]:
    return [node for node in range(run.layout.nodes) if node not in run.roster.nodes]


def _is_up(run: Situation, node: int) -> bool:
    return run.keepers.is_ready(node) and run.crew.is_node_ready(node)


def _note_who_is_missing(run: Situation, now: float) -> None:
    """A first start takes as long as it takes: a node counts as missing then only after a start that has failed."""
    for node in run.roster.nodes:
        if run.keepers.is_ready(node) and not run.crew.is_node_missing(node):
            run.absences.since_s.pop(node, None)
        elif run.watch is not None:
            run.absences.since_s.setdefault(node, now)


def _shrink_if_due(run: Situation, now: float) -> None:
    after_s, since_s = run.recovery.shrink_after_s, run.absences.since_s
    late = [node for node in run.roster.nodes if now - since_s.get(node, now) >= after_s]
    if not late:
        return
    staying = [node for node in run.roster.nodes if node not in late]
    left = staying + [node for node in _absent(run) if _is_up(run, node)]
    nodes = _largest(run, left)
    why = f"node(s) {', '.join(map(str, late))} are not ready after {after_s:g} s"
    if nodes:
        _change(run, nodes, why)
        for node in late:  # what is starting there may go on
            run.absences.retry_s[node] = now + run.recovery.retry_node_s
    else:
        _refuse(run, f"{why}, and the run cannot go on with the other {len(left)}: {_why_not(run)}")


def _refuse(run: Situation, reason: str) -> None:
    if run.absences.refused != reason:
        run.absences.refused = reason
        run.announce(Waiting(reason))


def _why_not(run: Situation) -> str:
    parts, per_node, least = run.layout.batch_parts, run.layout.workers_per_node, run.recovery.min_nodes
    return (
        f"recovery.min_nodes={least}, and every rank needs the same share of the {parts} micro-batches of a step, "
        f"with {per_node} rank(s) on each node"
    )


def _largest(run: Situation, nodes: Sequence[int]) -> tuple[int, ...]:
    """As many of these nodes as can share the batch, the first ones first; empty if there are too few."""
    least = max(run.recovery.min_nodes, 1)
    count = next((n for n in range(len(nodes), least - 1, -1) if run.layout.can_train(n)), 0)
    return tuple(sorted(nodes[:count]))


def _larger(run: Situation) -> tuple[int, ...]:
    """The roster with those that are back; empty if that makes it no larger."""
    back = [node for node in _absent(run) if _is_up(run, node)]
    nodes = _largest(run, [*run.roster.nodes, *back])
    return nodes if len(nodes) > len(run.roster.nodes) else ()


def _change(run: Situation, nodes: Sequence[int], reason: str) -> None:
    before = run.roster
    run.roster = roster = run.layout.roster(before.number + 1, nodes)
    run.is_memory_whole = False
    run.crew.move_to(roster)
    run.keepers.move_to(roster)
    run.sources.move_to(roster)
    run.protection.move_to(roster, absent=_absent(run))
    run.absences.since_s.clear()
    run.absences.refused = ""
    run.announce(WorldChanged(run.epoch, before.world, roster.world, reason))


def _try_absent_nodes(run: Situation, now: float) -> None:
    for node in _absent(run):
        if now >= run.absences.retry_s.get(node, now):
            run.absences.retry_s[node] = now + run.recovery.retry_node_s
            _start(run, [node], now)


def _start(run: Situation, nodes: Sequence[int], now: float) -> None:
    run.act(*run.keepers.fill(nodes, run.crew.host_of, incident=run.ledger.incidents, now=now))
    run.act(*run.crew.fill_seats(nodes, incident=run.ledger.incidents, now=now))
