"""What does a snapshot cost the training thread, against what else could be done with the same bytes?

A state as a rank of ZeRO holds it (fp32 masters, 8-bit codes of two moments and their absmax, cut from the matrices of
a four-layer decoder: 150 tensors) goes into warm shared memory, or into files on /dev/shm, which are memory too. The
ways take turns, in an order drawn anew each round, and caches are filled with something else before each. GB/s counts
the state's bytes; the ratios are of the same round.

- The floor is one np.copyto of as many bytes between two flat arrays that are warm already, into shared memory.
- "copy_ per tensor" and "copy_ and digest per tensor" (xxh3-128 of what arrived) do what a snapshot cannot do without.
- Holdfast is ArenaSnapshotter.offer, fence and commit into an arena, whose memory a keeper owns: copy, a digest per
  tensor and the manifest. "at once" waits for the copy right away; "beside a step" computes for so long between offer
  and fence (matrix products in one thread) that the copy fits in, and counts only what offer, fence and commit block.
- torch.save and torch.distributed.checkpoint (one process, no_dist) write files, with a CRC-32. Of async_save only
  the time until it returns counts: a copy without any digest. "reused" keeps its staging memory, shared too, from one
  save to the next: the best that it can do on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import mmap
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from record import quartiles, ratios, spread, table, write_record
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save

from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.capture import byte_view
from holdfast.fault_tolerance.manifest import digest
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter, required_bytes
from holdfast.optim import AdamW8bit, describe_state
from holdfast.parallel.slices import Flat, Piece, state_slices
from holdfast.types import RankState

FLOOR, OURS, AT_ONCE = "**floor: one flat np.copyto**", "**Holdfast, beside a step**", "Holdfast, at once"
WINDOW = 4.0
"""Length of the step beside which is copied, in times of the copy."""
BUFFERS, BLOCK = 3, 256
MATRICES = [1.0] * 2 + [1.0, 0.5, 0.5, 1.0, 2.75, 2.75, 2.75] * 4
"""Embedding, head, and wq, wk, wv, wo, w_gate, w_up, w_down of four layers, relative to each other."""
OTHER_BYTES = 128 << 20
"""Touched before each measurement, several times what the last-level cache holds."""

Way = Callable[[], Callable[[], object] | float | None]
"""What is timed. It may return what has to be done afterwards, off the clock, or the seconds that count."""


def zero_state(parameters: int) -> RankState:
    """Masters and 8-bit moments of so many parameters after a first update."""
    sizes = [round(parameters * weight / sum(MATRICES) / BLOCK) * BLOCK for weight in MATRICES]
    weights = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = AdamW8bit(weights, block_size=BLOCK)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    slices = []
    for number, weight in enumerate(weights):
        whole = Piece(f"matrix{number}.weight", (weight.numel(),), 0, weight.numel(), 0)
        slices += state_slices(Flat(0, weight, (whole,)), describe_state(optimizer, weight))
    return RankState(slices, {"step": 0, "tokens": 0, "owner": {}})


def shared_memory(size: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """As many buffers as an arena has, of so many bytes, every page there already."""
    memory = mmap.mmap(-1, BUFFERS * size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    return np.frombuffer(memory, dtype=np.uint8).reshape(BUFFERS, size)


def copies(state: RankState) -> dict[str, Way]:
    """The floor and what comes closest to it."""
    sources = [byte_view(s.tensor) for s in state.slices]
    flat = torch.cat(sources).numpy()
    buffers = itertools.cycle(shared_memory(flat.nbytes))

    def per_tensor(with_digest: bool) -> None:
        target, end = next(buffers), 0
        for source in sources:
            part = target[end : end + source.numel()]
            torch.from_numpy(part).copy_(source)
            if with_digest:
                digest(part)
            end += source.numel()

    return {
        FLOOR: lambda: np.copyto(next(buffers), flat),
        "copy_ per tensor": partial(per_tensor, False),
        "copy_ and digest per tensor": partial(per_tensor, True),
    }


def holdfast(state: RankState, keeper: Arena) -> dict[str, Way]:
    """Through a mapping of its own of the keeper's memory, as a worker has it."""
    keeper.reserve(required_bytes(state))
    snapshots = ArenaSnapshotter(Arena.attach(keeper.ref), rank=0, world=1, epoch=1)
    versions, matrix = itertools.count(1), torch.randn(256, 256)
    copies_s = [0.0]

    def compute() -> None:
        end = time.perf_counter() + WINDOW * copies_s[0]
        while time.perf_counter() < end:
            torch.mm(matrix, matrix)

    def snapshot(is_beside: bool) -> float:
        version, started = next(versions), time.perf_counter()
        if not snapshots.offer(state, version):
            raise RuntimeError(f"version {version} was skipped")
        offered = time.perf_counter()
        if is_beside:
            compute()
        computed = time.perf_counter()
        report = snapshots.fence()
        if not report.is_complete:
            raise RuntimeError(f"version {version} is not complete: {report.why_not}")
        snapshots.commit(version)
        copies_s[0] = max(copies_s[0], report.copy_s)
        return time.perf_counter() - computed + offered - started

    return {OURS: partial(snapshot, True), AT_ONCE: partial(snapshot, False)}


