"""The order of samples: a pure function of the seed and a sample's number, so that no position is ever stored.

Each pass over the windows is a permutation of its own. Any sample is found without those before it, and neither the
number of ranks nor that of the samples seen so far changes it.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

from holdfast.errors import ConfigurationError

__all__ = ["window_of"]

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8


def window_of(seed: int, index: int, n_windows: int) -> int:
    """The window that sample ``index`` of the run shows, in [0, n_windows).

    Samples k n .. (k + 1) n - 1, with n = ``n_windows``, show every window once; each k in another order.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002): generalised Feistel network on
    a rectangle of a x b >= n cells, walking the cycle until the cell is below n.
    """
    if n_windows < 1 or index < 0:
        raise ConfigurationError(f"sample {index} of {n_windows} windows does not exist; add text")
    number, cell = divmod(index, n_windows)
    keys = _round_keys(seed, number)
    rows = isqrt(n_windows - 1) + 1
    columns = -(-n_windows // rows)
    cell = _permuted(cell, keys, rows, columns)
    while cell >= n_windows:  # fewer than a + 1 cells are too many, so this is rare
        cell = _permuted(cell, keys, rows, columns)
    return cell


def _permuted(cell: int, keys: tuple[int, ...], rows: int, columns: int) -> int:
    """A keyed permutation of [0, rows * columns)."""
    right, left = divmod(cell, rows)
    for number, key in enumerate(keys):
        left, right = right, (left + _mixed(key + right)) % (columns if number % 2 else rows)
    return right * rows + left


@lru_cache(maxsize=64)
def _round_keys(seed: int, number: int) -> tuple[int, ...]:
    """Keys of pass ``number``."""
    base = _mixed(_mixed(seed) + number)
    return tuple(_mixed(base + i * _GOLDEN) for i in range(1, _ROUNDS + 1))


def _mixed(word: int) -> int:
    """64 bits that depend on all bits of ``word``. Source: Steele, Lea and Flood, OOPSLA 2014 (SplitMix64)."""
    word = (word + _GOLDEN) & _WORD
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _WORD
    return word ^ word >> 31
