"""Faults on purpose: a schedule of entries such as ``sigkill rank=1 step=150 at=step.after_backward``.

``ACTION rank=R step=S [at=FAILPOINT]`` happens in the worker of rank R when it reaches the failpoint (``step.begin``
unless told otherwise) with exactly S steps finished; at a ``recovery.`` failpoint S is the version it restores.
``keeper_sigkill node=N step=S`` is for the driver: it kills the keeper of node N once S steps are finished.

Each entry happens at most once per run, although the step is repeated after the recovery: before entry i acts, mark i
is set where it outlives the worker.
"""

from __future__ import annotations

import ctypes
import difflib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn, Protocol

from holdfast import failpoints
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.board import MAX_FAULTS

__all__ = ["Action", "Board", "ChaosException", "ChaosFault", "Target", "arm", "parse", "parse_all"]

logger = logging.getLogger(__name__)

_DEFAULT_AT = "step.begin"
_KEEPER_PREFIX = "keeper_"
_FOR_A_LONG_TIME_S = 3600.0


class Action(str, Enum):
    """Ways to die, or to seem dead."""

    SIGKILL = "sigkill"
    """Gone without a word."""
    SIGTERM = "sigterm"
    """Asked to go, as a scheduler does."""
    SIGSTOP = "sigstop"
    """Frozen: alive for the operating system, silent for everybody else."""
    EXCEPTION = "exception"
    """An error in somebody's code."""
    ABORT = "abort"
    """SIGABRT, as a failed C++ assertion."""
    EXIT = "exit"
    """The process ends by itself, status 1, without any clean-up."""
    HANG = "hang"
    """The training thread sleeps for ever; heartbeats go on."""
    GIL_HANG = "gil_hang"
    """The training thread sleeps with the interpreter locked; heartbeats stop."""


class Target(str, Enum):
    """Whose process it is."""

    WORKER = "worker"
    KEEPER = "keeper"


@dataclass(frozen=True, slots=True)
class ChaosFault:
    """One entry of the schedule."""

    action: Action
    number: int
    """Rank of the worker, or node of the keeper."""
    step: int
    """Steps finished when it happens."""
    at: str = _DEFAULT_AT
    target: Target = Target.WORKER

    def __str__(self) -> str:
        if self.target is Target.KEEPER:
            return f"{_KEEPER_PREFIX}{self.action.value} node={self.number} step={self.step}"
        return f"{self.action.value} rank={self.number} step={self.step} at={self.at}"


class Board(Protocol):
    """Remembers what has happened, beyond the death of the process that asks."""

    def mark_fired(self, fault: int, /) -> None: ...

    def has_fired(self, fault: int, /) -> bool: ...


class ChaosException(Exception):
    """Raised by the action ``exception``. No :class:`Fault`, because it stands for errors that nobody foresaw."""


# -- reading ----------------------------------------------------------------------------------------------------------


def parse(entry: str) -> ChaosFault:
    """Read one entry. Raises: ConfigurationError with everything that is wrong with it."""
    words = entry.split()
    word, pairs = (words[0] if words else ""), words[1:]
    is_keeper = word.startswith(_KEEPER_PREFIX)
    allowed = ("node", "step") if is_keeper else ("rank", "step", "at")
    problems = _unknown_action(word) + _unknown_keys(pairs, allowed)
    values = {key: value for key, _, value in (pair.partition("=") for pair in pairs) if key in allowed}
    number, step = _natural(values, allowed[0], problems), _natural(values, "step", problems)
    at = values.get("at", _DEFAULT_AT)
    problems += _unknown_failpoint(at)
    if problems:
        raise ConfigurationError([f"chaos fault {entry!r}: {problem}" for problem in problems])
    action = Action(word.removeprefix(_KEEPER_PREFIX))
    return ChaosFault(action, number, step, at, Target.KEEPER if is_keeper else Target.WORKER)


def parse_all(entries: Sequence[str]) -> tuple[ChaosFault, ...]:
    """Read a schedule. Raises: ConfigurationError with the problems of all entries."""
    faults, problems = list[ChaosFault](), list[str]()
    for entry in entries:
        try:
            faults.append(parse(entry))
        except ConfigurationError as error:
            problems += error.problems
    if len(entries) > MAX_FAULTS:
        problems.append(f"chaos.faults has {len(entries)} entries, at most {MAX_FAULTS} fit into one run")
    if problems:
        raise ConfigurationError(problems)
    return tuple(faults)


def _unknown_action(word: str) -> list[str]:
    known = [*(action.value for action in Action), f"{_KEEPER_PREFIX}{Action.SIGKILL.value}"]
    return [] if word in known else [f"action {word!r} does not exist; {_hint(word, known)}"]


def _unknown_keys(pairs: Iterable[str], allowed: Sequence[str]) -> list[str]:
    keys = [pair.partition("=")[0] for pair in pairs]
    problems = [f"{key!r} is unknown; {_hint(key, allowed)}" for key in keys if key not in allowed]
    return problems + [f"{key} is given twice" for key in allowed if keys.count(key) > 1]


def _unknown_failpoint(name: str) -> list[str]:
    try:
        failpoints.check_name(name)
    except ConfigurationError as error:
        return list(error.problems)
    return []


def _natural(values: Mapping[str, str], key: str, problems: list[str]) -> int:
    """The value of ``key``; a missing or impossible one is noted, and is -1."""
    value = values.get(key)
    if value is not None and value.isascii() and value.isdigit():
        return int(value)
    problems.append(f"{key}= is missing" if value is None else f"{key}={value} must be a whole number, 0 or more")
    return -1


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"


# -- acting -----------------------------------------------------------------------------------------------------------


def arm(faults: Sequence[ChaosFault], rank: int, board: Board) -> None:
    """Let this process, which works as ``rank``, suffer its part of the schedule. Replaces hooks at the same places."""
    mine: dict[str, list[tuple[int, ChaosFault]]] = {}
    for mark, fault in enumerate(faults):
        if fault.target is Target.WORKER and fault.number == rank:
            mine.setdefault(fault.at, []).append((mark, fault))
    for name, due in mine.items():
        failpoints.arm(name, _hook(due, board))


def _hook(due: Sequence[tuple[int, ChaosFault]], board: Board) -> failpoints.Hook:
    def strike(name: str, step: int) -> None:
        for mark, fault in due:
            if step == fault.step and not board.has_fired(mark):
                board.mark_fired(mark)  # first: most actions do not return
                logger.warning("chaos: %s", fault)
                _ACTIONS[fault.action]()

    return strike


def _raise() -> NoReturn:
    raise ChaosException("injected by chaos.faults")


def _hang() -> NoReturn:
    while True:
        time.sleep(_FOR_A_LONG_TIME_S)


def _hang_with_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(int(_FOR_A_LONG_TIME_S))  # PyDLL keeps the GIL during the call, CDLL would not


_ACTIONS: Mapping[Action, Callable[[], object]] = {
    Action.SIGKILL: lambda: os.kill(os.getpid(), signal.SIGKILL),
    Action.SIGTERM: lambda: os.kill(os.getpid(), signal.SIGTERM),
    Action.SIGSTOP: lambda: os.kill(os.getpid(), signal.SIGSTOP),
    Action.EXCEPTION: _raise,
    Action.ABORT: os.abort,
    Action.EXIT: lambda: os._exit(1),
    Action.HANG: _hang,
    Action.GIL_HANG: _hang_with_the_interpreter,
}
