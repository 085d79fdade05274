"""``holdfast plan``: how often to save, from the numbers of a run, from options or from assumptions.

What is advised is computed by :mod:`holdfast.fault_tolerance.interval`; here its input is gathered and shown, each
value with its origin, and the answer is printed. Loads the standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from holdfast import knobs
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import interval as iv
from holdfast.fault_tolerance.policy import DISK, MEMORY, PARITY
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wording import aligned, clean

__all__ = ["plan"]

_HOUR_S = 3600.0
_MONTH_H = 730.5
_NOTHING = 1e-3
"""A share of the time that is no plan."""
_NAMED = 5
"""Runs that an error message names."""

Numbers = Mapping[str, float]


# -- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Option:
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

    def read(self, word: str) -> float | None:
        """The number that ``word`` is, None if it breaks the rule."""
        try:
            number = float(word)
        except ValueError:
            return None
        is_allowed = self.low <= number <= self.high and (self.may_be_endless or not math.isinf(number))
        return number if is_allowed and not (self.is_whole and number % 1) else None


_SHORT_S, _SHORT_H = 1e-6, 1e-3
_OPTIONS = (
    _Option("step_s", 1.0, "seconds of one optimizer step", low=_SHORT_S),
    _Option("stall_s", 0.01, "seconds the training step waits for one memory snapshot"),
    _Option("commit_s", lambda v: v["step_s"], "seconds from a step's end until every rank holds its snapshot"),
    _Option("copy_s", lambda v: v["commit_s"], "seconds, in the background, of copying one snapshot"),
    _Option("encode_s", lambda v: v["commit_s"], "seconds, in the background, of making the parity of one snapshot"),
    _Option("persist_s", 30.0, "seconds, in the background, of writing one durable checkpoint"),
    _Option("slowdown", 0.02, "share of its speed that training loses while it is copied, encoded or written", high=1),
    _Option("detect_s", 1.0, "seconds from a fault until it is noticed"),
    _Option("restore_s", 10.0, "seconds from then until training goes on, state from memory"),
    _Option("rebuild_s", lambda v: v["restore_s"] + v["encode_s"], "the same, state of a lost node from parity"),
    _Option("reload_s", lambda v: v["restore_s"] + v["persist_s"], "the same, state from a durable checkpoint"),
    _Option("reprotect_s", 900.0, "seconds from the loss of a node until its group has full parity again"),
    _Option("nodes", 8, "nodes of the run", low=1, is_whole=True),
    _Option("group", lambda v: min(v["nodes"], 8), "nodes of one protection group, at most", low=1, is_whole=True),
    _Option("parity", lambda v: min(v["group"] - 1, 1), "nodes a group can lose; 0 means no parity", is_whole=True),
    _Option(
        "process_mtbf_h",
        720.0,
        "mean hours between deaths of processes on one node, its memory kept",
        low=_SHORT_H,
        may_be_endless=True,
    ),
    _Option("node_mtbf_h", 8760.0, "mean hours between losses of one node", low=_SHORT_H, may_be_endless=True),
    _Option(
        "rack_mtbf_h",
        26280.0,
        "mean hours between losses of more nodes at once than a group survives (rack, switch, power), whole run",
        low=_SHORT_H,
        may_be_endless=True,
    ),
)
_BY_NAME = {option.name: option for option in _OPTIONS}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="holdfast plan",
        add_help=False,
        allow_abbrev=False,
        description="Advises snapshot.every_steps and snapshot.persist_every_steps, and says what the groups of nodes "
        "survive and what is left for training. Values come from RUN, from options, or are assumed.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or directory of a run whose measured values to use")
    parser.add_argument("--help", "-h", action="store_true", help="show this and exit")
    parser.add_argument("--root", help="where runs are, if not in HOLDFAST_HOME or ~/holdfast-runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    for option in _OPTIONS:
        unit = option.name.rpartition("_")[2].upper() if option.name.endswith(("_s", "_h")) else "X"
        parser.add_argument(option.flag, metavar=unit, help=f"{option.means} (assumed: {_assumed_words(option)})")
    return parser


def _assumed_words(option: _Option) -> str:
    named = {
        "commit_s": "one step",
        "copy_s": "as --commit-s",
        "encode_s": "as --commit-s",
        "rebuild_s": "--restore-s + --encode-s",
        "reload_s": "--restore-s + --persist-s",
        "group": "8 or all nodes",
        "parity": "1, of one node 0",
    }
    return named.get(option.name) or f"{option.default:g}"


# -- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Value:
    number: float
    origin: str


def plan(words: Sequence[str]) -> int:
    """Print the advice for the command line ``words``; the exit code. Raises: ConfigurationError with all problems."""
    parser = _parser()
    args = parser.parse_args(list(words))
    if args.help:
        sys.stdout.write(parser.format_help())
        return 0
    given, bad = _given(args)
    problems = list(bad.values())
    run: RunDir | None = None
    if args.run is not None:
        try:
            run = _find(args.run, args.root)
        except ConfigurationError as error:
            problems += error.problems
    values = _resolved(given, {} if run is None else _measured(run))
    numbers = {name: value.number for name, value in values.items()}
    if not bad.keys() & {"nodes", "group", "parity"}:  # otherwise the groups are not those that were meant
        problems += _group_problems(numbers)
    if problems:
        raise ConfigurationError(problems)
    advice = _advise(numbers)
    show = _as_json if args.json else _as_text
    sys.stdout.write(show(run, values, advice))
    return 0


def _given(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers by option, and by option what is wrong with the others."""
    numbers, bad = {}, {}
    for option in _OPTIONS:
        word = getattr(args, option.name)
        if word is not None:
            number = option.read(word)
            if number is None:
                bad[option.name] = f"{option.flag}={word} must be {option.rule}: {option.means}"
            else:
                numbers[option.name] = number
    return numbers, bad


