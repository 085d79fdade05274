"""One buffer of an arena: bytes, and in the board the words that say what they are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from holdfast.errors import SnapshotError

__all__ = ["Buffer", "BufferState", "Slot"]

Bytes = npt.NDArray[np.uint8]


class BufferState(IntEnum):
    """FREE -> FILLING -> FILLED (-> ENCODED) -> COMMITTED -> FREE; any error leads to FREE."""

    FREE = 0
    FILLING = 1
    """Bytes are changing; found without its writer, it is garbage."""
    FILLED = 2
    """Complete on this rank."""
    ENCODED = 3
    """Complete, and this node's parity of the version is, too."""
    COMMITTED = 4
    """Complete on all ranks."""


class _Word(IntEnum):
    STATE = 0
    PINS = 1
    KEPT = 2
    VERSION = 3
    EPOCH = 4
    DATA_BYTES = 5
    MANIFEST_AT = 6
    MANIFEST_BYTES = 7


_DIGEST_AT, _DIGEST_BYTES = 64, 16


@dataclass(frozen=True, slots=True)
class Slot:
    """What a buffer holds, as one reading of its words."""

    state: BufferState
    version: int
    epoch: int
    """Membership epoch that wrote the version."""
    data_bytes: int
    manifest_at: int
    manifest_bytes: int
    manifest_digest: str
    is_pinned: bool
    """The keeper is reading it."""
    is_kept: bool
    """The worker wants it to become a durable checkpoint."""

    @property
    def is_complete(self) -> bool:
        return self.state >= BufferState.FILLED

    @property
    def identity(self) -> tuple[int, int, str]:
        """The same as long as the bytes are the same."""
        return self.version, self.epoch, self.manifest_digest


class Buffer:
    """Shapes: ``data`` uint8 [capacity], shared with every process that has the arena mapped.

    The state is written last and a buffer is FILLING before its first byte changes, so a process that dies
    in between leaves nothing that looks complete. Pins belong to the keeper; everything else to the worker while its
    epoch runs, and to the keeper between epochs.
    """

    def __init__(self, data: Bytes, descriptor: memoryview) -> None:
        self.data, self._descriptor, self._words = data, descriptor, descriptor.cast("q")

    def describe(self) -> Slot:
        words = self._words
        return Slot(
            state=_state(words[_Word.STATE]),
            version=words[_Word.VERSION],
            epoch=words[_Word.EPOCH],
            data_bytes=words[_Word.DATA_BYTES],
            manifest_at=words[_Word.MANIFEST_AT],
            manifest_bytes=words[_Word.MANIFEST_BYTES],
            manifest_digest=bytes(self._descriptor[_DIGEST_AT : _DIGEST_AT + _DIGEST_BYTES]).hex(),
            is_pinned=words[_Word.PINS] > 0,
            is_kept=words[_Word.KEPT] > 0,
        )

    def claim(self, version: int, epoch: int) -> bool:
        """Start to fill it. False, and nothing has changed, if the keeper has pinned it in the meantime."""
        words = self._words
        before = words[_Word.STATE]
        words[_Word.STATE] = BufferState.FILLING
        # The keeper pins first and looks at the state then; looking in the opposite order here leaves no gap.
        if words[_Word.PINS] > 0:
            words[_Word.STATE] = before
            return False
        words[_Word.KEPT], words[_Word.VERSION], words[_Word.EPOCH] = 0, version, epoch
        return True

    def publish(self, manifest: bytes, digest: str, *, data_bytes: int, state: BufferState) -> None:
        """Put the manifest behind the data and declare the version complete. Raises: SnapshotError if it is too
        long for the buffer."""
        at, words = data_bytes, self._words
        if at + len(manifest) > len(self.data):
            raise SnapshotError(
                f"{data_bytes:,} bytes of data and {len(manifest):,} of manifest do not fit a buffer of "
                f"{len(self.data):,}; the scalars must have grown since it was reserved: keep large state in slices"
            )
        self.data[at : at + len(manifest)] = np.frombuffer(manifest, dtype=np.uint8)
        words[_Word.DATA_BYTES], words[_Word.MANIFEST_AT], words[_Word.MANIFEST_BYTES] = data_bytes, at, len(manifest)
        self._descriptor[_DIGEST_AT : _DIGEST_AT + _DIGEST_BYTES] = bytes.fromhex(digest)
        words[_Word.STATE] = state

    def encode(self, is_encoded: bool = True) -> None:
        """Keeper. This node's part of the version's parity is complete, or void again; nothing else changes."""
        before, after = BufferState.FILLED, BufferState.ENCODED
        before, after = (before, after) if is_encoded else (after, before)
        if self._words[_Word.STATE] == before:
            self._words[_Word.STATE] = after

    def stamp(self, epoch: int) -> None:
        """Who wrote it is known only now."""
        self._words[_Word.EPOCH] = epoch

    def commit(self) -> None:
        """All ranks hold it."""
        self._words[_Word.STATE] = BufferState.COMMITTED

    def keep(self, wanted: bool = True) -> None:
        """Mark it as wanted for a durable checkpoint, or not any more."""
        self._words[_Word.KEPT] = int(wanted)

    def release(self) -> None:
        """Nothing in it counts any more."""
        self._words[_Word.STATE] = BufferState.FREE

    def pin(self, change: int) -> None:
        """Keeper, one thread at a time. Count the readers who need the bytes to stay: +1 or -1."""
        self._words[_Word.PINS] += change

    def manifest(self, slot: Slot) -> bytes:
        """The stored manifest as bytes; shorter than it says if the descriptor is damaged."""
        return self.data[max(slot.manifest_at, 0) :][: max(slot.manifest_bytes, 0)].tobytes()


def _state(word: int) -> BufferState:
    # A damaged word must not turn into an exception in the keeper: what cannot be read is not offered.
    return BufferState(word) if word in _KNOWN else BufferState.FREE


_KNOWN = frozenset(BufferState)
