"""What the files of a run tell about its speed, its failures and its repairs, each value with its origin."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from holdfast.fault_tolerance.interval import RateEstimate
from holdfast.fault_tolerance.policy import DISK, LIVE, MEMORY, PARITY
from holdfast.launch.plan_options import HOUR_S, NODE_MTBF_H, PROCESS_MTBF_H, Value
from holdfast.launch.records import read_yaml
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wording import span

__all__ = ["measured", "read_records"]

_SOON_S = 60.0
"""After a strike on purpose, at most: until a frozen process is given up."""


def measured(run: RunDir) -> dict[str, Value]:
    """Everything the files of a run tell; what they do not tell is left out."""
    steps = [record for record in read_records(run.metrics_file) if _is_step(record)]
    events = list(read_records(run.events_file))
    config = read_yaml(run.config_file)
    nodes = config.get("launch.nodes")
    found = _of_steps(steps)
    step_s = found["step_s"].number if found else 0.0
    found |= _of_events(events, step_s)
    if isinstance(nodes, int) and steps:
        found |= _groups(nodes, config)
        found |= _failure_rates(events, _hours(steps) * nodes)
    return found


def _groups(nodes: int, config: Mapping[str, object]) -> dict[str, Value]:
    """As configured; a group that is too small for the parity has less."""
    found = {"nodes": float(nodes)}
    size, parity = config.get("snapshot.group_size"), config.get("snapshot.parity")
    if isinstance(size, int) and isinstance(parity, int):
        found["group"] = size or min(nodes, 8)
        smallest = nodes // -(-nodes // max(size or min(nodes, 8), 1))
        found["parity"] = min(parity, smallest - 1)
    return {name: Value(number, "configuration of the run") for name, number in found.items()}


def _is_step(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(key), (int, float)) for key in ("time", "step", "step_s"))


def _of_steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    if not steps:
        return {}
    step_s = statistics.median(_numbers(steps, "step_s"))
    found = {"step_s": Value(step_s, f"measured: median of {len(steps):,} steps")}
    copies = sum(step.get("copy_bytes", 0) > 0 for step in steps)
    if copies:  # a snapshot is paid for in the step that takes it and in the next one
        stall_s = math.fsum(_numbers(steps, "stall_s")) / copies
        found["stall_s"] = Value(stall_s, f"measured: mean of {copies:,} snapshots")
    copied_s = [seconds for seconds in _numbers(steps, "copy_s") if seconds > 0]
    if copied_s:
        found["copy_s"] = Value(statistics.median(copied_s), f"measured: median of {len(copied_s):,} snapshots")
    behind = min((step["step"] - step["committed"] for step in steps if step.get("committed", -1) >= 0), default=None)
    if behind is not None:
        found["commit_s"] = Value(behind * step_s, f"measured: committed {behind} step(s) later")
    return found


def _of_events(events: Sequence[Mapping[str, Any]], step_s: float) -> dict[str, Value]:
    sources = {e.get("number"): e.get("source") for e in events if e.get("event") == "recovery_planned"}
    sources = {number: MEMORY if source == LIVE else source for number, source in sources.items()}  # read from it too
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


def _median(name: str, seconds: Sequence[float], of_what: str) -> dict[str, Value]:
    return {name: Value(statistics.median(seconds), f"measured: median of {len(seconds)} {of_what}")} if seconds else {}


def _hours(steps: Iterable[Mapping[str, Any]]) -> float:
    """Wall time between the first and the last step of each attempt."""
    spans: dict[object, tuple[float, float]] = {}
    for step in steps:
        first, last = spans.get(step.get("attempt"), (math.inf, -math.inf))
        spans[step.get("attempt")] = min(first, step["time"]), max(last, step["time"])
    return sum(last - first for first, last in spans.values()) / HOUR_S


def _failure_rates(events: Sequence[Mapping[str, Any]], node_hours: float) -> dict[str, Value]:
    """Workers lost, and keepers lost, with them the memory of a node; what was injected on purpose is no evidence."""
    strikes = [e for e in events if e.get("event") == "fault_injected"]
    faults = [e for e in events if e.get("event") == "fault_detected"]
    workers = [fault for fault in faults if fault.get("ranks")]
    keepers = [fault for fault in faults if not fault.get("ranks")]
    return {
        name: _posterior(prior_h, len(lost), sum(_is_on_purpose(fault, strikes) for fault in lost), node_hours)
        for name, prior_h, lost in (("process_mtbf_h", PROCESS_MTBF_H, workers), ("node_mtbf_h", NODE_MTBF_H, keepers))
    }


def _is_on_purpose(fault: Mapping[str, Any], strikes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the same rank or node was struck not long before."""
    since_s = fault["time"] - fault.get("detected_after_s", 0.0) - _SOON_S
    return any(since_s <= strike["time"] <= fault["time"] and _is_same(fault, strike) for strike in strikes)


def _is_same(fault: Mapping[str, Any], strike: Mapping[str, Any]) -> bool:
    if strike.get("target") == "worker":
        return strike.get("number") in fault.get("ranks", ())
    return strike.get("target") in ("keeper", "node") and strike.get("number") == fault.get("node")


def _posterior(prior_h: float, faults: int, injected: int, node_hours: float) -> Value:
    counted = max(faults - injected, 0)
    estimate = RateEstimate(1.0, prior_h).seen(counted, node_hours)
    slow, fast = estimate.credible(0.9)
    without = f" ({faults - counted} injected left out)" if faults > counted else ""
    return Value(
        1.0 / estimate.per_hour,
        f"measured: {counted} in {node_hours:.3g} node-hours{without}, prior 1 in {prior_h:g} h; "
        f"90 % between {span(HOUR_S / fast)} and {span(HOUR_S / slow)}",
    )


def read_records(path: Path) -> Iterator[Mapping[str, Any]]:
    """JSON lines, without those that a kill has torn."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record
