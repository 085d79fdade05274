"""Copying rows of live memory into a buffer, with a digest of each as it was staged, while other threads go on.

Interface::

    table = StagingTable(sources, offsets, lengths)  # once; the memory at `sources` has to stay where it is
    control = Control()                              # of one capture; any thread may use it meanwhile
    fence = Fence(word, limit)                       # 8 bytes of the board: the call ends when they exceed `limit`
    digests = stage(table, buffer.data, control=control, fence=fence, max_bytes_per_s=2e9, low_priority=True)
    ...                                              # 16 bytes per row, in order; None when it was stopped

    control.stop()                                   # ends the call before its next chunk
    control.hurry()                                  # lifts max_bytes_per_s from now on: somebody waits for the end
    control.done_bytes                               # how far it is

The work is done by C++ (``kernels/``, by ctypes), which needs no GIL from the first byte to the last. Where the library
has not been built, NumPy and xxhash do it chunk by chunk with the same results. Needs no torch.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import xxhash

from holdfast.errors import InvariantViolation
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.build_kernels import NATIVE
from holdfast.native_build import IsaChoice

__all__ = ["CHUNK_BYTES", "Control", "Fence", "StagingTable", "isas", "stage", "using"]

_log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
"""Copied between two looks at the fence."""

_DIGEST_BYTES = 16
_NICE = 10
_BURST_S = 0.01
"""What a paced call may catch up with after it was kept from the processor."""
_NAP_S = 0.001
"""Between two looks at the fence while a paced call waits."""


class StagingTable:
    """Where rows of bytes lie and where they go in a target. Knows addresses only; it keeps no memory alive."""

    def __init__(self, sources: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> None:
        """Row ``i`` is the ``lengths[i]`` bytes at address ``sources[i]``; it goes to byte ``offsets[i]`` of a target.

        Raises: InvariantViolation when the sequences differ in length or hold something negative.
        """
        if not len(sources) == len(offsets) == len(lengths):
            raise InvariantViolation(
                f"a staging table of {len(sources)} sources, {len(offsets)} offsets and {len(lengths)} lengths"
            )
        self._numbers = array("q", bytes(24 * len(sources)))
        for column, values in enumerate((sources, offsets, lengths)):
            self._numbers[column::3] = array("q", values)
        if self._numbers and min(self._numbers) < 0:
            raise InvariantViolation("a staging table has a negative address, offset or length")
        self.total_bytes = sum(lengths)
        self.end_bytes = max((offset + length for _, offset, length in self), default=0)
        """What a target has to have at least."""

    @property
    def address(self) -> int:
        """Of the rows, as ``Row`` of ``kernels/abi.h``."""
        return self._numbers.buffer_info()[0]

    def __len__(self) -> int:
        return len(self._numbers) // 3

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Source address, target offset and length of each row."""
        numbers = iter(self._numbers)
        return zip(numbers, numbers, numbers, strict=True)


class Control:
    """How other threads steer and watch a call of :func:`stage`, or several in a row that belong together."""

    def __init__(self) -> None:
        self.words = np.zeros(3, dtype=np.int64)
        """Stop, hurry, bytes done. The first two are 0 or 1."""

    def stop(self) -> None:
        """End the call before its next chunk; one that has not begun yet ends at once."""
        self.words[0] = 1

    def hurry(self) -> None:
        """Do the rest without a bound on the rate."""
        self.words[1] = 1

    @property
    def is_stopped(self) -> bool:
        return bool(self.words[0])

    @property
    def is_hurried(self) -> bool:
        return bool(self.words[1])

    @property
    def done_bytes(self) -> int:
        """Bytes that are through, of all calls. Nobody may rely on them before the call has returned."""
        return int(self.words[2])


class Fence:
    """Stops a call when a word that another process writes has become larger than ``limit``."""

    def __init__(self, word: memoryview | npt.NDArray[np.int64], limit: int) -> None:
        """``word``: 8 aligned bytes in memory, a signed number in native byte order. They are kept mapped."""
        self.word = np.frombuffer(word, dtype=np.int64)
        self.limit = limit
        if self.word.size != 1 or not self.word.flags.aligned:
            raise InvariantViolation(f"a fence is one aligned word of 8 bytes, not {self.word.nbytes} bytes")

    @property
    def is_closed(self) -> bool:
        return int(self.word[0]) > self.limit


def stage(
    table: StagingTable,
    target: Bytes,
    *,
    control: Control | None = None,
    fence: Fence | None = None,
    max_bytes_per_s: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
    low_priority: bool = False,
) -> list[bytes] | None:
    """Copy every row of the table into ``target``, uint8 [at least ``table.end_bytes``], in the order of the table.

    Returns the xxh3-128 of each row as it is in the target, 16 bytes as of ``xxhash.xxh3_128_digest``. Returns None
    when ``control`` or ``fence`` ended the call; the target then holds a part. Both are looked at before every chunk;
    a stop after the last one comes too late. ``max_bytes_per_s`` 0 is unbounded. ``low_priority`` lets every other
    thread of the machine go first; that stays with the calling thread, which should be there for staging alone.

    Raises: InvariantViolation when the target is too small or not plain writable memory.
    """
    _check_target(table, target)
    if low_priority:
        _lower_priority()
    course = _Course(control or Control(), fence, max_bytes_per_s, max(chunk_bytes, 1))
    isa = _choice.current()
    return _stage_by_numpy(table, target, course) if isa is None else _stage_natively(isa, table, target, course)


