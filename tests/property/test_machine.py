"""The recovery machine against a hostile world: any order of deaths, freezes, late news, lies and silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from holdfast.events import WorldChanged
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.config import RecoveryConfig
from holdfast.fault_tolerance.machine import Layout, State
from tests.support.model_cluster import ModelCluster, Worker, require

_GOAL = 60
_ANY = st.integers(0, 1000)
"""An index into whatever there is at that moment."""


def _living(cluster: ModelCluster, index: int) -> Worker | None:
    living = [worker for worker in cluster.workers.values() if worker.is_alive]
    return living[index % len(living)] if living else None


def _to_a_worker(what: Callable[[ModelCluster, Worker], None]) -> Callable[[ModelCluster, int], None]:
    def mishap(cluster: ModelCluster, index: int) -> None:
        worker = _living(cluster, index)
        if worker is not None:
            what(cluster, worker)

    return mishap


def _freeze(cluster: ModelCluster, worker: Worker) -> None:
    worker.is_frozen = True


def _hang(cluster: ModelCluster, worker: Worker) -> None:
    worker.is_hung = True


def _lose_an_answer(cluster: ModelCluster, index: int) -> None:
    position = index % max(len(cluster.pending), 1)
    # Without the news of a keeper's death every later inventory would be in vain.
    if cluster.pending and not isinstance(cluster.pending[position], m.KeeperLost):
        cluster.pending.pop(position)


def _damage_newest(cluster: ModelCluster, index: int) -> None:
    rank = index % cluster.roster.world
    for version in sorted(cluster._arena(rank))[-1:]:
        cluster.damage(rank, version)


def _take_a_node_away(cluster: ModelCluster, index: int) -> None:
    if cluster.recovery.shrink_after_s:  # otherwise it is waited for in vain
        cluster.take_away(index % cluster.layout.nodes)


def _bring_a_node_back(cluster: ModelCluster, index: int) -> None:
    cluster.gone.discard(index % cluster.layout.nodes)


def _give_notice(cluster: ModelCluster, index: int) -> None:
    """Of any length; with a host to move to, without one, or with one that other nodes are on."""
    node, within_s = index % cluster.layout.nodes, (0.5, 5.0, 40.0, 500.0)[index % 4]
    cluster.doom(node, within_s, ("", f"new host {index}", cluster.hosts[0])[index % 3])


def _write_checkpoint(cluster: ModelCluster, index: int) -> None:
    step = cluster.persist()
    if step is not None and index % 4 == 0:  # unnoticed until somebody loads it
        cluster.durable[step] = {rank: replace(c, is_good=False) for rank, c in cluster.durable[step].items()}


def _spoil_checkpoint(cluster: ModelCluster, index: int) -> None:
    steps = sorted(cluster.durable)
    if steps:
        cluster.unreadable[steps[index % len(steps)]] = "no commit record"


def _stop(cluster: ModelCluster, index: int) -> None:
    if index % 5 == 0:  # rarely, for it ends the run
        cluster.tell(m.StopAsked("SIGTERM"))


_MISHAPS: dict[str, Callable[[ModelCluster, int], None]] = {
    "a worker dies": _to_a_worker(ModelCluster.kill),
    "a worker freezes": _to_a_worker(_freeze),
    "a worker hangs with a beating heart": _to_a_worker(_hang),
    "a worker is out of reach": _to_a_worker(ModelCluster.cut_off),
    "a worker raises an exception": _to_a_worker(ModelCluster.raise_error),
    "a collective breaks": _to_a_worker(ModelCluster.report_broken),
    "a keeper dies": lambda cluster, index: cluster.kill_keeper(index % cluster.layout.nodes),
    "a node goes away, perhaps for good": _take_a_node_away,
    "a node comes back": _bring_a_node_back,
    "a node will be taken away": _give_notice,
    "a bit flips in the newest version": _damage_newest,
    "an answer is lost": _lose_an_answer,
    "a checkpoint is written": _write_checkpoint,
    "a checkpoint becomes unreadable": _spoil_checkpoint,
    "somebody asks to stop": _stop,
}


def good_turn(cluster: ModelCluster, told: list[m.Message], seconds: float) -> bool:
    """The driver delivers all news, every worker moves once, time passes. False if there was nothing to do."""
    news = bool(cluster.pending)
    while cluster.pending:
        told.append(cluster.pending.pop(0))
        cluster.tell(told[-1])
    moved = [cluster.work(worker) for worker in list(cluster.workers.values())]
    cluster.tick(seconds)
    return news or any(moved)


class HostileWorld(RuleBasedStateMachine):
    """Every rule is something that may happen at any time; the model checks each action, the invariants the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[m.Message] = []

    @initialize(
        nodes=st.integers(1, 3),
        per_node=st.integers(1, 2),
        spares=st.integers(0, 2),
        hosts=st.integers(1, 2),
        max_failures=st.integers(0, 12),
        max_no_progress=st.integers(1, 3),
        max_preemptions=st.integers(0, 3),
        shrink_after_s=st.sampled_from([0.0, 5.0]),
        min_nodes=st.integers(1, 2),
        shares=st.sampled_from([0, 1, 6]),
        turns=st.sampled_from([0, 1, 2, 3, 5, 9, 10]),
    )
    def begin(
        self,
        nodes: int,
        per_node: int,
        spares: int,
        hosts: int,
        max_failures: int,
        max_no_progress: int,
        max_preemptions: int,
        shrink_after_s: float,
        min_nodes: int,
        shares: int,
        turns: int,
    ) -> None:
        names = tuple(f"host{node % hosts}" for node in range(nodes))
        layout = Layout(nodes, per_node, spares, names, batch_parts=shares * nodes * per_node)
        recovery = RecoveryConfig(
            max_failures=max_failures,
            max_no_progress=max_no_progress,
            max_preemptions=max_preemptions,
            shrink_after_s=shrink_after_s,
            min_nodes=min(min_nodes, nodes),
        )
        self.cluster = ModelCluster(layout, recovery, goal=_GOAL)
        for _ in range(turns):
            good_turn(self.cluster, self.told, 0.05)

    # -- the driver at work ---------------------------------------------------------------------------------------

    @rule(turns=st.integers(1, 8))
    def all_goes_well_for_a_while(self, turns: int) -> None:
        for _ in range(turns):
            good_turn(self.cluster, self.told, 0.05)

    def _deliver(self, index: int) -> None:
        message = self.cluster.pending.pop(index % len(self.cluster.pending))
        self.told.append(message)
        self.cluster.tell(message)

    @precondition(lambda self: self.cluster.pending)
    @rule(count=st.integers(1, 8))
    def news_arrives_in_order(self, count: int) -> None:
        for _ in range(count):
            if self.cluster.pending:
                self._deliver(0)

    @precondition(lambda self: self.cluster.pending)
    @rule(index=_ANY)
    def news_overtakes(self, index: int) -> None:
        self._deliver(index)

    @precondition(lambda self: self.told)
    @rule(index=_ANY)
    def old_news_is_repeated(self, index: int) -> None:
        message = self.told[-1 - index % len(self.told)]
        if not isinstance(message, m.KeeperReady):  # a keeper has no id: that it is up would be a lie, not old news
            self.cluster.tell(message)

    @rule(units=st.integers(1, 30), first=_ANY)
    def workers_work(self, units: int, first: int) -> None:
        workers = list(self.cluster.workers.values())
        for i in range(units):
            self.cluster.work(workers[(first + i) % len(workers)])

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.4, 1.1, 3.0, 12.0, 70.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.tick(seconds)

    # -- what may break -------------------------------------------------------------------------------------------

    @rule(mishaps=st.lists(st.tuples(st.sampled_from(sorted(_MISHAPS)), _ANY), min_size=1, max_size=3))
    def something_happens(self, mishaps: list[tuple[str, int]]) -> None:
        for kind, index in mishaps:
            _MISHAPS[kind](self.cluster, index)

    # -- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def promises_are_kept(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check()

    def teardown(self) -> None:
        """From now on nothing breaks: the run must come to an end, and to the right one."""
        if hasattr(self, "cluster"):
            calm_down(self.cluster)
            self.cluster.check_final_state()


