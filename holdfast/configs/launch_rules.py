"""What deadlines and the start of a run must obey."""

from __future__ import annotations

import math
from collections.abc import Iterator

from holdfast.configs.schema import LaunchKind, RunConfig

__all__ = ["deadline_problems", "is_duration", "launch_problems"]


def is_duration(value: float) -> bool:
    return 0 < value < math.inf


def deadline_problems(config: RunConfig) -> Iterator[str]:
    recovery = config.recovery
    if not all(map(is_duration, (recovery.heartbeat_s, recovery.suspect_after_s, recovery.step_timeout_s))):
        return  # reported already
    if not recovery.heartbeat_s < recovery.suspect_after_s:
        yield (
            f"recovery.heartbeat_s={recovery.heartbeat_s} must be below recovery.suspect_after_s="
            f"{recovery.suspect_after_s}, or every rank counts as frozen; "
            f"try recovery.heartbeat_s={recovery.suspect_after_s / 50:g}"
        )
    if not recovery.suspect_after_s < recovery.step_timeout_s:
        yield (
            f"recovery.suspect_after_s={recovery.suspect_after_s} must be below recovery.step_timeout_s="
            f"{recovery.step_timeout_s}, or a frozen rank counts as a slow one; raise recovery.step_timeout_s"
        )


def launch_problems(config: RunConfig) -> Iterator[str]:
    launch = config.launch
    if launch.kind is LaunchKind.PROCESS:
        for key, value in (("address", launch.address), ("gpus_per_worker", launch.gpus_per_worker)):
            if value:
                yield f"launch.{key}={value!r} is for Ray, and launch=process runs without it; use launch=local"
    if config.run_id and config.resume not in ("auto", "must", "never", config.run_id):
        yield f"run_id={config.run_id!r} and resume={config.resume!r} name two runs; leave run_id empty"
    if config.recovery.min_nodes > launch.nodes >= 1:
        yield (
            f"recovery.min_nodes={config.recovery.min_nodes} must not exceed launch.nodes={launch.nodes}; "
            "the run starts with that many"
        )
