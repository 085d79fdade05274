"""How long does a step of the pipeline take, against the same step by torch.distributed.pipelining?

Two processes (gloo, one thread each) hold half a decoder each and carry out one schedule, GPipe or 1F1B, over the same
microbatches in fp32: forward and backward of a whole step, without the optimizer. Before anything is timed, both must
have the same actions in the same order, the same loss, and the same gradients to the bit.

The ways take turns, in an order drawn anew each round: a few steps that are not timed, then some that are. A step takes
as long as its slower process, both having met at a barrier before. A ratio is that of two medians of one round. The
processor time of both processes, gloo's threads included, says what a step costs whoever else uses the machine.

- torch.distributed.pipelining is ScheduleGPipe or Schedule1F1B around the very modules that our executor runs, told to
  do no more than ours: no outputs are returned, and the loss is scaled rather than every gradient. Shapes are
  exchanged in its first step, which is not timed.
- Executor is what the bar is about: the same weights, gradients and batch; both begin without gradients.
- PipelineEngine is what a run calls: it has weights of its own, and zeroes one flat tensor of gradients first.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from record import quartiles, ratios, spread, table, write_record
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from holdfast import optim
from holdfast.launch.compose import compose_config
from holdfast.optim.config import OptimConfig
from holdfast.parallel.comms import TorchCommunicator
from holdfast.parallel.microbatches import Microbatch
from holdfast.parallel.partition import Partition, equal
from holdfast.parallel.pipeline import Executor
from holdfast.parallel.pipeline_engine import PipelineEngine, PipelineOptions, Place
from holdfast.parallel.schedule import Schedule, gpipe, one_f_one_b
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import initialise
from holdfast.trainer.sizing import parameter_count
from holdfast.trainer.stages import Piece, Stage, layouts_of, piece_of
from holdfast.types import Precision

THEIRS, OURS, RUN = "torch.distributed.pipelining", "**Holdfast, Executor**", "Holdfast, PipelineEngine"
WORLD = 2
WARM_UP = 2
BAR = 1.1
COLLECTIVE_DEADLINE_S = 60.0
SCHEDULES = {"GPipe": (gpipe, ScheduleGPipe), "1F1B": (one_f_one_b, Schedule1F1B)}


@dataclass(frozen=True)
class Job:
    """What a step does."""

    kind: str
    """Of schedule."""
    model: ModelConfig
    micro_batch: int
    seq_len: int
    microbatches: int

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES[self.kind][0](WORLD, self.microbatches)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, T, D] of hidden states."""
        return self.micro_batch, self.seq_len, self.model.d_model

    @property
    def partition(self) -> Partition:
        return equal(self.model.n_layers, processes=WORLD)

    def piece(self, rank: int) -> tuple[Piece, Stage]:
        """Freshly initialised."""
        piece, [stage] = piece_of(self.model, self.partition, self.schedule.layout, rank)
        initialise(piece, seed=0)
        return piece, stage

    def batch(self) -> list[Microbatch]:
        """The same in every process."""
        draw = torch.Generator().manual_seed(0)
        text = torch.randint(256, (self.microbatches, self.micro_batch, self.seq_len + 1), generator=draw)
        return [(one[:, :-1].contiguous(), one[:, 1:].contiguous(), self.micro_batch * self.seq_len) for one in text]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Its tokens and targets."""
        return [(tokens, targets) for tokens, targets, _ in self.batch()]


@dataclass
class Samples:
    """Of one way: an entry per round, the median of its steps."""

    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Of both processes together, gloo's threads included."""


class Way(Protocol):
    """One way to take a step."""

    piece: Piece
    """Whose parameters have gradients after a step."""

    def step(self) -> float:
        """Collective. Forward and backward of the batch; its mean loss, nats, where the model ends, else 0."""
        ...


class Half(nn.Module):
    """A stage as torch wants it: one module, from tokens or hidden states to hidden states."""

    def __init__(self, piece: Piece, stage: Stage, *, has_embedding: bool) -> None:
        super().__init__()
        self.piece, self._stage, self._has_embedding = piece, stage, has_embedding

    def forward(self, x: Tensor) -> Tensor:
        return self._stage(self._stage.embed(x) if self._has_embedding else x)


