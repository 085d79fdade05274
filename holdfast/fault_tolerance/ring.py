"""A ring of fixed-size records in shared memory: one writing process, any number of readers, no locks between them."""

from __future__ import annotations

import struct
from typing import Any

import xxhash

__all__ = ["Ring"]

_CHECK_BYTES = 8


class Ring:
    """Keeps the newest ``slots`` records. A reader sees a record as it was written or not at all.

    Every record carries its number and a checksum, so neither a writer that overtakes the reader, nor one that was
    killed in the middle of a store, nor the order in which a processor makes stores visible can pass for a record.
    ``count`` is a view of one 64-bit word: the number of records ever written, changed after the record itself.
    Threads of the writing process must take turns. Values are ``Any``: the letters of ``fields`` say what they are.
    """

    def __init__(self, count: memoryview, memory: memoryview, fields: str) -> None:
        self._count, self._memory = count, memory
        self._record = struct.Struct("=q" + fields)
        self._stride = self.slot_bytes(fields)
        self._slots = len(memory) // self._stride

    @staticmethod
    def slot_bytes(fields: str) -> int:
        """Memory that one record of ``fields`` (letters of :mod:`struct`) takes."""
        return struct.calcsize("=q" + fields) + _CHECK_BYTES

    @property
    def count(self) -> int:
        """Number of records ever written, which is the number of the next one."""
        return self._count[0]

    def append(self, *values: object) -> None:
        """Write one record over the oldest."""
        number = self.count
        payload = self._record.pack(number, *values)
        at = number % self._slots * self._stride
        self._memory[at : at + self._stride] = payload + xxhash.xxh3_64_digest(payload)
        self._count[0] = number + 1

    def latest(self) -> tuple[Any, ...] | None:
        """The newest record that can be read, None if there is none."""
        newest = self.count - 1
        readable = (self._get(number) for number in range(newest, max(newest - self._slots, -1), -1))
        return next((record for record in readable if record is not None), None)

    def since(self, number: int) -> tuple[list[tuple[Any, ...]], int]:
        """Records from ``number`` on, as far as they still exist, and the number to ask for next time."""
        end = self.count
        # A number from the future belongs to another life of this memory: start over.
        start = max(number if number <= end else 0, end - self._slots, 0)
        records = (self._get(i) for i in range(start, end))
        return [record for record in records if record is not None], end

    def copy_from(self, other: Ring) -> None:
        """Take over all records and their numbers from a ring of the same shape."""
        self._memory[:] = other._memory
        self._count[0] = other.count

    def _get(self, number: int) -> tuple[Any, ...] | None:
        at = number % self._slots * self._stride
        raw = bytes(self._memory[at : at + self._stride])
        payload, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        if xxhash.xxh3_64_digest(payload) != check:
            return None
        stored, *values = self._record.unpack(payload)
        return tuple(values) if stored == number else None
