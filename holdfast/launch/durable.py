"""Durable checkpoints of a run: keepers write the bytes, the driver writes the one commit record."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from holdfast.clock import Clock, SystemClock
from holdfast.errors import ManifestMismatch, ShardCorrupt, SnapshotError
from holdfast.events import CheckpointRejected, CheckpointWritten, EventSink
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.config import SnapshotConfig
from holdfast.fault_tolerance.messages import HeldVersion
from holdfast.fault_tolerance.policy import newest_common
from holdfast.fault_tolerance.storage import open_storage
from holdfast.launch.calls import LOST, Calls, Gathered
from holdfast.launch.fleet import Address, Completion, Role

__all__ = ["DurableTier"]

logger = logging.getLogger(__name__)

_DAMAGE = frozenset({ShardCorrupt.__name__, ManifestMismatch.__name__})
"""Errors of a keeper that will come again whoever reads the checkpoint."""

_RETRIES = 10
"""Tries in the time of ``persist_every_s`` when none succeeds."""

KeeperOf = Callable[[int], Address]


@dataclass(frozen=True, slots=True)
class _Writing:
    step: int
    """-1 until the keepers have told what they hold."""
    started_s: float


class DurableTier:
    """One checkpoint at a time; a fault abandons the one in progress, and what it left behind is swept later.

    Made by the driver that holds the run's lease, because files that nobody has finished are removed at once.
    """

    def __init__(
        self,
        uri: str,
        config: SnapshotConfig,
        *,
        world: int,
        config_digest: str,
        events: EventSink,
        layout: str = "",
        clock: Clock | None = None,
    ) -> None:
        self.uri, self._config, self._world, self._layout = uri, config, world, layout
        self._config_digest, self._events = config_digest, events
        self._storage = open_storage(uri)
        self._storage.sweep()
        self._writing: _Writing | None = None
        self._told: set[str] = set()
        self._good: set[int] = set()
        self._foreign: set[int] = set()
        self._condemned: dict[int, str] = {}
        self._damaged: dict[str, str] = {}
        """What must not be used and is still in the way of a new checkpoint, with the reason."""
        self._failed_step = -1
        self._written: list[int] = []
        self.last_error = ""
        """Why the newest try to write a checkpoint failed; empty if it did not."""
        self._clock = clock or SystemClock()
        self._due_s = self._next_due_s()

    @property
    def is_idle(self) -> bool:
        return self._writing is None

    @property
    def newest_step(self) -> int:
        """Of the good checkpoints, as far as is known; -1 without any."""
        return max(self._good, default=-1)

    @property
    def foreign(self) -> tuple[int, ...]:
        """Good checkpoints that were written in another layout, or in one that nobody has noted, newest first."""
        return tuple(sorted(self._good & self._foreign, reverse=True))

    def written(self) -> list[int]:
        """Steps of the checkpoints that were committed since this was asked last."""
        written, self._written = self._written, []
        return written

    def move_to(self, world: int, layout: str) -> None:
        """The state is divided among other ranks from now on."""
        self._world, self._layout = world, layout

    # -- reading --------------------------------------------------------------------------------------------------

    def survey(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Steps of the good checkpoints of this run, newest first, and why others were refused."""
        for step, reason in self._condemned.items():
            self._refuse(step, reason)
        self._condemned.clear()
        try:
            good, rejected = checkpoint.list_checkpoints(self._storage)
        except SnapshotError as error:  # memory may have everything that is needed
            return (), (self._tell(checkpoint.Rejected("checkpoints", str(error))),)
        self._damaged = {one.name: one.reason for one in rejected if checkpoint.step_of(one.name) is not None}
        usable, refused = [], list(rejected)
        for found in good:
            problem = self._unusable(found)
            if problem:
                refused.append(checkpoint.Rejected(checkpoint.directory(found.step), problem))
            else:
                usable.append(found.step)
        self._good = set(usable)
        self._foreign = {found.step for found in good if (found.world, found.layout) != (self._world, self._layout)}
        return tuple(usable), tuple(self._tell(one) for one in refused)

    def _tell(self, refused: checkpoint.Rejected) -> str:
        """The refusal in one line; an event when it is news."""
        line = _line(refused)
        if line not in self._told:
            self._told.add(line)
            self._events.emit(CheckpointRejected(refused.name, refused.reason))
        return line

    def _unusable(self, found: checkpoint.Checkpoint) -> str:
        if found.config_digest != self._config_digest:
            return "written with another model, data, optimizer or precision"
        return ""

    def condemn(self, step: int, reason: str) -> None:
        """A rank that read the checkpoint itself could not use it. Others may be reading still, so it is put aside
        with the next survey, before which every rank has left the epoch."""
        self._condemned[step] = reason

    def load(
        self,
        step: int,
        keepers: Mapping[int, Address],
        calls: Calls,
        *,
        loaded: Callable[[], None],
        refused: Callable[[str], None],
        deadline_s: float,
    ) -> None:
        """Bring a checkpoint into the keepers' memory, each digest verified. What is damaged is put aside for good.

        Nothing is called when a keeper is lost meanwhile: that is no fault of the checkpoint's.
        """
        directory, left = checkpoint.directory(step), set(keepers)

        def then(rank: int) -> Callable[[Completion], None]:
            def answered(answer: Completion) -> None:
                if not left:  # refused already
                    return
                if answer.error is not None:
                    left.clear()
                    if not answer.error.startswith(LOST):
                        self._refuse(step, answer.error.splitlines()[0])
                        refused(answer.error.splitlines()[0])
                    return
                left.discard(rank)
                if not left:
                    loaded()

            return answered

        for rank, keeper in keepers.items():
            calls.ask(keeper, "load", rank, self.uri, directory, then=then(rank), deadline_s=deadline_s)

    def _refuse(self, step: int, reason: str) -> None:
        """It does not count as good any more: neither when old ones are deleted nor when the same step comes again."""
        name = checkpoint.directory(step)
        self._good.discard(step)
        self._tell(checkpoint.Rejected(name, reason))
        if reason.partition(":")[0] in _DAMAGE:
            self._damaged[name] = reason
            self._put_aside(step)

    def _put_aside(self, step: int) -> None:
        """Out of the way of a new checkpoint of the same step, all its files kept."""
        reason = self._damaged.pop(checkpoint.directory(step), None)
        if reason is None:
            return
        try:
            name = checkpoint.quarantine(self._storage, step, reason)
        except SnapshotError as error:
            logger.warning("the checkpoint of step %d is damaged and stays where it is: %s", step, error)
        else:
            self._told.add(_line(checkpoint.Rejected(name, reason)))

    # -- writing --------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """The membership changed: whatever is being written will not be committed, what failed may be tried again."""
        if self._writing is not None:
            self._due_s = self._clock.now()
        self._writing, self._failed_step = None, -1

    def give_up(self, reason: str) -> None:
        """Nobody waits any longer for what is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._failed(writing.step, reason)

    def persist_if_due(
        self,
        versions: Mapping[int, Sequence[Mapping[str, Any]]],
        calls: Calls,
        keeper_of: KeeperOf,
        *,
        deadline_s: float,
    ) -> None:
        """Start writing the version that every rank keeps for this purpose, if there is one; or, when the time has
        come, the newest one that every rank holds. A version that could not be written is not tried again: the next
        one that is due will be."""
        if self._writing is not None or len(versions) < self._world:
            return
        # One epoch, because ranks of different epochs may have computed a step from different parents.
        kept = [{(v["version"], v["epoch"]) for v in held if v["kept"]} for held in versions.values()]
        ready = max((version for version, _ in set.intersection(*kept)), default=-1)
        if ready > max(self.newest_step, self._failed_step):
            self._persist(ready, calls, keeper_of, deadline_s)
        elif self._clock.now() >= self._due_s:
            self._due_s = self._next_due_s(_RETRIES)  # unless it is written
            keepers = {keeper_of(rank).number for rank in range(self._world)}
            self.persist_newest(calls, keepers, keeper_of, deadline_s=deadline_s)  # asks again: versions pass quickly

    def _next_due_s(self, parts: int = 1) -> float:
        """When time alone asks for a checkpoint; never without ``persist_every_s``."""
        every_s = self._config.persist_every_s
        return self._clock.now() + every_s / parts if every_s else math.inf

    def persist_newest(self, calls: Calls, keepers: Collection[int], keeper_of: KeeperOf, *, deadline_s: float) -> None:
        """Write the newest version that every rank holds, unless it is on disk already."""
        self._writing = writing = _Writing(-1, self._clock.now())

        def then(answers: Gathered) -> None:
            if self._writing is not writing:
                return
            held = {
                int(rank): tuple(HeldVersion(v["version"], v["epoch"], v["world"]) for v in versions)
                for answer in answers.values()
                for rank, versions in cast(Mapping[str, Any], answer)["held"].items()
            }
            version = newest_common(held, self._world)
            self._writing, self.last_error = None, ""
            if version is not None and version > max(self.newest_step, 0):
                self._persist(version, calls, keeper_of, deadline_s)

        calls.gather(
            {Address(Role.KEEPER, node): ("inventory", ()) for node in keepers},
            then=then,
            failed=lambda answer: self._gave_up(writing, answer),
            deadline_s=deadline_s,
        )

    def _persist(self, step: int, calls: Calls, keeper_of: KeeperOf, deadline_s: float) -> None:
        self._writing, self.last_error = (writing := _Writing(step, self._clock.now())), ""
        self._put_aside(step)
        self._make_room()
        directory, receipts = checkpoint.directory(step), dict[int, Mapping[str, Any]]()

        def then(rank: int) -> Callable[[Completion], None]:
            def answered(answer: Completion) -> None:
                if answer.error is not None:
                    self._gave_up(writing, answer)
                elif self._writing is writing:
                    receipts[rank] = cast(Mapping[str, Any], answer.result)
                    if len(receipts) == self._world:
                        self._commit(writing, receipts)

            return answered

        for rank in range(self._world):
            calls.ask(
                keeper_of(rank),
                "persist",
                rank,
                step,
                self.uri,
                directory,
                then=then(rank),
                deadline_s=deadline_s,
            )

    def _make_room(self) -> None:
        """What earlier writes have left behind takes space that this one may need."""
        try:
            for name in checkpoint.leftovers(self._storage):
                self._storage.delete(name)
        except SnapshotError as error:
            logger.warning("interrupted checkpoints were not removed: %s", error)

    def _commit(self, writing: _Writing, receipts: Mapping[int, Mapping[str, Any]]) -> None:
        self._writing = None
        try:
            checkpoint.commit(
                self._storage,
                writing.step,
                receipts=receipts,
                config_digest=self._config_digest,
                layout=self._layout,
            )
        except SnapshotError as error:
            self._failed(writing.step, str(error))
            return
        self._good.add(writing.step)
        self._written.append(writing.step)
        self._due_s = writing.started_s + (self._config.persist_every_s or math.inf)
        written = sum(int(r["bytes"]) for r in receipts.values())
        seconds = self._clock.now() - writing.started_s
        self._events.emit(CheckpointWritten(writing.step, checkpoint.directory(writing.step), written, seconds))
        try:
            checkpoint.retain(self._storage, self._config.keep_last)
        except SnapshotError as error:
            logger.warning("old checkpoints were not removed: %s", error)

    def _gave_up(self, writing: _Writing, answer: Completion) -> None:
        if self._writing is writing:
            self.give_up(str(answer.error).splitlines()[0])

    def _failed(self, step: int, reason: str) -> None:
        """A failed checkpoint is an event, not the end: the memory tier still holds the state."""
        logger.warning("checkpoint of step %d was not written: %s", step, reason)
        self._failed_step, self.last_error = max(self._failed_step, step), reason
        self._events.emit(CheckpointRejected(checkpoint.directory(step) if step >= 0 else "newest", reason))


def _line(refused: checkpoint.Rejected) -> str:
    return f"{refused.name}: {refused.reason}"
