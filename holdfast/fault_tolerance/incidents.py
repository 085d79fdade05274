"""What went wrong so far: incidents with their first cause, budgets, and how long each outage took.

An *incident* lasts from the first sign of a fault until the next epoch starts; losses that follow from it belong to
it. An *outage* lasts until every rank has finished a step again and may span several incidents.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.events import Event, FaultDetected, RecoveryDone, Waiting
from holdfast.fault_tolerance.policy import name_ranks
from holdfast.fault_tolerance.progress import EpochWatch

__all__ = ["NAMING_GRACE_S", "Incident", "Ledger", "Loss", "Outage"]

NAMING_GRACE_S = 3.0
"""How long to wait for the first cause after its victims have reported: the news of a death may take longer. Ray tells
after 1.5 to 2 s that nobody is left of a node."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One piece of bad news."""

    cause: str
    last_seen_s: float
    ranks: tuple[int, ...] = ()
    node: int | None = None
    pid: int | None = None
    phase: str = ""
    joined: int = -1
    """Number of incidents when what was lost joined the run: a replacement's loss is no consequence of the
    incident that it was to repair."""
    is_victim: bool = False
    """Suffers from a fault whose cause is not known yet."""
    had_started: bool = True
    """False for a process that was lost before it was ready."""
    is_preemption: bool = False
    """The loss was announced; of a victim, may follow from one that was."""


@dataclass(slots=True)
class Incident:
    """A fault and what followed from it until the next epoch started."""

    number: int
    opened_s: float
    last_step: int
    first: Loss | None = None
    """The first cause, once known."""
    ranks: list[int] = field(default_factory=list)
    victims: list[int] = field(default_factory=list)
    symptom: str = ""
    is_announced: bool = False
    _was_expected: bool = False
    _may_be_expected: bool = False

    @property
    def is_preemption(self) -> bool:
        """Something in it was announced; what else went then followed from that."""
        return self._was_expected or (self.first is None and self._may_be_expected)

    def add(self, loss: Loss) -> None:
        if loss.is_victim:
            self._may_be_expected |= loss.is_preemption
            self.victims += loss.ranks
            self.symptom = self.symptom or _first_line(loss.cause)
            return
        self._was_expected |= loss.is_preemption
        self.first = self.first or loss
        self.ranks += loss.ranks

    def announcement(self) -> FaultDetected:
        first = self.first or Loss(
            f"no process was lost, but the collective broke at {name_ranks(self.victims)}: {self.symptom}",
            self.opened_s,
        )
        return FaultDetected(
            number=self.number,
            ranks=tuple(sorted(set(self.ranks))),
            node=first.node,
            pid=first.pid,
            cause=first.cause,
            phase=first.phase,
            last_step=self.last_step,
            detected_after_s=max(self.opened_s - first.last_seen_s, 0.0),
            is_preemption=self.is_preemption,
        )


@dataclass(slots=True)
class Outage:
    """Seconds and steps between the first sign of a fault and the first step finished after it."""

    number: int
    """Of its first incident."""
    began_s: float
    detect_s: float = 0.0
    top_step: int = 0
    """Most steps any rank had finished in the epochs that ended in it."""
    regrouped_s: float = 0.0
    restored_s: float | None = None

    def split_s(self, now: float) -> dict[str, float]:
        restored_s = now if self.restored_s is None else self.restored_s
        return {
            "detect": self.detect_s,
            "regroup": self.regrouped_s - self.began_s,
            "restore": restored_s - self.regrouped_s,
            "first_step": now - restored_s,
        }


@dataclass(frozen=True, slots=True)
class _Trial:
    """The epoch that runs, until it is judged."""

    best_before: int
    is_restart: bool