def _group_problems(v: Numbers) -> Sequence[str]:
    try:
        _layout(v)
    except ConfigurationError as error:
        return error.problems
    return ()


def _layout(v: Numbers) -> iv.GroupLayout:
    return iv.GroupLayout.of(int(v["nodes"]), int(v["group"]), int(v["parity"]))


def _resolved(given: Numbers, measured: Mapping[str, _Value]) -> dict[str, _Value]:
    """Options override measurements, and these override assumptions."""
    values: dict[str, _Value] = {}
    numbers: dict[str, float] = {}
    for option in _OPTIONS:
        name, default = option.name, option.default
        if name in given:
            values[name] = _Value(given[name], "given")
        elif name in measured:
            values[name] = measured[name]
        else:
            values[name] = _Value(default(numbers) if callable(default) else default, "assumed default")
        numbers[name] = values[name].number
    return values


# -- a run ------------------------------------------------------------------------------------------------------------


def _find(name: str, root: str | None) -> RunDir:
    """A run directory by its path, or by its id in any project below the root."""
    path = Path(name).expanduser().absolute()
    if (path / "run.json").is_file():
        return RunDir.open(str(path.parent.parent), path.parent.name, path.name)
    runs = Path(root).expanduser().absolute() if root else knobs.home()
    found = sorted(runs.glob("*/*/run.json"), key=lambda record: record.stat().st_mtime, reverse=True)
    same = [record.parent for record in found if record.parent.name == name]
    if len(same) == 1:
        return RunDir.open(str(runs), same[0].parent.name, name)
    if same:
        raise ConfigurationError(f"run {name} exists in several projects; give one: {', '.join(map(str, same))}")
    newest = ", ".join(record.parent.name for record in found[:_NAMED])
    there = f"the newest there are {newest}" if found else "there is none; leave RUN out to plan without one"
    raise ConfigurationError(f"run {name!r} is neither the directory of a run nor an id below {runs}; {there}")


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """JSON lines, without those that a kill has torn."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def _measured(run: RunDir) -> dict[str, _Value]:
    """Everything the files of a run tell; what they do not tell is left out."""
    steps = [record for record in _records(run.metrics_file) if _is_step(record)]
    events = list(_records(run.events_file))
    config = _configured(run.path / "config.yaml")
    nodes = config.get("launch.nodes")
    found = _of_steps(steps)
    step_s = found["step_s"].number if found else 0.0
    found |= _of_events(events, step_s)
    if isinstance(nodes, int) and steps:
        found |= _groups(nodes, config)
        found |= _failure_rates(events, _hours(steps) * nodes, config.get("chaos.faults"))
    return found


def _groups(nodes: int, config: Mapping[str, object]) -> dict[str, _Value]:
    """As configured; a group that is too small for the parity has less."""
    found = {"nodes": float(nodes)}
    size, parity = config.get("snapshot.group_size"), config.get("snapshot.parity")
    if isinstance(size, int) and isinstance(parity, int):
        found["group"] = size or min(nodes, 8)
        smallest = nodes // -(-nodes // max(size or min(nodes, 8), 1))
        found["parity"] = min(parity, smallest - 1)
    return {name: _Value(number, "configuration of the run") for name, number in found.items()}


def _is_step(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(key), (int, float)) for key in ("time", "step", "step_s"))


def _configured(path: Path) -> dict[str, object]:
    """Dotted key -> value of a file that :func:`holdfast.launch.records.to_yaml` wrote: JSON behind every key."""
    found: dict[str, object] = {}
    section = ""
    with suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.strip().partition(":")
            if not line.startswith(" "):
                section = key
            with suppress(ValueError):
                found[f"{section}.{key}" if line.startswith(" ") else key] = json.loads(value)
    return found


def _of_steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, _Value]:
    if not steps:
        return {}
    step_s = statistics.median(_numbers(steps, "step_s"))
    found = {"step_s": _Value(step_s, f"measured: median of {len(steps):,} steps")}
    copies = sum(step.get("copy_bytes", 0) > 0 for step in steps)
    if copies:  # a snapshot is paid for in the step that takes it and in the next one
        stall_s = math.fsum(_numbers(steps, "stall_s")) / copies
        found["stall_s"] = _Value(stall_s, f"measured: mean of {copies:,} snapshots")
    copied_s = [seconds for seconds in _numbers(steps, "copy_s") if seconds > 0]
    if copied_s:
        found["copy_s"] = _Value(statistics.median(copied_s), f"measured: median of {len(copied_s):,} snapshots")
    behind = min((step["step"] - step["committed"] for step in steps if step.get("committed", -1) >= 0), default=None)
    if behind is not None:
        found["commit_s"] = _Value(behind * step_s, f"measured: committed {behind} step(s) later")
    return found


def _of_events(events: Sequence[Mapping[str, Any]], step_s: float) -> dict[str, _Value]:
    sources = {e.get("number"): e.get("source") for e in events if e.get("event") == "recovery_planned"}
    faults = [e for e in events if e.get("event") == "fault_detected"]
    done = [e for e in events if e.get("event") == "recovery_done"]
    written = [e for e in events if e.get("event") == "checkpoint_written"]
    found = _median("detect_s", _numbers(faults, "detected_after_s"), "faults")
    for name, source in (("restore_s", MEMORY), ("rebuild_s", PARITY), ("reload_s", DISK)):
        # A repair is over when a step is finished, and that step counts as training.
        whole = _numbers((e for e in done if sources.get(e.get("number")) == source), "repaired_in_s")
        found |= _median(name, [max(seconds - step_s, 0.0) for seconds in whole], f"recoveries from {source}")
    return found | _median("persist_s", _numbers(written, "seconds"), "checkpoints")


def _numbers(records: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [float(record[key]) for record in records if isinstance(record.get(key), (int, float))]


def _median(name: str, seconds: Sequence[float], of_what: str) -> dict[str, _Value]:
    return (
        {name: _Value(statistics.median(seconds), f"measured: median of {len(seconds)} {of_what}")} if seconds else {}
    )


def _hours(steps: Iterable[Mapping[str, Any]]) -> float:
    """Wall time between the first and the last step of each attempt."""
    spans: dict[object, tuple[float, float]] = {}
    for step in steps:
        first, last = spans.get(step.get("attempt"), (math.inf, -math.inf))
        spans[step.get("attempt")] = min(first, step["time"]), max(last, step["time"])
    return sum(last - first for first, last in spans.values()) / _HOUR_S


def _failure_rates(events: Iterable[Mapping[str, Any]], node_hours: float, injected: object) -> dict[str, _Value]:
    """Workers lost, and keepers lost, with them the memory of a node; what was injected on purpose is no evidence."""
    faults = [e for e in events if e.get("event") == "fault_detected"]
    on_purpose = [str(fault) for fault in injected] if isinstance(injected, list) else []
    keepers = sum(fault.startswith("keeper") for fault in on_purpose)
    workers = sum(bool(fault.get("ranks")) for fault in faults)
    return {
        "process_mtbf_h": _posterior("process_mtbf_h", workers, len(on_purpose) - keepers, node_hours),
        "node_mtbf_h": _posterior("node_mtbf_h", len(faults) - workers, keepers, node_hours),
    }


def _posterior(name: str, faults: int, injected: int, node_hours: float) -> _Value:
    prior_h = float(_BY_NAME[name].default)  # type: ignore[arg-type]  # a number for both rates
    counted = max(faults - injected, 0)
    estimate = iv.RateEstimate(1.0, prior_h).seen(counted, node_hours)
    slow, fast = estimate.credible(0.9)
    without = f" ({faults - counted} injected left out)" if faults > counted else ""
    return _Value(
        1.0 / estimate.per_hour,
        f"measured: {counted} in {node_hours:.3g} node-hours{without}, prior 1 in {prior_h:g} h; "
        f"90 % between {_span(_HOUR_S / fast)} and {_span(_HOUR_S / slow)}",
    )


# -- advice -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """One tier and how often to save for it."""

    name: str
    serves: str
    tier: iv.Tier
    steps: int
    interval_s: float


@dataclass(frozen=True, slots=True)
class _Advice:
    rows: tuple[_Row, ...]
    layout: iv.GroupLayout
    unrecoverable_per_h: float
    """Of the groups alone, without racks."""
    unprotected_per_h: float
    correlated_per_h: float
    split: iv.Split

    @property
    def settings(self) -> dict[str, int]:
        by_name = {row.name: row.steps for row in self.rows}
        return {"snapshot.every_steps": by_name[_SNAPSHOT], "snapshot.persist_every_steps": by_name.get(_DURABLE, 0)}


_SNAPSHOT, _PARITY, _DURABLE = "memory snapshot", "parity", "durable checkpoint"


def _advise(v: Numbers) -> _Advice:
    layout = _layout(v)
    beyond = iv.unrecoverable_rate(layout, v["node_mtbf_h"], v["reprotect_s"] / _HOUR_S)
    named = _tiers(v, beyond)
    if not any(tier.rate_per_s for _, _, tier in named):
        raise ConfigurationError("nothing ever fails with these values, so no save is worth its cost; give an MTBF")
    # Every save is made from a snapshot, so that tier stays even if no failure is its own.
    needed = [named[0], *(entry for entry in named[1:] if entry[2].rate_per_s)]
    tiers = [tier for _, _, tier in needed]
    steps = iv.nested_steps(
        [iv.optimal_interval_s(tier.cost_s, tier.mtbf_s) for tier in tiers],
        [max(tier.background_s, v["commit_s"]) for tier in tiers],
        v["step_s"],
    )
    rows = tuple(
        _Row(name, serves, tier, n, n * v["step_s"]) for (name, serves, tier), n in zip(needed, steps, strict=True)
    )
    _refuse_hopeless(rows)
    return _Advice(
        rows=rows,
        layout=layout,
        unrecoverable_per_h=beyond,
        unprotected_per_h=layout.nodes / v["node_mtbf_h"],
        correlated_per_h=1.0 / v["rack_mtbf_h"],
        split=iv.expected_split([(row.tier, row.interval_s) for row in rows]),
    )


def _refuse_hopeless(rows: Iterable[_Row]) -> None:
    problems = [
        f"{row.name}: one failure in {_span(row.tier.mtbf_s)} ({row.serves}), {_span(row.interval_s)} between saves "
        f"and {_span(row.tier.recovery_s)} to recover leave no time for training; check the MTBF and these seconds"
        for row in rows
        if iv.ettr(row.interval_s, row.tier.cost_s, row.tier.mtbf_s, row.tier.recovery_s) < _NOTHING
    ]
    if problems:
        raise ConfigurationError(problems)


def _tiers(v: Numbers, beyond_per_h: float) -> list[tuple[str, str, iv.Tier]]:
    parity, lost_nodes = int(v["parity"]), v["nodes"] / v["node_mtbf_h"]
    more = f"more than {parity} node(s) of a group" if parity else "a node is lost"
    shared = {"slowdown": v["slowdown"], "detect_s": v["detect_s"]}
    snapshot = iv.Tier(
        rate_per_s=v["nodes"] / v["process_mtbf_h"] / _HOUR_S,
        stall_s=v["stall_s"],
        background_s=v["copy_s"],
        lag_s=v["commit_s"],
        restore_s=v["restore_s"],
        **shared,
    )
    code = iv.Tier(
        rate_per_s=max(lost_nodes - beyond_per_h, 0.0) / _HOUR_S if parity else 0.0,
        background_s=v["encode_s"],
        lag_s=v["commit_s"] + v["encode_s"],
        restore_s=v["rebuild_s"],
        **shared,
    )
    durable = iv.Tier(
        rate_per_s=(beyond_per_h + 1.0 / v["rack_mtbf_h"]) / _HOUR_S,
        background_s=v["persist_s"],
        lag_s=v["commit_s"] + v["persist_s"],
        restore_s=v["reload_s"],
        **shared,
    )
    return [
        (_SNAPSHOT, "a process dies", snapshot),
        (_PARITY, f"up to {parity} node(s) of a group", code),
        (_DURABLE, f"{more}; a rack", durable),
    ]


# -- output -----------------------------------------------------------------------------------------------------------


def _as_text(run: RunDir | None, values: Mapping[str, _Value], advice: _Advice) -> str:
    title = "plan without a run" if run is None else f"plan for run {run.run_id} ({run.path})"
    sections = [
        [clean(title)],
        ["values", *_table([[o.flag, _shown(o.name, values[o.name].number), values[o.name].origin] for o in _OPTIONS])],
        ["saves", *_table([_HEADER, *map(_row_words, advice.rows)])],
        _survival_words(advice, values),
        _goodput_words(advice.split),
        _set_words(run, advice),
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


_HEADER = ["", "serves", "one failure in", "cost C", "Young", "Daly", "exact", "advised"]


def _row_words(row: _Row) -> list[str]:
    cost_s, mtbf_s = row.tier.cost_s, row.tier.mtbf_s
    advised = f"{row.steps:,} step{'' if row.steps == 1 else 's'} = {_span(row.interval_s)}"
    return [row.name, row.serves, _span(mtbf_s), _span(cost_s), *map(_span, _optima(cost_s, mtbf_s).values()), advised]


def _optima(cost_s: float, mtbf_s: float) -> dict[str, float]:
    """Three answers to the same question; endless if nothing fails."""
    if math.isinf(mtbf_s):
        return dict.fromkeys(("young", "daly", "exact"), math.inf)
    return {
        "young": iv.young_interval_s(cost_s, mtbf_s),
        "daly": iv.daly_interval_s(cost_s, mtbf_s),
        "exact": iv.optimal_interval_s(cost_s, mtbf_s),
    }


def _survival(layout: iv.GroupLayout) -> dict[int, float]:
    return {k: iv.survival_of_losses(layout, k) for k in (1, 2, 3) if k <= layout.nodes}


def _month(per_hour: float) -> float:
    return math.exp(-per_hour * _MONTH_H)


def _survival_words(advice: _Advice, values: Mapping[str, _Value]) -> list[str]:
    layout = advice.layout
    sizes = " and ".join(dict.fromkeys(str(size) for size in layout.sizes))
    at_once = ", ".join(f"{k}: {_percent(p)}" for k, p in _survival(layout).items())
    total = advice.unrecoverable_per_h + advice.correlated_per_h
    window = _span(values["reprotect_s"].number)
    facts = {
        "random nodes lost at once": f"survived with {at_once}",
        "a month of single losses": f"survived with {_percent(_month(advice.unrecoverable_per_h))}, protected again "
        f"within {window}; without parity {_percent(_month(advice.unprotected_per_h))}",
        "a month, racks included": f"survived with {_percent(_month(total))}",
        "a loss the groups cannot repair": f"every {_span(_every_s(advice.unrecoverable_per_h))}; without parity "
        f"every {_span(_every_s(advice.unprotected_per_h))}; racks included every {_span(_every_s(total))}",
    }
    head = (
        f"memory of {layout.nodes} node(s) in {len(layout.sizes)} group(s) of {sizes}, "
        f"each survives the loss of {layout.parity}"
    )
    return [head, *_table([[key, fact] for key, fact in facts.items()])]


def _goodput_words(split: iv.Split) -> list[str]:
    lost = {name: share for name, share in asdict(split).items() if name != "useful"}
    return [
        f"expected goodput {_percent(split.useful)}",
        *aligned({k: f" {_percent(s)}" for k, s in lost.items()}, "  "),
    ]


def _set_words(run: RunDir | None, advice: _Advice) -> list[str]:
    lines = ["set", f"  {_settings_words(advice.settings)}"]
    config = {} if run is None else _configured(run.path / "config.yaml")
    present = {key: steps for key in advice.settings if isinstance(steps := config.get(key), int) and steps > 0}
    if present.keys() == advice.settings.keys():
        lines += [f"  the run has {_settings_words(present)},", f"  {_goodput_with(advice.rows, present)}"]
    return lines


def _settings_words(settings: Mapping[str, int]) -> str:
    return " ".join(f"{key}={steps}" for key, steps in settings.items())


def _goodput_with(rows: Sequence[_Row], settings: Mapping[str, int]) -> str:
    """What the same tiers give with a run's own settings; there, each snapshot gets its parity."""
    every, persist = settings.values()
    step_s = rows[0].interval_s / rows[0].steps
    try:
        split = iv.expected_split([(row.tier, (persist if row.name == _DURABLE else every) * step_s) for row in rows])
    except ConfigurationError as error:
        return f"with which it would not get far: {error}"
    return f"with which its expected goodput is {_percent(split.useful)}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{clean(c):<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shown(name: str, number: float) -> str:
    if name.endswith("_s"):
        return _span(number)
    return _span(number * _HOUR_S) if name.endswith("_h") else f"{number:g}"