def _longest_s(recovery: RecoveryConfig, announced: int) -> float:
    """Every fault the budget allows, each found and repaired only when the last deadline has passed, then the goal."""
    find = recovery.step_timeout_s + recovery.suspect_after_s
    gather = recovery.abort_after_s + recovery.start_timeout_s + recovery.shrink_after_s + recovery.retry_node_s
    inventory = recovery.start_timeout_s
    return (recovery.max_failures + announced + 2) * (find + gather + inventory + recovery.stop_grace_s) + _GOAL * 2.0


def calm_down(cluster: ModelCluster) -> None:
    """Deliver everything, let everybody work, and see the run end in time."""
    bound_s = _longest_s(cluster.recovery, cluster.supervisor.preemptions + 2 * len(cluster.doomed))
    end_s, told, pause_s = cluster.now + bound_s, list[m.Message](), 0.1
    while cluster.finish is None and cluster.now < end_s:
        pause_s = 0.1 if good_turn(cluster, told, pause_s) else min(pause_s * 1.5, 2.0)
        cluster.check()
    require(cluster.finish is not None, f"nothing breaks any more and the run has not ended after {bound_s:.0f} s")
    assert cluster.finish is not None
    if cluster.finish.outcome == "finished":
        require(_GOAL in cluster.committed, "a finished run has committed its last step")
        require(cluster.finish.exit_code == 0, f"finished with {cluster.finish.exit_code}")
    elif cluster.finish.outcome == "failed":
        preemptions, allowed = cluster.supervisor.preemptions, cluster.recovery.max_preemptions
        used_up = cluster.supervisor.faults - preemptions > cluster.recovery.max_failures
        used_up |= 0 < allowed < preemptions
        require(cluster.finish.exit_code == (1 if used_up else 93), f"{cluster.finish} is not what the faults allow")
    require(
        cluster.supervisor.state is (State.FAILED if cluster.finish.outcome == "failed" else State.FINISHED), "state"
    )


