"""What a helper needs to know to open a tracker; JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["OFFLINE", "Plan", "TensorBoardPlan", "WandbPlan"]

OFFLINE = "offline"


class Plan(Protocol):
    """How to open one kind of tracker."""

    @property
    def title(self) -> str:
        """Its name in messages."""
        ...

    @property
    def door(self) -> str:
        """The module of this package that opens it."""
        ...

    @property
    def init_timeout_s(self) -> float: ...

    @property
    def finish_timeout_s(self) -> float: ...

    def openings(self, endpoints: Mapping[str, str]) -> Sequence[Mapping[str, object]]:
        """What to tell the door: first as configured, then what is tried instead, the last one needing no network.
        ``endpoints``: see :class:`holdfast.trainer.trackers.Tracker`."""
        ...


@dataclass(frozen=True, slots=True)
class WandbPlan:
    """What W&B needs to know about the run."""

    run_id: str
    project: str
    directory: str
    """The run's; W&B writes into its ``wandb`` folder."""
    mode: str | None
    """None leaves it to W&B's own settings, which are online unless the user has said otherwise."""
    init_timeout_s: float
    finish_timeout_s: float
    entity: str | None = None
    group: str | None = None
    job_type: str = "train"
    config: Mapping[str, object] = field(default_factory=dict)
    checkpoints: str = ""
    """Directory or URI below which checkpoints lie; empty links none."""
    writes_to: str | None = None
    """Another directory than the run's."""
    must_arrive: bool = False
    """Not to be uploaded in time is an error."""
    title = "W&B"
    door = "wandb_door"

    def openings(self, endpoints: Mapping[str, str]) -> Sequence[Mapping[str, object]]:
        modes = dict.fromkeys((self.mode, OFFLINE))
        told = {
            "settings": self.settings(endpoints),
            "summary": {"run_dir": self.directory},
            "checkpoints": self.checkpoints,
        }
        return [{"init": {**self.init(), "mode": mode}, **told} for mode in modes]

    def init(self) -> dict[str, object]:
        """Arguments of ``wandb.init``, but for the mode."""
        return {
            "id": self.run_id,
            "name": self.run_id,
            "project": self.project,
            "entity": self.entity,
            "dir": self.writes_to or self.directory,
            "config": self.config,
            "group": self.group,
            "job_type": self.job_type,
            "resume": "allow",
            "allow_val_change": True,
        }

    def settings(self, endpoints: Mapping[str, str]) -> dict[str, object]:
        """Settings of wandb; those that the installed version does not have are left out."""
        return {
            "init_timeout": self.init_timeout_s,
            "finish_timeout": self.finish_timeout_s,
            "finish_timeout_raises": self.must_arrive,
            "console": "off",
            # The driver's log, which `line` messages repeat in the helper.
            "capture_loggers": {"holdfast": "INFO"},
            "silent": True,
            "save_code": False,
            "disable_code": True,
            "label_disable": True,
            "x_save_requirements": False,
            # The driver's host says little about the ranks', and looking around takes its processors.
            "x_disable_stats": not endpoints,
            **({**_SYSTEM_CHARTS, "x_stats_open_metrics_endpoints": dict(endpoints)} if endpoints else {}),
        }


_SYSTEM_CHARTS: Mapping[str, object] = {
    "x_stats_sampling_interval": 30.0,
    "x_stats_open_metrics_filters": [".*ray_holdfast_.*", ".*ray_node_(cpu_utilization|mem_used|disk_free).*"],
}
"""A node of Ray exports hundreds of series; these are of use beside a loss."""


@dataclass(frozen=True, slots=True)
class TensorBoardPlan:
    """Where event files go. It has no network to wait for."""

    directory: str
    init_timeout_s: float
    finish_timeout_s: float
    title = "TensorBoard"
    door = "tensorboard_door"

    def openings(self, endpoints: Mapping[str, str]) -> Sequence[Mapping[str, object]]:
        return [{"directory": self.directory}]
