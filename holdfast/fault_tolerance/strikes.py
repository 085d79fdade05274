"""How a process suffers what a schedule has for it: at its failpoints, once each, noted in the ledger before."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from holdfast import failpoints
from holdfast.fault_tolerance.chaos import Action, ChaosFault, Target
from holdfast.fault_tolerance.ledger import Ledger

__all__ = ["Act", "ChaosException", "arm", "strike"]

logger = logging.getLogger(__name__)

_FOR_A_LONG_TIME_S = 3600.0

Act = Callable[[ChaosFault], object]


class ChaosException(Exception):
    """Raised by the action ``exception``. No :class:`Fault`, because it stands for errors that nobody foresaw."""


def arm(
    faults: Sequence[ChaosFault],
    target: Target,
    number: int,
    ledger: Ledger,
    own: Mapping[Action, Act] | None = None,
) -> None:
    """Let this process, which is ``target`` ``number``, suffer its part of the schedule, and nothing else that was
    armed. ``own`` are actions that only this kind of process can carry out."""
    mine: dict[str, list[ChaosFault]] = {}
    for fault in faults:
        if fault.target is target and fault.at and (fault.rate is not None or fault.number == number):
            mine.setdefault(fault.at, []).append(fault)
    for name in failpoints.NAMES:
        if name in mine:
            failpoints.arm(name, _hook(mine[name], number, ledger, own or {}))
        else:
            failpoints.disarm(name)


def strike(fault: ChaosFault, own: Mapping[Action, Act]) -> None:
    """Now; it has been noted."""
    logger.warning("chaos: %s", fault)
    {**_ACTS, **own}[fault.action](fault)


def _hook(entries: Sequence[ChaosFault], number: int, ledger: Ledger, own: Mapping[Action, Act]) -> failpoints.Hook:
    def hook(name: str, step: int) -> None:
        for entry in entries:
            fault = entry.due(number, step)
            if fault is not None and ledger.claim(fault, step):
                strike(fault, own)

    return hook


def _send_self(number: signal.Signals) -> Act:
    return lambda _: os.kill(os.getpid(), number)


def _raise(fault: ChaosFault) -> NoReturn:
    raise ChaosException(f"injected by {fault.source.partition(':')[0]}")


def _segfault(_: ChaosFault) -> None:
    ctypes.string_at(0)


def _run_out_of_memory(_: ChaosFault) -> None:
    """What a kernel log and a shell show of its killer; no memory is taken, which others on the machine need."""
    sys.stderr.write(f"Out of memory: Killed process {os.getpid()} ({os.path.basename(sys.executable)})\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(_: ChaosFault) -> NoReturn:
    while True:
        time.sleep(_FOR_A_LONG_TIME_S)


def _hang_with_the_interpreter(_: ChaosFault) -> None:
    ctypes.PyDLL(None).sleep(int(_FOR_A_LONG_TIME_S))  # PyDLL keeps the GIL during the call, CDLL would not


def _jump_the_clock(fault: ChaosFault) -> None:
    """For all Python code of this process. Durations and deadlines are measured by a monotonic clock, which no
    administrator can set: see holdfast.clock."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + fault.by_s
    time.time_ns = lambda: now_ns() + int(fault.by_s * 1e9)


_ACTS: Mapping[Action, Act] = {
    Action.SIGKILL: _send_self(signal.SIGKILL),
    Action.SIGTERM: _send_self(signal.SIGTERM),
    Action.SIGSTOP: _send_self(signal.SIGSTOP),
    Action.EXCEPTION: _raise,
    Action.ABORT: lambda _: os.abort(),
    Action.SEGV: _segfault,
    Action.OOM: _run_out_of_memory,
    Action.EXIT: lambda _: os._exit(1),
    Action.HANG: _hang,
    Action.GIL_HANG: _hang_with_the_interpreter,
    Action.CLOCK_JUMP: _jump_the_clock,
    Action.KEEPER_SIGKILL: _send_self(signal.SIGKILL),
    Action.KEEPER_SIGSTOP: _send_self(signal.SIGSTOP),
    Action.KEEPER_SEGV: _segfault,
    Action.KEEPER_EXCEPTION: _raise,
    Action.DRIVER_SIGKILL: _send_self(signal.SIGKILL),
    Action.DRIVER_SIGTERM: _send_self(signal.SIGTERM),
}
