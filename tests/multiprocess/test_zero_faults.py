"""A rank is lost in the middle of a step: the others leave, free everything, and train on, in the same process, with a
newcomer."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from holdfast.parallel.comms import TorchCommunicator, broken_collective
from holdfast.parallel.zero import ZeroEngine
from holdfast.types import SliceSpec
from tests.support.local_cluster import LocalCluster, Member
from tests.support.zero_engines import Plain, Setup, copy_of, join, live_bytes, ragged_steps, text, whole_state

_CLUSTER = LocalCluster(deadline_s=40.0)
_LOST, _NEWCOMER, _WORLD = 2, 3, 3
_STEPS = 3


@dataclass(frozen=True)
class _Escape:
    """How a survivor got out."""

    message: str
    is_known: bool
    after_abort_s: float
    """Negative: it noticed the loss by itself."""
    closing_s: float
    left_bytes: int


_State = list[tuple[SliceSpec, Tensor]]


def _run(member: Member, setup: Setup, moment: str, fault: int) -> tuple[_Escape | None, _State]:
    if member.rank == _NEWCOMER:
        return None, _train_on(member, setup, rank=_LOST)
    return _escape(member, setup, moment, fault), _train_on(member, setup, rank=member.rank)


def _escape(member: Member, setup: Setup, moment: str, fault: int) -> _Escape:
    comm = join(member, world=_WORLD)
    _step(setup.build(), setup).close()
    gc.collect()
    gc.freeze()
    engine = None if moment == "build" else _step(setup.build(), setup)
    comm.all_reduce_sum([0.0])
    if member.rank == _LOST:
        if engine is not None:
            _until(engine, setup, moment)
        os.kill(os.getpid(), fault)
    aborter = _Aborter(comm)
    try:
        engine = engine or setup.build()
        _step(engine, setup)
        engine.full_weights()
        raise AssertionError("nothing is broken")
    except RuntimeError as error:
        message, is_known, woken_s = str(error), broken_collective(error), time.monotonic()
        if engine is not None:
            engine.close()
        comm.close()
        closing_s = time.monotonic() - woken_s
    aborter.join()
    del engine
    return _Escape(message, is_known, woken_s - aborter.aborted_s, closing_s, live_bytes())


def _train_on(member: Member, setup: Setup, *, rank: int) -> _State:
    """Collective. A fresh engine in the next epoch."""
    comm = join(member, "next", rank=rank, world=_WORLD)
    ragged = replace(setup, is_ragged=True)
    engine = ragged.build()
    ragged_steps(engine, ragged, range(_STEPS))
    state = copy_of(engine.slices())
    engine.close()
    comm.close()
    return state


def _until(engine: ZeroEngine, setup: Setup, moment: str) -> None:
    """A step up to this moment."""
    if moment == "loss":
        return
    for micro in range(setup.accumulation):
        loss = engine.loss(*text(0, batch=1))
        if moment == "backward" and micro == setup.accumulation - 1:
            return
        engine.backward(loss)
    if moment == "full_weights":
        engine.update(setup.lr)


def _step(engine: ZeroEngine, setup: Setup) -> ZeroEngine:
    for _ in range(setup.accumulation):
        engine.backward(engine.loss(*text(0, batch=1)))
    engine.update(setup.lr)
    return engine


class _Aborter(threading.Thread):
    """Whoever watches the ranks."""

    def __init__(self, comm: TorchCommunicator) -> None:
        super().__init__()
        self._comm = comm
        self.start()

    def run(self) -> None:
        time.sleep(0.5)
        self.aborted_s = time.monotonic()
        self._comm.abort()


@pytest.mark.parametrize(
    ("stage", "moment", "fault"),
    [
        (0, "backward", signal.SIGKILL),
        (1, "update", signal.SIGSTOP),
        (1, "full_weights", signal.SIGKILL),
        (2, "backward", signal.SIGSTOP),
        (2, "update", signal.SIGKILL),
        (3, "build", signal.SIGSTOP),
        (3, "loss", signal.SIGKILL),
        (3, "backward", signal.SIGSTOP),
        (3, "full_weights", signal.SIGSTOP),
    ],
)
def test_survivors_leave_free_everything_and_train_on_with_a_newcomer(stage: int, moment: str, fault: int) -> None:
    setup = Setup(stage, is_ragged=False)
    results = _CLUSTER.run(_run, _WORLD + 1, setup, moment, fault, lost={_LOST})
    for escape, _ in results[:_LOST]:
        assert escape.is_known, escape.message
        assert escape.after_abort_s < 1.0
        assert escape.closing_s < 1.0
        # A thread of gloo that has had nothing to do since may still hold the last tensor it sent.
        assert escape.left_bytes <= max(4 * parameter.numel() for parameter in setup.model().parameters())
    plain = Plain(replace(setup, is_ragged=True))
    for step in range(_STEPS):
        plain.step([(torch.full((1, 1), step),) * 2])
    have, want = whole_state([result[1] for result in results if result is not None]), plain.state()
    assert have.keys() == want.keys() and all(torch.equal(have[name], want[name]) for name in want)
