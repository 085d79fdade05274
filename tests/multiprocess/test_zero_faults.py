"""A rank is lost in the middle of a step: the others leave it, free everything, and train on in the same process."""

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
_SURVIVORS, _STEPS = 2, 3


@dataclass(frozen=True)
class _Escape:
    """How a survivor got out."""

    message: str
    is_known: bool
    after_abort_s: float
    """Negative: it noticed the loss by itself."""
    closing_s: float
    left_bytes: int
    state: list[tuple[SliceSpec, Tensor]]
    """After some steps of the survivors alone."""


def _survive(member: Member, setup: Setup, moment: str, fault: int) -> _Escape:
    comm = join(member)
    _train(setup.build(), setup).close()
    gc.collect()
    gc.freeze()
    engine = _train(setup.build(), setup)
    comm.all_reduce_sum([0.0])
    if member.rank == _SURVIVORS:
        _until(engine, setup, moment)
        os.kill(os.getpid(), fault)
    aborter = _Aborter(comm)
    try:
        _train(engine, setup)
        engine.full_weights()
        raise AssertionError("nothing is broken")
    except RuntimeError as error:
        message, is_known, woken_s = str(error), broken_collective(error), time.monotonic()
        engine.close()
        comm.close()
        closing_s = time.monotonic() - woken_s
    aborter.join()
    del engine
    left_bytes = live_bytes()

    comm = join(member, "next", world=_SURVIVORS)
    ragged = replace(setup, is_ragged=True)
    engine = ragged.build()
    ragged_steps(engine, ragged, range(_STEPS))
    state = copy_of(engine.slices())
    engine.close()
    comm.close()
    return _Escape(message, is_known, woken_s - aborter.aborted_s, closing_s, left_bytes, state)


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


def _train(engine: ZeroEngine, setup: Setup) -> ZeroEngine:
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
        (3, "loss", signal.SIGKILL),
        (3, "backward", signal.SIGSTOP),
        (3, "full_weights", signal.SIGSTOP),
    ],
)
def test_survivors_leave_the_step_free_everything_and_train_on(stage: int, moment: str, fault: int) -> None:
    setup = Setup(stage, is_ragged=False)
    escapes = _CLUSTER.run(_survive, _SURVIVORS + 1, setup, moment, fault, lost={_SURVIVORS})[:_SURVIVORS]
    for escape in escapes:
        assert escape.is_known, escape.message
        assert escape.after_abort_s < 1.0
        assert escape.closing_s < 1.0
        assert escape.left_bytes == 0
    plain = Plain(replace(setup, is_ragged=True))
    for step in range(_STEPS):
        plain.step([(torch.full((1, 1), step),) * 2])
    have, want = whole_state([escape.state for escape in escapes]), plain.state()
    assert have.keys() == want.keys() and all(torch.equal(have[name], want[name]) for name in want)
