"""How fast is a parity block made, against reading its data once and against zfec as it comes?

A stripe of n members has k = n - m data blocks in warm memory, all of them together as large as ``--megabytes`` says,
and one of its m parity blocks is made: XOR for m = 1, Reed–Solomon for m = 2. The ways take turns, in an order drawn
anew each round, and caches are filled with something else before each. GB/s counts the data's bytes; the ratios are
of the same round.

- The floor is one np.copyto of the data into warm memory, on one thread. "Read once" only reads it (a reduction of
  64-bit words), which is less than any code can do: parity has to be written too.
- Holdfast is parity_of_blocks, which cuts blocks into chunks that fit an L2 cache, on one thread and on two.
- "Whole blocks" is one call per parity block: zfec.Encoder.encode of that block alone, or np.bitwise_xor.
- "zfec in cache" encodes one chunk again and again until it has seen as many bytes: what its arithmetic can do at best.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import zfec
from record import ratios, spread, table, write_record

from holdfast.fault_tolerance.erasure import CHUNK_BYTES, parity_of_blocks

Bytes = npt.NDArray[np.uint8]

FLOOR, READ, OURS = "**floor: np.copyto**", "read once", "**Holdfast, 1 thread**"
ZFEC = "zfec, whole blocks"
OTHER_BYTES = 128 << 20
"""Touched before each measurement, several times what the last-level cache holds."""


def floors(data: Bytes) -> dict[str, Callable[[], object]]:
    target = np.zeros_like(data)
    return {
        FLOOR: lambda: np.copyto(target, data),
        READ: lambda: np.bitwise_or.reduce(data.view(np.uint64)),
    }


def codes(blocks: Sequence[Bytes], m: int, pool: ThreadPoolExecutor) -> dict[str, Callable[[], object]]:
    """Everything that makes parity block 0."""
    k, out = len(blocks), np.zeros_like(blocks[0])
    encoder = zfec.Encoder(k, k + m)
    chunk, wanted = tuple(block[:CHUNK_BYTES] for block in blocks), (k,)

    def in_cache() -> None:
        for _ in range(0, blocks[0].size, CHUNK_BYTES):
            encoder.encode(chunk, wanted)

    def whole_xor() -> None:
        np.bitwise_xor(blocks[0], blocks[1], out=out)
        for block in blocks[2:]:
            np.bitwise_xor(out, block, out=out)

    ours = partial(parity_of_blocks, blocks, 0, m, out, pool)
    return {
        OURS: partial(ours, threads=1),
        "Holdfast, 2 threads": partial(ours, threads=2),
        **({"np.bitwise_xor, whole blocks": whole_xor} if m == 1 else {}),
        ZFEC: lambda: encoder.encode(tuple(blocks), wanted),
        "zfec in cache": in_cache,
    }


def measure(members: int, m: int, data_bytes: int, rounds: int, pool: ThreadPoolExecutor) -> str:
    k = members - m
    size = max(data_bytes // k // CHUNK_BYTES, 1) * CHUNK_BYTES
    data = np.random.default_rng(members).integers(0, 256, k * size, dtype=np.uint8)
    ways = {**floors(data), **codes(np.split(data, k), m, pool)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    other = np.zeros(OTHER_BYTES, dtype=np.uint8)
    for number in range(-1, rounds):  # the first round touches everything once
        for name in random.Random(number).sample(list(ways), len(ways)):
            other += 1
            started = time.perf_counter()
            ways[name]()
            seconds = time.perf_counter() - started
            if number >= 0:
                found[name].append(seconds)
    columns = ["way", "GB/s: median (quartiles)", "seconds / floor", f"seconds / {ZFEC}"]
    rows = [
        [name, spread([data.nbytes / 1e9 / s for s in values])]
        + [spread(ratios(values, found[other_way])) for other_way in (FLOOR, ZFEC)]
        for name, values in found.items()
    ]
    code = "XOR" if m == 1 else f"Reed–Solomon, m = {m}"
    title = f"## {members} members, {code}: {k} blocks of {size / 1e6:.1f} MB, {rounds} rounds"
    return f"{title}\n\n{table(columns, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="*", type=int, default=[3, 4, 5, 6, 7, 8, 9], help="sizes of a group")
    parser.add_argument("--megabytes", type=float, default=256, help="data of one stripe")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of every way")
    options = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        sections = [
            measure(members, m, round(1e6 * options.megabytes), options.rounds, pool)
            for m in (1, 2)
            for members in options.members
            if members - m > 1  # parity of a single block is a copy
        ]
    version = f"zfec {importlib.metadata.version('zfec')}, chunks of {CHUNK_BYTES >> 10} KiB."
    write_record("erasure_code", "Speed of the erasure code", "\n\n".join([str(__doc__), version, *sections]))


if __name__ == "__main__":
    main()
