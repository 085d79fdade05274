"""The values that the advice of ``holdfast plan`` depends on: their options, rules and assumptions. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["HOUR_S", "NODE_MTBF_H", "OPTIONS", "PROCESS_MTBF_H", "Numbers", "Option", "Value", "given_in", "resolved"]

HOUR_S = 3600.0
PROCESS_MTBF_H, NODE_MTBF_H = 720.0, 8760.0
"""Assumed mean hours between failures of one node; what a run has seen is added to them, see ``run_facts``."""

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Option:
    """One value that the advice depends on; ``--step-s`` sets ``step_s``."""

    name: str
    default: float | Callable[[Numbers], float]
    """Assumed without a measurement; a function of the values before it."""
    means: str
    low: float = 0.0
    high: float = math.inf
    is_whole: bool = False
    may_be_endless: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def rule(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        bounds = f"of at least {self.low:g}" if math.isinf(self.high) else f"from {self.low:g} to {self.high:g}"
        return f"{kind} {bounds}{', or inf' if self.may_be_endless else ''}"

    @property
    def assumed(self) -> str:
        """The default in words."""
        return _ASSUMED.get(self.name) or f"{self.default:g}"

    def read(self, word: str) -> float | None:
        """The number that ``word`` is, None if it breaks the rule."""
        try:
            number = float(word)
        except ValueError:
            return None
        is_allowed = self.low <= number <= self.high and (self.may_be_endless or not math.isinf(number))
        return number if is_allowed and not (self.is_whole and number % 1) else None


_ASSUMED = {
    "commit_s": "one step",
    "copy_s": "as --commit-s",
    "encode_s": "as --commit-s",
    "rebuild_s": "--restore-s + --encode-s",
    "reload_s": "--restore-s + --persist-s",
    "group": "8 or all nodes",
    "parity": "1, of one node 0",
}
"""Defaults that are functions."""
_SHORT_S, _SHORT_H = 1e-6, 1e-3
OPTIONS = (
    Option("step_s", 1.0, "seconds of one optimizer step", low=_SHORT_S),
    Option("stall_s", 0.01, "seconds the training step waits for one memory snapshot"),
    Option("commit_s", lambda v: v["step_s"], "seconds from a step's end until every rank holds its snapshot"),
    Option("copy_s", lambda v: v["commit_s"], "seconds, in the background, of copying one snapshot"),
    Option("encode_s", lambda v: v["commit_s"], "seconds, in the background, of making the parity of one snapshot"),
    Option("persist_s", 30.0, "seconds, in the background, of writing one durable checkpoint"),
    Option("slowdown", 0.02, "share of its speed that training loses while it is copied, encoded or written", high=1),
    Option("detect_s", 1.0, "seconds from a fault until it is noticed"),
    Option("restore_s", 10.0, "seconds from then until training goes on, state from memory"),
    Option("rebuild_s", lambda v: v["restore_s"] + v["encode_s"], "the same, state of a lost node from parity"),
    Option("reload_s", lambda v: v["restore_s"] + v["persist_s"], "the same, state from a durable checkpoint"),
    Option("reprotect_s", 900.0, "seconds from the loss of a node until its group has full parity again"),
    Option("nodes", 8, "nodes of the run", low=1, is_whole=True),
    Option("group", lambda v: min(v["nodes"], 8), "nodes of one protection group, at most", low=1, is_whole=True),
    Option("parity", lambda v: min(v["group"] - 1, 1), "nodes a group can lose; 0 means no parity", is_whole=True),
    Option(
        "process_mtbf_h",
        PROCESS_MTBF_H,
        "mean hours between deaths of processes on one node, its memory kept",
        low=_SHORT_H,
        may_be_endless=True,
    ),
    Option("node_mtbf_h", NODE_MTBF_H, "mean hours between losses of one node", low=_SHORT_H, may_be_endless=True),
    Option(
        "rack_mtbf_h",
        26280.0,
        "mean hours between losses of more nodes at once than a group survives (rack, switch, power), whole run",
        low=_SHORT_H,
        may_be_endless=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Value:
    """What is used, and who says so."""

    number: float
    origin: str


def given_in(words: Mapping[str, str | None]) -> tuple[dict[str, float], dict[str, str]]:
    """Of the words behind each option: the numbers by option, and what is wrong with the others by option."""
    numbers, bad = {}, {}
    for option in OPTIONS:
        word = words.get(option.name)
        if word is not None:
            number = option.read(word)
            if number is None:
                bad[option.name] = f"{option.flag}={word} must be {option.rule}: {option.means}"
            else:
                numbers[option.name] = number
    return numbers, bad


def resolved(given: Numbers, measured: Mapping[str, Value]) -> dict[str, Value]:
    """Options override measurements, and these override assumptions."""
    values: dict[str, Value] = {}
    numbers: dict[str, float] = {}
    for option in OPTIONS:
        name, default = option.name, option.default
        if name in given:
            values[name] = Value(given[name], "given")
        elif name in measured:
            values[name] = measured[name]
        else:
            values[name] = Value(default(numbers) if callable(default) else default, "assumed default")
        numbers[name] = values[name].number
    return values
