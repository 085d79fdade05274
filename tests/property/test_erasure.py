"""Whatever a group loses, up to its parity, comes back to the byte; checked against arithmetic on Python's integers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import InsufficientShards, InvariantViolation
from holdfast.fault_tolerance.erasure import decode, parity, parity_of_blocks
from holdfast.fault_tolerance.stripes import StripeLayout

Bytes = npt.NDArray[np.uint8]

# The reference: GF(256) modulo x^8 + x^4 + x^3 + x^2 + 1, Vandermonde rows at 0, 1, 2, 4, ..., made systematic.


def _times(a: int, b: int) -> int:
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a, b = a << 1 ^ (0x11D if a & 0x80 else 0), b >> 1
    return product


_TABLES = [bytes(_times(factor, byte) for byte in range(256)) for factor in range(256)]
"""Products with a factor, for ``bytes.translate``."""


def _sum_of(vectors: Sequence[bytes], size: int) -> bytes:
    total = functools.reduce(lambda sum_, vector: sum_ ^ int.from_bytes(vector, "big"), vectors, 0)
    return total.to_bytes(size, "big")


def _combine(factors: Sequence[int], vectors: Sequence[bytes], size: int) -> bytes:
    return _sum_of([v.translate(_TABLES[f]) for f, v in zip(factors, vectors, strict=True)], size)


def _point(row: int) -> int:
    return 0 if row == 0 else functools.reduce(_times, [2] * (row - 1), 1)


@functools.cache
def _coefficients(k: int, row: int) -> list[int]:
    """Of a share, by Lagrange: shares are one polynomial's values, and data those at its first points."""
    points = [_point(number) for number in range(k)]
    factors = []
    for number in range(k):
        others = [point for point in points if point != points[number]]
        above = functools.reduce(_times, [_point(row) ^ other for other in others], 1)
        below = functools.reduce(_times, [points[number] ^ other for other in others], 1)
        factors.append(_times(above, _TABLES[below].index(1)))
    return factors


def _reference(blocks: Sequence[bytes], index: int, m: int, size: int) -> bytes:
    if m == 1:
        return _sum_of(blocks, size)
    return _combine(_coefficients(len(blocks), len(blocks) + index), blocks, size)


codes = st.integers(1, 9).flatmap(lambda n: st.integers(1, n).map(lambda k: (k, n - k)))
sizes = st.one_of(st.integers(0, 3), st.integers(0, 300))
lengths = st.lists(st.one_of(st.integers(0, 1), st.integers(0, 700), st.just(2003)), min_size=1, max_size=9)


def _random(seed: int, *sizes: int) -> list[Bytes]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]


@given(codes, sizes, st.integers(0, 2**32))
def test_parity_is_what_the_definition_says(code: tuple[int, int], size: int, seed: int) -> None:
    k, m = code
    blocks = _random(seed, *[size] * k)
    given_out = np.full(size, 7, dtype=np.uint8)
    for index in range(m):
        want = _reference([block.tobytes() for block in blocks], index, m, size)
        assert parity(blocks, index, m).tobytes() == want
        assert parity(blocks, index, m, given_out) is given_out and given_out.tobytes() == want


@given(codes, sizes, st.integers(0, 2**32), st.data())
def test_any_k_shares_restore_the_exact_data(code: tuple[int, int], size: int, seed: int, draw: st.DataObject) -> None:
    k, m = code
    blocks = _random(seed, *[size] * k)
    shares = dict(enumerate([*blocks, *(parity(blocks, index, m) for index in range(m))]))
    left = draw.draw(st.permutations(range(k + m)))[: draw.draw(st.integers(k, k + m))]
    missing = [number for number in draw.draw(st.permutations(range(k))) if number not in left]
    decoded = decode({number: shares[number] for number in left}, missing, k, m)
    assert [block.tobytes() for block in decoded] == [blocks[number].tobytes() for number in missing]


@given(codes, st.data())
def test_fewer_than_k_shares_are_refused(code: tuple[int, int], draw: st.DataObject) -> None:
    k, m = code
    left = draw.draw(st.permutations(range(k + m)))[: k - 1]
    missing = [number for number in range(k) if number not in left]
    with pytest.raises(InsufficientShards) as error:
        decode({number: np.zeros(3, dtype=np.uint8) for number in left}, missing, k, m)
    assert error.value.missing == tuple(missing)


