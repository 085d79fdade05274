"""Experiment trackers, which only show what ``metrics.jsonl`` and ``events.jsonl`` hold.

Each runs in a helper process of its own, fed by a thread through a bounded queue. So whatever it does (hang, crash,
patch ``sys.exit``, ask for a login, meet a full disk), the run neither waits nor ends for it, and it can be killed.

``messages`` says what a tracker is told, ``feeding`` and ``helper`` are the driver's side, ``serving`` is the helper's.
``wandb_door`` is the only door to wandb, ``tensorboard_door`` to TensorBoard; only helpers open them.
"""

from holdfast.trainer.trackers.build import build_tracker, wandb_mode
from holdfast.trainer.trackers.feeding import HelperTracker
from holdfast.trainer.trackers.plans import Plan, TensorBoardPlan, WandbPlan
from holdfast.trainer.trackers.protocol import MemoryTracker, NullTracker, SeveralTrackers, Tracker

__all__ = [
    "HelperTracker",
    "MemoryTracker",
    "NullTracker",
    "Plan",
    "SeveralTrackers",
    "TensorBoardPlan",
    "Tracker",
    "WandbPlan",
    "build_tracker",
    "wandb_mode",
]
