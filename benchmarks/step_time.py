"""What does sharding cost per step, and what does it save in memory, against plain DistributedDataParallel?

Two processes (gloo, one thread each) train the same decoder from the same weights on the same tokens, clip at the same
norm, and take turns over every way of doing it: build it, throw the first steps away, time the next ones, free it,
build the next. A round has every way once, in an order drawn anew, so that what else happens on the machine hits all
alike. A round's ratio is the median step over that of the plain DDP of the same precision and round.

- DDP is torch's DistributedDataParallel with torch.optim.AdamW as it comes. In bf16 its weights and moments are bf16
  and there are no fp32 masters: fewer bytes, and another arithmetic than every other way has. "DDP, autocast" keeps
  fp32 weights. "fused" is AdamW(fused=True).
- "no exchange" is the floor: the same model, each rank for itself, nothing sent. Its loss is its own.
- ZeRO N is Holdfast's ZeroEngine; the optimizer behind the comma is holdfast.optim.AdamW8bit or AdamW.

Memory is what rank 0's tensors occupy, each storage once, DDP's buckets included: between two steps, and between
backward and update, when gradients are there too. Activations and what lives only inside an operation are in neither.
ZeRO 3 keeps a bucket of parallel.bucket_elements fp32 elements, or as many as the model has. What a process keeps
once whatever it trains (AdamW8bit: tables of half a megabyte) is not counted.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from memory import tensor_bytes
from record import quartiles, spread, table, write_record
from torch import Tensor
from ways import PEER, Way, ways

from holdfast.launch.compose import compose_config
from holdfast.parallel.comms import TorchCommunicator
from holdfast.trainer.sizing import parameter_count
from holdfast.types import Precision

WORLD = 2
WARM_UP = 3


@dataclass
class Samples:
    """Of one way: one entry per round."""

    step_s: list[float] = field(default_factory=list)
    loss: float = 0.0
    between_steps: int = 0
    """Bytes."""
    with_gradients: int = 0


def batches(rank: int, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(rank)
    while True:
        windows = torch.randint(256, (options.batch, options.seq_len + 1), generator=draw)
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def time_steps(way: Way, rank: int, options: argparse.Namespace, into: Samples) -> None:
    """Collective. The median step of the slower rank."""
    times, feed = list[float](), batches(rank, options)
    for _ in range(WARM_UP + options.steps):
        tokens, targets = next(feed)
        started = time.perf_counter()
        into.loss = way.backward(tokens, targets)
        way.update()
        times.append(time.perf_counter() - started)
    slower = torch.tensor(statistics.median(times[WARM_UP:]))
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    into.step_s.append(float(slower))


def weigh(build: Callable[[], Way], rank: int, options: argparse.Namespace, into: Samples) -> None:
    """Collective. Bytes of one way once it has made a step."""
    feed, before = batches(rank, options), tensor_bytes()
    way = build()
    for _ in range(2):
        way.backward(*next(feed))
        into.with_gradients = tensor_bytes() - before + way.unseen_bytes()
        way.update()
    into.between_steps = tensor_bytes() - before + way.unseen_bytes()
    way.close()


def run_rank(rank: int, rendezvous: str, options: argparse.Namespace) -> dict[Precision, dict[str, Samples]]:
    torch.set_num_threads(1)
    comm = TorchCommunicator.join(rendezvous, rank=rank, world=WORLD, backend="gloo", timeout_s=600.0)
    config = compose_config([f"model={options.model}"]).model
    found: dict[Precision, dict[str, Samples]] = {}
    plan: list[tuple[Samples, Callable[[], Way]]] = []
    linear = F.linear
    for precision in Precision:
        built = ways(config, precision, options.batch)
        found[precision] = {name: Samples() for name in built}
        plan += [(found[precision][name], build) for name, build in built.items()]
    for samples, build in [*plan, *plan]:  # the second count stands: a first build fills caches of the process
        F.linear = linear  # DeepSpeed's stage 3 replaces it and never puts it back, which would slow the others down
        weigh(build, rank, options, samples)
    shuffle = random.Random(0)  # the same order on both ranks
    for number in range(options.rounds):
        if rank == 0:
            print(f"round {number + 1} of {options.rounds}", flush=True)
        for samples, build in shuffle.sample(plan, len(plan)):
            F.linear = linear
            way = build()
            time_steps(way, rank, options, samples)
            way.close()
            del way
            gc.collect()
    comm.close()
    return found


def section(precision: Precision, found: dict[str, Samples], parameters: int) -> str:
    peer = found[PEER]
    rows = [
        [
            name,
            f"{1000 * quartiles(s.step_s)[1]:.0f}",
            spread([own / other for own, other in zip(s.step_s, peer.step_s, strict=True)]),
            f"{s.between_steps / 1e6:.1f}",
            f"{s.between_steps / parameters:.2f}",
            f"{s.between_steps / peer.between_steps:.2f}",
            f"{s.with_gradients / parameters:.2f}",
            f"{s.with_gradients / peer.with_gradients:.2f}",
            f"{s.loss:.4f}",
        ]
        for name, s in found.items()
    ]
    columns = ["way", "step, ms", "step / DDP (quartiles)", "MB between steps", "bytes per parameter", "/ DDP"]
    columns += ["bytes per parameter before the update", "/ DDP", "last loss, rank 0"]
    return f"## {precision.value}\n\n{table(columns, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="builds of every way")
    parser.add_argument("--steps", type=int, default=6, help=f"timed steps per build, behind {WARM_UP} that are not")
    parser.add_argument("--model", default="10m", help="preset of holdfast/configs/model")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(WORLD, get_context("spawn")) as pool:
        run = partial(run_rank, rendezvous=str(Path(directory, "rendezvous")), options=options)
        found, _ = pool.map(run, range(WORLD))
    parameters = parameter_count(compose_config([f"model={options.model}"]).model)
    title = f"Step time and memory of ZeRO 0 to 3, {parameters / 1e6:.1f} M parameters, {WORLD} ranks, "
    title += f"{options.batch} x {options.seq_len} tokens per rank, {options.rounds} rounds of {options.steps} steps"
    sections = [section(precision, samples, parameters) for precision, samples in found.items()]
    write_record("step_time", title, "\n\n".join([str(__doc__), *sections]))


if __name__ == "__main__":
    main()
