"""Training in one process: a small real engine, and stand-ins that write down what a step asks of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from holdfast import optim
from holdfast.fault_tolerance.snapshot import MemorySnapshotter
from holdfast.optim import AdamW8bit
from holdfast.parallel.microbatches import Microbatch, OneByOne
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise
from holdfast.trainer.observers import MemoryWatcher
from holdfast.types import CopyReport, Phase, RankState, SliceSpec, StateSlice

__all__ = [
    "TINY",
    "Alone",
    "Journal",
    "LateSnapshots",
    "NotingEngine",
    "NotingSnapshots",
    "NotingWatcher",
    "Scripted",
    "Threads",
    "TinyEngine",
    "microbatches",
]

TINY = ModelConfig(name="tiny", d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=32, max_seq_len=16)

Journal = list[str]
"""What happened, in order."""


def microbatches(step: int, *, count: int = 2, size: int = 2) -> list[Microbatch]:
    """The same for the same step. A tenth of the targets are no bytes."""
    draw = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(259, (count, size, 11), generator=draw)
    return [(part[:, :-1], part[:, 1:], int(part[:, 1:].numel() * 0.9)) for part in text]


# -- a real engine ----------------------------------------------------------------------------------------------------


class TinyEngine(OneByOne):
    """A decoder with 8-bit AdamW on one rank. The loss is multiplied by noise from torch's default generator."""

    def __init__(self, seed: int = 0, *, accumulation: int = 2, noise: float = 0.0) -> None:
        self.model = Decoder(TINY)
        initialise(self.model, seed)
        self.optimizer = AdamW8bit(self.model.parameters(), min_8bit_size=1024, weight_decay=0.1)
        self.optimizer.ensure_state()
        self._accumulation, self._noise = accumulation, noise

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens, targets)
        return loss * (1 + self._noise * torch.rand(())) if torch.is_grad_enabled() else loss

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def update(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train()

    def slices(self) -> list[StateSlice]:
        found = []
        for name, parameter in self.model.named_parameters():
            kept = [(s.key, s.tensor) for s in optim.describe_state(self.optimizer, parameter)]
            found += [_slice(f"{name}/{key}", tensor) for key, tensor in [("master", parameter.data), *kept]]
        return found

    def scalars(self) -> dict[str, object]:
        return {name: optim.scalars(self.optimizer, p) for name, p in self.model.named_parameters()}

    def load_scalars(self, scalars: Mapping[str, object]) -> None:
        for name, parameter in self.model.named_parameters():
            optim.load_scalars(self.optimizer, parameter, cast(Mapping[str, object], scalars[name]))

    def refresh(self) -> None:
        self.optimizer.zero_grad()

    def bits(self) -> dict[str, bytes]:
        """Every byte of the state by slice."""
        return {s.spec.name: s.tensor.view(torch.uint8).numpy().tobytes() for s in self.slices()}


def _slice(name: str, tensor: Tensor) -> StateSlice:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StateSlice(SliceSpec(name, tuple(tensor.shape), 0, tensor.numel(), dtype), tensor.view(-1))


class LateSnapshots(MemorySnapshotter):
    """Copies only when it has to, in ``fence``: a state that changed before that is stored changed."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: tuple[RankState, int] | None = None

    def offer(self, state: RankState, version: int) -> bool:
        self._waiting = (state, version)
        return True

    def fence(self) -> CopyReport:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            super().offer(*waiting)
        return super().fence()


# -- peers ------------------------------------------------------------------------------------------------------------


class Alone:
    """A world of one rank."""

    world = 1

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]


class Scripted:
    """A world whose other ranks contribute what ``others`` says, call by call; the last entry goes on for ever."""

    def __init__(self, world: int, others: Sequence[Sequence[float]], journal: Journal | None = None) -> None:
        self.world, self._others, self._journal = world, list(others), journal
        self.calls = 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        others = [*self._others[min(self.calls, len(self._others) - 1)]]
        others += [self.world - 1.0] * (len(values) - len(others))  # there is room for the next version
        self.calls += 1
        if self._journal is not None:
            self._journal.append("sum")
        return [a + b for a, b in zip(values, others, strict=True)]


class Threads:
    """Ranks in threads of this process. A rank that raises breaks the barrier under the others."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._barrier = threading.Barrier(world, timeout=10.0)
        self._posted: dict[int, Sequence[float]] = {}
        self._rank = threading.local()

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        self._posted[self._rank.number] = values
        self._barrier.wait()
        sums = [sum(column) for column in zip(*(self._posted[r] for r in range(self.world)), strict=True)]
        self._barrier.wait()  # nobody posts again before everybody has read
        return sums

    def run(self, body: Callable[[int], object]) -> list[object]:
        """``body(rank)`` on every rank; the results, or the first error that is not a broken barrier."""
        results: list[object] = [None] * self.world
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self._rank.number = rank
            try:
                results[rank] = body(rank)
            except BaseException as error:  # a thread boundary: raised again below
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return results


# -- stand-ins that write down ----------------------------------------------------------------------------------------


class NotingEngine(OneByOne):
    """Scripted losses; the weight counts updates."""

    def __init__(self, journal: Journal, losses: Sequence[float] = (2.0,)) -> None:
        self._journal, self._losses = journal, list(losses)
        self.weight = torch.zeros(3)
        self.rates: list[float] = []

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self._journal.append("loss")
        return torch.tensor(self._losses.pop(0) if len(self._losses) > 1 else self._losses[0])

    def backward(self, loss: Tensor) -> None:
        self._journal.append("backward")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def update(self, lr: float) -> float:
        self._journal.append("update")
        self.rates.append(lr)
        self.weight += 1
        return 0.5

    def slices(self) -> list[StateSlice]:
        return [_slice("weight", self.weight)]

    def scalars(self) -> dict[str, object]:
        return {"updates": len(self.rates)}

    def load_scalars(self, scalars: Mapping[str, object]) -> None:
        self._journal.append(f"scalars {dict(scalars)}")

    def refresh(self) -> None:
        self._journal.append("refresh")


class NotingSnapshots:
    """Has room for every version but those in ``skips``, for which it has none as often as they are listed."""

    def __init__(self, journal: Journal, *, skips: Sequence[int] = (), fence_s: float = 0.0) -> None:
        self._journal, self._skips, self._fence_s = journal, list(skips), fence_s
        self.offered: list[int] = []
        self.held: list[int] = []
        self.committed: list[int] = []
        self.scalars: dict[int, Mapping[str, object]] = {}
        self._open = -1

    def has_room(self, version: int) -> bool:
        if version in self._skips:
            self._skips.remove(version)
            return False
        return True

    def offer(self, state: RankState, version: int) -> bool:
        self._journal.append(f"offer {version}")
        self.offered.append(version)
        assert version not in self.held, "a version is offered again although it is held"
        self.held.append(version)
        self.scalars[version] = state.scalars
        self._open = version
        return True

    def fence(self) -> CopyReport:
        self._journal.append("fence")
        version, self._open = self._open, -1
        return CopyReport(version, version >= 0, self._fence_s)

    def commit(self, version: int) -> None:
        self._journal.append(f"commit {version}")
        assert version in self.held, "a version is committed that is not held"
        self.committed.append(version)

    @property
    def newest_committed(self) -> int:
        return max(self.committed, default=-1)

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]:
        self._journal.append(f"restore {version}")
        assert version in self.held, "a version is restored that is not held"
        return self.scalars[version]


class NotingWatcher(MemoryWatcher):
    """Writes phases and checks down; ``check`` raises what ``interruptions`` says for a journal entry."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal
        self.interruption: BaseException | None = None

    def enter(self, phase: Phase, step: int) -> None:
        super().enter(phase, step)
        self._journal.append(f"{phase.name} {step}")

    def check(self) -> None:
        self._journal.append("check")
        if self.interruption is not None:
            raise self.interruption
