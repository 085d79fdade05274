"""What happens in a run, as typed records. Console, ``events.jsonl`` and trackers are sinks of one stream."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

__all__ = [
    "BricksHeld",
    "BricksRestored",
    "CheckpointRejected",
    "CheckpointWritten",
    "EpochStarted",
    "Evaluated",
    "Event",
    "EventSink",
    "FaultDetected",
    "FaultInjected",
    "Generated",
    "MemoryEvents",
    "PreemptionNoticed",
    "Protection",
    "ProtectionFailed",
    "RankLate",
    "RecoveryDone",
    "RecoveryPlanned",
    "RunEnded",
    "RunStarted",
    "SnapshotCost",
    "SnapshotFailed",
    "StageHealed",
    "StageRebuilt",
    "StagesMeasured",
    "StepLeftOut",
    "StopRequested",
    "Waiting",
    "WorldChanged",
    "kind_name",
    "kind_of",
    "to_record",
]


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    run_id: str
    attempt: int
    world: int
    resume: str
    """Where the state came from, or why the run starts fresh."""


@dataclass(frozen=True, slots=True)
class Waiting(Event):
    """The run cannot go on yet; ``what`` says for what."""

    what: str


@dataclass(frozen=True, slots=True)
class EpochStarted(Event):
    epoch: int
    world: int
    version: int
    """Snapshot version all ranks start from; -1 means a fresh model."""


@dataclass(frozen=True, slots=True)
class WorldChanged(Event):
    """The run goes on with fewer nodes, or with more again."""

    epoch: int
    """The first one of the new world."""
    world_before: int
    world: int
    reason: str


@dataclass(frozen=True, slots=True)
class FaultDetected(Event):
    number: int
    """Ordinal of the fault in this run, from 1."""
    ranks: tuple[int, ...]
    node: int | None
    pid: int | None
    cause: str
    phase: str
    last_step: int
    detected_after_s: float
    """Seconds since the last sign of life of the first rank lost."""
    is_preemption: bool = False
    """It was announced, see :class:`PreemptionNoticed`, and is no failure."""


@dataclass(frozen=True, slots=True)
class RankLate(Event):
    """The others wait for a rank that is alive, unusually long. It is no fault yet."""

    rank: int
    phase: str
    step: int
    """Steps finished."""
    seconds: float


@dataclass(frozen=True, slots=True)
class PreemptionNoticed(Event):
    """A node will be taken away."""

    node: int
    host: str
    within_s: float | None
    """Seconds until it goes; None if nobody has said."""
    reason: str


@dataclass(frozen=True, slots=True)
class FaultInjected(Event):
    """Something was broken on purpose; noted before it was done."""

    action: str
    target: str
    """worker, keeper, node, driver, checkpoint, storage, link."""
    number: int
    """Rank or node; -1 for all of them."""
    step: int
    """Steps finished."""
    at: str
    """Failpoint; empty when the driver did it."""
    source: str
    """Who wanted it, and the entry."""


@dataclass(frozen=True, slots=True)
class RecoveryPlanned(Event):
    number: int
    """Of the fault; 0 for a resume, -1 when the world changes without one."""
    source: str
    """Where the state comes from: keeper memory, disk, fresh."""
    version: int
    reason: str
    rejected: tuple[str, ...] = ()
    """Better sources that were refused, each with its reason."""
    is_approximate: bool = False
    """The run goes on from a state that it has never had."""


@dataclass(frozen=True, slots=True)
class RecoveryDone(Event):
    number: int
    epoch: int
    step: int
    repaired_in_s: float
    """Detection to the first step finished by all ranks."""
    steps_lost: int
    bytes_moved: int
    failures: int
    failures_allowed: int
    split_s: dict[str, float]
    """detect, regroup, restore, first_step."""
    preemptions: int = 0
    preemptions_allowed: int = 0
    """0 is no limit."""


@dataclass(frozen=True, slots=True)
class Protection(Event):
    """What the run could lose and still recover from exactly."""

    level: str
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointWritten(Event):
    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointRejected(Event):
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    step: int
    bits_per_byte: float
    windows: int


@dataclass(frozen=True, slots=True)
class StepLeftOut(Event):
    """A step whose loss or gradient norm was not finite: its update never happens."""

    step: int
    """Steps finished before it."""
    reason: str
    version: int
    """The state that all ranks went back to."""


@dataclass(frozen=True, slots=True)
class SnapshotFailed(Event):
    """A version was begun and did not become complete at a rank. Training goes on."""

    rank: int
    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class ProtectionFailed(Event):
    """The keepers could not commit one version after the other. Training goes on; the version before stays."""

    node: int
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotCost(Event):
    """What snapshots have cost at rank 0: medians over steps beside which a version was copied."""

    steps: int
    stall_s: float
    """The step waited for the snapshotter."""
    stall_share: float
    """Of the step."""
    copy_s: float
    """From the first byte to the last, beside the step."""
    slowdown: float | None
    """Steps with a copy beside them against steps without, 0.02 is 2 %; None when there were too few of either."""


@dataclass(frozen=True, slots=True)
class StageRebuilt(Event):
    """A pipeline stage was made from others: from here on the run is not the one that it would have been."""

    stage: int
    version: int
    repair: str
    """Such as checkfree: see ``recovery.stage.repair``."""
    sources: list[int]
    """Stages that were read."""
    share: float
    """Of the first of two sources in the average."""
    bytes: int
    """Read from the memory of other nodes."""


@dataclass(frozen=True, slots=True)
class StageHealed(Event):
    """A rebuilt stage was fitted, alone, to what the lost one had answered."""

    stage: int
    pairs: int
    """Microbatches of which both neighbours had logged their side."""
    steps: int
    before: float | None
    """Error on pairs held out, over their variance; None where there were too few pairs."""
    after: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class StagesMeasured(Event):
    step: int
    angular_distance: dict[str, float]
    """By stage, between what goes in and what comes out, in half turns: a stage with a low one is easily replaced.
    Source: arXiv 2403.17887, section 3.2."""


@dataclass(frozen=True, slots=True)
class BricksHeld(Event):
    """Every node that takes part has its pieces of the run's frozen files in memory."""

    bricks: int
    bytes: int
    """Of the files."""
    held: dict[str, int]
    """Bytes by node."""
    read: int
    """Bytes of pieces that came from the files, whose sha256 their keepers have verified; since these were started."""
    sent: int
    """Bytes that went from keeper to keeper."""
    coded: int
    """Bytes that were computed: parity, and pieces that were lost."""
    snapshot: dict[str, int]
    """Bytes by rank of the newest snapshot, which holds nothing that is frozen."""