# A whole group, as keepers would hold it: through the layout, chunk by chunk.


class _Group:
    def __init__(self, layout: StripeLayout, data: Sequence[Bytes], chunk_bytes: int) -> None:
        self.layout, self.data, self.chunk_bytes = layout, list(data), chunk_bytes
        self.parity = [np.full(layout.parity_bytes, 7, dtype=np.uint8) for _ in data]

    def chunks(self) -> Iterator[range]:
        return self.layout.chunks(self.chunk_bytes)

    def memory(self, stripe: int, share: int, chunk: range) -> Bytes:
        """A view of what is really held of a share."""
        held = self.data if share < self.layout.data else self.parity
        where = self.layout.byte_range(stripe, share, chunk)
        return held[self.layout.member_of(stripe, share)][where.start : where.stop]

    def read(self, stripe: int, share: int, chunk: range) -> Bytes:
        held = self.memory(stripe, share, chunk)
        return np.pad(held, (0, len(chunk) - len(held)))

    def encode(self, stripe: int, index: int) -> None:
        for chunk in self.chunks():
            blocks = [self.read(stripe, share, chunk) for share in range(self.layout.data)]
            parity(blocks, index, self.layout.parity, self.memory(stripe, self.layout.data + index, chunk))

    def lose(self, member: int) -> None:
        for memory in (self.data[member], self.parity[member]):
            memory[:] = 0xAA

    def repair(self, lost: Sequence[int]) -> None:
        plan = self.layout.repair(lost)
        for part in plan.stripes:
            for chunk in self.chunks():
                shares = {share: self.read(part.stripe, share, chunk) for share in part.sources}
                decoded = decode(shares, part.missing, self.layout.data, self.layout.parity)
                for share, block in zip(part.missing, decoded, strict=True):
                    memory = self.memory(part.stripe, share, chunk)
                    memory[:] = block[: len(memory)]
        for made in plan.parity:
            self.encode(made.stripe, made.index)


@settings(max_examples=60)
@given(lengths, st.integers(100, 700), st.integers(0, 2**32), st.data())
def test_a_group_survives_any_losses_up_to_its_parity(
    lengths: list[int], chunk_bytes: int, seed: int, draw: st.DataObject
) -> None:
    m = draw.draw(st.integers(0, len(lengths) - 1))
    lost = draw.draw(st.permutations(range(len(lengths))))[: draw.draw(st.integers(0, m))]
    layout = StripeLayout(lengths, m)
    group = _Group(layout, _random(seed, *lengths), chunk_bytes)
    for member in range(layout.members):
        for block in layout.parity_blocks(member):
            group.encode(block.stripe, block.index)
    data, held = [d.tobytes() for d in group.data], [p.tobytes() for p in group.parity]
    assert held == list(_reference_parity(layout, data))
    for member in lost:
        group.lose(member)
    group.repair(lost)
    assert [d.tobytes() for d in group.data] == data
    assert [p.tobytes() for p in group.parity] == held


def _reference_parity(layout: StripeLayout, data: Sequence[bytes]) -> Iterator[bytes]:
    """Every member's parity buffer, from whole blocks and the sentence that defines the layout."""
    n, m, size = layout.members, layout.parity, layout.block_bytes
    cut = [[d.ljust(size * (n - m), b"\0")[s * size : (s + 1) * size] for s in range(n - m)] for d in data]
    for member in range(n):
        buffer = b""
        for index in range(m):
            stripe = (member - index) % n
            blocks = [cut[(stripe + m + s) % n][s] for s in range(n - m)]
            buffer += _reference(blocks, index, m, size)
        yield buffer


# Long blocks over threads.


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


@pytest.mark.parametrize(("k", "m"), [(3, 1), (4, 2), (1, 2), (2, 0)])
@pytest.mark.parametrize("size", [0, 1, 5003])
@pytest.mark.parametrize(("threads", "chunk_bytes"), [(1, 512), (2, 1000), (7, 64), (2, 1 << 20)])
def test_long_blocks_in_chunks_give_what_whole_blocks_give(
    k: int, m: int, size: int, threads: int, chunk_bytes: int, pool: ThreadPoolExecutor
) -> None:
    blocks = _random(5, *[size] * k)
    outs = [np.full(size, 7, dtype=np.uint8) for _ in range(m)]
    for index, out in enumerate(outs):
        parity_of_blocks(blocks, index, m, out, pool, threads=threads, chunk_bytes=chunk_bytes)
        assert out.tobytes() == parity(blocks, index, m).tobytes()
    missing = list(range(min(k, m)))
    shares = {number: share for number, share in enumerate([*blocks, *outs]) if number not in missing}
    restored = decode(shares, missing, k, m)
    assert [block.tobytes() for block in restored] == [blocks[number].tobytes() for number in missing]


