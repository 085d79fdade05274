"""What the run could lose at this moment, and what it is waiting for: words for users."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.events import Protection
from holdfast.fault_tolerance.lanes import Roster
from holdfast.fault_tolerance.membership import Crew, Keepers, Worker, WorkerState
from holdfast.fault_tolerance.policy import name_ranks

__all__ = ["DEGRADED", "FULL", "REDUCED", "ProtectionGauge", "missing_pieces"]

FULL, REDUCED, DEGRADED = "full", "reduced", "degraded"
"""All spares are warm and parity is whole; something is missing; the run is recovering."""


class ProtectionGauge:
    """Says when the level of protection changes, and nothing while it stays."""

    def __init__(self, spares: int, roster: Roster) -> None:
        self._spares = spares
        self.move_to(roster, absent=())
        self._said = (FULL, "")

    def move_to(self, roster: Roster, *, absent: Sequence[int]) -> None:
        """Other nodes take part from now on; the run goes on without those that are ``absent``."""
        self._absent = tuple(absent)
        self._has_parity = any(lane.parity for lane in roster.lanes)

    def degraded(self) -> list[Protection]:
        """A recovery begins."""
        if self._said[0] == DEGRADED:
            return []
        return self._say(DEGRADED, "the run is recovering; another loss now is repaired together with this one")

    def measure(
        self, spares: Sequence[Worker], crowded: Sequence[int], *, has_lost: bool, is_encoded: bool
    ) -> list[Protection]:
        """Everybody trains. Spares of the first hour that are still warming up are no news, nor is the first parity.

        ``crowded``: nodes that have moved to the host of another one. ``is_encoded``: the keepers have committed a
        version since the epoch began.
        """
        if not has_lost:
            return []
        ready = sum(spare.state is WorkerState.IDLE for spare in spares)
        if self._has_parity and not is_encoded:
            lost = "a node lost now costs the steps since the last checkpoint"
            return self._say(REDUCED, f"parity is being computed anew; until it is, {lost}")
        if ready < self._spares:
            return self._say(
                REDUCED, f"{ready} of {self._spares} spares are warm; the next replacement may have to start cold"
            )
        if self._has_parity and crowded:
            names = ", ".join(map(str, crowded))
            return self._say(REDUCED, f"node(s) {names} moved to the host of another node, and both are lost with it")
        whole = "any worker or node" if self._has_parity else "any worker"
        if self._absent:
            names = ", ".join(map(str, self._absent))
            return self._say(REDUCED, f"the run goes on without node(s) {names}; {whole} can be replaced from memory")
        stand_by = f"{ready} warm spare(s) stand by" if self._spares else "without spares, as configured"
        return self._say(FULL, f"{whole} can be replaced from memory; {stand_by}")

    def _say(self, level: str, reason: str) -> list[Protection]:
        if (level, reason) == self._said:
            return []
        self._said = (level, reason)
        return [Protection(level, reason)]


def missing_pieces(crew: Crew, keepers: Keepers, *, loading: int | None) -> str:
    """What a start or a recovery waits for."""
    pieces = [
        _of_ranks("a worker to start for", crew.in_state(WorkerState.STARTING)),
        _of_ranks("the old epoch to be left by", crew.in_state(WorkerState.LEAVING)),
        f"the keeper(s) of node(s) {', '.join(map(str, keepers.waiting))}" if keepers.waiting else "",
    ]
    text = " and ".join(piece for piece in pieces if piece)
    if not text:
        text = "the keepers' inventory" if loading is None else f"the checkpoint of step {loading} to be loaded"
    return f"waiting for {text}"


def _of_ranks(what: str, workers: Sequence[Worker]) -> str:
    ranks = [worker.rank for worker in workers if worker.rank is not None]
    return f"{what} {name_ranks(ranks)}" if ranks else ""
