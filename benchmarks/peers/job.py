"""What the peers of ``recovery_peers.py`` train, with torch alone: the main job's decoder, data and schedule.

The two scripts beside it differ in how they start, save and resume. Everything they measure is written here, the same
for both: a line for each step that a rank has finished, and one for each kill just before it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from holdfast.optim.config import OptimConfig
from holdfast.optim.schedules import learning_rate
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.data import Batches
from holdfast.trainer.model import Decoder, initialise

__all__ = ["RANKS", "VICTIM", "Diary", "Finished", "Kill", "Task", "Training", "read_finished", "read_kills"]

RANKS = 3
VICTIM = 1


@dataclass(frozen=True, slots=True)
class Task:
    """What to train, and where to write about it; the same for every rank and every start."""

    folder: str
    """Of this run; empty at its first start."""
    store: str
    """Directory of the token store."""
    steps: int
    kills: tuple[int, ...]
    """Rank ``VICTIM`` dies after this many finished steps, in the backward pass of the next; once each."""
    seed: int
    seq_len: int
    global_batch: int
    model: Mapping[str, Any]
    """Fields of ``ModelConfig``."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float
    lr: float
    warmup_steps: int
    min_lr_ratio: float

    @classmethod
    def read(cls, path: str | Path) -> Task:
        return cls(**json.loads(Path(path).read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    def learning_rate(self, step: int) -> float:
        rule = OptimConfig(lr=self.lr, warmup_steps=self.warmup_steps, min_lr_ratio=self.min_lr_ratio)
        return learning_rate(rule, step, self.steps)


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill, noted just before it."""

    time: float
    """Seconds of the wall clock."""
    step: int
    """Steps finished."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that one rank, or every rank, has finished."""

    time: float
    """Seconds of the wall clock."""
    step: int
    life: int
    """Which start of the ranks made it: kills before it, for the peers; the epoch, for holdfast."""
    loss: float
    """Of this rank's share of the batch, or of the whole; nats per token."""


class Diary:
    """What one rank writes below the task's folder; every line is in its file when a method returns."""

    def __init__(self, task: Task, rank: int) -> None:
        self._folder, self._rank, self._kills = Path(task.folder), rank, task.kills
        self._killed = [kill.step for kill in read_kills(self._folder)]
        self._append("starts", life=self._life)

    def finished(self, step: int, loss: float) -> None:
        self._append("steps", time=time.time(), step=step, life=self._life, loss=loss)

    def die_if_due(self, step: int) -> None:
        if self._rank == VICTIM and step in self._kills and step not in self._killed:
            self._append("kills", time=time.time(), step=step)
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def _life(self) -> int:
        return len(self._killed)

    def _append(self, kind: str, **record: float) -> None:
        with open(self._folder / f"{kind}.rank{self._rank}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


class Training:
    """Collective. The state of one rank, fresh from the seed, and its steps."""

    def __init__(self, task: Task, rank: int) -> None:
        self.step, self._task, self._diary = 0, task, Diary(task, rank)
        model = Decoder(ModelConfig(**task.model))
        initialise(model, task.seed)
        self._net = DistributedDataParallel(model)
        self._optimizer = _adamw(model, task)
        self._batches = Batches.open(
            task.store,
            seed=task.seed,
            seq_len=task.seq_len,
            global_batch=task.global_batch,
            micro_batch=task.global_batch // RANKS,
            rank=rank,
            world=dist.get_world_size(),
        )

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, for ``torch.save``."""
        return {"step": self.step, "model": self._net.module.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self._net.module.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def train_step(self) -> None:
        """Collective. The backward pass reduces the gradients; each rank then updates by itself."""
        ((tokens, targets, _),) = self._batches.microbatches(self.step)
        loss: Tensor = self._net(tokens, targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own, without annotations
        self._diary.die_if_due(self.step)
        nn.utils.clip_grad_norm_(self._net.parameters(), self._task.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._task.learning_rate(self.step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        self._diary.finished(self.step, float(loss.detach()))


def read_kills(folder: Path) -> list[Kill]:
    """Every kill of a run so far, in order."""
    return [Kill(**record) for record in _records(folder / f"kills.rank{VICTIM}.jsonl")]


def read_finished(folder: Path) -> list[Finished]:
    """The steps that every rank has finished, in order, each when its last rank had and with the loss of all.

    A step that some ranks finished while one died in it is none of them. Raises: RuntimeError if the ranks were
    started more often than somebody was killed, because the seconds would not be those of a kill.
    """
    lives = [record["life"] for record in _records(folder / "starts.rank0.jsonl")]
    if lives != sorted(set(lives)):
        raise RuntimeError(f"{folder}: the ranks were started again without a kill; lives {lives}")
    by_rank = [{(r["life"], r["step"]): r for r in _records(folder / f"steps.rank{n}.jsonl")} for n in range(RANKS)]
    by_all = sorted(set.intersection(*map(set, by_rank)))
    return [_of_all([records[key] for records in by_rank]) for key in by_all]


def _of_all(records: list[dict[str, Any]]) -> Finished:
    last = max(records, key=lambda record: float(record["time"]))
    return Finished(last["time"], last["step"], last["life"], sum(r["loss"] for r in records) / len(records))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def _adamw(model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """torch's fastest; vectors do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": task.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    first, second = task.betas
    return torch.optim.AdamW(groups, lr=task.lr, betas=(first, second), eps=task.eps, fused=True)
