"""One training step: the fence, the vote and the update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from holdfast import failpoints
from holdfast.errors import NonFiniteStep, SnapshotError
from holdfast.parallel.microbatches import Microbatch
from holdfast.trainer.memory import memory_bytes
from holdfast.trainer.observers import Watcher
from holdfast.trainer.state import StateView
from holdfast.types import CopyReport, Phase, RankState, StepReport

__all__ = [
    "Communicator",
    "Engine",
    "Note",
    "Pending",
    "Snapshots",
    "StepParts",
    "Verdict",
    "await_room",
    "fence",
    "offer",
    "pass_over",
    "take",
    "train_step",
    "vote",
]

ROOM_S, LOOK_S = 30.0, 0.02
"""Patience with keepers that are slow to make room for a version that must be taken, and between two looks."""


class Engine(Protocol):
    """The sharded model and optimizer. Collective."""

    def forward_backward(self, batch: Sequence[Microbatch]) -> list[float]:
        """Gradients of a whole step. Sums over the microbatches that count here: nats, targets, targets that are
        bytes."""
        ...

    def update(self, lr: float) -> float: ...


class Communicator(Protocol):
    """Collective. Sums float64 values over all ranks; the result has the same bits on each."""

    world: int

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]: ...


class Snapshots(Protocol):
    """``has_room`` says whether a version could be taken, and keeps the room for it. ``offer`` begins to take the
    state; False: it is skipped. ``fence`` waits until the live tensors may change and tells what became of it.
    ``commit`` flips the version."""

    def has_room(self, version: int) -> bool: ...

    def offer(self, state: RankState, version: int) -> bool: ...

    def fence(self) -> CopyReport: ...

    def commit(self, version: int) -> None: ...

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]: ...

    @property
    def newest_committed(self) -> int:
        """-1 if there is none."""
        ...


Note = Callable[[dict[str, object]], None]


@dataclass(frozen=True, slots=True)
class StepParts:
    """Everything a step needs, chosen once in ``build``."""

    engine: Engine
    comm: Communicator
    snapshots: Snapshots
    watcher: Watcher
    learning_rate: Callable[[int], float]
    """Rate of the update that finishes step i + 1."""
    snapshot_every: int
    epoch: int
    rank: int = 0
    note: Note = lambda _: None
    """Tell the driver of something besides steps: ``event`` and its fields."""
    persist_every: int = 0
    """Versions that are multiples become durable checkpoints: the step waits until every rank has room for them."""
    max_age_steps: int = 0
    """Steps that the newest committed version may be old; 0 does not look."""
    judge: Callable[[int], None] | None = None
    """Collective. Look at the state after this many steps, and change what of it depends on that, before it becomes a
    version."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks agreed on before the update."""

    loss: float
    bits_per_byte: float
    tokens: int
    is_held_by_all: bool
    """The last version offered is complete on every rank."""
    stop: bool
    """At least one rank was asked to stop."""
    has_room: bool
    """Every rank can take the next version."""


@dataclass(slots=True)
class Pending:
    """The version offered last, until its fate is known."""

    version: int = -1
    """-1 if it was skipped."""
    is_held: bool = False
    """Complete on this rank; known since the fence."""
    restored: int = -1
    """The version that the epoch started from."""
    held_by_all: int = -1
    """The newest that is complete on every rank."""
    copied_bytes: int = 0
    live: int = -1
    """The step whose state is live and whole; -1 while an update changes it."""

    def reach(self, view: StateView) -> None:
        """The live state is that of a step boundary again."""
        view.mark()
        self.live = view.train.step


def train_step(
    view: StateView, batch: Sequence[Microbatch], parts: StepParts, pending: Pending
) -> tuple[StepReport, bool]:
    """Collective. One optimizer step, applied on every rank or on none; also whether the ranks agreed to stop."""
    started, step = time.perf_counter(), view.train.step
    parts.watcher.enter(Phase.FORWARD_BACKWARD, step)
    failpoints.hit("step.begin", step)
    sums = parts.engine.forward_backward(batch)
    failpoints.hit("step.after_backward", step)
    copied = fence(parts, pending, step)
    verdict = _wait_if_due(vote(sums, parts, pending, step, wanted=_next_version(parts, step)), parts, pending, step)
    _refuse_old_age(parts, pending, step)
    if not math.isfinite(verdict.loss):
        raise NonFiniteStep(step, verdict.loss)
    failpoints.hit("step.before_update", step)
    parts.watcher.enter(Phase.UPDATE, step)
    rate, pending.live = parts.learning_rate(step), -1
    grad_norm = parts.engine.update(rate)
    if not math.isfinite(grad_norm):  # clipping by it has spoiled the live state, which nobody has been offered yet
        raise NonFiniteStep(step, grad_norm, "gradient norm")
    judged_s = _arrive(view, parts, pending, verdict.tokens)
    failpoints.hit("step.after_update", step)
    offered_s = offer(view, parts, pending, has_room=verdict.has_room)
    report = StepReport(
        step=view.train.step,
        epoch=parts.epoch,
        loss=verdict.loss,
        bits_per_byte=verdict.bits_per_byte,
        learning_rate=rate,
        grad_norm=grad_norm,
        tokens=view.train.tokens,
        step_s=time.perf_counter() - started - judged_s,
        stall_s=copied.waited_s + offered_s,
        copy_bytes=pending.copied_bytes,
        committed=max(pending.restored, parts.snapshots.newest_committed),
        copy_s=copied.copy_s,
        memory_bytes=memory_bytes(),
    )
    return report, verdict.stop


