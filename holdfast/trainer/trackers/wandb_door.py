"""The only door to wandb; only helper processes open it.

Never a ``step``: W&B drops the steps that a run repeats after a rollback, while with ``train/step`` as the axis they
overlay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb

__all__ = ["WandbDoor", "open_door"]

_MIRROR = "holdfast"
"""The logger of this process that repeats the driver's lines; see ``capture_loggers`` in the plan."""


def open_door(opening: Mapping[str, Any], stop: Callable[[], None]) -> WandbDoor:
    """Start the run: ``opening`` has the arguments of ``wandb.init``, the settings and the first of the summary."""
    wanted = {**opening["settings"], "stop_fn": stop}
    known = getattr(wandb.Settings, "model_fields", wanted)
    settings = wandb.Settings(**{name: value for name, value in wanted.items() if name in known})
    run = wandb.init(**opening["init"], settings=settings)
    run.define_metric("train/step")
    run.define_metric("*", step_metric="train/step")
    run.summary.update(opening["summary"])
    logging.getLogger(_MIRROR).setLevel(logging.INFO)
    return WandbDoor(run, opening["init"]["id"], opening["checkpoints"])


class WandbDoor:
    """See :class:`holdfast.trainer.trackers.serving.Door`. ``run``: W&B's, which is not typed here."""

    def __init__(self, run: Any, run_id: str, checkpoints: str) -> None:
        self._run, self._run_id, self._checkpoints = run, run_id, checkpoints
        self._actions: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
            "log": self._log,
            "alert": self._alert,
            "summary": lambda message: run.summary.update(message["values"]),
            "checkpoint": self._link,
            "preempting": lambda message: run.mark_preempting(),
            "line": lambda message: logging.getLogger(_MIRROR).log(message["level"], message["text"]),
        }

    def obey(self, message: Mapping[str, Any]) -> None:
        action = self._actions.get(message["do"])
        if action is not None:
            action(message)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def _log(self, message: Mapping[str, Any]) -> None:
        stamp = {"attempt": message["attempt"], "wall_time": message["time"], "_timestamp": message["time"]}
        self._run.log({"train/step": message["step"], **message["values"], **stamp})

    def _alert(self, message: Mapping[str, Any]) -> None:
        wait = {"wait_duration": message["wait_s"]} if "wait_s" in message else {}
        self._run.alert(message["title"], message["text"], level=message["level"], **wait)

    def _link(self, message: Mapping[str, Any]) -> None:
        """By reference: nothing is uploaded, and what the run deletes later is gone for W&B, too."""
        place = f"{self._checkpoints}/{message['name']}"
        if not self._checkpoints or ("://" not in place and not Path(place).exists()):
            return
        checkpoint = wandb.Artifact(f"checkpoint-{self._run_id}", type="checkpoint", metadata={"step": message["step"]})
        checkpoint.add_reference(place if "://" in place else Path(place).as_uri(), checksum=False)
        self._run.log_artifact(checkpoint, aliases=[f"step-{message['step']}"])
