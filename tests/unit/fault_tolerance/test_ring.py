"""Records in shared memory: the newest ones, each as it was written or not at all, in every order of events."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest

from holdfast.fault_tolerance.ring import Ring

_FIELDS = "qdq"
_SLOTS = 4


class _Memory:
    """Zeroed memory for a ring, and as many views of it as there are processes."""

    def __init__(self, slots: int = _SLOTS, spare_bytes: int = 0) -> None:
        self.count = memoryview(bytearray(8)).cast("q")
        self.bytes = bytearray(slots * Ring.slot_bytes(_FIELDS) + spare_bytes)

    def ring(self) -> Ring:
        return Ring(self.count, memoryview(self.bytes), _FIELDS)


def _record(number: int) -> tuple[int, float, int]:
    return number * 3, number / 8, -number


def _ring(records: int = 0) -> Ring:
    ring = _Memory().ring()
    for number in range(records):
        ring.append(*_record(number))
    return ring


# -- the newest records -----------------------------------------------------------------------------------------------


def test_an_empty_ring_has_no_record() -> None:
    ring = _ring()
    assert (ring.count, ring.latest(), ring.since(0)) == (0, None, ([], 0))


@pytest.mark.parametrize("written", range(1, 3 * _SLOTS + 1))
@pytest.mark.parametrize("asked", range(3 * _SLOTS + 1))
def test_whoever_asks_gets_every_record_from_there_on_that_still_exists(written: int, asked: int) -> None:
    ring = _ring(written)
    everything = [_record(number) for number in range(written)]
    kept = everything[-_SLOTS:]
    wanted = everything[asked:] if asked <= written else everything
    assert ring.since(asked) == (kept[-len(wanted) :] if wanted else [], written)
    assert ring.latest() == everything[-1]
    assert ring.count == written


def test_asking_with_the_last_answer_gives_each_record_once() -> None:
    memory, seen, asked = _Memory(), list[object](), 0
    writer, reader = memory.ring(), memory.ring()
    for number in range(20):
        writer.append(*_record(number))
        if number % 3 == 0:
            records, asked = reader.since(asked)
            seen += records
    assert seen == [_record(number) for number in range(19)]


def test_a_number_from_the_future_of_another_life_starts_over() -> None:
    assert _ring(2).since(3) == ([_record(0), _record(1)], 2)


def test_memory_that_is_no_multiple_of_a_record_is_used_as_far_as_it_goes() -> None:
    ring = _Memory(spare_bytes=Ring.slot_bytes(_FIELDS) - 1).ring()
    for number in range(9):
        ring.append(*_record(number))
    assert ring.since(0) == ([_record(number) for number in range(5, 9)], 9)


def test_a_record_of_the_wrong_shape_is_refused_and_writes_nothing() -> None:
    ring = _ring(1)
    with pytest.raises(Exception, match="expected 4 items"):
        ring.append(1)
    assert ring.since(0) == ([_record(0)], 1)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [0, 7])
def test_a_record_with_a_flipped_bit_anywhere_is_not_delivered_and_hides_no_other(bit: int) -> None:
    memory = _Memory()
    ring = memory.ring()
    for number in range(6):
        ring.append(*_record(number))
    stride = Ring.slot_bytes(_FIELDS)
    for at in range(len(memory.bytes)):
        memory.bytes[at] ^= 1 << bit
        damaged = next(number for number in range(2, 6) if number % _SLOTS == at // stride)
        assert ring.since(0)[0] == [_record(number) for number in range(2, 6) if number != damaged]
        assert ring.latest() == (_record(4) if damaged == 5 else _record(5))
        memory.bytes[at] ^= 1 << bit


def test_zeroed_memory_is_no_record_although_the_count_says_so() -> None:
    memory = _Memory()
    memory.count[0] = 3
    assert memory.ring().latest() is None
    assert memory.ring().since(0) == ([], 3)


@pytest.mark.parametrize("count", [-1, -(2**62), 2**62])
def test_an_impossible_count_delivers_nothing_and_returns_at_once(count: int) -> None:
    memory = _Memory()
    for number in range(6):
        memory.ring().append(*_record(number))
    memory.count[0] = count
    assert memory.ring().latest() is None
    assert memory.ring().since(0)[0] == []


def test_a_writer_killed_between_any_two_bytes_leaves_whole_records_and_its_successor_continues() -> None:
    stride = Ring.slot_bytes(_FIELDS)
    for cut in range(stride + 1):
        memory = _Memory()
        for number in range(6):
            memory.ring().append(*_record(number))
        before = bytes(memory.bytes)
        memory.ring().append(*_record(6))
        at = 6 % _SLOTS * stride
        memory.bytes[:] = before[:at] + bytes(memory.bytes[at : at + cut]) + before[at + cut :]
        memory.count[0] = 6  # the count is changed last, so it is the old one
        whole = [_record(number) for number in range(2, 6)]
        assert memory.ring().since(0)[0] in (whole, whole[1:])
        assert memory.ring().latest() == _record(5)
        memory.ring().append(*_record(60))
        assert memory.ring().since(6) == ([_record(60)], 7)


def test_stores_that_become_visible_in_the_wrong_order_are_no_record() -> None:
    memory = _Memory()
    memory.ring().append(*_record(0))
    memory.count[0] = 2  # the count before the record
    assert memory.ring().since(0) == ([_record(0)], 2)
    assert memory.ring().latest() == _record(0)


# -- a writer and a reader at the same time ---------------------------------------------------------------------------


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


@pytest.mark.usefixtures("hasty_threads")
def test_a_reader_that_is_overtaken_again_and_again_sees_only_what_was_written_and_in_order() -> None:
    memory, over = _Memory(), threading.Event()

    def write() -> None:
        ring, number = memory.ring(), 0
        while not over.is_set():
            ring.append(*_record(number))
            number += 1

    writing = threading.Thread(target=write)
    writing.start()
    try:
        ring, asked, seen = memory.ring(), 0, list[int]()
        while len(seen) < 300:
            records, asked = ring.since(asked)
            for first, second, third in records:
                assert (first, second) == (-third * 3, -third / 8)
                seen.append(-third)
            latest = ring.latest()
            assert latest is None or latest == _record(-latest[2])
    finally:
        over.set()
        writing.join(10)
    assert seen == sorted(set(seen))
    assert ring.since(0)[0] == [_record(number) for number in range(ring.count - _SLOTS, ring.count)]


# -- succession -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [0, 1, _SLOTS, 11])
def test_a_copy_has_the_records_and_their_numbers(records: int) -> None:
    old, new = _ring(records), _ring(2)
    new.copy_from(old)
    assert new.since(0) == old.since(0)
    new.append(*_record(99))
    assert new.since(records) == ([_record(99)], records + 1)
    assert old.count == records


def test_a_ring_of_another_shape_is_not_copied() -> None:
    with pytest.raises(ValueError, match="different structures"):
        _ring().copy_from(_Memory(slots=_SLOTS + 1).ring())


def test_any_history_reads_like_a_list() -> None:
    dice, memory = random.Random(7), _Memory()
    ring, history = memory.ring(), list[tuple[int, float, int]]()
    for _ in range(500):
        if dice.random() < 0.6:
            history.append(_record(dice.randrange(10**9)))
            ring.append(*history[-1])
        asked = dice.randrange(len(history) + 1)
        assert ring.since(asked) == (history[max(asked, len(history) - _SLOTS) :], len(history))
