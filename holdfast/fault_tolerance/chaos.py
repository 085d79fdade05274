"""Faults on purpose: entries such as ``sigkill rank=1 step=150 at=step.after_backward``, and when each is due. Pure.

``ACTION KEY=VALUE ...``: :data:`ACTIONS` has every action with whom it strikes and which keys it takes. An entry with
``step=S`` strikes once, with S steps finished: in a worker when it reaches the failpoint ``at`` with exactly S (at a
``recovery.`` failpoint S is the version it restores), at a ``keeper.`` failpoint with the first version from S on,
and whatever has no failpoint as soon as the driver sees that S steps are finished.

An entry with ``rate=P seed=K`` strikes each (rank, step) or (node, step) with probability P. Whether it does is a hash
of (seed, rank, step) and of nothing else, so that a schedule stays the same whatever happens in the run.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from holdfast import failpoints
from holdfast.errors import ConfigurationError
from holdfast.events import FaultInjected

__all__ = [
    "ACTIONS",
    "ALL",
    "NEXT",
    "Action",
    "ChaosFault",
    "Kind",
    "Rate",
    "Target",
    "draw",
    "parse",
    "parse_all",
]

ALL, NEXT = -1, -1
"""Instead of the number of a node: every one. Instead of a step: whichever comes next."""


class Action(str, Enum):
    """What is done; :data:`ACTIONS` says to whom."""

    SIGKILL = "sigkill"
    SIGTERM = "sigterm"
    SIGSTOP = "sigstop"
    EXCEPTION = "exception"
    ABORT = "abort"
    SEGV = "segv"
    OOM = "oom"
    EXIT = "exit"
    HANG = "hang"
    GIL_HANG = "gil_hang"
    NO_HEARTBEAT = "no_heartbeat"
    CLOCK_JUMP = "clock_jump"
    FLIP = "flip"
    KEEPER_SIGKILL = "keeper_sigkill"
    KEEPER_SIGSTOP = "keeper_sigstop"
    KEEPER_SEGV = "keeper_segv"
    KEEPER_EXCEPTION = "keeper_exception"
    NODE_SIGKILL = "node_sigkill"
    NODE_SIGSTOP = "node_sigstop"
    DRIVER_SIGKILL = "driver_sigkill"
    DRIVER_SIGTERM = "driver_sigterm"
    FLIP_FILE = "flip_file"
    TRUNCATE_FILE = "truncate_file"
    DISK_FULL = "disk_full"
    SLOW_DISK = "slow_disk"
    SLOW_LINK = "slow_link"


class Target(str, Enum):
    """Who suffers it."""

    WORKER = "worker"
    KEEPER = "keeper"
    NODE = "node"
    """A keeper and all workers of its node at once."""
    DRIVER = "driver"
    CHECKPOINT = "checkpoint"
    """The newest durable one."""
    STORAGE = "storage"
    """Writing durable checkpoints, in one keeper, or in all of them and the driver."""
    LINK = "link"
    """What a keeper, or every keeper, sends to its peers."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table of actions."""

    target: Target
    does: str
    at: str = ""
    """Failpoint unless told otherwise; without one the driver strikes when it sees the step."""
    takes: tuple[str, ...] = ()
    """Keys besides the number, ``step`` and what goes with ``rate``."""
    needs: tuple[str, ...] = ()
    """Those that cannot be left out."""
    what: tuple[str, ...] = ()
    """Values of ``what``, the default first."""

    @property
    def number_key(self) -> str:
        """``rank``, ``node``, or nothing."""
        return _NUMBER_KEYS[self.target]

    @property
    def keys(self) -> tuple[str, ...]:
        """All that an entry may have."""
        several = (f"{self.number_key}s",) if self.number_key else ()
        return tuple(dict.fromkeys((*self.single_keys, *self.takes, "rate", "seed", *several, "from", "to")))

    @property
    def single_keys(self) -> tuple[str, ...]:
        """Where and when an entry without a rate strikes."""
        return (self.number_key, "step") if self.number_key else ("step",)

    @property
    def optional_keys(self) -> frozenset[str]:
        """Those of an entry without a rate that can be left out."""
        number = {self.number_key} if self.target in _DEFAULT_NUMBERS else set[str]()
        return frozenset((*number, *self.takes)) - frozenset(self.needs)


_NUMBER_KEYS: Mapping[Target, str] = {
    Target.WORKER: "rank",
    Target.KEEPER: "node",
    Target.NODE: "node",
    Target.DRIVER: "",
    Target.CHECKPOINT: "rank",
    Target.STORAGE: "node",
    Target.LINK: "node",
}
_DEFAULT_NUMBERS: Mapping[Target, int] = {
    Target.DRIVER: 0,
    Target.CHECKPOINT: 0,
    Target.STORAGE: ALL,
    Target.LINK: ALL,
}
"""Of targets whose number may be left out."""


