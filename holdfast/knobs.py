"""Every environment variable Holdfast reads, in one place. Each is also a config key."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "PREFIX",
    "RayJob",
    "has_ray_token",
    "home",
    "ray_address",
    "ray_auth_mode",
    "ray_dashboard",
    "ray_job",
    "set_knobs",
    "wandb_key",
]

PREFIX = "HOLDFAST_"


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
    stop_wait_s: int | None
    """Between the SIGTERM and the SIGKILL of ``ray job stop``; None where nobody has set it, and Ray waits 3 s."""


def ray_job() -> RayJob | None:
    """What Ray's job supervisor tells its driver; None in any other process. Nothing here is a setting of ours."""
    told = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    if told is None:
        return None
    try:
        submission_id = str(json.loads(told)["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):  # another version of Ray; that it is a job is what counts
        submission_id = ""
    wait = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "")
    return RayJob(submission_id, int(wait) if wait.isdecimal() else None)


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


def set_knobs() -> dict[str, str]:
    """The ``HOLDFAST_`` variables that are set, to be printed once at the start."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIX)}
