"""Which buffer may receive the next version. Pure: readings of the buffers go in, an index comes out.

Never the newest COMMITTED version, because it is what everybody can go back to; never the newest complete one,
because it is about to become that; never one that the keeper is reading.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.fault_tolerance.buffer import BufferState, Slot

__all__ = ["choose_target", "newest_committed", "superseded"]


def newest_committed(slots: Sequence[Slot]) -> int:
    """The newest version that all ranks hold; -1 if there is none."""
    return max((slot.version for slot in slots if slot.state is BufferState.COMMITTED), default=-1)


def choose_target(slots: Sequence[Slot]) -> int | None:
    """Index of the buffer to fill next; None if every buffer is still needed.

    First what holds nothing (a FILLING buffer was left behind by a writer that is gone), then the oldest complete
    version that a newer one replaces, and only then one that waits for its durable checkpoint.
    """
    open_to_all = [i for i, slot in enumerate(slots) if not slot.is_pinned]
    empty = [i for i in open_to_all if not slots[i].is_complete]
    if empty:
        return empty[0]
    replaced = [i for i in open_to_all if _is_replaced(slots[i], slots)]
    return min(replaced, key=lambda i: (slots[i].is_kept, slots[i].version, slots[i].epoch), default=None)


def superseded(slots: Sequence[Slot], version: int) -> list[int]:
    """Indices of what nobody needs once all ranks hold ``version``: the older ones, unless somebody reads or waits."""
    return [
        i
        for i, slot in enumerate(slots)
        if slot.is_complete and slot.version < version and not slot.is_pinned and not slot.is_kept
    ]


def _is_replaced(slot: Slot, slots: Sequence[Slot]) -> bool:
    """Older than the newest COMMITTED version; or not committed, although a newer one is complete already: then
    some rank lacks it, and it never will be."""
    if slot.version < newest_committed(slots):
        return True
    newest = max(other.version for other in slots if other.is_complete)
    return slot.state is not BufferState.COMMITTED and slot.version < newest
