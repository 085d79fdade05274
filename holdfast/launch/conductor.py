"""Carries the supervisor's actions out. Decides nothing: what to do next is the machine's answer to what happened."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from holdfast.clock import Clock
from holdfast.configs.schema import RunConfig
from holdfast.events import EventSink, ProtectionFailed, RecoveryDone, StagesMeasured
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.bricks import Brick
from holdfast.fault_tolerance.laggards import Laggards
from holdfast.fault_tolerance.lanes import Roster
from holdfast.fault_tolerance.machine import Layout, State, Supervisor
from holdfast.fault_tolerance.policy import DO_NOT_RESTART
from holdfast.launch import identity
from holdfast.launch.calls import LOST, NO_ANSWER, Calls, Gathered
from holdfast.launch.crew import Crew, ProcessSpecs, keeper_address, worker_address
from holdfast.launch.durable import DurableTier
from holdfast.launch.fleet import Address, Completion, Fleet, Lost, Role
from holdfast.launch.frozen import FrozenFiles
from holdfast.launch.injection import Injector
from holdfast.launch.last_save import LastSave
from holdfast.launch.notes import Notes
from holdfast.launch.protection import Protection
from holdfast.launch.protocol import EpochPlan
from holdfast.launch.pulse import Pulse
from holdfast.launch.striker import Striker
from holdfast.types import StepReport

__all__ = ["Conductor", "Verdict"]

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_PULSE_S = 0.1
_LAST_WORDS_S = 2.0
_NO_ANSWER_S = 60.0
"""Deadline of a keeper's or worker's answer to anything but training."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the run ended."""

    outcome: str
    exit_code: int
    reason: str
    step: int
    """Steps finished, if the run failed or reached its goal; steps saved, -1 for none, if it was stopped."""
    faults: int
    steps_lost: int
    findings: Mapping[str, object]
    """What rank 0 concluded: bits per byte, generated text, weights or why there are none."""
    saved: int | None = None
    """Step of the newest checkpoint on disk, -1 for none; None if nobody has looked."""
    preemptions: int = 0
    """Of the faults."""
    nodes: tuple[int, ...] = ()
    """Those that took part last; none if nothing had started."""