def _every_s(per_hour: float) -> float:
    return _HOUR_S / per_hour if per_hour else math.inf


_UNITS = ((365.25 * 86400, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))


def _span(seconds: float) -> str:
    """Three digits in the largest unit of which there is one: ``1.21 ms``, ``17.3 min``, ``9.78 y``."""
    if seconds == 0 or math.isinf(seconds):
        return "0 s" if seconds == 0 else "never"
    size, unit = next((u for u in _UNITS if seconds >= u[0]), _UNITS[-1])
    amount = seconds / size
    return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:,.0f} {unit}"


def _percent(share: float) -> str:
    """Two digits of what is lost or of what is left, whichever is less: ``99.9972 %``, ``0.0028 %``, ``88.9 %``."""
    less = 100.0 * min(share, 1.0 - share)
    if less <= 0.0:
        return f"{100.0 * share:.0f} %"
    return f"{100.0 * share:.{min(max(1, 1 - math.floor(math.log10(less))), 12)}f} %"


def _as_json(run: RunDir | None, values: Mapping[str, _Value], advice: _Advice) -> str:
    answer = {
        "run": None if run is None else str(run.path),
        "values": {name: {"value": value.number, "origin": value.origin} for name, value in values.items()},
        "tiers": [_row_facts(row) for row in advice.rows],
        "groups": {
            "sizes": list(advice.layout.sizes),
            "parity": advice.layout.parity,
            "survival_of_losses": {str(k): p for k, p in _survival(advice.layout).items()},
            "survival_of_a_month": _month(advice.unrecoverable_per_h),
            "survival_of_a_month_racks_included": _month(advice.unrecoverable_per_h + advice.correlated_per_h),
            "unrecoverable_mtbf_h": _every_s(advice.unrecoverable_per_h) / _HOUR_S,
        },
        "goodput": asdict(advice.split),
        "set": advice.settings,
    }
    return json.dumps(_without_infinity(answer), indent=1) + "\n"


def _row_facts(row: _Row) -> dict[str, object]:
    tier = row.tier
    optima = {f"{name}_s": seconds for name, seconds in _optima(tier.cost_s, tier.mtbf_s).items()}
    facts = {"name": row.name, "serves": row.serves, "mtbf_h": tier.mtbf_s / _HOUR_S, "cost_s": tier.cost_s}
    return {**facts, **optima, "steps": row.steps, "interval_s": row.interval_s}


def _without_infinity(value: Any) -> Any:
    """JSON values, opaque to the type checker; JSON has no infinity, so what never happens is null."""
    if isinstance(value, dict):
        return {key: _without_infinity(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_infinity(one) for one in value]
    return None if isinstance(value, float) and math.isinf(value) else value
