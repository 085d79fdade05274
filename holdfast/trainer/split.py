"""What is held out for validation: a pure function of names and numbers, the same on every machine."""

from __future__ import annotations

import os
from collections.abc import Collection
from enum import Enum

import xxhash

__all__ = ["Division", "Split"]

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio."""


class Split(Enum):
    """The two streams of a token store."""

    TRAIN = "train"
    VALIDATION = "validation"


class Division:
    """Holds out whole files where there are enough of them, rows otherwise.

    Files: enough are ``1 / share``. Those whose name hashes (xxh3-64) below ``share`` are held out, but at least one,
    and not all. Rows (for text: chunks of 4 KiB) are numbered through all files in order, and hashed by
    multiplication with the golden ratio, which spreads evenly: of any ``2 / share`` rows in a row one is held out.
    Source: Knuth, The Art of Computer Programming, volume 3, section 6.4 (Fibonacci hashing).
    """

    def __init__(self, names: Collection[str], share: float) -> None:
        self._threshold = int(share * _WORD)
        self.is_by_file = len(names) > 1 and len(names) * share >= 1
        self._held_out = _held_out(names, self._threshold) if self.is_by_file else frozenset()

    def split_of(self, name: str, row: int) -> Split:
        """Where row ``row`` belongs, counted from zero through all files; it is in file ``name``."""
        held = name in self._held_out if self.is_by_file else (row + 1) * _GOLDEN % _WORD < self._threshold
        return Split.VALIDATION if held else Split.TRAIN


def _held_out(names: Collection[str], threshold: int) -> frozenset[str]:
    ordered = sorted((xxhash.xxh3_64_intdigest(os.fsencode(name)), name) for name in names)
    count = sum(hashed < threshold for hashed, _ in ordered)
    return frozenset(name for _, name in ordered[: min(max(count, 1), len(names) - 1)])