class Recorder(PipelineStage):
    """Notes what it does."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.done: list[str] = []

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **named: Any) -> Any:
        self.done.append(f"F{fwd_chunk_id}")
        return super().forward_one_chunk(fwd_chunk_id, *arguments, **named)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **named: Any) -> Any:
        self.done.append(f"B{bwd_chunk_id}")
        return super().backward_one_chunk(bwd_chunk_id, *arguments, **named)


class Theirs:
    """torch's schedule over torch's stage."""

    def __init__(
        self, job: Job, rank: int, piece: Piece, part: Stage, make: Callable[..., PipelineStage] = PipelineStage
    ) -> None:
        def loss(out: Tensor, targets: Tensor) -> Tensor:
            return part.loss(out, targets) / job.microbatches

        self.piece, self._is_last = piece, rank == WORLD - 1
        self._tokens, self._targets = (torch.cat(one) for one in zip(*job.pairs(), strict=True))
        self.stage = make(Half(piece, part, has_embedding=rank == 0), rank, WORLD, torch.device("cpu"))
        self._schedule = SCHEDULES[job.kind][1](self.stage, job.microbatches, loss_fn=loss, scale_grads=False)

    def step(self) -> float:
        losses: list[Tensor] = []
        self.piece.zero_grad()
        if self._is_last:
            self._schedule.step(target=self._targets, losses=losses, return_outputs=False)
        else:
            self._schedule.step(self._tokens, return_outputs=False)
        return sum(float(loss.detach()) for loss in losses)


class Ours:
    """The executor alone."""

    def __init__(self, job: Job, rank: int, piece: Piece, part: Stage) -> None:
        self.piece, self._batch, self._scale = piece, job.pairs(), 1 / job.microbatches
        self._executor = Executor(
            [part],
            job.schedule,
            process=rank,
            ranks=range(WORLD),
            shape=job.shape,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def step(self) -> float:
        self.piece.zero_grad()
        return sum(self._executor.run(self._batch, scale=self._scale).values()) * self._scale


class OursInARun:
    """The engine, built as a rank builds it."""

    def __init__(self, job: Job, rank: int, piece: Piece, part: Stage) -> None:
        self.piece, self._batch, options = piece, job.batch(), OptimConfig()
        self._engine = PipelineEngine(
            piece,
            [part],
            job.schedule,
            Place(WORLD, 1, rank),
            optim.parameter_groups(piece, options),
            partial(optim.build_optimizer, options),
            optim,
            PipelineOptions(Precision.FP32, job.shape, options.grad_clip, options.block_size),
            layouts_of(job.model, job.partition, job.schedule.layout),
        )

    def step(self) -> float:
        nats, targets, _ = self._engine.forward_backward(self._batch)
        return nats / max(targets, 1)


def ways(job: Job, rank: int) -> dict[str, Way]:
    """The first two on the same modules."""
    shared = job.piece(rank)
    return {
        THEIRS: Theirs(job, rank, *shared),
        OURS: Ours(job, rank, *shared),
        RUN: OursInARun(job, rank, *job.piece(rank)),
    }


def agree(job: Job, rank: int, found: Mapping[str, Way]) -> None:
    """Collective. A step of every way. Raises: RuntimeError, in both processes, where one differs from torch's."""
    problems: list[list[str]] = [[] for _ in range(WORLD)]
    dist.all_gather_object(problems, [*_orders(job, rank), *_results(found)])
    if any(problems):
        raise RuntimeError("; ".join(f"process {n}: {one}" for n, many in enumerate(problems) for one in many))


def _orders(job: Job, rank: int) -> Iterator[str]:
    recorded = Theirs(job, rank, *job.piece(rank), Recorder)
    recorded.step()
    own = [f"{action.kind.value}{action.microbatch}" for action in job.schedule.actions[rank]]
    if own != recorded.stage.done:
        yield f"our {job.kind} is {' '.join(own)}, torch's {' '.join(recorded.stage.done)}"


def _results(found: Mapping[str, Way]) -> Iterator[str]:
    loss = found[THEIRS].step()
    truth = _gradients(found[THEIRS].piece)
    for name, way in found.items():
        own = way.step()
        if not math.isclose(own, loss, rel_tol=1e-6):
            yield f"{name} has a loss of {own}, torch one of {loss}"
        gradients = _gradients(way.piece)
        if wrong := [key for key in truth if not torch.equal(gradients[key], truth[key])]:
            yield f"{name} has other gradients than torch in {', '.join(wrong)}"


def _gradients(piece: Piece) -> dict[str, Tensor]:
    """NaN, which equals nothing, where there is none."""
    none = torch.tensor(math.nan)
    return {name: none if param.grad is None else param.grad.clone() for name, param in piece.named_parameters()}