class _Counting(ThreadPoolExecutor):
    """Counts the tasks it is given, each of which takes one thread at a time."""

    tasks = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.tasks += 1
        return super().submit(fn, *args, **kwargs)


@pytest.mark.parametrize(("threads", "size", "used"), [(1, 1000, 1), (3, 1000, 3), (3, 150, 2), (3, 0, 1)])
def test_no_more_threads_are_taken_than_allowed(threads: int, size: int, used: int) -> None:
    with _Counting(4) as pool:
        blocks = _random(6, size, size)
        parity_of_blocks(blocks, 0, 1, np.empty(size, dtype=np.uint8), pool, threads=threads, chunk_bytes=100)
        assert pool.tasks == used


def test_an_error_in_a_thread_reaches_the_caller(pool: ThreadPoolExecutor) -> None:
    blocks = _random(7, 1000, 1000)
    read_only = np.zeros(1000, dtype=np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        parity_of_blocks(blocks, 0, 1, read_only, pool, threads=2, chunk_bytes=100)


@pytest.mark.parametrize("number", ["threads", "chunk_bytes"])
def test_no_threads_or_no_chunks_are_refused(number: str, pool: ThreadPoolExecutor) -> None:
    block = np.zeros(4, dtype=np.uint8)
    with pytest.raises(InvariantViolation, match=f"{number}=0"):
        parity_of_blocks([block], 0, 1, block.copy(), pool, **{"threads": 1, "chunk_bytes": 1, number: 0})


# What cannot be meant.

_FOUR = np.zeros(4, dtype=np.uint8)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("wrong", [np.zeros(5, np.uint8), np.zeros(4, np.int8), np.zeros(8, np.uint8)[::2]])
def test_blocks_that_do_not_match_are_refused(m: int, wrong: Bytes) -> None:
    good = [_FOUR, _FOUR]
    calls: list[Callable[[], object]] = [
        lambda: parity([_FOUR, wrong], 0, m),
        lambda: parity(good, 0, m, wrong),
        lambda: decode({1: _FOUR, 2: wrong}, [0], 2, m),
        lambda: decode({1: _FOUR, 2: _FOUR}, [0], 2, m, [wrong]),
    ]
    for call in calls:
        with pytest.raises(InvariantViolation):
            call()


@pytest.mark.parametrize(("blocks", "index", "m"), [([], 0, 1), ([_FOUR], 1, 1), ([_FOUR], -1, 1), ([_FOUR], 0, 0)])
def test_parity_that_does_not_exist_is_refused(blocks: list[Bytes], index: int, m: int) -> None:
    with pytest.raises(InvariantViolation, match="does not exist"):
        parity(blocks, index, m)


@pytest.mark.parametrize(
    ("shares", "missing"), [([0, 1], [0]), ([1, 4], [0]), ([1, 2], [2]), ([1, -1], [0]), ([2, 3], [0, 0])]
)
def test_shares_that_make_no_sense_are_refused(shares: list[int], missing: list[int]) -> None:
    with pytest.raises(InvariantViolation, match="cannot be decoded"):
        decode(dict.fromkeys(shares, _FOUR), missing, 2, 2)


def test_room_for_another_number_of_blocks_is_refused() -> None:
    with pytest.raises(InvariantViolation, match="room for 2"):
        decode({1: _FOUR, 2: _FOUR}, [0], 2, 2, [_FOUR.copy(), _FOUR.copy()])


def test_the_reference_multiplies_in_a_field() -> None:
    """Every row of products is a permutation, and the order of multiplication does not matter."""
    assert all(sorted(_TABLES[factor]) == list(range(256)) for factor in range(1, 256))
    assert all(_times(a, b) == _times(b, a) for a, b in itertools.combinations(range(0, 256, 17), 2))
