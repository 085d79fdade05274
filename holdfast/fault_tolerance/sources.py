"""What is known about restorable state: the last inventory, less what turned out to be damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from holdfast.fault_tolerance.lanes import Roster
from holdfast.fault_tolerance.messages import HeldVersion, InventoryTaken
from holdfast.fault_tolerance.policy import DISK, Decision, View, decide
from holdfast.fault_tolerance.stage_policy import StageFacts

__all__ = ["Sources"]


class Sources:
    """Gathers evidence for and against every source; ``decide`` turns it into a decision."""

    def __init__(self, roster: Roster, stages: StageFacts | None = None, replicas_every: int = 0) -> None:
        self._stages, self._replicas_every = stages, replicas_every
        self._roster, self._rosters = roster, {roster.number: roster}
        self._inventory = InventoryTaken(-1, {})
        self._decision: Decision | None = None
        self._damaged: set[tuple[int, HeldVersion]] = set()
        self._refused: dict[int, str] = {}
        self._spoilt: dict[tuple[int, int], str] = {}
        self._rejected: dict[str, None] = {}  # an ordered set
        self._live: dict[int, int] = {}
        self._live_epoch = -1

    def move_to(self, roster: Roster) -> None:
        """Other nodes take part from now on. What was known of memory is known of the ranks before."""
        self._roster = self._rosters[roster.number] = roster
        self._damaged.clear()
        self._live.clear()

    def take(self, inventory: InventoryTaken) -> None:
        """A newer inventory replaces the last one; a checkpoint once seen unusable is never forgotten."""
        self._inventory = inventory
        self._rejected.update(dict.fromkeys(inventory.rejected))

    def left(self, rank: int, live: int, epoch: int) -> None:
        """``rank`` has left ``epoch`` alive; its state was version ``live`` then, or none (-1)."""
        if epoch > self._live_epoch:
            self._live, self._live_epoch = {}, epoch
        if epoch == self._live_epoch and live >= 0:
            self._live[rank] = live

    def measured(self, step: int, angular_distance: Mapping[int, float]) -> None:
        """How much stages change what passes them: what a rebuilt one will miss is told with the plan."""
        if self._stages is not None:
            self._stages = replace(self._stages, measured_at=step, angular_distance=dict(angular_distance))

    def damaged(self, rank: int, version: int, reason: str) -> None:
        """What ``rank`` was to restore cannot be used: its copy in memory, or a checkpoint that it read itself."""
        decision = self._decision
        if decision is None or decision.version != version:
            return
        if decision.rebuild is not None:
            self._spoilt[decision.rebuild.held.version, decision.rebuild.held.epoch] = reason
        elif self.is_direct(decision) or decision.recorded is not None or decision.former is not None:
            self.refuse(version, reason)
        elif decision.writer_epoch is not None:
            self._damaged.add((rank, HeldVersion(version, decision.writer_epoch, self._roster.world)))

    def refuse(self, step: int, reason: str) -> None:
        """The durable checkpoint of ``step`` could not be loaded, or the version not be rebuilt."""
        decision = self._decision
        recorded = None if decision is None else decision.recorded or decision.former
        if recorded is None:
            self._refused[step] = reason
        else:
            self._spoilt[recorded.version, recorded.epoch] = reason

    def is_direct(self, decision: Decision) -> bool:
        """The ranks must read the checkpoint themselves, because it was written in another layout."""
        return decision.source == DISK and decision.version in self._inventory.foreign

    def newest_written_in(self, epoch: int) -> int:
        """Newest version that any rank completed in ``epoch``; -1 if there is none."""
        found = [(h.version, h.epoch) for copies in self._inventory.held.values() for h in copies]
        found += [(former.version, former.epoch) for former in self._inventory.former]
        return max((version for version, writer in found if writer == epoch), default=-1)

    def decide(self) -> Decision:
        """The best source left."""
        inventory = self._inventory
        self._decision = decide(
            View(
                roster=self._roster,
                held={r: [h for h in held if (r, h) not in self._damaged] for r, held in inventory.held.items()},
                live=self._live,
                recorded=inventory.recorded,
                former=inventory.former,
                rosters=self._rosters,
                spoilt=self._spoilt,
                durable=inventory.durable,
                refused=self._refused,
                rejected=tuple(self._rejected),
                stages=self._stages,
                replicas_every=self._replicas_every,
            )
        )
        return self._decision
