"""Hundreds of ranks, fake time, a seeded storm of faults: the run must end where the undisturbed one ends."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

import pytest

from holdfast.events import FaultDetected, RecoveryDone
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.config import RecoveryConfig
from holdfast.fault_tolerance.machine import Layout, State
from tests.support.model_cluster import ModelCluster, Worker

_NODES, _PER_NODE, _GOAL = 40, 8, 25
_SLICE_S = 0.1

_DELAYS_S: dict[type[m.Message], tuple[float, float]] = {
    m.WorkerReady: (3.0, 9.0),
    m.KeeperReady: (0.5, 2.0),
    m.WorkerLost: (0.005, 0.04),
    m.KeeperLost: (0.005, 0.04),
    m.WorkerParked: (0.01, 0.9),
    m.InventoryTaken: (0.05, 0.3),
    m.CheckpointLoaded: (0.5, 3.0),
    m.CheckpointRefused: (0.5, 3.0),
}
"""How long news and answers take, as measured on a small machine and stretched."""

_NO_ANSWER_S = 60.0


class Storm:
    """A cluster whose messages take time, whose workers move at their own pace and whose parts break on schedule."""

    def __init__(self, seed: int, faults: Sequence[str], *, spares: int = 6) -> None:
        self.chance = random.Random(seed)
        hosts = tuple(f"host{node // 2}" for node in range(_NODES))
        recovery = RecoveryConfig(max_failures=30, step_timeout_s=60.0)
        self.hit: set[int] = set()
        """Workers that something happened to."""
        self.hit_ranks: set[int] = set()
        self._due: list[tuple[float, int, m.Message]] = []
        self._ticket = 0
        self.cluster = ModelCluster(Layout(_NODES, _PER_NODE, spares, hosts), recovery, goal=_GOAL)
        self.cluster.on_pending = self._post
        for message in self.cluster.pending:
            self._post(message)
        self._faults = [(self.chance.uniform(15.0, 15.0 + 12.0 * len(faults)), kind) for kind in faults]
        self._faults.sort()

    def _post(self, message: m.Message) -> None:
        self._ticket += 1
        due_s = self.cluster.now + self.chance.uniform(*_DELAYS_S[type(message)])
        if isinstance(message, m.WorkerLost) and "deadline" in message.cause:
            due_s += _NO_ANSWER_S
        heapq.heappush(self._due, (due_s, self._ticket, message))

    def run(self, *, limit_s: float) -> ModelCluster:
        cluster, began_s = self.cluster, self.cluster.now
        while cluster.finish is None:
            assert cluster.now - began_s < limit_s, f"no end after {limit_s} s, state {cluster.supervisor.state}"
            while self._due and self._due[0][0] <= cluster.now and cluster.finish is None:
                cluster.tell(heapq.heappop(self._due)[2])
            while self._faults and self._faults[0][0] <= cluster.now - began_s:
                _FAULTS[self._faults.pop(0)[1]](self)
            self._everybody_works()
            if self.chance.random() < 0.02:
                cluster.persist()
            cluster.tick(_SLICE_S)
            cluster.check()
        return cluster

    def _everybody_works(self) -> None:
        """About a step every two seconds, the ranks in any order."""
        if self.cluster.supervisor.state is State.RUNNING:
            members = [self.cluster.workers[member.worker] for member in self.cluster.members]
            for worker in self.chance.sample(members, k=len(members) // 3):
                self.cluster.work(worker)

    # -- faults ---------------------------------------------------------------------------------------------------

    def victim(self) -> Worker:
        """A worker with a seat that nothing has happened to yet."""
        members = [self.cluster.workers[member.worker] for member in self.cluster.supervisor.members]
        worker = self.chance.choice([w for w in members if w.can_move])
        self._struck(worker)
        return worker

    def _struck(self, worker: Worker) -> None:
        self.hit.add(worker.worker)
        self.hit_ranks |= {mb.rank for mb in self.cluster.supervisor.members if mb.worker == worker.worker}

    def kill(self) -> None:
        self.cluster.kill(self.victim())
        for member in self.chance.sample(self.cluster.members, k=min(2, len(self.cluster.members))):
            self.cluster.report_broken(self.cluster.workers[member.worker])

    def kill_node(self) -> None:
        """Power is gone: a keeper, its memory, and every process beside it."""
        node = self.chance.randrange(_NODES)
        self.cluster.kill_keeper(node)
        seats = {member.worker for member in self.cluster.supervisor.members if member.node == node}
        for worker in [w for w in self.cluster.workers.values() if w.is_alive]:
            if worker.node == node or worker.worker in seats:
                self._struck(worker)
                self.cluster.kill(worker, f"node {node} went away")

    def freeze(self) -> None:
        self.victim().is_frozen = True

    def hang(self) -> None:
        self.victim().is_hung = True

    def raise_error(self) -> None:
        self.cluster.raise_error(self.victim())

    def kill_keeper(self) -> None:
        self.cluster.kill_keeper(self.chance.randrange(_NODES))


_FAULTS: dict[str, Callable[[Storm], None]] = {
    "worker": Storm.kill,
    "node": Storm.kill_node,
    "freeze": Storm.freeze,
    "hang": Storm.hang,
    "error": Storm.raise_error,
    "keeper": Storm.kill_keeper,
}


def _check_outcome(storm: Storm) -> None:
    cluster = storm.cluster
    assert cluster.finish == m.Finish("finished", 0, "the goal is reached")
    assert cluster.supervisor.state is State.FINISHED
    assert max(cluster.committed) == _GOAL
    cluster.check_final_state()
    killed = {action.worker for action in cluster.actions if isinstance(action, m.KillWorker)}
    assert killed <= storm.hit, "a survivor was restarted"
    named = {rank for event in cluster.events if isinstance(event, FaultDetected) for rank in event.ranks}
    assert named <= storm.hit_ranks, "somebody was blamed for another one's fault"


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_all_faults_leaves_no_trace_in_the_result(seed: int) -> None:
    print(f"seed={seed}")
    faults = random.Random(seed).choices(sorted(_FAULTS), k=14)
    storm = Storm(seed, faults)
    storm.run(limit_s=3600)
    _check_outcome(storm)


@pytest.mark.parametrize("seed", range(3))
def test_losing_workers_only_costs_at_most_one_step_each(seed: int) -> None:
    print(f"seed={seed}")
    storm = Storm(seed, ["worker"] * 10, spares=2 * _NODES)
    cluster = storm.run(limit_s=1800)
    _check_outcome(storm)
    recoveries = [event for event in cluster.events if isinstance(event, RecoveryDone)]
    assert recoveries
    assert all(event.steps_lost <= 1 for event in recoveries)
    assert all(event.split_s["regroup"] < 3.0 for event in recoveries), "a warm spare was at hand"
    assert cluster.supervisor.steps_lost == sum(event.steps_lost for event in recoveries)


@pytest.mark.parametrize("seed", range(2))
def test_an_undisturbed_run_starts_one_epoch_and_announces_no_fault(seed: int) -> None:
    print(f"seed={seed}")
    storm = Storm(seed, [])
    cluster = storm.run(limit_s=600)
    _check_outcome(storm)
    assert len(cluster.started) == 1
    assert cluster.supervisor.faults == 0
    assert not storm.hit
