"""Runs on disk, written by what writes real ones, with a clock that the test sets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from holdfast import events as e
from holdfast.configs.plain import to_plain
from holdfast.configs.schema import LaunchConfig, RunConfig
from holdfast.launch.records import JsonlEvents
from holdfast.launch.run_dir import RunDir
from holdfast.trainer.config import TrainerConfig
from holdfast.trainer.metrics import MetricsFile
from holdfast.types import StepReport

__all__ = ["FAULT", "PLAN", "Told", "story"]

FAULT = e.FaultDetected(1, (1,), 1, 4711, "killed by SIGKILL (pid 4711)", "update", 5, detected_after_s=0.5)
PLAN = e.RecoveryPlanned(
    1, "keeper memory", 4, "version 4 is complete", ("version 5 in memory: not complete at rank 1",)
)
DONE = e.RecoveryDone(1, 2, 5, 3.5, 1, 2048, 1, 10, {"detect": 0.5, "regroup": 0.5, "restore": 2.0, "first_step": 1.0})


class Told:
    """One run. ``at`` is the time of whatever is told next, in seconds since 1970."""

    def __init__(self, root: Path, run_id: str = "r1", *, goal: int = 9, at: float = 1000.0) -> None:
        self.at = at
        self._goal, self._attempt = goal, 0
        self.dir = RunDir.create(str(root), "p", run_id, config_digest="d", clock=lambda: self.at)

    def attempt(self, command: tuple[str, ...] = ("holdfast", "train")) -> Told:
        config = RunConfig(trainer=TrainerConfig(max_steps=self._goal), launch=LaunchConfig(nodes=3))
        self._attempt = self.dir.begin_attempt(
            config=to_plain(config), overrides=[], command=command, versions={"holdfast": "0.1.0"}, git="abc"
        )
        return self

    def event(self, event: e.Event, at: float | None = None) -> Told:
        self.at = self.at if at is None else at
        JsonlEvents(self.dir.events_file, clock=lambda: self.at).emit(event)
        return self

    def step(self, step: int, at: float, *, epoch: int = 1, step_s: float = 1.0, stall_s: float = 0.1) -> Told:
        """Ten tokens a step; a loss that falls."""
        self.at = at
        report = StepReport(
            step=step,
            epoch=epoch,
            loss=5.0 / step,
            bits_per_byte=7.5 / step,
            learning_rate=1e-3,
            grad_norm=1.0,
            tokens=10 * step,
            step_s=step_s,
            stall_s=stall_s,
            copy_bytes=100,
            committed=step - 1,
            copy_s=0.01,
        )
        MetricsFile(self.dir.metrics_file, attempt=self._attempt, clock=lambda: self.at).write(report)
        return self

    def end(self, at: float, outcome: str = "finished", exit_code: int = 0, **more: object) -> Told:
        """The event, then the record, as a driver does it."""
        step = int(str(more.pop("step", self._goal)))
        self.event(e.RunEnded(outcome, step, at - 1000.0, 1, 1, exit_code, str(more.get("reason", ""))), at)
        self.dir.end_attempt(outcome, exit_code, step=step, **more)  # type: ignore[arg-type]  # reason only
        return self


def story(root: Path, run_id: str = "r1") -> Told:
    """Nine steps in 30 s, with a fault that costs one: 10 s of startup, steps of 1 s with 0.1 s of stall, a step
    that is cut off after 1 s, 0.5 s of silence, 2.5 s of repair, an evaluation of 2 s, and 4 s at the end."""
    told = Told(root, run_id).attempt()
    told.event(e.RunStarted(run_id, 1, 3, "auto: nothing to continue"), 1000.5).event(e.EpochStarted(1, 3, -1), 1004.0)
    for step in range(1, 6):
        told.step(step, 1010.0 + step)
    told.event(e.FaultInjected("sigkill", "worker", 1, 5, "", "chaos.faults: sigkill rank=1 step=5"), 1016.0)
    told.event(FAULT, 1016.5)
    (told.dir.path / "logs" / "rank00001.attempt1.log").write_text("step 5\nlast words\n")
    told.dir.record_failure(1, asdict(FAULT), [told.dir.rank_log(1, 1)])
    told.event(e.Protection("degraded", "the run is recovering")).event(PLAN, 1016.9).event(
        e.EpochStarted(2, 3, 4), 1017.0
    )
    for step in range(5, 9):
        told.step(step, 1015.0 + step, epoch=2)
        if step == 5:
            told.event(DONE, 1020.2)
    told.event(e.Protection("full", "any worker can be replaced"), 1023.1)
    told.event(e.Evaluated(8, 0.9, 6), 1025.0).step(9, 1026.0, epoch=2)
    told.event(e.CheckpointWritten(9, "step-00000009", 4096, 0.5), 1027.0).event(e.Generated(9, "so it\nwas"), 1029.0)
    return told.end(1030.0, reason="the goal is reached")
