"""How a run has ended, whoever ended it: the conductor, a signal or an error."""

from __future__ import annotations

from dataclasses import replace

from holdfast.errors import ConfigurationError
from holdfast.launch.conductor import Conductor, Verdict
from holdfast.launch.durable import DurableTier
from holdfast.launch.signals import StopSignals

__all__ = ["UNEXPECTED", "drive", "not_begun", "verdict_on"]

UNEXPECTED, _BAD_CONFIGURATION, _SAVED = 1, 2, 75
"""Exit codes, see :mod:`holdfast.launch.cli`. A stop without a checkpoint ends with the signal's own."""


def drive(conductor: Conductor, signals: StopSignals) -> Verdict:
    """To the end that the conductor, the signals or the export give the run."""
    try:
        verdict = conductor.run()
    except (KeyboardInterrupt, SystemExit):
        if not signals.is_overdue:
            return conductor.leave(signals.exit_code, "a second signal")
        verdict = conductor.leave(signals.exit_code, f"{signals.reason}; the grace is over")
    if verdict.outcome == "stopped":
        return replace(verdict, exit_code=_SAVED if verdict.step >= 0 else signals.exit_code)
    why = verdict.findings.get("not_exported")
    if why is None:
        return verdict
    reason = f"the goal is reached, but the weights are not exported: {why}; the same command tries it again"
    return replace(verdict, outcome="failed", exit_code=UNEXPECTED, reason=reason)


def not_begun(durable: DurableTier, signals: StopSignals) -> Verdict:
    """Somebody wanted to stop before there was a process to stop; earlier attempts may have left a checkpoint."""
    durable.survey()
    step, why = durable.newest_step, f"{signals.reason}, before anything had started"
    code = _SAVED if step >= 0 else signals.exit_code
    return Verdict("stopped", code, why, step=step, faults=0, steps_lost=0, findings={}, saved=step)


def verdict_on(error: BaseException, signals: StopSignals) -> Verdict:
    """How a run ended that the conductor did not bring to its end."""
    outcome, exit_code, reason = "failed", UNEXPECTED, f"{type(error).__name__}: {error}"
    if isinstance(error, ConfigurationError):
        exit_code, reason = _BAD_CONFIGURATION, "; ".join(error.problems)
    elif not isinstance(error, Exception):
        outcome, exit_code, reason = "stopped", signals.exit_code, "a second signal, before anything had started"
    return Verdict(outcome, exit_code, reason, step=-1, faults=0, steps_lost=0, findings={})
