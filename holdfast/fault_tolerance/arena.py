"""A rank's shared memory: a board and N equal buffers in one memfd, which the keeper owns and the worker maps.

The memory has no name anywhere, so nothing can be left behind: it exists as long as the keeper holds the descriptor
or somebody has it mapped. A worker that dies, at whatever instant, leaves it as it is; so does a keeper.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass

import numpy as np

from holdfast.errors import InvariantViolation, SnapshotError, SnapshotMemory
from holdfast.fault_tolerance.board import HEADER_BYTES, Board
from holdfast.fault_tolerance.buffer import Buffer, Slot

__all__ = ["Arena", "ArenaRef"]

_SLACK_BYTES = 1 << 16
"""Added when memory is reserved, so that a manifest whose numbers grow a digit still fits."""


@dataclass(frozen=True, slots=True)
class ArenaRef:
    """Where a worker on the same host finds a rank's memory; JSON-able."""

    pid: int
    """The keeper's process."""
    fd: int
    rank: int
    run_tag: str

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"


class Arena:
    """The memory of one rank as seen by one process. Buffers are mapped when they exist, whoever reserved them."""

    def __init__(self, fd: int, board: Board, *, prefault: bool) -> None:
        self._fd, self.board = fd, board
        self._flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if prefault else 0)
        self._memory, self._mapped_capacity = np.empty((board.buffers, 0), dtype=np.uint8), 0

    @classmethod
    def create(cls, rank: int, run_tag: str, limit_bytes: int, buffers: int) -> Arena:
        """Keeper. Memory for a board; the buffers come with :meth:`reserve`."""
        # Sealed against shrinking: no process can pull the memory from under another one's mapping.
        fd = os.memfd_create(f"holdfast-rank{rank}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, HEADER_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        board = Board.create(_map_header(fd), rank=rank, run_tag=run_tag, buffers=buffers)
        board.limit_bytes = limit_bytes
        return cls(fd, board, prefault=False)

    @classmethod
    def attach(cls, ref: ArenaRef) -> Arena:
        """Worker. Map the memory that a keeper of this host owns. Raises: SnapshotError."""
        try:
            fd = os.open(ref.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SnapshotError(
                f"the memory of rank {ref.rank} at {ref.path} cannot be opened ({error.strerror}): its keeper has "
                "died, or runs on another host, in another container or as another user"
            ) from error
        try:
            if os.fstat(fd).st_size < HEADER_BYTES:
                raise SnapshotError(f"{ref.path} is not the memory of rank {ref.rank}: it is too small for a board")
            board = Board.open(_map_header(fd), rank=ref.rank, run_tag=ref.run_tag)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, board, prefault=True)

    @property
    def ref(self) -> ArenaRef:
        """What other processes need to attach to the memory that this one has open."""
        return ArenaRef(os.getpid(), self._fd, self.board.rank, self.board.run_tag)

    @property
    def buffers(self) -> list[Buffer]:
        return [self.buffer(index) for index in range(self.board.buffers)]

    def buffer(self, index: int) -> Buffer:
        if self._fd < 0:
            raise InvariantViolation(f"the arena of rank {self.board.rank} is used after it was closed")
        self._remap()
        return Buffer(self._memory[index], self.board.descriptor(index))

    def slots(self) -> list[Slot]:
        """What each buffer holds at this moment."""
        return [buffer.describe() for buffer in self.buffers]

    def reserve(self, capacity_bytes: int) -> None:
        """Make every buffer at least this large, in memory that really exists. Buffers that are large enough stay
        as they are.

        Raises: SnapshotMemory when that is more than allowed or than there is; SnapshotError when the buffers are
        too small and hold versions that growing would destroy.
        """
        if capacity_bytes <= self.board.capacity:
            return
        self._refuse_to_destroy(capacity_bytes)
        capacity = -(-(capacity_bytes + _SLACK_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
        need = self.board.buffers * capacity
        if need > self.board.limit_bytes:
            raise SnapshotMemory(need_bytes=need, have_bytes=self.board.limit_bytes, rank=self.board.rank)
        for buffer in self.buffers:
            buffer.release()
        try:
            os.posix_fallocate(self._fd, 0, HEADER_BYTES + need)
        except OSError as error:
            have = os.fstat(self._fd).st_size - HEADER_BYTES
            raise SnapshotMemory(need_bytes=need, have_bytes=have, rank=self.board.rank) from error
        self.board.capacity = capacity

    def close(self) -> None:
        """Let go of the buffers; views handed out before keep them mapped until they are gone. May be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._memory, self._mapped_capacity = -1, np.empty((0, 0), dtype=np.uint8), 0

    def _refuse_to_destroy(self, capacity_bytes: int) -> None:
        held = sorted(slot.version for slot in self.slots() if slot.is_complete)
        if held:
            raise SnapshotError(
                f"rank {self.board.rank} needs buffers of {capacity_bytes:,} bytes, but its keeper's have "
                f"{self.board.capacity:,} and hold versions {held}, which were taken of a smaller state; "
                "resume with the configuration that wrote them, or start a new run"
            )

    def _remap(self) -> None:
        """Another process may have reserved since."""
        capacity = self.board.capacity
        if capacity != self._mapped_capacity:
            size = self.board.buffers * capacity
            mapping = mmap.mmap(self._fd, size, flags=self._flags, offset=HEADER_BYTES)
            self._memory = np.frombuffer(mapping, dtype=np.uint8).reshape(self.board.buffers, capacity)
            self._mapped_capacity = capacity


def _map_header(fd: int) -> memoryview:
    return memoryview(mmap.mmap(fd, HEADER_BYTES, flags=mmap.MAP_SHARED))
