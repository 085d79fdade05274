"""From the configuration to a tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from holdfast import knobs
from holdfast.trainer.config import TrackerConfig, TrackerName, WandbMode
from holdfast.trainer.trackers.feeding import HelperTracker
from holdfast.trainer.trackers.plans import OFFLINE, Plan, TensorBoardPlan, WandbPlan
from holdfast.trainer.trackers.protocol import NullTracker, SeveralTrackers, Tracker

__all__ = ["build_tracker", "wandb_mode"]


def build_tracker(
    config: TrackerConfig,
    *,
    run_id: str,
    project: str,
    directory: Path,
    plain_config: Mapping[str, object],
    attempt: int,
    checkpoints: str = "",
    group: str = "",
    on_stop: Callable[[str], None] | None = None,
) -> Tracker:
    """The tracker that the configuration names, not started.

    ``directory`` is the run's; W&B writes into its ``wandb`` folder, TensorBoard into ``tensorboard``. ``checkpoints``:
    below which directory or URI they lie. ``group``: what W&B groups runs by where the configuration does not say.
    ``on_stop`` is called, in some thread, when somebody stops the run in W&B's user interface.
    """
    wandb = WandbPlan(
        run_id=run_id,
        project=project,
        entity=config.entity or None,
        group=config.group or group or None,
        job_type=_job_type(plain_config),
        directory=str(directory),
        checkpoints=checkpoints,
        config=dict(plain_config),
        mode=wandb_mode(config.mode),
        init_timeout_s=config.init_timeout_s,
        finish_timeout_s=config.finish_timeout_s,
    )
    tensorboard = TensorBoardPlan(str(directory / "tensorboard"), config.init_timeout_s, config.finish_timeout_s)
    plans: Mapping[TrackerName, tuple[Plan, ...]] = {
        TrackerName.NONE: (),
        TrackerName.WANDB: (wandb,),
        TrackerName.TENSORBOARD: (tensorboard,),
        TrackerName.BOTH: (wandb, tensorboard),
    }
    trackers = [
        HelperTracker(plan, attempt=attempt, on_stop=on_stop, stalled_after_s=config.alert_after_s)
        for plan in plans[config.name]
    ]
    if len(trackers) == 1:
        return trackers[0]
    return SeveralTrackers(trackers) if trackers else NullTracker()


def wandb_mode(mode: WandbMode) -> str | None:
    """What to tell W&B; None leaves it to W&B's own settings, which are online unless the user has said otherwise."""
    if mode is WandbMode.AUTO:
        return None if knobs.wandb_key() is not None else OFFLINE
    return str(mode.value)


def _job_type(plain_config: Mapping[str, object]) -> str:
    chaos = plain_config.get("chaos")
    return "chaos" if isinstance(chaos, Mapping) and chaos.get("faults") else "train"
