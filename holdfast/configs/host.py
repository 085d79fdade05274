"""What a machine has to offer to the processes of a run."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from holdfast import knobs

__all__ = ["Host", "this_host"]


@dataclass(frozen=True, slots=True)
class Host:
    """What the machine of the driver has to offer."""

    free_bytes: int
    """Memory that processes started now may take."""
    ray_address: str = ""
    """The cluster that RAY_ADDRESS names."""


def this_host() -> Host:
    """The machine this process runs on, at this moment; inside a container no more than the container may use."""
    free_bytes = min(psutil.virtual_memory().available, _container_free_bytes(Path("/sys/fs/cgroup")))
    return Host(int(free_bytes), knobs.ray_address() or "")


def _container_free_bytes(cgroup: Path) -> float:
    """What the container's limit leaves, page cache that can be dropped included; infinite without a limit."""
    v1 = cgroup / "memory"
    for limit, used, cache in (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes", v1 / "memory.stat"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            return max(0, int(limit.read_text()) - int(used.read_text()) + _droppable(cache.read_text()))
    return math.inf


def _droppable(memory_stat: str) -> int:
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", memory_stat, re.MULTILINE)
    return int(found[1]) if found else 0