def _check_target(table: StagingTable, target: Bytes) -> None:
    if target.dtype != np.uint8 or target.ndim != 1 or not target.flags.c_contiguous or not target.flags.writeable:
        raise InvariantViolation("the target of a staging table has to be flat, writable memory of bytes")
    if target.size < table.end_bytes:
        raise InvariantViolation(f"a target of {target.size:,} bytes cannot take rows that end at {table.end_bytes:,}")


def _lower_priority() -> None:
    """On Linux a thread has a niceness of its own, and its number is a process number to setpriority."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))


class _Course:
    """What a call looks at before each chunk: whether to go on, and when. ``Course`` of ``kernels/`` does the same."""

    def __init__(self, control: Control, fence: Fence | None, max_bytes_per_s: float, chunk_bytes: int) -> None:
        self.control, self.fence, self.max_bytes_per_s, self.chunk_bytes = control, fence, max_bytes_per_s, chunk_bytes
        self._due_s = time.monotonic()

    def admit(self, size: int) -> bool:
        """Wait until the rate allows ``size`` more bytes. False when the call has been stopped."""
        while not (self.control.is_stopped or (self.fence and self.fence.is_closed)):
            if self.max_bytes_per_s <= 0:
                return True
            now_s = time.monotonic()
            if now_s >= self._due_s or self.control.is_hurried:
                self._due_s = max(self._due_s, now_s - _BURST_S) + size / self.max_bytes_per_s
                return True
            time.sleep(min(self._due_s - now_s, _NAP_S))
        return False

    def advance(self, size: int) -> None:
        self.control.words[2] += size


# -- NumPy --------------------------------------------------------------------------------------------------------


def _stage_by_numpy(table: StagingTable, target: Bytes, course: _Course) -> list[bytes] | None:
    digests = []
    for source, offset, length in table:
        staged = xxhash.xxh3_128()
        arrived = target[offset : offset + length]
        for start in range(0, max(length, 1), course.chunk_bytes):
            size = min(course.chunk_bytes, length - start)
            if not course.admit(size):
                return None
            np.copyto(arrived[start : start + size], _memory_at(source + start, size))
            staged.update(arrived[start : start + size].data)
            course.advance(size)
        digests.append(staged.digest())
    return digests


def _memory_at(address: int, size: int) -> Bytes:
    if size == 0:  # no address is valid for it
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(address)), dtype=np.uint8)


# -- C++ ----------------------------------------------------------------------------------------------------------

_ISAS = NATIVE.isas
"""From slow to fast, numbered as in ``dispatch.h``."""


def isas() -> list[str]:
    """Instruction sets that both the library and this processor have, from slow to fast; none without the library."""
    return NATIVE.usable(_loaded())


class _Steering(ctypes.Structure):
    """As in ``kernels/abi.h``."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("fence", ctypes.c_void_p),
        ("fence_limit", ctypes.c_int64),
        ("chunk_bytes", ctypes.c_int64),
        ("max_bytes_per_s", ctypes.c_double),
        ("burst_s", ctypes.c_double),
        ("nap_s", ctypes.c_double),
    )


def _stage_natively(isa: str, table: StagingTable, target: Bytes, course: _Course) -> list[bytes] | None:
    library, fence = _loaded(), course.fence
    if isinstance(library, str):
        raise InvariantViolation(library)
    steering = _Steering(
        course.control.words.ctypes.data,
        fence.word.ctypes.data if fence else None,
        fence.limit if fence else 0,
        course.chunk_bytes,
        course.max_bytes_per_s,
        _BURST_S,
        _NAP_S,
    )
    digests = ctypes.create_string_buffer(_DIGEST_BYTES * len(table))
    is_done = library.holdfast_stage(
        _ISAS.index(isa), table.address, len(table), target.ctypes.data, ctypes.byref(steering), digests
    )
    if is_done < 0:
        raise InvariantViolation(f"the staging library has no instruction set {isa}")
    flat = digests.raw
    return [flat[at : at + _DIGEST_BYTES] for at in range(0, len(flat), _DIGEST_BYTES)] if is_done else None


@cache
def _best() -> str | None:
    """The fastest instruction set that can be used; None without the library."""
    if usable := isas():
        return usable[-1]
    _log.warning(
        "%s: snapshots are copied by NumPy, several times slower, with the same results. "
        "`python -m holdfast.fault_tolerance.build_kernels` builds it, or says why not.",
        _loaded(),
    )
    return None


_choice = IsaChoice(_best)
using = _choice.using
"""``with using(isa)``: calls of any thread use this instruction set, or NumPy for None. For tests and measurements."""


@cache
def _loaded() -> ctypes.CDLL | str:
    """The library, ready for calls, or why it cannot be used."""
    library = NATIVE.load()
    if not isinstance(library, str):
        pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        library.holdfast_stage.argtypes = [int32, pointer, int64, pointer, pointer, pointer]
    return library
