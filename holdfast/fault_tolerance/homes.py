"""Which host each node's processes are on, since a keeper shares memory with its workers. Pure.

The executor tells when a node moves, but what it starts at that moment may have got to either host. So every process
says where it is once it is ready, and what has been started last is right about where the next one will get to.
"""

from __future__ import annotations

from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance import preemption
from holdfast.fault_tolerance.membership import WorkerState
from holdfast.fault_tolerance.situation import Situation

__all__ = ["keeper_ready", "node_moved", "separated", "worker_ready"]


def worker_ready(run: Situation, message: m.WorkerReady, now: float) -> None:
    worker = run.crew.get(message.worker)
    if worker is None or worker.state is not WorkerState.STARTING:
        return
    if message.host not in ("", worker.host):
        worker.host = message.host
        _move(run, worker.node, message.host, worker.since_s)
    worker.pid = message.pid
    worker.rest(None, now)


def keeper_ready(run: Situation, message: m.KeeperReady, now: float) -> None:
    run.silent_nodes.discard(message.node)
    started_s = run.keepers.ready(message.node)
    if started_s is not None and message.host not in ("", run.keepers.host_of(message.node)):
        run.keepers.found_on(message.node, message.host)
        _move(run, message.node, message.host, started_s)


def node_moved(run: Situation, message: m.NodeMoved, now: float) -> None:
    _move(run, message.node, message.host, now)


def separated(run: Situation) -> list[int]:
    """Nodes of the roster that have a worker on another host than the keeper. Everybody is ready."""
    return [
        node
        for node in run.roster.nodes
        if any(worker.host != run.keepers.host_of(node) for worker in run.crew.of_node(node))
    ]


def _move(run: Situation, node: int, host: str, since_s: float) -> None:
    if run.crew.move(node, host, since_s):
        preemption.moved(run, node, host)
