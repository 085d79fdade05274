"""What the recovery machine is told and what it answers: messages in, actions out.

Everything here is plain, frozen data without behaviour, so that the executor can build messages and dispatch
actions without knowing the machine. Every instant (``last_seen_s``, ``beat_s``, ``progress_s``) is in the clock
whose ``now`` is passed to :meth:`holdfast.fault_tolerance.machine.Supervisor.handle`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from holdfast.events import Event
from holdfast.fault_tolerance.lanes import Recorded, Roster
from holdfast.fault_tolerance.stage_policy import StageRebuild
from holdfast.types import Phase

__all__ = [
    "AbortWorker",
    "Action",
    "Announce",
    "BeatSeen",
    "Beats",
    "CheckpointLoaded",
    "CheckpointRefused",
    "Fence",
    "Finish",
    "HeldVersion",
    "InventoryTaken",
    "KeeperLost",
    "KeeperReady",
    "KillKeeper",
    "KillWorker",
    "LoadCheckpoint",
    "Member",
    "Message",
    "NodeDraining",
    "NodeMoved",
    "Outcome",
    "Persist",
    "Persisted",
    "Protected",
    "Quarantine",
    "Rebuild",
    "RedundancyMeasured",
    "StartEpoch",
    "StartKeeper",
    "StartWorker",
    "StopAsked",
    "StopEpoch",
    "TakeInventory",
    "Tick",
    "WorkerLost",
    "WorkerParked",
    "WorkerReady",
]


class Outcome(str, Enum):
    """Why a worker has left its epoch; its process lives."""

    ABORTED = "aborted"
    """It was asked to leave."""
    BROKEN = "broken"
    """A collective broke under it: a victim of somebody else's loss."""
    ERROR = "error"
    """An exception of its own; ``detail`` holds the traceback."""
    CORRUPT = "corrupt"
    """A digest did not match while it restored ``version``."""
    FINISHED = "finished"
    """The goal is reached."""
    STOPPED = "stopped"
    """A graceful stop is done."""


@dataclass(frozen=True, slots=True)
class Member:
    """Who plays a rank in one membership epoch, and where."""

    rank: int
    node: int
    worker: int


@dataclass(frozen=True, slots=True)
class HeldVersion:
    """A complete version in a keeper's memory."""

    version: int
    epoch: int
    """Membership epoch that wrote it."""
    world: int
    """Ranks among which its state is divided."""


@dataclass(frozen=True, slots=True)
class BeatSeen:
    """The newest sign of life of a rank."""

    rank: int
    epoch: int
    phase: Phase
    step: int
    """Steps finished."""
    beat_s: float
    progress_s: float
    """When phase or step last changed."""


# -- messages in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """Base of everything the machine can be told."""


@dataclass(frozen=True, slots=True)
class WorkerReady(Message):
    """A started worker has imported everything and waits."""

    worker: int
    node: int
    pid: int
    host: str = ""
    """Where it has got to; empty for where it was expected."""


@dataclass(frozen=True, slots=True)
class WorkerLost(Message):
    """A worker's process died, or the executor could not reach it."""

    worker: int
    cause: str
    last_seen_s: float


@dataclass(frozen=True, slots=True)
class WorkerParked(Message):
    """A worker has left ``epoch`` and waits for the next one."""

    worker: int
    epoch: int
    outcome: Outcome
    detail: str = ""
    version: int = -1
    live: int = -1
    """The version that its state was when it left, whole and by now in its keeper's memory; -1 for none."""


@dataclass(frozen=True, slots=True)
class KeeperReady(Message):
    """A started keeper answers."""

    node: int
    host: str = ""
    """Where it has got to; empty for where it was expected."""


@dataclass(frozen=True, slots=True)
class NodeMoved(Message):
    """What is started for ``node`` from now on gets to another host, because the one it was on does not answer or
    will be taken away."""

    node: int
    host: str


@dataclass(frozen=True, slots=True)
class NodeDraining(Message):
    """The host that ``node`` is on will be taken away. If there is room elsewhere, :class:`NodeMoved` follows."""

    node: int
    host: str
    within_s: float
    """Infinite if nobody has said."""
    reason: str


@dataclass(frozen=True, slots=True)
class Persisted(Message):
    """A durable checkpoint has been committed."""

    step: int


@dataclass(frozen=True, slots=True)
class KeeperLost(Message):
    """A keeper died or fell silent; the memory it owned is gone."""

    node: int
    cause: str
    is_silent: bool = False
    """It did not answer for too long, and may be frozen with all of its node."""


@dataclass(frozen=True, slots=True)
class RedundancyMeasured(Message):
    """An evaluation told how much stages of the pipeline change what passes them."""

    step: int
    angular_distance: Mapping[int, float]
    """By stage, in half turns."""


