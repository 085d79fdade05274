"""The first screenful: what is about to run, where, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from holdfast import knobs
from holdfast.configs import layout, validate
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.launch.identity import versions
from holdfast.launch.resume import checkpoints_uri
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wording import size
from holdfast.trainer import corpus
from holdfast.trainer.config import TrackerName, WandbMode
from holdfast.trainer.models import model_of
from holdfast.trainer.token_store import TokenStore

if TYPE_CHECKING:
    from holdfast.trainer.adapting import Bricks

__all__ = ["banner"]

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
        "look": f"{_tracker(config)} | tail -f {run_dir.events_file}",
    }
    set_knobs = ", ".join(f"{name}={value}" for name, value in knobs.set_knobs().items())
    return {**facts, "environ": set_knobs} if set_knobs else facts


def _shortened(how: str) -> str:
    first, *against = how.split("\n")
    more = [f"and {len(against) - _REASONS} more, see run_started in the events"] if len(against) > _REASONS else []
    return "\n".join([first, *against[:_REASONS], *more])


def _tracker(config: RunConfig) -> str:
    if config.tracker.name is TrackerName.NONE:
        return "W&B off (tracker=wandb turns it on)"
    mode = config.tracker.mode
    is_offline = mode is WandbMode.OFFLINE or (mode is WandbMode.AUTO and knobs.wandb_key() is None)
    return "W&B offline" if is_offline else "W&B online"


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
        f"frozen: {base} and these tasks, {size(bricks.size_bytes)} read from files, in no snapshot"
    )


def _pipeline(config: RunConfig) -> str:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return ""
    waiting = f"waits {layout.pipeline_plan(config).bubble:.0%} of the time"
    return f" pipeline={parallel.pipeline}x{parallel.chunks} ({waiting})"


def _memory(config: RunConfig) -> str:
    state = validate.state_bytes(config)
    return f"state {size(state)}/rank; snapshots {config.snapshot.buffers} x {size(state)} per rank in the keepers"
