"""``holdfast status``: the state of a run, what protects it and what it has lost. Loads neither torch nor Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from holdfast import events as e
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.find_run import find_run
from holdfast.launch.run_state import DRIVER_GONE, GOES_ON, exit_code_of, state_of
from holdfast.launch.run_view import RunReader, RunView
from holdfast.launch.run_words import facts, pace_of
from holdfast.launch.wording import aligned

__all__ = ["status"]

_NEWEST_STEPS = 100


def status(words: Sequence[str]) -> int:
    """Print the state for the command line ``words``; the exit code. Raises: ConfigurationError without such a run."""
    args = _parser().parse_args(list(words))
    view = RunReader(find_run(args.run, args.root), newest_steps=_NEWEST_STEPS).view()
    text = json.dumps(_plain(view), indent=1) if args.json else "\n".join(aligned(facts(view)))
    sys.stdout.write(f"{text}\n")
    return exit_code_of(view) if args.exit_code else 0


def _plain(view: RunView) -> dict[str, object]:
    """JSON values, with null for what is not known."""
    state, newest = state_of(view), view.steps[-1] if view.steps else None
    written = [(one.step, when) for when, one in view.of(e.CheckpointWritten)]
    levels = [one.event for one in view.newest_attempt if isinstance(one.event, e.Protection)]
    worlds = [one.world for _, one in view.of(e.EpochStarted)]
    faults = [(when, one) for when, one in view.of(e.FaultDetected)]
    disk_step, disk_s = max(written, default=(None, None))
    return {
        "run": view.run_id,
        "directory": str(view.path),
        "attempt": len(view.record["attempts"]),
        "state": state.word,
        "why": state.why,
        "since": state.since_s,
        "driver": view.driver,
        "exit_code": None if view.ended is None else view.ended.get("exit_code"),
        "step": newest.report.step if newest else None,
        "goal": view.goal or None,
        "step_time": newest.time_s if newest else None,
        "loss": newest.report.loss if newest and newest.report.loss == newest.report.loss else None,
        "tokens_per_s": pace_of(view).tokens_per_s,
        "memory_version": newest.report.committed if newest and newest.report.committed >= 0 else None,
        "parity": view.config.get("snapshot.parity"),
        "protection": levels[-1].level if levels else None,
        "protection_reason": levels[-1].reason if levels else None,
        "checkpoint_step": disk_step,
        "checkpoint_time": disk_s,
        "world": worlds[-1] if worlds else None,
        "failures": view.faults_of_attempt[0],
        "failures_allowed": view.config.get("recovery.max_failures"),
        "preemptions": view.faults_of_attempt[1],
        "preemptions_allowed": view.config.get("recovery.max_preemptions") or None,
        "last_fault": {"time": faults[-1][0], "cause": faults[-1][1].cause} if faults else None,
    }


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast status",
        allow_abbrev=False,
        description="Tells the state of a run from its files, while it goes on or afterwards.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or directory of a run; the newest if left out")
    add_root(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object; times are seconds since 1970")
    parser.add_argument(
        "--exit-code",
        action="store_true",
        help=f"exit as the run has: 0, 1, 2, 75, 93, 130 or 143; {GOES_ON} if it goes on, {DRIVER_GONE} if its driver "
        "is gone without a word",
    )
    return parser