@dataclass(frozen=True, slots=True)
class BricksRestored(Event):
    """Frozen files were not what the run began with, and a rank took them from the keepers' memory."""

    rank: int
    files: dict[str, str]
    """sha256 by path."""
    bytes: int
    """Of all of them."""
    reason: str
    """What was wrong with the first of them."""


@dataclass(frozen=True, slots=True)
class Generated(Event):
    step: int
    text: str


@dataclass(frozen=True, slots=True)
class StopRequested(Event):
    reason: str

    @property
    def is_notice(self) -> bool:
        """What schedulers send before they take a machine away, and no person's wish."""
        return self.reason.startswith(("SIGTERM", "SIGUSR1"))


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    outcome: str
    """finished, stopped, failed."""
    step: int
    seconds: float
    faults: int
    steps_lost: int
    exit_code: int
    reason: str = ""
    preemptions: int = 0
    """Of the faults."""


class EventSink(Protocol):
    """Receives every event in order, in the driver's thread. Must return quickly and never raise."""

    def emit(self, event: Event) -> None: ...


class MemoryEvents:
    """Keeps events in a list, for tests and notebooks."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> Sequence[Event]:
        return [e for e in self.events if isinstance(e, kind)]


def kind_of(event: Event) -> str:
    """``FaultDetected`` -> ``fault_detected``."""
    return kind_name(type(event))


def kind_name(kind: type[Event]) -> str:
    """The same of the class."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def to_record(event: Event, *, time_s: float) -> dict[str, object]:
    """One JSON line: wall-clock time, kind, then the fields."""
    return {"time": time_s, "event": kind_of(event), **asdict(event)}