class Conductor:
    """One run, from the first process to the verdict. Everything happens in the thread that calls ``run``."""

    def __init__(
        self,
        config: RunConfig,
        *,
        fleet: Fleet,
        supervisor: Supervisor,
        layout: Layout,
        specs: ProcessSpecs,
        durable: DurableTier,
        run_dir: Path,
        events: EventSink,
        on_step: Callable[[StepReport], None],
        clock: Clock,
        bricks: Sequence[Brick] = (),
    ) -> None:
        self._config, self._fleet, self._supervisor, self._specs = config, fleet, supervisor, specs
        self._durable, self._run_dir, self._events, self._clock = durable, run_dir, events, clock
        self._calls = Calls(fleet)
        self._pulse = Pulse(
            self._calls, interval_s=_PULSE_S, silence_s=config.recovery.suspect_after_s, on_step=on_step
        )
        self._frozen = FrozenFiles(bricks, self._calls, events, self._pulse)
        everybody = layout.roster(0, range(layout.nodes))
        self._crew = Crew(fleet, self._calls, specs)
        self._notes = Notes(self._calls, events, self._measured)
        self._protection = Protection(everybody, persist_every=config.snapshot.persist_every_steps)
        self._result: dict[str, object] = {}
        self._verdict: m.Finish | None = None
        self._stop_reason: str | None = None
        self._draining: set[tuple[int, str]] = set()
        """Nodes and hosts whose notices the supervisor has."""
        self._is_wanted_on_disk = False
        """The supervisor waits for a durable checkpoint that has not been begun."""
        self._save = LastSave(durable, self._persist_newest)
        self._rebuilt: tuple[int, ...] = ()
        """Ranks of stages that the epoch which starts makes from others."""
        self._laggards = Laggards(config.recovery.suspect_after_s)
        self._hosts = list(layout.hosts)
        self._listened_s = clock.now()
        self._striker = Striker(
            Injector(config, run_dir, events),
            self._crew,
            self._calls,
            durable=durable,
            protection=self._protection,
            keeper_fails=self._keeper_silent,
        )

    # -- the loop -------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Any thread or a signal handler: end gracefully."""
        self._stop_reason = reason

    def parity_s(self) -> float:
        """Any thread: see :attr:`Pulse.parity_s`."""
        return self._pulse.parity_s

    def run(self) -> Verdict:
        """Until the machine has finished and what must be kept is on disk."""
        self._perform(self._supervisor.start(self._clock.now()))
        while self._verdict is None:
            self._turn()
            self._after_turn()
        self._settle(self._verdict)
        return self._conclude(self._verdict)

    def leave(self, exit_code: int, why: str) -> Verdict:
        """``run`` was interrupted: what is on disk by now is what stays."""
        return self._conclude(m.Finish("stopped", exit_code, f"{why}; nothing more was saved"))

    def _conclude(self, end: m.Finish) -> Verdict:
        self._durable.survey()  # nobody may have looked yet
        saved = self._durable.newest_step
        return Verdict(
            outcome=end.outcome,
            exit_code=end.exit_code,
            reason=end.reason,
            step=saved if end.outcome == "stopped" else self._last_step(),
            faults=self._supervisor.faults,
            preemptions=self._supervisor.preemptions,
            steps_lost=self._supervisor.steps_lost,
            findings=self._result,
            saved=saved,
            nodes=self._supervisor.nodes,
        )

    def _turn(self) -> None:
        reports = self._crew.poll(_POLL_S)
        self._follow_notices()
        self._follow_moves()  # first: who replaces the lost has to be on the new host
        for report in reports:
            if self._crew.is_old_news(report):
                continue
            if isinstance(report, Lost):
                self._lost(report)
            else:
                self._calls.complete(report)
        now = self._clock.now()
        self._forgive_own_sleep(now)
        self._calls.expire(now)
        self._pulse.ask(self._crew.keepers, now)
        while self._pulse.silent:
            self._keeper_silent(*self._pulse.silent.pop(0))

    def _follow_notices(self) -> None:
        """Before the moves that they cause."""
        for node, notice in self._fleet.draining().items():
            if (node, notice.host) not in self._draining:
                self._draining.add((node, notice.host))
                self._tell(m.NodeDraining(node, notice.host, notice.within_s, notice.reason))

    def _follow_moves(self) -> None:
        for node, host in enumerate(self._fleet.hosts(self._config.launch.nodes)):
            if host != self._hosts[node]:
                self._hosts[node] = host
                self._tell(m.NodeMoved(node, host))

    def _forgive_own_sleep(self, now: float) -> None:
        """Suspended with the whole run, or held up by its output: the answers are still on their way."""
        overslept_s = now - self._listened_s - self._config.recovery.suspect_after_s / 4
        self._listened_s = now
        if overslept_s > 0:
            self._calls.forgive(overslept_s)

    def _after_turn(self) -> None:
        if self._stop_reason is not None:
            reason, self._stop_reason = self._stop_reason, None
            self._tell(m.StopAsked(reason))
        beats = self._pulse.beats_at(self._clock.now())
        self._tell(m.Beats({w: beats[r] for r, w in self._crew.workers_of_ranks.items() if r in beats}))
        self._tell(m.Tick())
        while self._pulse.unprotected:
            self._events.emit(ProtectionFailed(*self._pulse.unprotected.pop(0)))
        for epoch, version in self._pulse.committed():
            self._tell(m.Protected(epoch, version))
        self._frozen.tell_news(self._roster.world)
        now = self._clock.now()
        self._save_before_it_is_too_late(now)
        if self._supervisor.state is State.RUNNING:  # a recovery needs the storage, and may turn against the version
            end = now + self._config.recovery.step_timeout_s
            self._durable.persist_if_due(self._pulse.versions, self._calls, self._keeper_of, deadline_s=end)
            self._striker.strike_due(self._newest_step(), now)
            late = self._laggards.look(beats.values(), now)
            if late is not None:
                self._events.emit(late)
        self._striker.listen(self._newest_step(), now)
        self._notes.fetch_if_due(self._crew.workers_of_ranks.get(0), now)

    def _save_before_it_is_too_late(self, now: float) -> None:
        """What nobody may be there to save a moment later."""
        for step in self._durable.written():
            self._tell(m.Persisted(step))
        if not self._has_all_keepers():
            return
        if self._supervisor.state is State.STOPPING:
            self._save.look(now, self._supervisor.stop_by_s, self._config.recovery.stop_grace_s)
        elif self._is_wanted_on_disk and self._durable.is_idle:
            self._is_wanted_on_disk = False
            self._persist_newest(now + self._config.recovery.step_timeout_s)

    def _persist_newest(self, deadline_s: float) -> None:
        self._durable.persist_newest(self._calls, self._roster.nodes, self._keeper_of, deadline_s=deadline_s)

    def _has_all_keepers(self) -> bool:
        return self._crew.keepers.issuperset(self._roster.nodes)

    def _tell(self, message: m.Message) -> None:
        self._perform(self._supervisor.handle(message, self._clock.now()))

    def _perform(self, actions: Sequence[m.Action]) -> None:
        for action in actions:
            _HANDLERS[type(action)](self, action)

    def _last_step(self) -> int:
        return int(cast(int, self._result.get("step", self._newest_step(default=0))))

    def _newest_step(self, default: int = -1) -> int:
        return max((beat.step for beat in self._pulse.beats.values()), default=default)

    # -- processes ------------------------------------------------------------------------------------------------

    def _lost(self, lost: Lost) -> None:
        self._striker.report(self._clock.now())  # the cause comes before its effect
        if lost.target.role is Role.KEEPER:
            self._keeper_gone(lost.target.number, lost.cause)
        else:
            self._crew.worker_gone(lost.target.number, lost.cause)
            self._worker_gone(lost.target.number, lost.cause)

    def _worker_gone(self, worker: int, cause: str) -> None:
        ranks = [r for r, w in self._crew.workers_of_ranks.items() if w == worker]
        seen = max((self._pulse.beats[r].beat_s for r in ranks if r in self._pulse.beats), default=self._clock.now())
        self._tell(m.WorkerLost(worker, cause, seen))

    def _keeper_silent(self, node: int, error: str) -> None:
        if node in self._crew.keepers:
            self._keeper_gone(node, f"keeper of node {node}: {error.splitlines()[0]}")

    def _keeper_gone(self, node: int, cause: str) -> None:
        """Told once, although each of its open calls fails too: the next keeper of the node must not be blamed."""
        self._forget_keeper(node, cause)
        self._tell(m.KeeperLost(node, cause, is_silent=NO_ANSWER in cause))

    def _forget_keeper(self, node: int, cause: str) -> None:
        self._crew.keeper_gone(node, cause)
        self._pulse.silent = [(silent, error) for silent, error in self._pulse.silent if silent != node]
        for rank in self._roster.ranks_of(node):
            self._pulse.forget_rank(rank)
        if node in self._roster.nodes:
            self._durable.abandon()

    @property
    def _roster(self) -> Roster:
        """The nodes whose ranks the keepers have admitted last."""
        return self._protection.roster

    def _keeper_of(self, rank: int) -> Address:
        return keeper_address(self._roster.node_of(rank))

    def _start_worker(self, action: m.StartWorker) -> None:
        self._crew.start_worker(
            action.worker,
            action.node,
            ready=lambda pid, host: self._tell(m.WorkerReady(action.worker, action.node, pid, host)),
            failed=lambda error: self._worker_gone(action.worker, error),
        )

    def _start_keeper(self, action: m.StartKeeper) -> None:
        def ready(address: str, host: str) -> None:
            self._protection.reached_at(action.node, address)
            self._striker.arm_keeper(action.node)
            self._tell(m.KeeperReady(action.node, host))

        self._crew.start_keeper(action.node, ready=ready, failed=lambda error: self._keeper_gone(action.node, error))

    def _kill_keeper(self, action: m.KillKeeper) -> None:
        self._forget_keeper(action.node, action.reason)

    def _kill_worker(self, action: m.KillWorker) -> None:
        self._crew.kill_worker(action.worker, action.reason)

    # -- epochs ---------------------------------------------------------------------------------------------------

    def _fence(self, action: m.Fence) -> None:
        self._is_wanted_on_disk = False
        if not action.is_last:
            self._durable.abandon()
        for node in self._crew.keepers:
            self._calls.tell(keeper_address(node), "fence", action.epoch)

    def _abort_worker(self, action: m.AbortWorker) -> None:
        self._calls.tell(worker_address(action.worker), "abort", action.epoch, action.may_update)

    def _stop_epoch(self, action: m.StopEpoch) -> None:
        for member in self._supervisor.members:
            self._calls.tell(worker_address(member.worker), "stop", action.epoch)

    def _persist(self, action: m.Persist) -> None:
        self._is_wanted_on_disk = True

    def _take_inventory(self, action: m.TakeInventory) -> None:
        """Admit every rank at its keeper, attach its worker, then ask the keepers what they hold."""
        self._move_to(action.roster)
        self._crew.workers_of_ranks = {member.rank: member.worker for member in action.members}
        members = {member.rank: member for member in action.members}
        refs: dict[int, object] = {}

        def admitted(rank: int) -> Callable[[Completion], None]:
            def then(answer: Completion) -> None:
                if answer.error is None:
                    refs[rank] = answer.result
                    if len(refs) == len(members):
                        attach()
                else:
                    self._keeper_silent(members[rank].node, answer.error)

            return then

        def attach() -> None:
            self._calls.gather(
                {
                    worker_address(mb.worker): ("attach", [mb.rank, refs[mb.rank], action.roster.number])
                    for mb in action.members
                },
                then=lambda _: self._ask_what_is_held(action.epoch),
                failed=self._failed,
                deadline_s=self._deadline(),
            )
            self._striker.arm_workers()

        for member in action.members:
            self._calls.ask(
                keeper_address(member.node),
                "admit",
                member.rank,
                action.roster.number,
                then=admitted(member.rank),
                deadline_s=self._deadline(),
            )

    def _move_to(self, roster: Roster) -> None:
        """From now on a rank's number means the one that has it in this roster."""
        if roster.number != self._roster.number:
            self._protection.move_to(roster)
            self._pulse.move_to(roster.number)
            self._durable.move_to(roster.world, identity.layout(self._config.parallel, world=roster.world))

    def _ask_what_is_held(self, epoch: int) -> None:
        def then(answers: Gathered) -> None:
            inventories = {keeper.number: cast(Mapping[str, Any], answer) for keeper, answer in answers.items()}
            self._protection.take(inventories)
            held, recorded = self._protection.held(), self._protection.recorded()
            durable, rejected = self._durable.survey()
            former = self._protection.former()
            self._tell(m.InventoryTaken(epoch, held, durable, rejected, recorded, self._durable.foreign, former))

        self._ask_keepers(self._crew.keepers, "inventory", epoch, then=then, failed=self._failed)

    def _ask_keepers(
        self,
        nodes: Collection[int],
        method: str,
        *args: object,
        then: Callable[[Gathered], None],
        failed: Callable[[Completion], None],
    ) -> None:
        self._calls.gather(
            {keeper_address(node): (method, args) for node in sorted(nodes)},
            then=then,
            failed=failed,
            deadline_s=self._deadline(),
        )

    def _failed(self, answer: Completion) -> None:
        """A process could not do what an epoch needs: to the supervisor that is a loss."""
        if answer.target.role is Role.KEEPER:
            self._keeper_silent(answer.target.number, str(answer.error))
        else:
            self._worker_gone(answer.target.number, str(answer.error))

    def _deadline(self) -> float:
        return self._clock.now() + _NO_ANSWER_S

    def _quarantine(self, action: m.Quarantine) -> None:
        self._calls.tell(self._keeper_of(action.rank), "quarantine", action.rank, action.version)

    def _load_checkpoint(self, action: m.LoadCheckpoint) -> None:
        ranks = range(self._roster.world)
        self._durable.load(
            action.step,
            {rank: self._keeper_of(rank) for rank in ranks},
            self._calls,
            loaded=lambda: self._tell(m.CheckpointLoaded(action.epoch, action.step)),
            refused=lambda reason: self._tell(m.CheckpointRefused(action.epoch, action.step, reason)),
            deadline_s=self._clock.now() + self._config.recovery.step_timeout_s,
        )

    def _rebuild(self, action: m.Rebuild) -> None:
        left, state = set(action.ranks), {"failed": False}

        def then(rank: int) -> Callable[[Completion], None]:
            def answered(answer: Completion) -> None:
                left.discard(rank)
                if answer.error is not None and not state["failed"] and not answer.error.startswith(LOST):
                    state["failed"] = True
                    why = f"rank {rank} was not rebuilt: {answer.error.splitlines()[0]}"
                    self._tell(m.CheckpointRefused(action.epoch, action.version, why))
                elif not left and not state["failed"]:
                    self._tell(m.CheckpointLoaded(action.epoch, action.version))

            return answered

        end = self._clock.now() + self._config.recovery.step_timeout_s
        asks = self._protection.rebuild(action.epoch, action.version, action.record_epoch, action.ranks)
        for rank, node, arguments in asks:
            self._calls.ask(keeper_address(node), "rebuild", *arguments, then=then(rank), deadline_s=end)

    def _start_epoch(self, action: m.StartEpoch) -> None:
        self._striker.begin(action.version)
        rendezvous = self._run_dir / "rendezvous"
        rendezvous.mkdir(exist_ok=True)
        for old in rendezvous.iterdir():
            old.unlink(missing_ok=True)
        path = str(rendezvous / f"epoch-{action.epoch}")
        checkpoints = self._durable.uri if action.from_storage else ""
        self._rebuilt = () if action.rebuild is None else action.rebuild.ranks
        whole = EpochPlan(action.epoch, -1, len(action.members), action.version, path, checkpoints)
        keepers = self._protection.addresses(self._crew.keepers)
        if self._frozen.exist:
            whole = replace(whole, keepers={str(node): at for node, at in keepers.items()}, token=self._token)

        def begin() -> None:
            for member in action.members:
                plan = self._plan_of(member.rank, whole, action)
                self._calls.ask(
                    worker_address(member.worker), "run_epoch", asdict(plan), then=self._parked(member, plan)
                )
            self._frozen.hold(keepers)

        def failed(answer: Completion) -> None:
            begin()  # to the supervisor everybody is in the epoch; only who has been sent there can leave it
            self._failed(answer)

        def protect() -> None:
            arguments = self._protection.start(action.epoch, action.version)
            self._ask_keepers(self._roster.nodes, "begin", *arguments, then=lambda _: begin(), failed=failed)

        for node in self._crew.keepers - set(self._roster.nodes):
            self._calls.tell(keeper_address(node), "forget_above", action.version)
        nodes = self._roster.nodes
        self._ask_keepers(nodes, "forget_above", action.version, then=lambda _: protect(), failed=failed)

    def _plan_of(self, rank: int, whole: EpochPlan, action: m.StartEpoch) -> EpochPlan:
        """What is the same for all ranks, and from whose memory this one reads, if not from its own."""
        rebuild, source = action.rebuild, action.former
        if rebuild is not None:
            whole = replace(whole, repairs=[repair.to_json() for repair in rebuild.repairs])
            source = rebuild.held if rank in rebuild.ranks else None
        if source is None:
            return replace(whole, rank=rank)
        held = {str(other): asdict(part) for other, part in self._protection.parts(source).items()}
        return replace(whole, rank=rank, held=held, token=self._token)

    @property
    def _token(self) -> str:
        return str(self._specs.keeper["token"])

    def _measured(self, event: StagesMeasured) -> None:
        angles = {int(stage): angle for stage, angle in event.angular_distance.items()}
        self._tell(m.RedundancyMeasured(event.step, angles))

    def _parked(self, member: m.Member, plan: EpochPlan) -> Callable[[Completion], None]:
        def then(answer: Completion) -> None:
            if answer.error is not None:
                if not answer.error.startswith(LOST):  # a lost process is reported as such
                    self._tell(m.WorkerParked(member.worker, plan.epoch, m.Outcome.ERROR, answer.error))
                return
            parked = cast(Mapping[str, Any], answer.result)
            self._notes.take(parked["notes"])
            outcome = m.Outcome(parked["outcome"])
            if outcome is m.Outcome.FINISHED and parked["result"]:
                self._result.update(parked["result"])
            if outcome is m.Outcome.CORRUPT and plan.checkpoints:
                self._durable.condemn(plan.version, parked["detail"])
            left = parked["detail"], parked["version"], parked["live"]
            self._tell(m.WorkerParked(member.worker, plan.epoch, outcome, *left))

        return then

    # -- the end --------------------------------------------------------------------------------------------------

    def _announce(self, action: m.Announce) -> None:
        self._events.emit(action.event)
        if isinstance(action.event, RecoveryDone):
            for rank in self._crew.workers_of_ranks if self._frozen.exist else self._rebuilt:
                if (worker := self._crew.workers_of_ranks.get(rank)) is not None:
                    self._notes.fetch(worker)
            self._rebuilt = ()

    def _finish(self, action: m.Finish) -> None:
        self._verdict = action

    def _settle(self, verdict: m.Finish) -> None:
        """Bring the newest version that every rank holds to disk, then let the workers go."""
        self._hear_last_steps()
        is_trusted = verdict.exit_code != DO_NOT_RESTART
        if is_trusted and self._has_all_keepers():
            self._bring_to_disk(self._supervisor.stop_by_s)
        self._striker.close(self._clock.now())
        self._crew.release_workers()

    def _hear_last_steps(self) -> None:
        """A pulse that is asked for now brings the reports of all steps that the ranks have finished."""
        now = self._clock.now()
        asked_s, end = now, now + min(_LAST_WORDS_S, (self._supervisor.stop_by_s - now) / 4)
        while now < end and any(self._pulse.heard_s.get(node, -1.0) < asked_s for node in self._crew.keepers):
            self._turn()
            now = self._clock.now()

    def _bring_to_disk(self, end: float) -> None:
        """Whoever asked the run to stop does not wait long; nor does one who asks only now."""
        self._save.begin(self._clock.now(), min(end, self._clock.now() + self._config.recovery.step_timeout_s))
        while not self._save.is_over(self._clock.now()):
            self._turn()
            if self._stop_reason is not None and end == math.inf:
                end = self._clock.now() + self._config.recovery.stop_grace_s
                self._save.hurry(end)


_HANDLERS: Mapping[type[m.Action], Callable[[Conductor, Any], None]] = {
    m.StartWorker: Conductor._start_worker,
    m.StartKeeper: Conductor._start_keeper,
    m.KillKeeper: Conductor._kill_keeper,
    m.KillWorker: Conductor._kill_worker,
    m.Persist: Conductor._persist,
    m.Fence: Conductor._fence,
    m.AbortWorker: Conductor._abort_worker,
    m.StopEpoch: Conductor._stop_epoch,
    m.TakeInventory: Conductor._take_inventory,
    m.Quarantine: Conductor._quarantine,
    m.LoadCheckpoint: Conductor._load_checkpoint,
    m.Rebuild: Conductor._rebuild,
    m.StartEpoch: Conductor._start_epoch,
    m.Announce: Conductor._announce,
    m.Finish: Conductor._finish,
}
