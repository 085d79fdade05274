"""The only door to TensorBoard, through torch's writer; only helper processes open it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardDoor", "open_door"]

_FLUSH_S = 10


def open_door(opening: Mapping[str, Any], stop: Callable[[], None]) -> TensorBoardDoor:
    """Write into the directory that ``opening`` names; nobody can stop a run in TensorBoard."""
    return TensorBoardDoor(opening["directory"])


class TensorBoardDoor:
    """See :class:`holdfast.trainer.trackers.serving.Door`.

    Every epoch of a run gets a file of its own, whose first record tells TensorBoard to forget what earlier files say
    of the steps that are done again.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._writer = SummaryWriter(directory, flush_secs=_FLUSH_S)
        self._step = 0

    def obey(self, message: Mapping[str, Any]) -> None:
        action = {"log": self._log, "alert": self._note, "rollback": self._roll_back}.get(message["do"])
        if action is not None:
            action(message)

    def finish(self, exit_code: int) -> None:
        self._writer.close()

    def _log(self, message: Mapping[str, Any]) -> None:
        self._step = message["step"]
        for name, value in message["values"].items():
            self._writer.add_scalar(name, value, self._step, walltime=message["time"])

    def _note(self, message: Mapping[str, Any]) -> None:
        """TensorBoard has no alerts: what would be one is a text."""
        text = f"{message['title']}: {message['text']}"
        self._writer.add_text("alerts", text, self._step, walltime=message["time"])

    def _roll_back(self, message: Mapping[str, Any]) -> None:
        self._writer.close()
        self._step = message["step"]
        self._writer = SummaryWriter(self._directory, purge_step=self._step + 1, flush_secs=_FLUSH_S)
        self._writer.add_scalar("attempt", message["attempt"], self._step + 1, walltime=message["time"])
