"""The first screenful: what is about to run, where, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from holdfast import knobs
from holdfast.configs import layout
from holdfast.configs.memory import state_bytes
from holdfast.configs.protection import brick_bytes
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.launch.identity import versions
from holdfast.launch.resume import checkpoints_uri
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wording import size
from holdfast.trainer import corpus
from holdfast.trainer.config import TrackerName
from holdfast.trainer.models import model_of
from holdfast.trainer.token_store import TokenStore
from holdfast.trainer.trackers import wandb_mode

if TYPE_CHECKING:
    from holdfast.trainer.adapting import Bricks

__all__ = ["banner", "ray_job_facts"]

_ENOUGH_S = 20.0
"""To save, as a rule."""
_REASONS = 3
"""Runs that were passed over, each with its reason; more would push the rest off the screen."""


def banner(
    config: RunConfig, run_dir: RunDir, attempt: int, store: TokenStore, how: str, bricks: Bricks | None = None
) -> Mapping[str, str]:
    """Facts in the order they are shown."""
    facts = {
        "run": f"{run_dir.run_id}  attempt {attempt}\n" + ", ".join(f"{k} {v}" for k, v in versions().items()),
        "devices": _devices(config),
        **({"adapter": _adapter(config, bricks)} if bricks else {}),
        "memory": _memory(config),
        "data": corpus.describe(store),
        **({"storage": checkpoints_uri(config, run_dir)} if config.snapshot.storage else {}),
        "resume": _shortened(how),
        "look": f"{_tracker(config, run_dir)} | tail -f {run_dir.events_file}",
    }
    set_knobs = ", ".join(f"{name}={value}" for name, value in knobs.set_knobs().items())
    return {**facts, "environ": set_knobs} if set_knobs else facts


def ray_job_facts(job: knobs.RayJob | None, waits_s: float | None) -> Mapping[str, str]:
    """That this is a Ray job, and whether ``ray job stop``, which waits so long, leaves it the time to save itself;
    nothing elsewhere."""
    if job is None or waits_s is None:
        return {}
    stops = f"ray job stop leaves {waits_s:g} s for saving"
    if waits_s < _ENOUGH_S:
        ask = '--runtime-env-json \'{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}\''
        stops = f"WARNING: {stops}, which is little; submit with {ask} or with holdfast submit"
    return {"ray job": f"{job.submission_id}\n{stops}"}


def _shortened(how: str) -> str:
    first, *against = how.split("\n")
    more = [f"and {len(against) - _REASONS} more, see run_started in the events"] if len(against) > _REASONS else []
    return "\n".join([first, *against[:_REASONS], *more])


def _tracker(config: RunConfig, run_dir: RunDir) -> str:
    name = config.tracker.name
    if name is TrackerName.NONE:
        return "W&B off (tracker=wandb turns it on)"
    shown = [] if name is TrackerName.TENSORBOARD else [f"W&B {wandb_mode(config.tracker.mode) or 'online'}"]
    if name is not TrackerName.WANDB:
        shown.append(f"tensorboard --logdir {run_dir.path / 'tensorboard'}")
    return " | ".join(shown)


def _devices(config: RunConfig) -> str:
    launch, parallel = config.launch, config.parallel
    device = "gpu, nccl" if launch.gpus_per_worker else "cpu, gloo"
    started = "Ray" if launch.kind is LaunchKind.LOCAL else "processes"
    return (
        f"{launch.nodes} nodes x {launch.workers_per_node} ranks ({started}), {launch.spares} spare, {device}; "
        f"zero={parallel.zero_stage}{_pipeline(config)} {parallel.precision.value}; model {config.model.name} "
        f"{model_of(config.model).parameters / 1e6:.2f} M parameters, {config.optim.name.value}"
    )


def _adapter(config: RunConfig, bricks: Bricks) -> str:
    from holdfast.trainer.adapting import trainable_elements

    adapter = config.adapter
    options = ", ".join(f"{name}={value}" for name, value in adapter.options.items())
    base = f"base {bricks.base[:8]}…{' in 4 bits' if adapter.nf4 else ''}"
    return (
        f"{adapter.method}({options}) learns {adapter.task} on {len(adapter.tasks)} finished tasks: "
        f"{trainable_elements(adapter, config.model):,} elements train\n"
        f"frozen: {base} and these tasks, {bricks.size_bytes:,} bytes read from files, in no snapshot\n"
        f"held in memory: {_held(config, bricks)}"
    )


def _held(config: RunConfig, bricks: Bricks) -> str:
    if not config.adapter.in_memory:
        return "nothing of them (adapter.in_memory=false)"
    held = brick_bytes(config, bricks.files)
    return f"at most {max(held):,} bytes of them per keeper, {sum(held):,} in all, parity included"


def _pipeline(config: RunConfig) -> str:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return ""
    waiting = f"waits {layout.pipeline_plan(config).bubble:.0%} of the time"
    return f" pipeline={parallel.pipeline}x{parallel.chunks} ({waiting})"


def _memory(config: RunConfig) -> str:
    state = state_bytes(config)
    return f"state {size(state)}/rank; snapshots {config.snapshot.buffers} x {size(state)} per rank in the keepers"