@dataclass(frozen=True, slots=True)
class InventoryTaken(Message):
    """Answer to :class:`TakeInventory`: which versions could be restored."""

    epoch: int
    held: Mapping[int, tuple[HeldVersion, ...]]
    """Complete versions in keeper memory, by rank."""
    durable: tuple[int, ...] = ()
    """Steps of the good durable checkpoints, newest first."""
    rejected: tuple[str, ...] = ()
    """Durable checkpoints that cannot be used, each with its reason."""
    recorded: tuple[Recorded, ...] = ()
    """Versions that the keepers have committed together, newest first, and what is left of each."""
    foreign: tuple[int, ...] = ()
    """Those of ``durable`` that were written in another layout: no keeper can load them, but every rank can read its
    part itself."""
    former: tuple[Recorded, ...] = ()
    """Versions that the ranks of another roster hold in memory, and what is left of each: every rank can read its part
    of them from the keepers."""


@dataclass(frozen=True, slots=True)
class Protected(Message):
    """The newest version that the keepers have committed in ``epoch``, data and parity."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class CheckpointLoaded(Message):
    """Answer to :class:`LoadCheckpoint` or :class:`Rebuild`: every rank's keeper holds ``step``."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class CheckpointRefused(Message):
    """Answer to :class:`LoadCheckpoint` or :class:`Rebuild`: it cannot be read or is damaged."""

    epoch: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Beats(Message):
    """The newest sign of life of each worker, by worker id."""

    beats: Mapping[int, BeatSeen]


@dataclass(frozen=True, slots=True)
class Tick(Message):
    """Time has passed; deadlines are looked at."""


@dataclass(frozen=True, slots=True)
class StopAsked(Message):
    """Somebody wants the run to end gracefully."""

    reason: str


# -- actions out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Action:
    """Base of everything the machine can order."""


@dataclass(frozen=True, slots=True)
class StartWorker(Action):
    """Start a process on ``node``; answer WorkerReady or WorkerLost."""

    worker: int
    node: int


@dataclass(frozen=True, slots=True)
class StartKeeper(Action):
    """Start the keeper of ``node``; answer KeeperReady or KeeperLost."""

    node: int


@dataclass(frozen=True, slots=True)
class KillWorker(Action):
    """End a process at once; no answer is expected and late ones are ignored."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class KillKeeper(Action):
    """End the keeper of ``node`` at once, its memory with it; no answer is expected and late ones are ignored."""

    node: int
    reason: str


@dataclass(frozen=True, slots=True)
class Persist(Action):
    """Write the newest version that every rank holds to a checkpoint; answer Persisted. A fence ends the try."""


@dataclass(frozen=True, slots=True)
class Fence(Action):
    """All keepers refuse epochs older than ``epoch`` from now on."""

    epoch: int
    is_last: bool = False
    """No epoch follows: a checkpoint that is being written may be finished."""


@dataclass(frozen=True, slots=True)
class AbortWorker(Action):
    """The worker must leave ``epoch``, whatever it is blocked in; answer WorkerParked."""

    worker: int
    epoch: int
    may_update: bool = False
    """All ranks are alive: an update that is under way may end first, as half of it is no state to go on from."""


@dataclass(frozen=True, slots=True)
class TakeInventory(Action):
    """Admit every rank at its keeper, attach each member's worker to its arena, ask all keepers what they hold and
    list the durable checkpoints; answer InventoryTaken."""

    epoch: int
    members: tuple[Member, ...]
    roster: Roster


@dataclass(frozen=True, slots=True)
class Quarantine(Action):
    """The copy of ``version`` at ``rank`` is damaged: it must not be offered again."""

    rank: int
    version: int


@dataclass(frozen=True, slots=True)
class LoadCheckpoint(Action):
    """Bring the durable checkpoint of ``step`` into the keepers; answer CheckpointLoaded or CheckpointRefused."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Rebuild(Action):
    """Decode what ``ranks`` had of a recorded version from what their lanes hold; answer CheckpointLoaded or
    CheckpointRefused. Ranks of another roster are guests of any keeper."""

    epoch: int
    version: int
    record_epoch: int
    """In which the version was committed."""
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StartEpoch(Action):
    """The keepers forget everything newer than ``version``, then every member trains from it; -1 is a fresh model.
    Each member answers WorkerParked when it leaves the epoch."""

    epoch: int
    members: tuple[Member, ...]
    version: int
    from_storage: bool = False
    """The members read ``version`` from its durable checkpoint; a member that cannot use it leaves as CORRUPT."""
    former: Recorded | None = None
    """The members read ``version`` from what the ranks of another roster hold in memory; one that finds it damaged
    leaves as CORRUPT."""
    rebuild: StageRebuild | None = None
    """The members of these stages make ``version`` from what others hold; one that cannot leaves as CORRUPT."""


@dataclass(frozen=True, slots=True)
class StopEpoch(Action):
    """The ranks leave together at the next step boundary, after their newest version is complete."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Announce(Action):
    """Something the user wants to know has happened."""

    event: Event


@dataclass(frozen=True, slots=True)
class Finish(Action):
    """The run is over: persist, export, clean up."""

    outcome: str
    """finished, stopped or failed."""
    exit_code: int
    reason: str
