"""Staging against the xxhash package and plain slices, with every instruction set and with NumPy."""

from __future__ import annotations

import mmap
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import InvariantViolation
from holdfast.fault_tolerance import staging
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.staging import Control, Fence, StagingTable, stage
from holdfast.native_build import SHARED
from holdfast.optim import build_kernels as optim

_EVERY_WAY = pytest.mark.parametrize("isa", [*staging.isas(), None])
_DEADLINE_S = 20.0
_BLOCK = 1024
"""Of XXH3: what a chunk of the C++ engine is a multiple of."""


class Case:
    """Random rows in one source, and a target with room between and around them."""

    def __init__(self, lengths: Sequence[int], *, gap: int = 64, source_at: int = 0, target_at: int = 0) -> None:
        """Source and target begin so many bytes after a multiple of 64."""
        generator = np.random.default_rng(len(lengths))
        sizes = [-(-length // 64) * 64 + gap for length in lengths]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.source = _aligned(sum(sizes) + 64, source_at)
        self.source[:] = generator.integers(0, 256, self.source.size, dtype=np.uint8)
        self.target = _aligned(sum(sizes) + 64, target_at)
        self.target[:] = 7
        self.rows = list(zip(starts, lengths, strict=True))
        self.table = StagingTable([self.source.ctypes.data + start for start in starts], starts, lengths)

    def expected_digests(self, of: Bytes) -> list[bytes]:
        return [xxhash.xxh3_128_digest(of[start : start + length].data) for start, length in self.rows]

    def expected_target(self) -> Bytes:
        expected = np.full_like(self.target, 7)
        for start, length in self.rows:
            expected[start : start + length] = self.source[start : start + length]
        return expected

    def check(self, digests: list[bytes] | None) -> None:
        assert digests == self.expected_digests(self.source)
        np.testing.assert_array_equal(self.target, self.expected_target())


def _aligned(size: int, offset: int) -> Bytes:
    memory = np.zeros(size + 128, dtype=np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + size]


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.001)


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


# -- bytes and digests --------------------------------------------------------------------------------------------


@_EVERY_WAY
@pytest.mark.parametrize(("source_at", "target_at"), [(0, 0), (1, 0), (0, 1), (33, 32)])
def test_every_length_up_to_two_blocks_is_copied_and_hashed_and_nothing_else_is_touched(
    isa: str | None, source_at: int, target_at: int
) -> None:
    case = Case(range(2 * _BLOCK + 1), source_at=source_at, target_at=target_at)
    with staging.using(isa):
        case.check(stage(case.table, case.target))


@_EVERY_WAY
def test_long_rows_of_random_length_are_copied_and_hashed(isa: str | None) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    lengths = [random.Random(seed + i).randrange(10_000_000) for i in range(4)]
    case = Case([*lengths, 10_000_000, 10 << 20], gap=0)
    with staging.using(isa):
        case.check(stage(case.table, case.target))


@_EVERY_WAY
@pytest.mark.parametrize("chunk_bytes", [0, 1, 63, 64, 65, 1023, 1024, 1025, 3000, 4096, 1 << 30])
def test_where_chunks_split_a_row_makes_no_difference(isa: str | None, chunk_bytes: int) -> None:
    near = [blocks * _BLOCK + rest for blocks in range(5) for rest in (-65, -64, -1, 0, 1, 63, 64, 65)]
    case = Case([length for length in near if length >= 0])
    with staging.using(isa):
        case.check(stage(case.table, case.target, chunk_bytes=chunk_bytes))


_LENGTHS = st.one_of(
    st.integers(0, 300), st.integers(0, 20 * _BLOCK), st.integers(0, 20).map(lambda blocks: blocks * _BLOCK)
)


@_EVERY_WAY
@given(
    lengths=st.lists(_LENGTHS, max_size=8),
    gap=st.integers(0, 70),
    source_at=st.integers(0, 63),
    target_at=st.sampled_from([0, 0, 1, 32, 63]),
    chunk_bytes=st.integers(1, 10 * _BLOCK),
)
@settings(max_examples=60)
def test_any_table_is_staged_as_slices_would_be(
    isa: str | None, lengths: list[int], gap: int, source_at: int, target_at: int, chunk_bytes: int
) -> None:
    case, control = Case(lengths, gap=gap, source_at=source_at, target_at=target_at), Control()
    with staging.using(isa):
        case.check(stage(case.table, case.target, control=control, chunk_bytes=chunk_bytes))
    assert control.done_bytes == case.table.total_bytes == sum(lengths)


@_EVERY_WAY
def test_a_table_serves_one_target_after_another(isa: str | None) -> None:
    case, control = Case([5000, 0, 17]), Control()
    with staging.using(isa):
        first = stage(case.table, case.target, control=control)
        case.source += 1
        case.check(stage(case.table, case.target, control=control))
    assert control.done_bytes == 2 * 5017
    assert first is not None and first != case.expected_digests(case.source)


@_EVERY_WAY
@pytest.mark.parametrize("shift", [1, 64, 99])
@pytest.mark.parametrize("length", [100, 1000, 5000, 5 * _BLOCK, 5 * _BLOCK + 1])
def test_a_digest_is_of_the_target_even_when_the_source_changes_meanwhile(
    isa: str | None, length: int, shift: int
) -> None:
    """Here the copy itself changes it: the source is the target, a little further on."""
    target = _aligned(length + shift, 0)
    target[:] = np.random.default_rng(0).integers(0, 256, target.size, dtype=np.uint8)
    before = target.copy()
    with staging.using(isa):
        digests = stage(StagingTable([target.ctypes.data + shift], [0], [length]), target)
    assert digests == [xxhash.xxh3_128_digest(target[:length].data)]
    assert digests != [xxhash.xxh3_128_digest(target[shift:].data)] and (target != before).any()


@_EVERY_WAY
def test_an_empty_table_and_empty_rows_without_an_address_need_no_memory(isa: str | None) -> None:
    nothing = np.empty(0, dtype=np.uint8)
    with staging.using(isa):
        assert stage(StagingTable([], [], []), nothing) == []
        assert stage(StagingTable([0, 0], [0, 0], [0, 0]), nothing) == [xxhash.xxh3_128_digest(b"")] * 2


# -- the course of a call -----------------------------------------------------------------------------------------


def _start_slowly(
    worker: ThreadPoolExecutor, case: Case, control: Control, fence: Fence | None = None
) -> Future[list[bytes] | None]:
    """A call that would take a minute, after its first chunk."""
    started = worker.submit(
        stage, case.table, case.target, control=control, fence=fence, max_bytes_per_s=2e4, chunk_bytes=4096
    )
    _wait_for(lambda: control.done_bytes > 0 or started.done())
    return started


@_EVERY_WAY
def test_stop_ends_a_call_before_its_next_chunk(isa: str | None, worker: ThreadPoolExecutor) -> None:
    """It waits in C++ then: that this thread gets so far shows that the call does not hold the GIL."""
    case, control = Case([1 << 20]), Control()
    with staging.using(isa):
        started = _start_slowly(worker, case, control)
        assert not started.done()
        control.stop()
        assert started.result(_DEADLINE_S) is None
    done = control.done_bytes
    assert 0 < done < 1 << 20 and done % 4096 == 0
    np.testing.assert_array_equal(case.target[:done], case.source[:done])
    assert (case.target[done:] == 7).all()


@_EVERY_WAY
def test_hurry_lifts_the_bound(isa: str | None, worker: ThreadPoolExecutor) -> None:
    case, control = Case([1 << 20, 100]), Control()
    with staging.using(isa):
        started = _start_slowly(worker, case, control)
        control.hurry()
        case.check(started.result(_DEADLINE_S))
    assert control.done_bytes == (1 << 20) + 100


_CLOSE = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memoryview(mmap.mmap(file.fileno(), 0)).cast("q")[6] = 4
"""


@_EVERY_WAY
def test_a_fence_that_another_process_closes_ends_a_call(
    isa: str | None, worker: ThreadPoolExecutor, tmp_path: Path
) -> None:
    page = tmp_path / "board"
    page.write_bytes(bytes(mmap.PAGESIZE))
    with page.open("r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
    words[6] = 3
    case, control, fence = Case([1 << 20]), Control(), Fence(words[6:7], limit=3)
    with staging.using(isa):
        started = _start_slowly(worker, case, control, fence)
        assert not started.done() and not fence.is_closed
        subprocess.run([sys.executable, "-c", _CLOSE, str(page)], check=True, timeout=_DEADLINE_S)
        assert started.result(_DEADLINE_S) is None
    assert fence.is_closed and 0 < control.done_bytes < 1 << 20


@_EVERY_WAY
@pytest.mark.parametrize("lengths", [[5000], [10], [0]], ids=["long", "short", "empty"])
def test_a_call_that_may_not_begin_touches_nothing(isa: str | None, lengths: list[int]) -> None:
    case, stopped = Case(lengths), Control()
    stopped.stop()
    with staging.using(isa):
        assert stage(case.table, case.target, control=stopped) is None
        assert stage(case.table, case.target, fence=Fence(np.array([4]), limit=3)) is None
        assert (case.target == 7).all() and stopped.done_bytes == 0
        case.check(stage(case.table, case.target, fence=Fence(np.array([3]), limit=3)))


@_EVERY_WAY
def test_a_bounded_call_is_never_faster_than_its_bound(isa: str | None) -> None:
    """But for its first chunk, and for what it may catch up with."""
    case, rate, chunk = Case([100_000, *[1000] * 100]), 1e6, 2048
    with staging.using(isa):
        started = time.monotonic()
        case.check(stage(case.table, case.target, max_bytes_per_s=rate, chunk_bytes=chunk))
        seconds = time.monotonic() - started
    assert seconds >= (case.table.total_bytes - chunk) / rate - 0.02


def test_low_priority_is_that_of_the_calling_thread_alone(worker: ThreadPoolExecutor) -> None:
    case, before = Case([100]), os.getpriority(os.PRIO_PROCESS, 0)

    def niceness() -> int:
        stage(case.table, case.target, low_priority=True)
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert worker.submit(niceness).result(_DEADLINE_S) >= 10
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


# -- what is refused, and what is there ---------------------------------------------------------------------------


def _read_only(size: int) -> Bytes:
    memory = np.zeros(size, dtype=np.uint8)
    memory.flags.writeable = False
    return memory


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (np.zeros(99, dtype=np.uint8), "99 bytes cannot take rows that end at 100"),
        (np.zeros(200, dtype=np.int8), "flat, writable memory of bytes"),
        (np.zeros(200, dtype=np.uint8)[::2], "flat, writable memory of bytes"),
        (np.zeros((2, 100), dtype=np.uint8), "flat, writable memory of bytes"),
        (_read_only(200), "flat, writable memory of bytes"),
    ],
    ids=["short", "signed", "strided", "two axes", "read-only"],
)
def test_a_target_that_would_be_overrun_or_is_no_plain_memory_is_refused(target: Bytes, says: str) -> None:
    source = np.zeros(100, dtype=np.uint8)
    with pytest.raises(InvariantViolation, match=says):
        stage(StagingTable([source.ctypes.data], [40], [60]), target)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (([1], [0], [1, 2]), "1 sources, 1 offsets and 2 lengths"),
        (([1], [-1], [1]), "negative"),
        (([1, 1], [0, 8], [1, -8]), "negative"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(columns: tuple[list[int], ...], says: str) -> None:
    with pytest.raises(InvariantViolation, match=says):
        StagingTable(*columns)


@pytest.mark.parametrize("word", [np.zeros(2, dtype=np.int64), np.frombuffer(bytes(17), np.uint8)[1:9]])
def test_a_fence_is_one_aligned_word(word: Bytes) -> None:
    with pytest.raises(InvariantViolation, match="one aligned word of 8 bytes"):
        Fence(word.data, limit=0)


_WITHOUT = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from holdfast.fault_tolerance import staging
staging.NATIVE = replace(staging.NATIVE, path=Path("/nowhere/libholdfast_staging.so"))
source, target = np.ones(5000, np.uint8), np.zeros(5000, np.uint8)
for _ in range(3):
    staging.stage(staging.StagingTable([source.ctypes.data], [0], [5000]), target)
print(staging.isas(), target.sum(), "torch" in sys.modules)
"""


def test_without_the_library_numpy_stages_which_is_said_once_and_no_torch_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "[] 5000 False\n"
    assert done.stderr.count("copied by NumPy") == 1 and "/nowhere/libholdfast_staging.so" in done.stderr


def test_python_and_the_c_interface_agree_on_the_fields_and_on_the_numbers_of_instruction_sets() -> None:
    kernels = staging.NATIVE.kernels
    body = (kernels / "abi.h").read_text().split("struct Steering {")[1].split("};")[0]
    fields = re.findall(r"^ *(?:const )?(\w+)(\*?) (\w+);", body, re.MULTILINE)
    kinds = {("int64_t", "*"): "c_void_p", ("int64_t", ""): "c_long", ("double", ""): "c_double"}
    ours = [(name, kind.__name__) for name, kind in staging._Steering._fields_]
    assert [(name, kinds[kind, pointer]) for kind, pointer, name in fields] == ours
    (numbered,) = re.findall(r"enum Isa : int32_t \{ (.*) \};", (SHARED / "dispatch.h").read_text())
    names = tuple(numbered.lower().split(", "))
    assert names == optim.NATIVE.isas and staging.NATIVE.isas == names[: len(staging.NATIVE.isas)]