def files(state: RankState, folder: Path) -> dict[str, Way]:
    """What torch offers."""
    tensors = {s.spec.name: s.tensor for s in state.slices}
    reused = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
    )

    def torch_save() -> Callable[[], object]:
        torch.save(tensors, folder / "state.pt")
        return (folder / "state.pt").unlink

    def dcp_save() -> Callable[[], object]:
        save(tensors, checkpoint_id=folder / "dcp", no_dist=True)
        return lambda: shutil.rmtree(folder / "dcp")

    def dcp_async(stager: DefaultStager | None) -> Callable[[], object]:
        response = async_save(tensors, checkpoint_id=folder / "async", async_stager=stager, no_dist=True)

        def finish() -> None:
            upload = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
            upload.result()
            shutil.rmtree(folder / "async")

        return finish

    return {
        "torch.save": torch_save,
        "checkpoint.save": dcp_save,
        "checkpoint.async_save": partial(dcp_async, None),
        "checkpoint.async_save, reused": partial(dcp_async, reused),
    }


def measure(parameters: int, rounds: int) -> str:
    state = zero_state(parameters)
    size, other = sum(s.tensor.nbytes for s in state.slices), np.zeros(OTHER_BYTES, dtype=np.uint8)
    keeper = Arena.create(0, "benchmark", 1 << 36, BUFFERS)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        ways = {**copies(state), **holdfast(state, keeper), **files(state, Path(folder))}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(-BUFFERS, rounds):  # the first rounds touch every buffer once
            for name in random.Random(number).sample(list(ways), len(ways)):
                gc.collect()
                other += 1
                started = time.perf_counter()
                afterwards = ways[name]()
                seconds = time.perf_counter() - started
                if isinstance(afterwards, float):
                    seconds = afterwards
                elif afterwards is not None:
                    afterwards()
                if number >= 0:
                    found[name].append(seconds)
    keeper.close()
    columns = ["way", "ms: median (quartiles)", "GB/s", "seconds / floor", "seconds / Holdfast"]
    rows = [
        [name, spread([1000 * s for s in values]), f"{size / 1e9 / quartiles(values)[1]:.2f}"]
        + [spread(ratios(values, found[other_way])) for other_way in (FLOOR, OURS)]
        for name, values in found.items()
    ]
    title = f"## {parameters / 1e6:g} M parameters: {size / 1e6:.1f} MB in {len(state.slices)} tensors, {rounds} rounds"
    return f"{title}\n\n{table(columns, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", nargs="*", type=float, default=[1, 10, 50], help="parameters of each state")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of every way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    sections = [measure(round(1e6 * millions), options.rounds) for millions in options.millions]
    write_record("snapshot_copy", "Time of a snapshot, one process", "\n\n".join([str(__doc__), *sections]))


if __name__ == "__main__":
    main()