def _worker(does: str, *takes: str, needs: tuple[str, ...] = (), what: tuple[str, ...] = ()) -> Kind:
    return Kind(Target.WORKER, does, "step.begin", ("at", *takes), needs, what)


ACTIONS: Mapping[Action, Kind] = {
    Action.SIGKILL: _worker("gone without a word"),
    Action.SIGTERM: _worker("asked to go, as a scheduler does"),
    Action.SIGSTOP: _worker("frozen: alive for the operating system, silent for everybody else"),
    Action.EXCEPTION: _worker("an error in somebody's code"),
    Action.ABORT: _worker("SIGABRT, as a failed C++ assertion"),
    Action.SEGV: _worker("a real segmentation fault: memory is read that is not there"),
    Action.OOM: _worker("the kernel's line about a lack of memory, then SIGKILL, seen outside as exit code 137"),
    Action.EXIT: _worker("the process ends by itself, status 1, without any clean-up"),
    Action.HANG: _worker("the training thread sleeps for ever; heartbeats go on"),
    Action.GIL_HANG: _worker("the training thread sleeps with the interpreter locked; heartbeats stop"),
    Action.NO_HEARTBEAT: _worker("the heartbeat thread is silent for so long (0: for ever); training goes on", "for"),
    Action.CLOCK_JUMP: _worker("wall-clock time jumps by so many seconds", "by", needs=("by",)),
    Action.FLIP: _worker(
        "a bit of its newest snapshot in keeper memory flips; of parity, when the driver sees the step",
        *("what", "bit", "seed"),
        what=("data", "manifest", "parity"),
    ),
    Action.KEEPER_SIGKILL: Kind(Target.KEEPER, "gone, and the memory of its node's ranks with it", takes=("at",)),
    Action.KEEPER_SIGSTOP: Kind(Target.KEEPER, "frozen", takes=("at",)),
    Action.KEEPER_SEGV: Kind(Target.KEEPER, "a real segmentation fault", takes=("at",)),
    Action.KEEPER_EXCEPTION: Kind(Target.KEEPER, "an error while it protects a version", "keeper.mid_encode", ("at",)),
    Action.NODE_SIGKILL: Kind(Target.NODE, "keeper and workers are gone at once"),
    Action.NODE_SIGSTOP: Kind(Target.NODE, "keeper and workers are frozen at once"),
    Action.DRIVER_SIGKILL: Kind(Target.DRIVER, "gone, and with it a run of forked processes; resume continues it"),
    Action.DRIVER_SIGTERM: Kind(Target.DRIVER, "the graceful stop: state is saved, exit code 75"),
    Action.FLIP_FILE: Kind(
        Target.CHECKPOINT,
        "a bit of a rank's file, or of the commit record, flips",
        takes=("what", "bit", "seed"),
        what=("data", "manifest", "record"),
    ),
    Action.TRUNCATE_FILE: Kind(
        Target.CHECKPOINT,
        "the second half of a file is gone",
        takes=("what",),
        what=("data", "manifest", "record"),
    ),
    Action.DISK_FULL: Kind(Target.STORAGE, "no space left for so long", takes=("for",), needs=("for",)),
    Action.SLOW_DISK: Kind(
        Target.STORAGE, "writes at this rate for so long", takes=("mb_per_s", "for"), needs=("mb_per_s", "for")
    ),
    Action.SLOW_LINK: Kind(
        Target.LINK, "bulk data at this rate for so long", takes=("mb_per_s", "for"), needs=("mb_per_s", "for")
    ),
}
"""Every action. Seconds in ``for`` and ``by``, 10^6 bytes per second in ``mb_per_s``."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Strikes by chance, the same ones in each run."""

    share: float
    """Probability per rank or node and step."""
    seed: int = 0
    numbers: tuple[int, int] | None = None
    """First and last rank or node; None is every one."""
    first: int = 0
    last: int | None = None
    """Steps finished; None is the end of the run."""

    def strikes(self, number: int, step: int) -> bool:
        """Whether it strikes there. Depends on nothing else."""
        low, high = self.numbers or (number, number)
        is_inside = low <= number <= high and self.first <= step <= (math.inf if self.last is None else self.last)
        return is_inside and draw(self.seed, number, step) < self.share * 2**64


