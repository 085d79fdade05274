"""How fast are live bytes copied into shared memory with a digest of every row, and what is left for others meanwhile?

Rows as a rank of ZeRO has them (a few large ones, many small ones) go from private into shared memory, all of it warm.
The ways take turns, in an order drawn anew each round, and caches are filled with something else before each. GB/s
counts the bytes copied; the ratios are of the same round.

- The floor is one memcpy of as many bytes between two flat arrays, without any digest.
- Native is `staging.stage` by C++ with each instruction set that this machine has, also with other chunk sizes;
  NumPy is `staging.stage` without the library.
- The neighbour is another thread that reads 256 MB of memory again and again: its rate while a way runs, relative to
  its rate alone.

It prints its tables and writes no record.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import random
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from record import quartiles, ratios, spread, table

from holdfast.fault_tolerance import staging
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.staging import StagingTable

FLOOR = "**floor: one memcpy**"
BUFFERS = 2
OTHER_BYTES, NEIGHBOUR_BYTES = 128 << 20, 256 << 20
CHUNKS = [64 << 10, 256 << 10, 1 << 20, 4 << 20]
SHARES = [8.0] * 8 + [1.0] * 32 + [0.01] * 110
"""Of the rows in the whole: matrices, 8-bit moments, norms and scales of blocks."""

Way = Callable[[], object]


def shared_memory(size: int) -> list[Bytes]:
    """As many buffers of so many bytes as take turns, every page there already."""
    memory = mmap.mmap(-1, BUFFERS * size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    return list(np.frombuffer(memory, dtype=np.uint8).reshape(BUFFERS, size))


def rows_of(source: Bytes) -> StagingTable:
    """The source cut into rows, each of which goes where it lies, aligned to 64 bytes."""
    lengths = [int(source.size * share / sum(SHARES)) // 64 * 64 for share in SHARES]
    offsets = list(itertools.accumulate(lengths, initial=0))[:-1]
    return StagingTable([source.ctypes.data + offset for offset in offsets], offsets, lengths)


def ways_of(source: Bytes, rows: StagingTable) -> dict[str, Way]:
    buffers = itertools.cycle(shared_memory(source.size))

    def memcpy() -> None:
        ctypes.memmove(next(buffers).ctypes.data, source.ctypes.data, rows.total_bytes)

    def staged(isa: str | None, chunk_bytes: int) -> None:
        with staging.using(isa):
            staging.stage(rows, next(buffers), chunk_bytes=chunk_bytes)

    ways: dict[str, Way] = {FLOOR: memcpy}
    ways |= {f"native, {isa}": partial(staged, isa, staging.CHUNK_BYTES) for isa in staging.isas()}
    if staging.isas():
        best = staging.isas()[-1]
        ways |= {f"native, {best}, chunks of {size >> 10} KiB": partial(staged, best, size) for size in CHUNKS}
    return {**ways, "NumPy and xxhash": partial(staged, None, staging.CHUNK_BYTES)}


def measure(megabytes: int, rounds: int) -> str:
    source = np.random.default_rng(0).integers(0, 256, megabytes * 1_000_000, dtype=np.uint8)
    rows, other = rows_of(source), np.zeros(OTHER_BYTES, dtype=np.uint8)
    ways = ways_of(source, rows)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-BUFFERS, rounds):  # the first rounds touch every buffer once
        for name in random.Random(number).sample(list(ways), len(ways)):
            other += 1
            started = time.perf_counter()
            ways[name]()
            if number >= 0:
                found[name].append(time.perf_counter() - started)
    columns = ["way", "ms: median (quartiles)", "GB/s", "seconds / floor", "NumPy's seconds / its own"]
    lines = [
        [
            name,
            spread([1000 * s for s in values]),
            f"{rows.total_bytes / 1e9 / quartiles(values)[1]:.2f}",
            spread(ratios(values, found[FLOOR])),
            spread(ratios(found["NumPy and xxhash"], values)),
        ]
        for name, values in found.items()
    ]
    return f"## {rows.total_bytes / 1e6:.0f} MB in {len(rows)} rows, {rounds} rounds\n\n{table(columns, lines)}"


class Neighbour:
    """Reads memory in a thread of its own, without the GIL."""

    def __init__(self) -> None:
        self._memory = np.ones(NEIGHBOUR_BYTES // 8)
        self._seconds: list[float] = []
        self._is_over = threading.Event()

    def _read(self) -> None:
        while not self._is_over.is_set():
            started = time.perf_counter()
            np.max(self._memory)
            self._seconds.append(time.perf_counter() - started)

    def rate_during(self, way: Way, seconds: float) -> float:
        """Bytes per second while ``way`` is repeated, each time from its beginning to its end."""
        self._is_over.clear()
        self._seconds.clear()
        thread = threading.Thread(target=self._read)
        thread.start()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            way()
        self._is_over.set()
        thread.join()
        return self._memory.nbytes / quartiles(self._seconds)[1]


def measure_neighbour(megabytes: int, rounds: int) -> str:
    source = np.random.default_rng(0).integers(0, 256, megabytes * 1_000_000, dtype=np.uint8)
    ways = {**ways_of(source, rows_of(source)), "alone": partial(time.sleep, 0.1)}
    neighbour = Neighbour()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in random.Random(number).sample(list(ways), len(ways)):
            found[name].append(neighbour.rate_during(ways[name], 0.3))
    lines = [
        [name, f"{quartiles(values)[1] / 1e9:.2f}", spread(ratios(values, found["alone"]))]
        for name, values in found.items()
    ]
    title = f"## A neighbour during copies of {megabytes} MB, {rounds} rounds"
    return f"{title}\n\n{table(['way', 'neighbour GB/s', 'relative to alone'], lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="*", type=int, default=[16, 128, 512], help="bytes of each state")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of every way")
    options = parser.parse_args()
    for megabytes in options.megabytes:
        print(measure(megabytes, options.rounds), end="\n\n")
    print(measure_neighbour(max(options.megabytes), options.rounds))


if __name__ == "__main__":
    main()
