"""Which buffer is filled next."""

from __future__ import annotations

import pytest

from holdfast.fault_tolerance.buffer import BufferState, Slot
from holdfast.fault_tolerance.rotation import choose_target, newest_committed, superseded


def _slots(text: str) -> list[Slot]:
    """``"C7 F8 - p:C3 k:C2 ~9"``: COMMITTED, FILLED, FREE, pinned, kept for a checkpoint, FILLING."""
    states = {"C": BufferState.COMMITTED, "F": BufferState.FILLED, "~": BufferState.FILLING, "-": BufferState.FREE}
    slots = []
    for word in text.split():
        marks, _, what = word.rpartition(":")
        version = int(what[1:]) if what[1:] else 0
        slots.append(Slot(states[what[0]], version, 1, 0, 0, 0, "", "p" in marks, "k" in marks))
    return slots


@pytest.mark.parametrize(
    ("slots", "target"),
    [
        ("- - -", 0),
        ("C7 F8 -", 2),
        ("C7 ~9 F8", 1),
        ("C6 C7 F8", 0),
        ("C7 C6 C5", 2),
        ("C7 F8 p:C5", None),
        ("C7 F8 p:-", None),
        ("C7 F8 k:C5", 2),
        ("C7 k:C5 C6", 2),
        ("F7 F8 F9", 0),
        ("C7 F9 F8", 2),
        ("C7 F8 p:F9", 1),
        ("C7", None),
        ("F7", None),
    ],
)
def test_the_buffer_least_needed_is_chosen(slots: str, target: int | None) -> None:
    assert choose_target(_slots(slots)) == target


@pytest.mark.parametrize(
    ("slots", "version", "gone"),
    [
        ("C6 C7 F8", 7, [0]),
        ("F5 C7 F8", 7, [0]),
        ("p:C6 k:C5 C7", 7, []),
        ("~3 C7 -", 7, []),
        ("C7 F8 F9", 7, []),
    ],
)
def test_a_commit_frees_what_is_older_and_not_in_use(slots: str, version: int, gone: list[int]) -> None:
    assert superseded(_slots(slots), version) == gone


@pytest.mark.parametrize(("slots", "version"), [("- F3 ~4", -1), ("C2 C9 F10", 9), ("p:C2 - -", 2)])
def test_the_newest_committed_version_is_found_in_any_order(slots: str, version: int) -> None:
    assert newest_committed(_slots(slots)) == version
