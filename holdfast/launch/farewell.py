"""What the last lines of a run say: what is saved, who was there, where the report is, and what to type next."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence

from holdfast.configs import layout
from holdfast.configs.schema import RunConfig
from holdfast.errors import HoldfastError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.policy import DO_NOT_RESTART
from holdfast.launch.attempt import Attempt
from holdfast.launch.conductor import Verdict
from holdfast.launch.ending import UNEXPECTED
from holdfast.launch.report_command import write_report
from holdfast.launch.run_dir import RunDir

__all__ = ["next_command", "record", "report", "what_is_saved", "world_of"]

logger = logging.getLogger(__name__)

_QUICKLY_REPORTED_BYTES = 64 << 20
"""Of metrics, at most, for a run to write its report itself: some seconds, and a few hundred MB of memory."""


def what_is_saved(verdict: Verdict) -> dict[str, str]:
    """The weights, and the newest checkpoint."""
    facts = {"weights": str(verdict.findings["weights"])} if "weights" in verdict.findings else {}
    if verdict.saved is None:
        return facts
    if verdict.saved < 0:
        return {"saved": "no checkpoint", **facts}
    and_later = ", and nothing later" if verdict.saved < verdict.step else ""
    return {"saved": f"checkpoint of step {verdict.saved:,}, {checkpoint.directory(verdict.saved)}{and_later}", **facts}


def world_of(verdict: Verdict, *, config: RunConfig) -> dict[str, str]:
    """Worth a line if nodes were missing at the end."""
    launch, nodes = config.launch, verdict.nodes
    if not 0 < len(nodes) < launch.nodes:
        return {}
    missing = ", ".join(str(node) for node in range(launch.nodes) if node not in nodes)
    ranks = len(nodes) * launch.workers_per_node
    return {"world": f"{ranks} of {layout.world(config)} ranks; node(s) {missing} are missing"}


def report(run_dir: RunDir) -> dict[str, str]:
    """Where the report is. A run is worth more than its report, so that nothing in here can fail it."""
    try:
        metrics = run_dir.metrics_file
        if metrics.exists() and metrics.stat().st_size > _QUICKLY_REPORTED_BYTES:
            return {"report": f"holdfast report {run_dir.path}"}
        return {"report": str(write_report(run_dir, run_dir.path / "report.html")[0])}
    except Exception:  # the log learns of it
        logger.exception("the report was not written; holdfast report %s tries it again", run_dir.path)
        return {}


def record(verdict: Verdict, attempt: Attempt) -> dict[str, str]:
    """Note the end in ``run.json``. What the user must be told if it could not be told."""
    try:
        attempt.run_dir.end_attempt(
            verdict.outcome,
            verdict.exit_code,
            step=verdict.step,
            reason=verdict.reason,
            world=len(verdict.nodes) * attempt.config.launch.workers_per_node,
            findings=verdict.findings,
        )
    except HoldfastError as error:  # a full disk; that makes the run no worse than it is
        return {"record": f"run.json does not know how it ended: {error}"}
    return {}


def next_command(verdict: Verdict, attempt: Attempt) -> str:
    """What to type now; empty where something follows by itself."""
    if verdict.outcome == "finished" and attempt.command[:2] == ("holdfast", "adapt"):
        return ""  # the next domain follows by itself
    if verdict.outcome == "finished":
        return _again(attempt, {"trainer.max_steps": str(2 * attempt.config.trainer.max_steps)})
    if verdict.exit_code in (UNEXPECTED, DO_NOT_RESTART) and "not_exported" not in verdict.findings:
        return f"tail -n 50 {attempt.run_dir.driver_log(attempt.number)}"
    return _again(attempt, {})


def _again(attempt: Attempt, changes: Mapping[str, str]) -> str:
    return _with_changes(attempt.command, attempt.overrides, {"run_id": attempt.run_dir.run_id, **changes})


def _with_changes(command: Sequence[str], overrides: Sequence[str], changes: Mapping[str, str]) -> str:
    """What continues a run: the same options, because others would make another run."""
    if tuple(command[:2]) == ("holdfast", "adapt"):  # which names the run itself
        return shlex.join(command)
    new = [f"{key}={value}" for key, value in changes.items()]
    if tuple(command[:2]) != ("holdfast", "train"):
        return f"the same configuration with {', '.join(new)}"
    # In a sweep the words typed mean several runs, the overrides only this one.
    typed = command[2:] if set(overrides) <= set(command) else overrides
    kept = [word for word in typed if word.partition("=")[0] not in {"resume", *changes}]
    return shlex.join(["holdfast", "train", *kept, *new])