def time_steps(way: Way, steps: int, into: Samples) -> None:
    """Collective. Adds the median step."""
    wall, cpu = list[float](), list[float]()
    for _ in range(WARM_UP + steps):
        dist.barrier()
        started, used = time.perf_counter(), time.process_time()
        way.step()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    slower, both = torch.tensor([wall[WARM_UP:], cpu[WARM_UP:]], dtype=torch.float64)
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    dist.all_reduce(both, dist.ReduceOp.SUM)
    into.step_s.append(statistics.median(slower.tolist()))
    into.cpu_s.append(statistics.median(both.tolist()))


def run_rank(rank: int, rendezvous: str, job: Job, options: argparse.Namespace) -> dict[str, Samples]:
    """One process. Raises: TimeoutError after the deadline, besides what ``agree`` raises."""
    torch.set_num_threads(1)
    end_s = time.monotonic() + options.deadline_s
    comm = TorchCommunicator.join(rendezvous, rank=rank, world=WORLD, backend="gloo", timeout_s=COLLECTIVE_DEADLINE_S)
    try:
        built = ways(job, rank)
        agree(job, rank, built)
        found = {name: Samples() for name in built}
        for number in range(options.rounds):
            if time.monotonic() > end_s:
                raise TimeoutError(
                    f"{number} of {options.rounds} rounds after {options.deadline_s:g} s; see --deadline-s"
                )
            for name in random.Random(number).sample(list(built), len(built)):  # the same order in both processes
                time_steps(built[name], options.steps, found[name])
        return found
    finally:
        comm.close()  # wakes the other process too


def measure(job: Job, options: argparse.Namespace) -> dict[str, Samples]:
    """In two processes of its own."""
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(WORLD, get_context("spawn")) as pool:
        run = partial(run_rank, rendezvous=str(Path(directory, "rendezvous")), job=job, options=options)
        found, _ = pool.map(run, range(WORLD))
    return found


def rows(kind: str, found: Mapping[str, Samples]) -> Iterator[list[str]]:
    peer = found[THEIRS]
    for name, own in found.items():
        yield [
            kind,
            name,
            spread([1000 * s for s in own.step_s], 1),
            spread(ratios(own.step_s, peer.step_s), 3),
            spread([1000 * s for s in own.cpu_s], 1),
            spread(ratios(own.cpu_s, peer.cpu_s), 3),
        ]


def bar(kind: str, found: Mapping[str, Samples]) -> list[str]:
    value = round(quartiles(ratios(found[OURS].step_s, found[THEIRS].step_s))[1], 2)
    return [f"{kind}: Executor / torch", f"≤ {BAR}", f"{value:.2f}", "met" if value <= BAR else "**missed**"]


def section(preset: str, options: argparse.Namespace) -> str:
    model = compose_config([f"model={preset}"]).model
    lines, bars = list[list[str]](), list[list[str]]()
    for kind in options.schedules:
        print(f"{preset}, {kind}", flush=True)
        found = measure(Job(kind, model, options.micro_batch, options.seq_len, options.microbatches), options)
        lines += rows(kind, found)
        bars.append(bar(kind, found))
    title = f"## {preset}: {parameter_count(model) / 1e6:.1f} M parameters, {options.microbatches} microbatches of "
    title += f"{options.micro_batch} x {options.seq_len} tokens, {options.rounds} rounds of {options.steps} steps"
    columns = ["schedule", "way", "step, ms: median (quartiles)", "/ torch", "CPU of both processes, ms", "/ torch"]
    text = "\n\n".join([title, table(columns, lines), table(["bar", "promised", "measured", ""], bars)])
    print(text, end="\n\n", flush=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["1m", "10m"], help="presets of holdfast/configs/model")
    parser.add_argument("--schedules", nargs="*", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--rounds", type=int, default=15, help="turns of every way")
    parser.add_argument("--steps", type=int, default=5, help=f"timed steps per turn, behind {WARM_UP} that are not")
    parser.add_argument("--microbatches", type=int, default=8, help="per step")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences of a microbatch")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--deadline-s", type=float, default=900.0, help="for one model and schedule")
    options = parser.parse_args()
    sections = [section(preset, options) for preset in options.models]
    title = f"Step of a pipeline of {WORLD} processes, against torch.distributed.pipelining"
    write_record("pipeline_overhead", title, "\n\n".join([str(__doc__), *sections]))


if __name__ == "__main__":
    main()
