"""What does sharding cost per step, and what does it save in memory, against plain DistributedDataParallel?

Two processes (gloo, one thread each) train the same decoder from the same weights on the same tokens, clip at the same
norm, and take turns over every way of doing it: build it, throw the first steps away, time the next ones, free it, build
the next. A round has every way once, in an order drawn anew, so that what else happens on the machine hits all alike.
A round's ratio is the median step over that of the plain DDP of the same precision and round.

- DDP is torch's DistributedDataParallel with torch.optim.AdamW as it comes. In bf16 its weights and moments are bf16
  and there are no fp32 masters: fewer bytes than any other bf16 row, and another arithmetic. "DDP, autocast" keeps fp32
  weights. "fused" is AdamW(fused=True), the fastest that torch has.
- "no exchange" is the floor: the same model, each rank for itself, nothing sent. Its loss is its own.
- ZeRO N is Holdfast's ZeroEngine; the optimizer behind the comma is AdamW8bit or torch.optim.AdamW as it comes.

Memory is counted exactly, in builds of their own: bytes that torch's allocator handed out from the first to the last step
and had not got back (steady), and the most there were at any time (peak, activations included).
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
from typing import Any, Protocol

import torch
import torch.distributed as dist
from record import quartiles, spread, table, write_record
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from holdfast import optim
from holdfast.launch.compose import compose_config
from holdfast.optim.config import OptimConfig, OptimName
from holdfast.parallel.comms import TorchCommunicator
from holdfast.parallel.zero import ZeroEngine, ZeroOptions
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise
from holdfast.trainer.sizing import parameter_count
from holdfast.types import Precision

WORLD = 2
LR = 1e-3
WARM_UP = 3


class Way(Protocol):
    """One way to train; building one is collective."""

    def step(self, tokens: Tensor, targets: Tensor) -> float: ...

    def close(self) -> None: ...


class Plain:
    """torch alone."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        exchange: bool = True,
        autocast: bool = False,
        fused: bool = False,
    ) -> None:
        model = Decoder(config)
        initialise(model, 0)
        model.to(dtype)
        options, self._autocast = OptimConfig(), autocast
        groups = optim.parameter_groups(model.named_parameters(), options)
        first, second = options.betas
        self._optimizer = torch.optim.AdamW(groups, lr=LR, betas=(first, second), eps=options.eps, fused=fused)
        self._net = DistributedDataParallel(model) if exchange else model
        self._clip_at = options.grad_clip

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            loss = self._net(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._net.parameters(), self._clip_at)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def close(self) -> None:
        del self._net, self._optimizer


class Sharded:
    """Holdfast's engine, built as a rank builds it."""

    def __init__(self, config: ModelConfig, *, stage: int, name: OptimName, precision: Precision, batch: int) -> None:
        model = Decoder(config)
        initialise(model, 0)
        options = OptimConfig(name=name)
        block_size = options.block_size if name is OptimName.ADAMW8BIT else 1
        self._engine = ZeroEngine(
            model,
            optim.parameter_groups(model.named_parameters(), options),
            lambda groups: optim.build_optimizer(options, groups),
            optim,
            ZeroOptions(stage, precision, batch, 1, options.grad_clip, 5_000_000, block_size),
        )

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        loss = self._engine.loss(tokens, targets)
        self._engine.backward(loss)
        self._engine.update(LR)
        return float(loss.detach())

    def close(self) -> None:
        self._engine.close()


def ways(config: ModelConfig, precision: Precision, batch: int) -> dict[str, Callable[[], Way]]:
    """Every way of one precision; the first is the peer."""
    dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
    plain = partial(Plain, config, dtype=dtype)
    found: dict[str, Callable[[], Way]] = {
        "DDP": plain,
        "DDP, fused": partial(plain, fused=True),
        "no exchange": partial(plain, exchange=False),
    }
    if precision is Precision.BF16:
        found["DDP, autocast"] = partial(Plain, config, dtype=torch.float32, autocast=True)
    for name, word in ((OptimName.ADAMW8BIT, "AdamW8bit"), (OptimName.ADAMW, "AdamW")):
        for stage in range(4):
            found[f"ZeRO {stage}, {word}"] = partial(
                Sharded, config, stage=stage, name=name, precision=precision, batch=batch
            )
    return found


@dataclass
class Samples:
    """Of one way: one entry per round."""

    step_s: list[float] = field(default_factory=list)
    loss: float = 0.0
    steady: int = 0
    peak: int = 0


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
        into.loss = way.step(tokens, targets)
        times.append(time.perf_counter() - started)
    slower = torch.tensor(statistics.median(times[WARM_UP:]))
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    into.step_s.append(float(slower))


def weigh(build: Callable[[], Way], rank: int, options: argparse.Namespace, into: Samples) -> None:
    """Collective. Bytes of one way, from torch's own account of every allocation."""
    feed = batches(rank, options)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as account:
        way = build()
        for _ in range(WARM_UP):
            way.step(*next(feed))
        gc.collect()
    events: Any = account.profiler.kineto_results.events()  # type: ignore[union-attr]  # it has run
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        into.steady += size
        into.peak = max(into.peak, into.steady)
    way.close()


def run_rank(rank: int, rendezvous: str, options: argparse.Namespace) -> dict[Precision, dict[str, Samples]]:
    torch.set_num_threads(1)
    comm = TorchCommunicator.join(rendezvous, rank=rank, world=WORLD, backend="gloo", timeout_s=600.0)
    config = compose_config([f"model={options.model}"]).model
    found: dict[Precision, dict[str, Samples]] = {}
    plan: list[tuple[Samples, Callable[[], Way]]] = []
    for precision in Precision:
        built = ways(config, precision, options.batch)
        found[precision] = {name: Samples() for name in built}
        plan += [(found[precision][name], build) for name, build in built.items()]
    for samples, build in plan:
        weigh(build, rank, options, samples)
        gc.collect()
    shuffle = random.Random(0)  # the same order on both ranks
    for number in range(options.rounds):
        if rank == 0:
            print(f"round {number + 1} of {options.rounds}", flush=True)
        for samples, build in shuffle.sample(plan, len(plan)):
            way = build()
            time_steps(way, rank, options, samples)
            way.close()
            del way
            gc.collect()
    comm.close()
    return found


def section(precision: Precision, found: dict[str, Samples], parameters: int) -> str:
    peer = found["DDP"]
    rows = [
        [
            name,
            f"{1000 * quartiles(s.step_s)[1]:.0f}",
            spread([own / other for own, other in zip(s.step_s, peer.step_s, strict=True)]),
            f"{s.steady / 1e6:.1f}",
            f"{s.steady / parameters:.2f}",
            f"{s.steady / peer.steady:.2f}",
            f"{s.peak / peer.peak:.2f}",
            f"{s.loss:.4f}",
        ]
        for name, s in found.items()
    ]
    columns = ["way", "step, ms", "step / DDP (quartiles)", "MB per rank", "bytes per parameter", "steady / DDP"]
    columns += ["peak / DDP", "last loss, rank 0"]
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
        found = list(pool.map(run, range(WORLD)))[0]
    parameters = parameter_count(compose_config([f"model={options.model}"]).model)
    title = f"Step time and memory of ZeRO 0 to 3, {parameters / 1e6:.1f} M parameters, {WORLD} ranks, "
    title += f"{options.batch} x {options.seq_len} tokens per rank, {options.rounds} rounds of {options.steps} steps"
    sections = [section(precision, samples, parameters) for precision, samples in found.items()]
    write_record("step_time", title, "\n\n".join([str(__doc__), *sections]))


if __name__ == "__main__":
    main()
