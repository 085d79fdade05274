"""A run's files told to W&B after the fact: one W&B run of all attempts, however many pieces each has left behind."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.errors import HoldfastError
from holdfast.events import Event, RunEnded, RunStarted
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.launch.replay import Happened, happened
from holdfast.launch.run_dir import RunDir
from holdfast.trainer.trackers.helper import FINISH_GRACE_S, Helper
from holdfast.trainer.trackers.messages import Narrator
from holdfast.trainer.trackers.plans import OFFLINE, WandbPlan
from holdfast.types import StepReport

__all__ = ["ReplayFailed", "Sent", "folder", "live_pieces", "replay"]

_START_GRACE_S = 30.0
_CRASHED = 1
_Ends = Mapping[str, int]
"""Bytes of each file."""


class ReplayFailed(HoldfastError):
    """W&B did not take it all; the next replay sends what this one has not."""


@dataclass(slots=True)
class Sent:
    """What one replay has told W&B."""

    steps: int = 0
    events: int = 0
    attempts: set[int] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)
    """The first record that W&B did not take, if any, with its reason."""

    def count(self, item: StepReport | Event, attempt: int) -> None:
        self.attempts.add(attempt)
        if isinstance(item, StepReport):
            self.steps += 1
        else:
            self.events += 1


def folder(run: RunDir) -> Path:
    """Where W&B's files of replays lie."""
    return run.path / "wandb" / "replay"


def live_pieces(run: RunDir, *, is_online: bool) -> list[Path]:
    """What attempts with ``tracker=wandb`` have left: W&B knows of the online ones, and not of the others."""
    prefix = "run" if is_online else "offline-run"
    return sorted((run.path / "wandb").glob(f"{prefix}-*-{run.run_id}"))


def replay(run: RunDir, plan: WandbPlan) -> Sent:
    """Tell W&B what no replay has told it yet; offline, everything, as soon as there is anything new.

    Raises: ReplayFailed; then the next replay sends the same again.
    """
    is_offline = plan.mode == OFFLINE
    marker = f"{plan.run_id}.{'offline' if is_offline else 'online'}.json"
    known, ends = _read_marker(run, marker), {h.file: h.end for h in _happened(run)}
    if ends == known:
        return Sent()
    before = _offline_pieces(run, plan.run_id)
    sent = _send(run, plan, since={} if is_offline else known, until=ends)
    if is_offline:  # the new one holds it all, and `wandb sync` would upload each
        for piece in before:
            shutil.rmtree(piece, ignore_errors=True)
    DirectoryStorage(folder(run)).write(marker, [json.dumps(ends).encode()])
    return sent


def _happened(run: RunDir) -> Iterator[Happened]:
    return happened(metrics=run.metrics_file, events=run.events_file)


def _offline_pieces(run: RunDir, wandb_id: str) -> list[Path]:
    return sorted((folder(run) / "wandb").glob(f"offline-run-*-{wandb_id}"))


def _read_marker(run: RunDir, name: str) -> _Ends:
    """Nothing if there is none: sending twice is better than not at all."""
    try:
        found = json.loads((folder(run) / name).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _send(run: RunDir, plan: WandbPlan, *, since: _Ends, until: _Ends) -> Sent:
    folder(run).mkdir(parents=True, exist_ok=True)
    helper = Helper()
    try:
        _open(helper, plan)
        sent = Sent()
        exit_code = _tell(helper, run, sent, since=since, until=until)
        helper.send({"do": "finish", "exit_code": exit_code})
        status = helper.wait(plan.finish_timeout_s + FINISH_GRACE_S)
        troubles = [str(said["trouble"]) for said in helper.said() if "trouble" in said]
    except OSError as error:
        raise ReplayFailed(f"W&B's process has ended half-way: {error}") from error
    finally:
        helper.kill()
    if status != 0:
        late = f"it was not done after {plan.finish_timeout_s:.0f} s; --timeout gives it more"
        raise ReplayFailed(late if status is None else "W&B could not finish; see the logs in its directory")
    sent.refused = troubles
    return sent


def _open(helper: Helper, plan: WandbPlan) -> None:
    end_s = time.monotonic() + plan.init_timeout_s + _START_GRACE_S
    problem = helper.open(
        plan.door,
        plan.openings({})[0],
        patience_s=FINISH_GRACE_S,
        is_late=lambda: time.monotonic() > end_s,
    )
    if problem is not None:
        raise ReplayFailed(f"W&B could not be started: {problem}")


def _tell(helper: Helper, run: RunDir, sent: Sent, *, since: _Ends, until: _Ends) -> int:
    """What happened between the two; returns the exit code of the newest attempt."""
    narrator, exit_code = Narrator(attempt=1), _CRASHED
    for h in _happened(run):
        if isinstance(h.item, RunStarted):
            exit_code = _CRASHED
        elif isinstance(h.item, RunEnded):
            exit_code = h.item.exit_code
        told = list(narrator.tell(h.time_s, h.item))  # in any case: later ones depend on it
        if since.get(h.file, 0) < h.end <= until.get(h.file, 0):
            for message in told:
                if message["do"] != "preempting":  # that is for the machine it happened on
                    helper.send(message)
            sent.count(h.item, narrator.attempt)
    return 0 if run.driver() is not None else exit_code