def pass_over(view: StateView, parts: StepParts, pending: Pending) -> bool:
    """Collective. A step whose update is left out, and which therefore has nothing to report; whether to stop."""
    step = view.train.step
    fence(parts, pending, step)
    verdict = vote([0.0, 0.0, 0.0], parts, pending, step, wanted=_next_version(parts, step))
    verdict = _wait_if_due(verdict, parts, pending, step)
    pending.live = -1
    _arrive(view, parts, pending, 0)
    offer(view, parts, pending, has_room=verdict.has_room)
    return verdict.stop


def _arrive(view: StateView, parts: StepParts, pending: Pending, tokens: int) -> float:
    """Collective. The step is made and judged; a fault until then makes it again, with the same verdict. Seconds that
    the judging took."""
    view.train.advance(tokens)
    judged_s = 0.0
    if parts.judge is not None:
        started = time.perf_counter()
        parts.judge(view.train.step)
        judged_s = time.perf_counter() - started
    pending.reach(view)
    return judged_s


def _wait_if_due(verdict: Verdict, parts: StepParts, pending: Pending, step: int) -> Verdict:
    """Collective. A version that is to become a durable checkpoint is not skipped because keepers are slow."""
    wanted = _next_version(parts, step)
    if verdict.has_room or not parts.persist_every or wanted % parts.persist_every:
        return verdict
    return replace(verdict, has_room=await_room(parts, pending, step, wanted))


def await_room(parts: StepParts, pending: Pending, step: int, wanted: int) -> bool:
    """Collective. Wait until every rank can take version ``wanted``; all lose patience after as many looks."""
    for _ in range(round(ROOM_S / LOOK_S)):
        if vote([0.0, 0.0, 0.0], parts, pending, step, wanted=wanted).has_room:
            return True
        time.sleep(LOOK_S)
    return False


def _next_version(parts: StepParts, step: int) -> int:
    """What will be offered after this step; -1 for nothing."""
    return -1 if (step + 1) % parts.snapshot_every else step + 1


def fence(parts: StepParts, pending: Pending, step: int) -> CopyReport:
    """Wait until the last snapshot's copies are done; the live state may change afterwards."""
    parts.watcher.enter(Phase.FENCE, step)
    copied = parts.snapshots.fence()
    pending.is_held = copied.is_complete and copied.version == pending.version
    if copied.why_not:
        failure = {"rank": parts.rank, "version": copied.version, "reason": copied.why_not}
        parts.note({"event": "snapshot_failed", **failure})
    return copied


def _refuse_old_age(parts: StepParts, pending: Pending, step: int) -> None:
    """A snapshot that fails is no failure of the training, until too much would be lost with the next fault."""
    newest = max(pending.restored, parts.snapshots.newest_committed)
    if parts.max_age_steps and step - newest > parts.max_age_steps:
        raise SnapshotError(
            f"no version since {newest} counts, {step - newest} steps ago, and snapshot.max_age_steps="
            f"{parts.max_age_steps}; the events say why, and 0 lets a run go on without snapshots"
        )


def vote(sums: Sequence[float], parts: StepParts, pending: Pending, step: int, *, wanted: int = -1) -> Verdict:
    """Collective. Agree on the global loss, on the fate of the pending version, on stopping, and on whether to take
    version ``wanted``: all ranks do, or none, so that the newest version of one is the newest of all.

    Returning from the sum proves that every rank holds the version, so each may flip on its own: a rank
    that dies before it flips leaves a FILLED copy that recovery finds complete on all ranks.
    """
    parts.watcher.enter(Phase.VOTE, step)
    parts.watcher.check()
    has_room = wanted < 0 or parts.snapshots.has_room(wanted)
    wishes = [float(pending.is_held), float(parts.watcher.should_stop()), float(has_room)]
    nats, targets, byte_targets, held, stop, room = parts.comm.all_reduce_sum([*sums, *wishes])
    is_held_by_all = held == parts.comm.world
    if is_held_by_all:
        failpoints.hit("snapshot.before_commit", step)
        parts.snapshots.commit(pending.version)
        pending.is_held, pending.held_by_all = False, pending.version
        failpoints.hit("snapshot.after_commit", step)
    return Verdict(
        loss=nats / targets if targets else 0.0,
        bits_per_byte=nats / math.log(2) / byte_targets if byte_targets else 0.0,
        tokens=int(targets),
        is_held_by_all=is_held_by_all,
        stop=stop > 0,
        has_room=room == parts.comm.world,
    )


def offer(view: StateView, parts: StepParts, pending: Pending, *, has_room: bool) -> float:
    """Take the new state if this step's version is wanted and every rank has room. Seconds it took."""
    pending.copied_bytes = 0
    if view.train.step % parts.snapshot_every:
        return 0.0
    if not has_room:
        pending.version, pending.is_held = -1, False
        return 0.0
    return take(view, parts, pending)


def take(view: StateView, parts: StepParts, pending: Pending) -> float:
    """Hand the state to the snapshotter, as the version whose fate is open from now on. Seconds until it returned."""
    started = time.perf_counter()
    parts.watcher.enter(Phase.CAPTURE, view.train.step)
    state = view.capture()
    is_taken = parts.snapshots.offer(state, view.train.step)
    pending.version, pending.is_held = view.train.step if is_taken else -1, False
    if is_taken:
        pending.copied_bytes = sum(s.tensor.numel() * s.tensor.element_size() for s in state.slices)
    return time.perf_counter() - started