def draw(*counters: int) -> int:
    """64 bits, evenly distributed over different ``counters`` and the same for the same ones."""
    text = "/".join(map(str, counters)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class ChaosFault:
    """One entry of a schedule."""

    action: Action
    number: int = ALL
    """Rank of the worker, or node of the keeper."""
    step: int = NEXT
    """Steps finished when it happens."""
    at: str = ""
    """Failpoint; empty for what the driver does itself."""
    what: str = ""
    bit: int | None = None
    """None for one that the seed chooses."""
    seed: int = 0
    by_s: float = 0.0
    for_s: float = 0.0
    mb_per_s: float = 0.0
    rate: Rate | None = None
    """Instead of number and step."""
    source: str = field(default="", compare=False)
    """Who wants it; tells equal entries apart."""

    @property
    def kind(self) -> Kind:
        return ACTIONS[self.action]

    @property
    def target(self) -> Target:
        return self.kind.target

    def due(self, number: int, step: int) -> ChaosFault | None:
        """What strikes rank or node ``number`` with ``step`` steps finished: an entry without a rate, or nothing."""
        if self.rate is not None:
            is_due = self.rate.strikes(number, step)
            return replace(self, number=number, step=step, rate=None) if is_due else None
        # Keepers may leave versions out, and the driver sees some steps only when the next is finished.
        is_time = step == self.step if self.target is Target.WORKER and self.at else step >= self.step
        return self if self.number == number and (self.step == NEXT or is_time) else None

    def injected(self, step: int) -> FaultInjected:
        """The event of an entry that is due."""
        return FaultInjected(self.action.value, self.target.value, self.number, step, self.at, self.source)

    def __str__(self) -> str:
        return " ".join([self.action.value, *(f"{key}={value}" for key, value in _shown(self))])


def _shown(fault: ChaosFault) -> Iterable[tuple[str, object]]:
    """Keys in the order of the table; what was left out and has a default, except the failpoint, stays out."""
    kind, rate = fault.kind, fault.rate
    if rate is None:
        if kind.number_key and fault.number != _DEFAULT_NUMBERS.get(kind.target):
            yield kind.number_key, fault.number
        if fault.step != NEXT:
            yield "step", fault.step
    values: dict[str, object] = {"at": fault.at, "what": fault.what, "bit": fault.bit}
    values |= {"by": fault.by_s, "for": fault.for_s, "mb_per_s": fault.mb_per_s}
    defaults = {"at": "", "what": next(iter(kind.what), ""), "bit": None, "by": 0.0, "for": 0.0, "mb_per_s": 0.0}
    own = [key for key in kind.takes if key in kind.needs or (key != "seed" and values[key] != defaults[key])]
    yield from ((key, values[key]) for key in own)
    if rate is not None:
        yield "rate", rate.share
    seed = fault.seed if rate is None else rate.seed
    if seed:
        yield "seed", seed
    if rate is not None:
        yield from _shown_bounds(rate, kind)


def _shown_bounds(rate: Rate, kind: Kind) -> Iterable[tuple[str, object]]:
    if rate.numbers is not None:
        yield f"{kind.number_key}s", f"{rate.numbers[0]}-{rate.numbers[1]}"
    if rate.first:
        yield "from", rate.first
    if rate.last is not None:
        yield "to", rate.last


# -- reading ----------------------------------------------------------------------------------------------------------


def parse(entry: str, *, source: str = "", any_step: bool = False) -> ChaosFault:
    """Read one entry; ``any_step`` lets ``step=`` be left out, which means the next one.

    Raises: ConfigurationError with everything that is wrong with it.
    """
    words = entry.split()
    word, pairs = (words[0] if words else ""), words[1:]
    kind = ACTIONS[_action(word)]
    problems = _unknown_action(word) + _unknown_keys(pairs, kind.keys)
    given = {key: value for key, _, value in (pair.partition("=") for pair in pairs) if key in kind.keys}
    values = _read(given, problems)
    problems += _missing(given, kind, any_step) + _wrong_failpoint(given.get("at"), kind)
    if "what" in given and given["what"] not in kind.what:
        problems.append(f"what={given['what']} is unknown; {_hint(given['what'], kind.what)}")
    if given.get("what") == "parity" and "at" in given:
        problems.append("at= does not go with what=parity, which lies in the keeper; leave it out")
    if problems:
        raise ConfigurationError([f"chaos fault {entry!r}: {problem}" for problem in problems])
    return _built(_action(word), kind, values, source)


def parse_all(entries: Sequence[str]) -> tuple[ChaosFault, ...]:
    """Read the schedule of ``chaos.faults``. Raises: ConfigurationError with the problems of all entries."""
    faults, problems, copies = list[ChaosFault](), list[str](), dict[str, int]()
    for entry in entries:
        try:
            fault = parse(entry)
        except ConfigurationError as error:
            problems += error.problems
            continue
        copies[str(fault)] = copy = copies.get(str(fault), 0) + 1
        faults.append(replace(fault, source=f"chaos.faults: {fault}{f' ({copy})' if copy > 1 else ''}"))
    if problems:
        raise ConfigurationError(problems)
    return tuple(faults)


def _built(action: Action, kind: Kind, values: Mapping[str, object], source: str) -> ChaosFault:
    """Every value has been checked."""
    found: dict[str, object] = {
        "what": values.get("what", next(iter(kind.what), "")),
        "at": values.get("at", kind.at),
        **{name: values[key] for key, name in _FIELDS.items() if key in values and key in kind.takes},
    }
    if found["what"] == "parity":  # a worker cannot reach it
        found["at"] = ""
    if "rate" in values:
        found["rate"] = _rate(kind, values)
    else:
        found |= {"number": values.get(kind.number_key, _DEFAULT_NUMBERS.get(kind.target, ALL))}
        found |= {"step": values.get("step", NEXT)}
    return ChaosFault(action, source=source, **found)  # type: ignore[arg-type]  # as the readers made them


def _rate(kind: Kind, values: Mapping[str, Any]) -> Rate:
    bounds = values.get(f"{kind.number_key}s")
    return Rate(values["rate"], values.get("seed", 0), bounds, values.get("from", 0), values.get("to"))


_FIELDS: Mapping[str, str] = {"bit": "bit", "seed": "seed", "by": "by_s", "for": "for_s", "mb_per_s": "mb_per_s"}


def _action(word: str) -> Action:
    """The one that is meant, or one like it: what is wrong besides the word can be told too."""
    if word in {action.value for action in Action}:
        return Action(word)
    prefixes = {"keeper": Action.KEEPER_SIGKILL, "node": Action.NODE_SIGKILL, "driver": Action.DRIVER_SIGKILL}
    return prefixes.get(word.replace("-", "_").partition("_")[0], Action.SIGKILL)


def _unknown_action(word: str) -> list[str]:
    known = [action.value for action in Action]
    return [] if word in known else [f"action {word!r} does not exist; {_hint(word, known)}"]


def _unknown_keys(pairs: Iterable[str], allowed: Sequence[str]) -> list[str]:
    keys = [pair.partition("=")[0] for pair in pairs]
    problems = [f"{key!r} is unknown; {_hint(key, allowed)}" for key in keys if key not in allowed]
    return problems + [f"{key} is given twice" for key in allowed if keys.count(key) > 1]


def _missing(given: Mapping[str, str], kind: Kind, any_step: bool) -> list[str]:
    """Also what does not go together."""
    problems = [f"{key}= is missing" for key in kind.needs if key not in given]
    several = [key for key in ("ranks", "nodes", "from", "to") if key in given]
    if "rate" in given:
        wrong = [key for key in kind.single_keys if key in given]
        return problems + [f"{key}= does not go with rate=, which has {key}s=, from= and to=" for key in wrong]
    problems += [f"{key}= goes with rate= only" for key in several]
    if "seed" in given and "seed" not in kind.takes:
        problems.append("seed= goes with rate= only")
    needed = {*kind.single_keys} - kind.optional_keys - ({"step"} if any_step else set())
    return [f"{key}= is missing" for key in kind.single_keys if key in needed and key not in given] + problems


def _wrong_failpoint(name: str | None, kind: Kind) -> list[str]:
    if name is None:
        return []
    try:
        failpoints.check_name(name)
    except ConfigurationError as error:
        return list(error.problems)
    is_for_keepers = name.startswith("keeper.")
    if is_for_keepers and kind.target is Target.WORKER:
        return [f"at={name} is reached by keepers only; use one of keeper_sigkill, keeper_sigstop, keeper_exception"]
    if not is_for_keepers and kind.target is Target.KEEPER:
        return [f"at={name} is reached by workers only; a keeper's failpoints begin with keeper."]
    return []


def _read(given: Mapping[str, str], problems: list[str]) -> dict[str, object]:
    """The values; impossible ones are noted."""
    values: dict[str, object] = {}
    for key, text in given.items():
        read, rule = _READERS.get(key, (str, ""))
        try:
            values[key] = read(text)
        except ValueError:
            problems.append(f"{key}={text} must be {rule}")
    return values


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _positive(text: str) -> float:
    number = _finite(text)
    if number <= 0:
        raise ValueError
    return number


def _share(text: str) -> float:
    number = _positive(text)
    if number > 1:
        raise ValueError
    return number


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    span = _natural(first), _natural(last or first)
    if span[0] > span[1]:
        raise ValueError
    return span


_Reader = tuple[Callable[[str], object], str]
_READERS: Mapping[str, _Reader] = {
    **dict.fromkeys(("rank", "node", "step", "bit", "seed", "from", "to"), (_natural, "a whole number, 0 or more")),
    **dict.fromkeys(("ranks", "nodes"), (_span, "a number or a range such as 0-2")),
    **dict.fromkeys(("for", "mb_per_s"), (_positive, "a number above 0")),
    "by": (_finite, "a number of seconds"),
    "rate": (_share, "a probability above 0, 1 at most"),
}


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