@settings(max_examples=100, deadline=None)
@given(
    nodes=st.integers(2, 4),
    per_node=st.integers(1, 2),
    spares=st.integers(0, 2),
    lost=_ANY,
    shares=st.sampled_from([0, 1, 12]),
    before=st.integers(0, 30),
    returns_after=st.none() | st.integers(0, 60),
)
def test_a_node_that_is_gone_for_good_does_not_end_the_run(
    nodes: int, per_node: int, spares: int, lost: int, shares: int, before: int, returns_after: int | None
) -> None:
    layout = Layout(nodes, per_node, spares, ("host",) * nodes, batch_parts=shares * per_node * nodes)
    recovery = RecoveryConfig(shrink_after_s=3.0, retry_node_s=2.0, max_failures=2)
    cluster = ModelCluster(layout, recovery, goal=_GOAL)
    for _ in range(before):
        good_turn(cluster, [], 0.05)
    cluster.take_away(lost % nodes)
    for _ in range(40 + (returns_after or 0)):
        good_turn(cluster, [], 0.25)
    fewer = next(n for n in range(nodes - 1, 0, -1) if layout.can_train(n))
    assert len(cluster.supervisor.nodes) == fewer
    assert lost % nodes not in cluster.supervisor.nodes
    if returns_after is not None:
        cluster.gone.clear()
    calm_down(cluster)
    cluster.check_final_state()
    assert cluster.finish is not None and cluster.finish.outcome == "finished"
    assert cluster.supervisor.faults <= 1 + spares  # a spare of the node may take a seat before its death is known
    worlds = [event.world for event in cluster.events if isinstance(event, WorldChanged)]
    assert worlds == [fewer * per_node] + [layout.world] * (len(worlds) - 1)
    if returns_after is not None and returns_after < 10:
        assert len(worlds) == 2, "the node is back in time, and nobody takes it in"


HostileWorld.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestTheMachineInAHostileWorld = HostileWorld.TestCase
