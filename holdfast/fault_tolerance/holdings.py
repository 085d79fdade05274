"""The memory that one keeper owns: an arena for each of its ranks, and what ranks have left that are counted anew.

When nodes leave the run or come back, ranks are others even where they are called alike, so they get fresh memory. What
their predecessors hold stays as it is, unless it is rebuilt here as a guest, until the new ranks have as much.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from holdfast.errors import SnapshotError
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.board import Board

__all__ = ["Holdings"]


class Holdings:
    """Mappings are replaced, never changed, because other threads iterate. ``limit_bytes`` is shared equally by the
    ranks that are admitted before they reserve; of each share ``parity_ratio`` parts in ``buffers + parity_ratio`` are
    for parity."""

    def __init__(self, run_tag: str, *, limit_bytes: int, buffers: int, parity_ratio: float) -> None:
        self._run_tag, self._limit_bytes = run_tag, limit_bytes
        self._buffers, self._parity_ratio = buffers, parity_ratio
        self._lock = threading.Lock()
        self.roster = 0
        """Number of the membership whose ranks are the present ones."""
        self.present: Mapping[int, Arena] = {}
        """By rank."""
        self.former: Mapping[tuple[int, int], Arena] = {}
        """By roster and rank."""
        self._board_before: Board | None = None
        """Of a rank that was present until the roster changed last."""

    @property
    def arenas(self) -> list[Arena]:
        """All of them."""
        return [*self.present.values(), *self.former.values()]

    def of(self, rank: int) -> list[Arena]:
        """Whatever belongs to ranks that are, or were, called so."""
        present = [self.present[rank]] if rank in self.present else []
        return present + [arena for (_, other), arena in self.former.items() if other == rank]

    def admit(self, rank: int, roster: int, *, fence: int) -> Arena:
        """The rank's memory, made when it is asked for first. Raises: SnapshotError for a roster that is history."""
        with self._lock:
            if roster < self.roster:
                raise SnapshotError(f"rank {rank} belongs to roster {roster}, and roster {self.roster} is here by now")
            if roster > self.roster:
                self._retire(roster)
            if rank not in self.present:
                arena = Arena.create(rank, self._run_tag, 0, self._buffers)
                arena.board.fence(fence)
                if self._board_before is not None:  # its last reports may not have been heard yet
                    arena.board.carry_reports(self._board_before)
                self.present = {**self.present, rank: arena}
                self._share()
            return self.present[rank]

    def guest(self, rank: int, roster: int, size_bytes: int) -> Arena:
        """Room for one version of a rank of another roster. Raises: SnapshotMemory."""
        with self._lock:
            arena = self.former.get((roster, rank))
            if arena is None:
                arena = Arena.create(rank, self._run_tag, int(self._unreserved()), 1)
                self.former = {**self.former, (roster, rank): arena}
            arena.reserve(size_bytes)
            self._share()
            return arena

    def drop_former(self) -> None:
        """The present ranks have versions enough of their own."""
        with self._lock:
            former, self.former = self.former, {}
            _close(list(former.values()))
            self._share()

    def close(self) -> None:
        """Free all memory that no worker has mapped."""
        with self._lock:
            arenas, self.present, self.former = self.arenas, {}, {}
            _close(arenas)

    def _retire(self, roster: int) -> None:
        self._board_before = next((arena.board for arena in self.present.values()), self._board_before)
        held = {rank: arena for rank, arena in self.present.items() if arena.board.capacity}
        _close([arena for rank, arena in self.present.items() if rank not in held])
        self.former = {**self.former, **{(self.roster, rank): arena for rank, arena in held.items()}}
        self.present, self.roster = {}, roster

    def _share(self) -> None:
        """What is not reserved yet is divided among the ranks that have reserved nothing."""
        waiting = [arena.board for arena in self.present.values() if arena.board.capacity == 0]
        for board in waiting:
            share = self._unreserved() / len(waiting)
            board.limit_bytes = int(share * self._buffers / (self._buffers + self._parity_ratio))

    def _unreserved(self) -> float:
        boards = [arena.board for arena in self.arenas]
        reserved = sum(board.capacity * (board.buffers + self._parity_ratio) for board in boards)
        return max(self._limit_bytes - reserved, 0.0)


def _close(arenas: Sequence[Arena]) -> None:
    for arena in arenas:
        arena.close()
