"""A rank's status page in shared memory: heartbeat, phase, step reports, fence, and the words of its buffers.

Layout (native byte order, 64-bit words; ``LAYOUT`` changes with it)::

    0       magic, layout, rank, buffers, capacity, limit, fence epoch, beats written, reports written, protected
    128     run tag, 64 bytes, padded with zeros
    512     buffer descriptors, 128 bytes each, at most 16
    4096    ring of heartbeats
    8192    ring of step reports

Words are written with one aligned 8-byte store each and have one writer: the keeper writes limit, fence, protected; the
worker writes the rings and, while its epoch runs, the descriptors, except their pins and, where keepers protect
versions together, that one is COMMITTED and kept.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from operator import attrgetter

from holdfast.errors import InvariantViolation, SnapshotError
from holdfast.fault_tolerance.ring import Ring
from holdfast.types import Phase, StepReport

__all__ = ["HEADER_BYTES", "MAX_BUFFERS", "REPORT_SLOTS", "Beat", "Board"]

MAX_BUFFERS, REPORT_SLOTS = 16, 4096

_MAGIC, _LAYOUT = int.from_bytes(b"HOLDFAST", "little"), 3
_TAG_AT, _TAG_BYTES = 128, 64
_SLOTS_AT, _SLOT_BYTES = 512, 128
_BEATS_AT, _BEAT_SLOTS = 4096, 16
_REPORTS_AT = 8192

_BEAT_FIELDS = "qqqqqddq"
_REPORT_FIELDS = "".join({"int": "q", "float": "d"}[str(f.type)] for f in fields(StepReport))
_report_values = attrgetter(*(f.name for f in fields(StepReport)))
_REPORT_BYTES = REPORT_SLOTS * Ring.slot_bytes(_REPORT_FIELDS)

HEADER_BYTES = -(-(_REPORTS_AT + _REPORT_BYTES) // 65536) * 65536
"""Bytes before the first buffer: a multiple of the mapping granularity of every platform."""


class _Word(IntEnum):
    MAGIC = 0
    LAYOUT = 1
    RANK = 2
    BUFFERS = 3
    CAPACITY = 4
    LIMIT = 5
    FENCE = 6
    BEATS = 7
    REPORTS = 8
    PROTECTED = 9


@dataclass(frozen=True, slots=True)
class Beat:
    """The newest sign of life of the process behind a rank. Seconds are CLOCK_MONOTONIC of its host."""

    rank: int
    pid: int
    """0 until a worker has taken the rank over."""
    epoch: int
    phase: Phase
    step: int
    """Steps finished."""
    beat_s: float
    progress_s: float
    """When phase or step last changed."""
    committed: int
    """Newest version that this worker knows all ranks hold; -1 if none."""


_beat_values = attrgetter(*(f.name for f in fields(Beat)))


class Board:
    """View of a status page. Every method may be called from any thread of the process that may call it at all."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._words, self._lock = view, view[:HEADER_BYTES].cast("q"), threading.Lock()
        beats = view[_BEATS_AT : _BEATS_AT + _BEAT_SLOTS * Ring.slot_bytes(_BEAT_FIELDS)]
        self._beats = Ring(self._words[_Word.BEATS : _Word.BEATS + 1], beats, _BEAT_FIELDS)
        reports = view[_REPORTS_AT : _REPORTS_AT + _REPORT_BYTES]
        self._reports = Ring(self._words[_Word.REPORTS : _Word.REPORTS + 1], reports, _REPORT_FIELDS)

    @classmethod
    def create(cls, view: memoryview, *, rank: int, run_tag: str, buffers: int) -> Board:
        """Keeper. Turn zeroed memory into a board."""
        tag = run_tag.encode()
        if not 0 < buffers <= MAX_BUFFERS or not 0 < len(tag) <= _TAG_BYTES:
            raise InvariantViolation(
                f"buffers={buffers} must be 1 to {MAX_BUFFERS}, run_tag={run_tag!r} 1 to {_TAG_BYTES} bytes long"
            )
        board = cls(view)
        board._words[_Word.LAYOUT], board._words[_Word.RANK], board._words[_Word.BUFFERS] = _LAYOUT, rank, buffers
        view[_TAG_AT : _TAG_AT + len(tag)] = tag
        board._write(Beat(rank, 0, 0, Phase.IDLE, 0, 0.0, 0.0, -1))
        board._words[_Word.MAGIC] = _MAGIC
        return board

    @classmethod
    def open(cls, view: memoryview, *, rank: int, run_tag: str) -> Board:
        """Worker. Check that the memory is what the caller was told. Raises: SnapshotError."""
        board = cls(view)
        layout = (board._words[_Word.MAGIC], board._words[_Word.LAYOUT])
        if layout != (_MAGIC, _LAYOUT):
            raise SnapshotError(f"memory of rank {rank} has no board of layout {_LAYOUT}, found {layout}")
        if (board.run_tag, board.rank) != (run_tag, rank):
            raise SnapshotError(
                f"memory belongs to rank {board.rank} of run {board.run_tag!r}, not to rank {rank} of {run_tag!r}; "
                "its keeper has been replaced, ask for a new reference"
            )
        return board

    # -- the arena ------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self._words[_Word.RANK]

    @property
    def run_tag(self) -> str:
        return bytes(self._view[_TAG_AT : _TAG_AT + _TAG_BYTES]).rstrip(b"\0").decode(errors="replace")

    @property
    def buffers(self) -> int:
        return self._words[_Word.BUFFERS]

    @property
    def capacity(self) -> int:
        """Bytes of one buffer; 0 until memory is reserved."""
        return self._words[_Word.CAPACITY]

    @capacity.setter
    def capacity(self, size_bytes: int) -> None:
        self._words[_Word.CAPACITY] = size_bytes

    @property
    def limit_bytes(self) -> int:
        """Bytes that all buffers together may take."""
        return self._words[_Word.LIMIT]

    @limit_bytes.setter
    def limit_bytes(self, size_bytes: int) -> None:
        self._words[_Word.LIMIT] = size_bytes

    def descriptor(self, index: int) -> memoryview:
        """The 128 bytes that describe one buffer."""
        at = _SLOTS_AT + index * _SLOT_BYTES
        return self._view[at : at + _SLOT_BYTES]

    # -- fence ----------------------------------------------------------------------------------------------------

    @property
    def fence_epoch(self) -> int:
        """Epochs before this one are over: their workers must not write any more."""
        return self._words[_Word.FENCE]

    @property
    def fence_word(self) -> memoryview:
        """The word behind ``fence_epoch``, for code that looks at it between two pieces of a copy."""
        return self._words[_Word.FENCE : _Word.FENCE + 1]

    def fence(self, epoch: int) -> None:
        """Keeper. End all epochs before ``epoch``; a fence never moves back."""
        self._words[_Word.FENCE] = max(self.fence_epoch, epoch)

    @property
    def is_protected(self) -> bool:
        """Keepers decide when a version is committed; otherwise whoever writes it does."""
        return self._words[_Word.PROTECTED] == 1

    @is_protected.setter
    def is_protected(self, value: bool) -> None:
        self._words[_Word.PROTECTED] = int(value)

    # -- signs of life --------------------------------------------------------------------------------------------

    def take_over(self, pid: int, epoch: int) -> None:
        """Worker. Another process or another epoch speaks for the rank from here on; what it does is unknown yet."""
        with self._lock:
            self._write(replace(self.read(), pid=pid, epoch=epoch, phase=Phase.IDLE, committed=-1))

    def beat(self, now: float) -> None:
        """Worker. Still here."""
        with self._lock:
            self._write(replace(self.read(), beat_s=now))

    def enter(self, phase: Phase, step: int, now: float) -> None:
        """Worker. A new phase of a step begins."""
        with self._lock:
            last = self.read()
            progress_s = last.progress_s if (last.phase, last.step) == (phase, step) else now
            self._write(replace(last, phase=phase, step=step, beat_s=now, progress_s=progress_s))

    def note_committed(self, version: int) -> None:
        """Worker. All ranks hold ``version``."""
        with self._lock:
            self._write(replace(self.read(), committed=version))

    def read(self) -> Beat:
        """The newest sign of life, never a mixture of two. Raises: SnapshotError when the memory is destroyed."""
        for _ in range(100):  # only a writer that goes round the whole ring meanwhile makes a second look necessary
            record = self._beats.latest()
            if record is not None:
                rank, pid, epoch, phase, step, beat_s, progress_s, committed = record
                return Beat(rank, pid, epoch, Phase(phase), step, beat_s, progress_s, committed)
        raise SnapshotError(f"the board of rank {self.rank} cannot be read; its memory was overwritten")

    # -- step reports ---------------------------------------------------------------------------------------------

    def append(self, report: StepReport) -> None:
        """Worker. One more finished step."""
        with self._lock:
            self._reports.append(*_report_values(report))

    def reports(self, since_seq: int) -> tuple[list[StepReport], int]:
        """Reports from number ``since_seq`` on that are still there, and the number to ask for next time."""
        records, next_seq = self._reports.since(since_seq)
        return [StepReport(*record) for record in records], next_seq

    def carry_over(self, old: Board) -> None:
        """Worker. Continue ``old`` here: its last sign of life and, unless there are reports already, its reports under
        their old numbers."""
        self.carry_reports(old)
        with self._lock:
            self._write(replace(old.read(), beat_s=max(old.read().beat_s, self.read().beat_s)))

    def carry_reports(self, old: Board) -> None:
        """Before anybody reports here: those of ``old`` under their old numbers, unless there are some already."""
        with self._lock:
            if self._reports.count == 0:
                self._reports.copy_from(old._reports)

    def _write(self, beat: Beat) -> None:
        self._beats.append(*_beat_values(beat))
