"""Every environment variable Holdfast reads, in one place. Each is also a config key."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["PREFIX", "home", "import_path", "ray_address", "set_knobs", "wandb_key", "world_size"]

PREFIX = "HOLDFAST_"


def home() -> Path:
    """Root of all run directories: ``HOLDFAST_HOME``, else ``~/holdfast-runs`` (config key ``root``)."""
    return Path(os.environ.get("HOLDFAST_HOME") or Path.home() / "holdfast-runs").expanduser().absolute()


def ray_address() -> str | None:
    """Ray's own ``RAY_ADDRESS`` (config key ``launch.address``)."""
    return os.environ.get("RAY_ADDRESS") or None


def wandb_key() -> str | None:
    """W&B's own ``WANDB_API_KEY``; without one the tracker stays offline (config key ``tracker.mode``)."""
    return os.environ.get("WANDB_API_KEY") or None


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
