"""Every environment variable Holdfast reads, in one place. Each is also a config key."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "PREFIX",
    "RayJob",
    "has_ray_token",
    "home",
    "import_path",
    "ray_address",
    "ray_auth_mode",
    "ray_dashboard",
    "ray_job",
    "ray_stop_wait_s",
    "set_knobs",
    "stop_grace_s",
    "wandb_key",
    "world_size",
]

PREFIX = "HOLDFAST_"

_STOP_GRACE_S = 60.0
_RAY_STOP_WAIT_S = 3.0
"""What ``ray job stop`` waits between SIGTERM and SIGKILL unless RAY_JOB_STOP_WAIT_TIME_S says otherwise."""
_SHARE = 0.9
"""Of the time before SIGKILL, so that the last words are written too."""


def home() -> Path:
    """Root of all run directories: ``HOLDFAST_HOME``, else ``~/holdfast-runs`` (config key ``root``)."""
    return Path(os.environ.get("HOLDFAST_HOME") or Path.home() / "holdfast-runs").expanduser().absolute()


def ray_address() -> str | None:
    """Ray's own ``RAY_ADDRESS`` (config key ``launch.address``)."""
    return os.environ.get("RAY_ADDRESS") or None


@dataclass(frozen=True, slots=True)
class RayJob:
    """The Ray job that this process is the driver of."""

    submission_id: str
    """What ``ray job logs`` and ``ray job stop`` take."""


def ray_job() -> RayJob | None:
    """What Ray's job supervisor tells its driver; None in any other process. Nothing here is a setting of ours."""
    told = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    if told is None:
        return None
    try:
        submission_id = str(json.loads(told)["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):  # another version of Ray; that it is a job is what counts
        submission_id = ""
    return RayJob(submission_id)


def ray_dashboard() -> str | None:
    """Ray's own ``RAY_API_SERVER_ADDRESS``, for ``holdfast submit`` (option ``--address``)."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or None


def ray_auth_mode() -> str:
    """Ray's own ``RAY_AUTH_MODE``: ``token``, ``disabled``, or empty when Ray decides by itself."""
    return os.environ.get("RAY_AUTH_MODE", "")


def has_ray_token() -> bool:
    """Whether Ray finds a token where it looks: ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``, ``~/.ray/auth_token``."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").is_file()


def wandb_key() -> str | None:
    """W&B's own ``WANDB_API_KEY``; without one the tracker stays offline (config key ``tracker.mode``)."""
    return os.environ.get("WANDB_API_KEY") or None


def ray_stop_wait_s() -> float | None:
    """Seconds that ``ray job stop`` leaves this driver, from Ray's own ``RAY_JOB_STOP_WAIT_TIME_S``; None if the driver
    is no Ray job and the variable is not set."""
    try:
        waits_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S") or 0.0)
    except ValueError:  # Ray does not understand it either
        waits_s = 0.0
    is_job = bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    return waits_s if 0.0 < waits_s < math.inf else _RAY_STOP_WAIT_S if is_job else None


def stop_grace_s() -> float:
    """Default of config key ``recovery.stop_grace_s``: nine tenths of what Ray leaves a job, 60 s elsewhere."""
    waits_s = ray_stop_wait_s()
    return _STOP_GRACE_S if waits_s is None else round(_SHARE * waits_s, 3)


def import_path() -> list[str]:
    """Python's own ``PYTHONPATH``, for processes that are started."""
    places = os.environ.get("PYTHONPATH", "")
    return [place for place in places.split(os.pathsep) if place]


def world_size() -> int:
    """torchrun's own ``WORLD_SIZE``; 1 for a process that nobody has put into a group."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def set_knobs() -> dict[str, str]:
    """The ``HOLDFAST_`` variables that are set, to be printed once at the start."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIX)}
