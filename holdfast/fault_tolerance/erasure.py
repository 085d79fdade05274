"""Parity blocks and what they restore: XOR for one parity block, Reed–Solomon for more. The only door to zfec.

``k`` data blocks, shares ``0 .. k-1``, have ``m`` parity blocks, shares ``k .. k+m-1``; any ``k`` shares restore all
data, to the byte. Blocks are contiguous uint8 arrays ``[n_bytes]`` of one length, which may be 0 or odd. All functions
release the GIL while they compute and may run in several threads at once.

:func:`parity` and :func:`decode` work best on chunks that fit a core's L2 cache: the result is written once per block,
and only the blocks themselves should come from memory. :func:`parity_of_blocks` cuts long blocks into such chunks and
shares them out over threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, wait
from typing import Any

import numpy as np
import numpy.typing as npt
import zfec

from holdfast.errors import InsufficientShards, InvariantViolation

__all__ = ["CHUNK_BYTES", "decode", "parity", "parity_of_blocks"]

Bytes = npt.NDArray[np.uint8]

CHUNK_BYTES = 512 << 10
"""Half an L2 cache of 1 MiB. Measured with XOR of 3 to 8 blocks: chunks of 64 KiB are read at three quarters of this
size's rate and of 16 KiB at half of it, as the calls cost as much as the work; chunks larger than the cache get slower
again. zfec is as fast with any size from 64 KiB on."""


def parity(blocks: Sequence[Bytes], index: int, m: int, out: Bytes | None = None) -> Bytes:
    """Parity block ``index`` of ``m`` of these data blocks, into ``out`` where given (not one of the blocks)."""
    if not blocks or not 0 <= index < m:
        raise InvariantViolation(f"parity block {index} of {m} over {len(blocks)} data blocks does not exist")
    size = _common_size(blocks if out is None else [*blocks, out])
    out = np.empty(size, dtype=np.uint8) if out is None else out
    if _is_xor(len(blocks), m):
        _xor(blocks, out)
    elif size:
        k = len(blocks)
        (made,) = _encoder(k, m).encode(tuple(blocks), (k + index,))
        np.copyto(out, np.frombuffer(made, dtype=np.uint8))
    return out


def decode(
    shares: Mapping[int, Bytes], missing: Sequence[int], k: int, m: int, out: Sequence[Bytes] | None = None
) -> list[Bytes]:
    """Data blocks ``missing``, in this order, from any ``k`` other shares by their numbers, into ``out`` where given.

    Uses data shares before parity shares. Raises: InsufficientShards for fewer than ``k`` shares.
    """
    _check_shares(shares, missing, k, m)
    size = _common_size([*shares.values(), *(out or ())])
    out = [np.empty(size, dtype=np.uint8) for _ in missing] if out is None else list(out)
    if len(out) != len(missing):
        raise InvariantViolation(f"{len(missing)} blocks are missing, and there is room for {len(out)}")
    used = sorted(shares)[:k]
    if missing and _is_xor(k, m):
        _xor([shares[number] for number in used], out[0])
    elif missing and size:
        decoded = _decoded(shares, used, k, m)
        for number, block in zip(missing, out, strict=True):
            np.copyto(block, np.frombuffer(decoded[number], dtype=np.uint8))
    return out


def parity_of_blocks(
    blocks: Sequence[Bytes],
    index: int,
    m: int,
    out: Bytes,
    pool: Executor,
    *,
    threads: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """:func:`parity` of long blocks into ``out``, at most ``threads`` chunks at a time in threads of ``pool``.

    Blocks until all is done; must not be called from a thread of the same pool.
    """
    size = _common_size([*blocks, out])

    def work(part: slice) -> None:
        parity([block[part] for block in blocks], index, m, out[part])

    _in_chunks(work, size, pool, threads, chunk_bytes)


def _in_chunks(work: Callable[[slice], None], size: int, pool: Executor, threads: int, chunk_bytes: int) -> None:
    if threads < 1 or chunk_bytes < 1:
        raise InvariantViolation(f"threads={threads} and chunk_bytes={chunk_bytes} must be at least 1")
    parts = [slice(start, min(start + chunk_bytes, size)) for start in range(0, max(size, 1), chunk_bytes)]

    def lane(mine: Iterable[slice]) -> None:
        for part in mine:
            work(part)

    lanes = [pool.submit(lane, parts[first::threads]) for first in range(min(threads, len(parts)))]
    wait(lanes)  # nothing writes into the caller's memory any more when an error leaves here
    for done in lanes:
        done.result()


def _is_xor(k: int, m: int) -> bool:
    """A single parity block is the XOR; and parity of a single data block is a copy, its XOR with nothing."""
    return m == 1 or k == 1


def _xor(blocks: Sequence[Bytes], out: Bytes) -> None:
    if len(blocks) == 1:
        np.copyto(out, blocks[0])
        return
    np.bitwise_xor(blocks[0], blocks[1], out=out)
    for block in blocks[2:]:
        np.bitwise_xor(out, block, out=out)


# Any: zfec has no types.
@functools.lru_cache(maxsize=64)
def _encoder(k: int, m: int) -> Any:
    return zfec.Encoder(k, k + m)


@functools.lru_cache(maxsize=64)
def _decoder(k: int, m: int) -> Any:
    return zfec.Decoder(k, k + m)


def _decoded(shares: Mapping[int, Bytes], used: Sequence[int], k: int, m: int) -> Sequence[Any]:
    """All data blocks. Every data share goes to its own place, as zfec would otherwise reorder our tuple in place."""
    spare = (number for number in used if number >= k)
    numbers = tuple(place if place in shares else next(spare) for place in range(k))
    decoded: Sequence[Any] = _decoder(k, m).decode(tuple(shares[number] for number in numbers), numbers)
    return decoded


def _common_size(blocks: Iterable[Bytes]) -> int:
    sizes = set[int]()
    for block in blocks:
        if block.dtype != np.uint8 or block.ndim != 1 or not block.flags.c_contiguous:
            raise InvariantViolation(f"a block must be contiguous uint8 [n_bytes], not {block.dtype} {block.shape}")
        sizes.add(block.size)
    if len(sizes) > 1:
        raise InvariantViolation(f"blocks of one stripe must be equally long, not {sorted(sizes)} bytes")
    return sizes.pop() if sizes else 0


def _check_shares(shares: Mapping[int, Bytes], missing: Sequence[int], k: int, m: int) -> None:
    wrong = [number for number in shares if not 0 <= number < k + m]
    wrong += [number for number in missing if not 0 <= number < k or number in shares]
    if wrong or len(set(missing)) < len(missing):
        raise InvariantViolation(
            f"{list(missing)} cannot be decoded from shares {sorted(shares)}: data shares are 0..{k - 1}, parity "
            f"shares up to {k + m - 1}, and what is missing is named once and is not there"
        )
    if len(shares) < k:
        raise InsufficientShards(missing, f"shares {sorted(shares)} are there, and {k} are needed to decode the rest")