class Ledger:
    """Counts incidents, keeps their story and says when enough is enough."""

    def __init__(self, *, max_failures: int, max_no_progress: int, max_preemptions: int = 0) -> None:
        self._max_failures, self._max_no_progress = max_failures, max_no_progress
        self._max_preemptions = max_preemptions
        self._incidents: list[Incident] = []
        self.steps_lost = 0
        self.best_step = 0
        """Most steps that any rank ever finished."""
        self.history: list[str] = []
        self.outage: Outage | None = None
        self._open: Incident | None = None
        self._trial: _Trial | None = None
        self._fruitless = 0
        self._news: list[Event] = []

    # -- incidents ------------------------------------------------------------------------------------------------

    @property
    def incidents(self) -> int:
        """Failures and preemptions; the number of the newest one."""
        return len(self._incidents)

    @property
    def preemptions(self) -> int:
        return sum(incident.is_preemption for incident in self._incidents)

    @property
    def failures(self) -> int:
        return self.incidents - self.preemptions

    @property
    def is_used_up(self) -> bool:
        return self.failures > self._max_failures or 0 < self._max_preemptions < self.preemptions

    def record(self, loss: Loss, *, last_step: int, now: float) -> None:
        """Open an incident, or add to the open one what follows from it."""
        incident = self._open
        if incident is None or loss.joined == incident.number:
            incident = self._begin(last_step, now)
        if incident.is_announced:
            self._also_lost(loss)
        incident.add(loss)

    def news(self, now: float, *, at_once: bool = False) -> list[Event]:
        """What to announce. An incident without a known cause is held back for a while unless ``at_once``."""
        incident = self._open
        if incident is not None and not incident.is_announced:
            is_known = incident.first is not None
            if is_known or at_once or now - incident.opened_s >= NAMING_GRACE_S:
                self._tell(incident)
        news, self._news = self._news, []
        return news

    def used_up(self) -> str:
        """Why the run ends when the budget is used up."""
        option, limit = "max_failures", self._max_failures
        if self.failures <= self._max_failures:
            option, limit = "max_preemptions", self._max_preemptions
        return f"recovery.{option}={limit} is used up: {'; '.join(self.history)}"

    def _begin(self, last_step: int, now: float) -> Incident:
        if self._open is not None and not self._open.is_announced:
            self._tell(self._open)
        self._open = Incident(self.incidents + 1, now, last_step)
        self._incidents.append(self._open)
        if self.outage is None:
            self.outage = Outage(self.incidents, began_s=now)
        return self._open

    def _tell(self, incident: Incident) -> None:
        event = incident.announcement()
        incident.is_announced = True
        self._news.append(event)
        where = f" ({name_ranks(event.ranks)})" if event.ranks else ""
        kind = "preemption" if event.is_preemption else "fault"
        self.history.append(f"{kind} {event.number}{where} at step {event.last_step}: {_first_line(event.cause)}")
        if self.outage is not None and self.outage.number == event.number:
            self.outage.detect_s = event.detected_after_s

    def _also_lost(self, loss: Loss) -> None:
        if not loss.is_victim:
            who = name_ranks(loss.ranks) if loss.ranks else f"node {loss.node}"
            self._news.append(Waiting(f"{who} lost as well while the run recovers: {_first_line(loss.cause)}"))

    # -- progress -------------------------------------------------------------------------------------------------

    def reached(self, step: int) -> None:
        """Some rank has finished this many steps."""
        self.best_step = max(self.best_step, step)

    def epoch_starts(self, version: int, *, is_restart: bool, now: float) -> None:
        """What goes wrong from now on is a new incident; an outage goes on until every rank has resumed."""
        self.reached(version)
        self._open = None
        self._trial = _Trial(self.best_step, is_restart)
        if self.outage is not None:
            self.outage.regrouped_s, self.outage.restored_s = now, None

    def judge(self, watch: EpochWatch, newest_held: int) -> None:
        """The epoch of ``watch`` has ended in a fault. A restart should have got beyond the best step before it."""
        top_step = max(watch.top_step, newest_held)
        self.reached(top_step)
        if self.outage is not None:
            self.outage.top_step = max(self.outage.top_step, top_step)
        trial, self._trial = self._trial, None
        if trial is None:
            return
        was_announced = self._open is not None and self._open.is_preemption
        if self.best_step > trial.best_before:
            self._fruitless = 0
        elif trial.is_restart and not was_announced:  # the state is not to blame for a node that was taken away
            self._fruitless += 1

    @property
    def is_fruitless(self) -> bool:
        return self._fruitless >= self._max_no_progress

    def fruitless(self) -> str:
        """Why restarting again would not help."""
        return (
            f"{self._fruitless} restarts in a row finished no step beyond step {self.best_step} "
            f"(recovery.max_no_progress={self._max_no_progress}), so another one would not help: "
            f"{'; '.join(self.history)}"
        )

    def restored(self, now: float) -> None:
        """Every rank holds the state it starts from."""
        if self.outage is not None and self.outage.restored_s is None:
            self.outage.restored_s = now

    def resumed(self, watch: EpochWatch, now: float) -> list[Event]:
        """Every rank has finished a step again: the outage, if there was one, is over."""
        outage, self.outage = self.outage, None
        if outage is None:
            return []
        lost = max(outage.top_step - watch.first_step, 0)
        self.steps_lost += lost
        return [
            RecoveryDone(
                number=self.incidents,
                epoch=watch.epoch,
                step=watch.resumed_step,
                repaired_in_s=now - outage.began_s,
                steps_lost=lost,
                bytes_moved=0,  # ranks read their own keepers' memory; what a rebuild fetches is not counted
                failures=self.failures,
                failures_allowed=self._max_failures,
                split_s=outage.split_s(now),
                preemptions=self.preemptions,
                preemptions_allowed=self._max_preemptions,
            )
        ]


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text.strip() else "no reason given"
