"""Whole runs of ``holdfast train`` as a user starts them: a new driver process each time, read from what it leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

__all__ = ["Attempt", "drive"]

_PROJECT = "benchmark"
_DEADLINE_S = 900.0
_KILL = re.compile(r"^(\S+ \S+),(\d+) WARNING \S+: chaos: sigkill ", re.MULTILINE)


@dataclass(frozen=True)
class Attempt:
    """One driver process, from its start to its end, in seconds of the wall clock."""

    started_s: float
    ended_s: float
    events: Sequence[dict[str, Any]]
    metrics: Sequence[dict[str, Any]]
    kills_s: Sequence[float]
    """When each injected SIGKILL was sent, as the victim itself logged just before it."""

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, in order."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def steps_s(self) -> list[float]:
        """Seconds of each finished step, as the ranks measured them."""
        return [record["step_s"] for record in self.metrics if "step_s" in record]

    def first_step_beyond(self, step: int, after_s: float) -> float:
        """When the driver recorded a step that nobody had finished before."""
        steps = [m for m in self.metrics if "step_s" in m and m["step"] > step and m["time"] > after_s]
        return float(min(m["time"] for m in steps))


def drive(root: Path, run_id: str, overrides: Sequence[str], *, exit_code: int = 0) -> Attempt:
    """Start or continue run ``run_id`` below ``root``; raises RuntimeError unless it ends with ``exit_code``."""
    command = [sys.executable, "-m", "holdfast", "train", f"root={root}", f"project={_PROJECT}", f"run_id={run_id}"]
    run_dir, started_s = root / _PROJECT / run_id, time.time()
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=_DEADLINE_S)
    ended_s = time.time()
    if done.returncode != exit_code:
        output = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{' '.join(overrides)} ended with code {done.returncode}, not {exit_code}:\n{output}")
    return Attempt(
        started_s=started_s,
        ended_s=ended_s,
        events=_since(run_dir / "events.jsonl", started_s),
        metrics=_since(run_dir / "metrics.jsonl", started_s),
        kills_s=[kill_s for kill_s in _kills(run_dir) if kill_s >= started_s],
    )


def _since(path: Path, started_s: float) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["time"] >= started_s]


def _kills(run_dir: Path) -> list[float]:
    logs = "\n".join(path.read_text() for path in (run_dir / "logs").glob("rank*.log"))
    return sorted(datetime.fromisoformat(day).timestamp() + int(ms) / 1000 for day, ms in _KILL.findall(logs))
